#include "grammar/token_masks.h"

#include <bit>

#include "base/error.h"

namespace latente::grammar {
namespace {

void set(std::span<uint64_t> mask, int32_t token) {
  mask[static_cast<size_t>(token) / 64] |= uint64_t{1} << (token % 64);
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

// Walks nodes begin .. end of the tree, which lie below one of `depth`, from the configuration path[1], and
// calls visit(node, configuration) for those that can be read. path[0] is the caller's; memory may be
// collected, which keeps both.
template <class Visit>
void TokenGrammar::walk(Configurations& all, std::vector<uint32_t>& path, size_t begin, size_t end,
                        uint32_t depth, Visit visit) const {
  const std::span<const Vocabulary::Node> nodes = vocabulary_->nodes();
  path.resize(vocabulary_->longest() + 2);
  const uint64_t work_end = all.work() + most_work;
  for (size_t i = begin; i < end;) {
    const Vocabulary::Node& node = nodes[i];
    const size_t at = node.depth - depth;  // where in the path its parent is
    if (all.full()) all.collect(std::span(path).first(at + 1));
    const uint32_t next = all.step(path[at], node.byte);
    if (next == Configurations::none) {
      i = node.end;
      continue;
    }
    if (all.work() > work_end)
      fail("the grammar is too ambiguous: more than {} steps to find the tokens that may come next",
           most_work);
    path[at + 1] = next;
    visit(i, next);
    i = all.items(next).empty() ? node.end : i + 1;
  }
}

void TokenGrammar::walk_all(Configurations& all, uint32_t& configuration, std::span<uint64_t> mask) const {
  std::vector<uint32_t> path{configuration, configuration};
  walk(all, path, 0, vocabulary_->nodes().size(), 0, [&](size_t node, uint32_t) { add_tokens(node, mask); });
  configuration = path[0];
}

std::shared_ptr<const TokenGrammar::Top> TokenGrammar::top(Configurations& all, uint32_t& configuration,
                                                           const Configurations::Beginning& beginning) const {
  {
    const std::lock_guard lock(mutex_);
    if (auto found = tops_.find(beginning.key); found != tops_.end()) return found->second;
  }
  auto made = std::make_shared<Top>();
  std::vector<uint64_t> mask(vocabulary_->words());
  std::vector<uint32_t> path{configuration, all.of_beginning(beginning)};
  const uint64_t collections = all.collections();
  const auto nodes = vocabulary_->nodes();
  walk(all, path, 0, nodes.size(), 0, [&](size_t node, uint32_t next) {
    add_tokens(node, mask);
    if (!all.leaves(next) || nodes[node].end == node + 1) return;
    made->exits.push_back(static_cast<uint32_t>(node));
    made->below_exits += nodes[node].end - node - 1;
  });
  configuration = path[0];
  made->inside = TokenSet(mask);
  {
    const std::lock_guard lock(mutex_);
    if (tops_bytes_ + made->memory_bytes() > tops_memory) {
      tops_.clear();
      tops_bytes_ = 0;
    }
    if (tops_.emplace(beginning.key, made).second) tops_bytes_ += made->memory_bytes();
  }
  return all.collections() == collections ? made : nullptr;
}

// A rule of a single character is left at every character: then more of the stack is taken in.
std::shared_ptr<const TokenGrammar::Top> TokenGrammar::small_top(Configurations& all, uint32_t& configuration,
                                                                 const Item& item, uint32_t& below) const {
  std::shared_ptr<const Top> best;
  size_t length = 0;
  for (int more = 0; more < 3; ++more) {
    const Configurations::Beginning beginning = all.beginning(item, more);
    if (beginning.key.size() == length) break;
    length = beginning.key.size();
    below = beginning.below;
    best = top(all, configuration, beginning);
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
  for (const Item& item : items) {
    uint32_t below = 0;
    tops.emplace_back(small_top(all, configuration, item, below), 0);
    if (tops.back().first == nullptr) return walk_all(all, configuration, mask);
    tops.back().second = below;
    below_exits += tops.back().first->below_exits;
  }
  if (below_exits > nodes.size() / 2) return walk_all(all, configuration, mask);
  for (const auto& [top, below] : tops) {
    top->inside.add_to(mask);
    if (top->exits.empty()) continue;
    std::vector<uint32_t> path{configuration, all.after(below)};
    for (uint32_t exit : top->exits) {
      walk(all, path, exit + 1, nodes[exit].end, nodes[exit].depth,
           [&](size_t node, uint32_t) { add_tokens(node, mask); });
    }
    configuration = path[0];
    if (all.collections() != collections) return walk_all(all, configuration, mask);
  }
}

}  // namespace latente::grammar
