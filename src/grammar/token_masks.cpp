#include "grammar/token_masks.h"

#include <bit>

namespace latente::grammar {
namespace {

void set(std::span<uint64_t> mask, int32_t token) {
  mask[static_cast<size_t>(token) / 64] |= uint64_t{1} << (token % 64);
}

void clear(std::span<uint64_t> mask, int32_t token) {
  mask[static_cast<size_t>(token) / 64] &= ~(uint64_t{1} << (token % 64));
}

}  // namespace

TokenSet::TokenSet(std::span<const uint64_t> mask) {
  size_t count = 0;
  for (uint64_t word : mask) count += static_cast<size_t>(std::popcount(word));
  if (count * sizeof(int32_t) >= mask.size_bytes()) {
    mask_.assign(mask.begin(), mask.end());
    return;
  }
  tokens_.reserve(count);
  for (size_t i = 0; i < mask.size(); ++i) {
    for (uint64_t word = mask[i]; word != 0; word &= word - 1)
      tokens_.push_back(static_cast<int32_t>(i * 64 + static_cast<size_t>(std::countr_zero(word))));
  }
}

void TokenSet::add_to(std::span<uint64_t> mask) const {
  for (int32_t token : tokens_) set(mask, token);
  for (size_t i = 0; i < mask_.size(); ++i) mask[i] |= mask_[i];
}

TokenGrammar::TokenGrammar(std::shared_ptr<const Automaton> automaton,
                           std::shared_ptr<const Vocabulary> vocabulary)
    : automaton_(std::move(automaton)), vocabulary_(std::move(vocabulary)) {}

void TokenGrammar::add_tokens(size_t node, std::span<uint64_t> mask) const {
  for (int32_t token : vocabulary_->tokens_at(node)) set(mask, token);
}

// Walks a part of the tree from the configuration path[1], and calls visit(node, configuration) for what can
// be read. path[0] is the caller's; memory may be collected, which keeps both.
template <class Visit>
void TokenGrammar::walk(Configurations& all, std::vector<uint32_t>& path, const Part& part,
                        Visit visit) const {
  const std::span<const Vocabulary::Node> nodes = vocabulary_->nodes();
  path.resize(vocabulary_->longest() + 2);
  for (size_t i = part.begin; i < part.end;) {
    const Vocabulary::Node& node = nodes[i];
    all.count(1);
    if (node.reach <= part.beyond) {
      i = node.end;
      continue;
    }
    const size_t at = node.depth - part.depth;  // where in the path its parent is
    if (all.full()) all.collect(std::span(path).first(at + 1));
    const uint32_t next = all.step(path[at], node.byte);
    if (next == Configurations::none) {
      i = node.end;
      continue;
    }
    path[at + 1] = next;
    visit(i, next);
    i = all.items(next).empty() ? node.end : i + 1;
  }
}

void TokenGrammar::walk_all(Configurations& all, uint32_t& configuration, std::span<uint64_t> mask) const {
  all.limit_work(most_work);
  walk_whole(all, configuration, mask);
}

void TokenGrammar::walk_whole(Configurations& all, uint32_t& configuration, std::span<uint64_t> mask) const {
  std::vector<uint32_t> path{configuration, configuration};
  walk(all, path, {0, vocabulary_->nodes().size()}, [&](size_t node, uint32_t) { add_tokens(node, mask); });
  configuration = path[0];
}

std::shared_ptr<const TokenGrammar::Top> TokenGrammar::known_top(const std::vector<uint32_t>& key) const {
  const std::lock_guard lock(mutex_);
  const auto found = tops_.find(key);
  return found == tops_.end() ? nullptr : found->second;
}

void TokenGrammar::keep_top(const std::vector<uint32_t>& key, const std::shared_ptr<const Top>& made) const {
  const std::lock_guard lock(mutex_);
  if (tops_bytes_ + made->memory_bytes() > tops_memory) {
    tops_.clear();
    tops_bytes_ = 0;
  }
  if (tops_.emplace(key, made).second) tops_bytes_ += made->memory_bytes();
}

std::shared_ptr<const TokenGrammar::Top> TokenGrammar::top(Configurations& all, uint32_t& configuration,
                                                           const std::vector<uint32_t>& key, const Top* same,
                                                           size_t same_until) const {
  if (auto known = known_top(key)) return known;
  auto made = std::make_shared<Top>();
  std::vector<uint64_t> mask(vocabulary_->words());
  std::vector<uint32_t> path{configuration, all.of_beginning(key)};
  const uint64_t collections = all.collections();
  const auto nodes = vocabulary_->nodes();
  const auto add_exit = [&](size_t node) {
    made->exits.push_back(static_cast<uint32_t>(node));
    made->below_exits += nodes[node].end - node - 1;
  };
  if (same != nullptr) {
    same->inside.add_to(mask);
    for (int32_t token : vocabulary_->longer_than(same_until)) clear(mask, token);
    for (uint32_t exit : same->exits) {
      if (nodes[exit].depth <= same_until) add_exit(exit);
    }
  }
  const size_t known = same != nullptr ? same_until : 0;
  walk(all, path, {0, nodes.size(), 0, known}, [&](size_t node, uint32_t next) {
    if (nodes[node].depth <= known) return;
    add_tokens(node, mask);
    if (all.leaves(next) && nodes[node].end > node + 1) add_exit(node);
  });
  configuration = path[0];
  made->inside = TokenSet(mask);
  keep_top(key, made);
  return all.collections() == collections ? made : nullptr;
}

// A rule of a single character is left at every character: then more of the stack is taken in. Repetitions
// that are far from their bounds differ in few tokens from those without.
std::shared_ptr<const TokenGrammar::Top> TokenGrammar::small_top(Configurations& all, uint32_t& configuration,
                                                                 const Item& item, uint32_t& below) const {
  std::shared_ptr<const Top> best;
  size_t length = 0;
  for (int more = 0; more < 3; ++more) {
    const Configurations::Beginning beginning = all.beginning(item, more);
    if (beginning.key.size() == length) break;
    length = beginning.key.size();
    below = beginning.below;
    best = known_top(beginning.key);
    if (best == nullptr) {
      std::shared_ptr<const Top> same;
      if (beginning.free_key != beginning.key) {
        same = top(all, configuration, beginning.free_key, nullptr, 0);
        if (same == nullptr) return nullptr;
      }
      best = top(all, configuration, beginning.key, same.get(), beginning.same_until);
    }
    if (best == nullptr || best->below_exits <= vocabulary_->nodes().size() / 16) break;
  }
  return best;
}

void TokenGrammar::add_readable(Configurations& all, uint32_t& configuration,
                                std::span<uint64_t> mask) const {
  const auto nodes = vocabulary_->nodes();
  const std::vector<Item> items(all.items(configuration).begin(), all.items(configuration).end());
  const uint64_t collections = all.collections();
  uint64_t below_exits = 0;
  std::vector<std::pair<std::shared_ptr<const Top>, uint32_t>> tops;
  all.limit_work(most_work);
  for (const Item& item : items) {
    uint32_t below = 0;
    tops.emplace_back(small_top(all, configuration, item, below), 0);
    if (tops.back().first == nullptr) return walk_whole(all, configuration, mask);
    tops.back().second = below;
    below_exits += tops.back().first->below_exits;
  }
  if (below_exits > nodes.size() / 2) return walk_whole(all, configuration, mask);
  for (const auto& [top, below] : tops) {
    top->inside.add_to(mask);
    if (top->exits.empty()) continue;
    std::vector<uint32_t> path{configuration, all.after(below)};
    for (uint32_t exit : top->exits) {
      walk(all, path, {exit + 1, nodes[exit].end, nodes[exit].depth},
           [&](size_t node, uint32_t) { add_tokens(node, mask); });
    }
    configuration = path[0];
    if (all.collections() != collections) return walk_whole(all, configuration, mask);
  }
}

}  // namespace latente::grammar
