#include "grammar/matcher.h"

#include <algorithm>

#include "grammar/work.h"

namespace latente::grammar {

namespace {

// Configuration::none, and `from` as it may have been renumbered, if the bytes cannot be read.
uint32_t read(Configurations& all, uint32_t from, std::string_view bytes) {
  for (const char c : bytes) {
    if (all.full()) all.collect(std::span(&from, 1));
    from = all.step(from, static_cast<uint8_t>(c));
    if (from == Configurations::none) break;
  }
  return from;
}

}  // namespace

struct Matcher::Masks {
  static constexpr size_t most_memory = size_t{4} << 20;

  void clear() {
    known.clear();
    bytes = 0;
  }

  std::unordered_map<uint32_t, TokenSet> known;  // by canonical configuration
  size_t bytes = 0;
  uint64_t collections = 0;  // when they were made
  uint64_t asked = 0;        // masks
};

Matcher::Matcher(std::shared_ptr<const TokenGrammar> grammar)
    : grammar_(std::move(grammar)),
      masks_(std::make_shared<Masks>()),
      at_(std::make_shared<Configurations>(grammar_->automaton(), grammar_->vocabulary().longest()), 0) {
  at_.set(at_.home().start());
}

void Matcher::admitted(std::span<uint64_t> mask) {
  const Vocabulary& vocabulary = grammar_->vocabulary();
  LATENTE_ASSERT(mask.size() >= vocabulary.words());
  std::fill(mask.begin(), mask.end(), 0);
  if (ended_) return;
  Configurations& all = at_.home();
  if (all.items(at_.get()).empty() && !can_end())
    throw TooMuch(
        fmt::format("the text nests deeper than {} rules of the grammar", Configurations::Limits{}.depth));
  if (all.work() > first_work + ++masks_->asked * work_a_mask)
    throw TooMuch(
        "the grammar is too ambiguous: the tokens that may come take too long to find, time and again");
  if (all.full()) all.collect();
  uint32_t canonical = all.canonical(at_.get());
  if (masks_->collections != all.collections()) masks_->clear();
  masks_->collections = all.collections();
  if (auto known = masks_->known.find(canonical); known != masks_->known.end()) {
    known->second.add_to(mask);
  } else {
    grammar_->add_readable(all, canonical, mask.first(vocabulary.words()));
    TokenSet set(mask.first(vocabulary.words()));
    if (masks_->collections != all.collections() || masks_->bytes > Masks::most_memory) masks_->clear();
    masks_->collections = all.collections();
    masks_->bytes += set.memory_bytes() + 64;
    masks_->known.emplace(canonical, std::move(set));
  }
  if (!can_end()) return;
  for (int32_t token : vocabulary.stop_tokens())
    mask[static_cast<size_t>(token) / 64] |= uint64_t{1} << (token % 64);
}

bool Matcher::accept(int32_t token) {
  const Vocabulary& vocabulary = grammar_->vocabulary();
  if (ended_ || token < 0 || static_cast<size_t>(token) >= vocabulary.size()) return false;
  if (vocabulary.stops(token)) {
    ended_ = can_end();
    return ended_;
  }
  const std::string_view text = vocabulary.text(token);
  return !text.empty() && accept_text(text);
}

bool Matcher::accept_text(std::string_view bytes) {
  if (ended_) return false;
  const uint32_t to = read(at_.home(), at_.get(), bytes);
  if (to == Configurations::none) return false;
  at_.set(to);
  return true;
}

bool Matcher::can_end() const { return !ended_ && at_.home().can_end(at_.get()); }

bool Matcher::finished() const { return ended_ || (can_end() && at_.home().items(at_.get()).empty()); }

bool matches(std::shared_ptr<const Automaton> automaton, std::string_view text) {
  Configurations all(std::move(automaton), 0);
  const uint32_t end = read(all, all.start(), text);
  return end != Configurations::none && all.can_end(end);
}

}  // namespace latente::grammar
