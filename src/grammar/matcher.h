// Reads a text under a grammar, token by token.
#pragma once

#include <memory>
#include <span>
#include <string_view>
#include <unordered_map>

#include "grammar/token_masks.h"

namespace latente::grammar {

// A copy goes its own way and costs next to nothing: speculation runs ahead on one. Copies share memory; they
// may be used from one thread at a time.
//
// A token costs work in proportion to its bytes, a mask mostly less than a walk of the vocabulary's tree.
// Where it is too much (Configurations::Limits, TokenGrammar::most_work, or more than so much for each mask)
// accept and admitted throw TooMuch; the latter also behind a token that led beyond the limit of nesting and
// nowhere else.
class Matcher {
 public:
  explicit Matcher(std::shared_ptr<const TokenGrammar> grammar);

  // The tokens that may come next: token i at bit i % 64 of word i / 64. Stop tokens may where the text may
  // end. `mask` has room for the whole vocabulary; all of it is written.
  void admitted(std::span<uint64_t> mask);

  // False, and nothing changes, if the token may not come next.
  bool accept(int32_t token);
  // The same with bytes that need not be a token.
  bool accept_text(std::string_view bytes);

  bool can_end() const;
  // Nothing may follow but a stop token, or one has come.
  bool finished() const;

 private:
  // Of all masks of a text and its copies: some half a second, and 3 ms a mask.
  static constexpr uint64_t first_work = uint64_t{1} << 25, work_a_mask = uint64_t{1} << 17;
  struct Masks;  // of configurations, by number
  std::shared_ptr<const TokenGrammar> grammar_;
  std::shared_ptr<Masks> masks_;
  Configurations::Holder at_;
  bool ended_ = false;  // by a stop token
};

// Whether the whole text matches. Errors as Matcher's.
bool matches(std::shared_ptr<const Automaton> automaton, std::string_view text);

}  // namespace latente::grammar
