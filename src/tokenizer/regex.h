// Regular expressions of tokenizer.json: the Ruby syntax of Oniguruma, as far as pre-tokenizers use it, over
// UTF-8.
//
// Understood: literals and escapes; `.`; classes with ranges, nesting, negation, \p{..} and [:space:]-like
// names; \d \w \s \h; general categories and the scripts Han, Hiragana, Katakana, Hangul; groups, (?i:..),
// atomic groups, lookahead, lookbehind of one character; alternation; greedy, lazy and possessive repetition;
// ^ $ \A \z \Z \b \B. Everything else is an Error that names it. Matching backtracks, with a limit on its
// steps.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace latente {

struct RegexNode;

struct RegexInstruction {
  enum class Op : std::uint8_t {
    character,  // `a`: the code point
    set,        // bit `bit` of the character's mask
    loop,       // set repeated `a`..`b` times
    split,      // try `a`, then `b`; `bit`, `bit_b`: first characters of either, 255 = anything
    jump,       // to `a`
    line_begin,
    line_end,
    text_begin,
    text_end,
    text_end_line,
    word_boundary,
    not_word_boundary,
    look,         // lookahead at the program behind this instruction; continue at `a`; negative if `b`
    look_behind,  // one character of `bit` before; negative if `b`
    atomic,       // run the program behind this instruction; continue at `a` with its first match
    end           // of a lookahead, an atomic group or the whole
  };
  enum class Mode : std::uint8_t { greedy, lazy, possessive };
  Op op;
  Mode mode = Mode::greedy;
  std::uint8_t bit = 255, bit_b = 255;
  std::uint32_t a = 0, b = 0;
};

class Regex {
 public:
  // Throws Error, starting with `where`, if the pattern is malformed or uses what is not understood.
  explicit Regex(std::string_view pattern, std::string_view where = "regular expression");
  static Regex literal(std::string_view text, std::string_view where = "regular expression");
  static Regex from_tree(const RegexNode& root, std::string_view name);  // regex_syntax.h

  // Walks the non-overlapping matches in `text` (valid UTF-8), leftmost first. An empty match directly after
  // a match is skipped. Throws Error when matching needs more than about 2,000 steps a byte.
  class Matches {
   public:
    Matches(const Regex& regex, std::string_view text);
    bool next(std::size_t& begin, std::size_t& end);

   private:
    struct Choice {
      std::uint32_t pc;
      RegexInstruction::Mode mode;
      std::size_t at, limit;  // loops: may give back (greedy) or take (lazy) up to `limit`; else limit == at
      std::uint32_t loop;     // instruction of the loop, or npc
    };
    bool search(std::size_t from, std::size_t& begin, std::size_t& end);
    bool run(std::uint32_t pc, std::size_t at, std::size_t& end);
    bool resume(std::size_t base, std::uint32_t& pc, std::size_t& at);
    bool enter_loop(std::uint32_t pc, std::size_t& at);
    bool holds(const RegexInstruction& instruction, std::size_t at) const;
    std::uint64_t mask(std::size_t at) const;
    bool word_at(std::size_t at) const;
    void spend();

    const Regex& regex_;
    std::string_view text_;
    std::vector<Choice> stack_;
    std::uint64_t steps_left_;
    std::size_t next_ = 0;
    std::size_t last_end_ = std::string_view::npos;
    bool done_ = false;
  };

  const std::string& pattern() const { return pattern_; }

 private:
  friend class RegexCompiler;
  Regex() = default;

  std::string pattern_, where_;
  std::vector<RegexInstruction> program_;
  std::uint8_t first_ = 255;  // bit of the characters a match may start with, 255 = anything
  std::uint8_t word_ = 255;   // bit of \w, where \b is used
  // Characters → the sets they belong to, a bit each.
  std::array<std::uint64_t, 128> ascii_{};
  std::vector<std::uint16_t> block_of_;  // code point / 128 → block
  std::vector<std::uint16_t> class_of_;  // block · 128 + code point % 128 → class
  std::vector<std::uint64_t> masks_;     // class → sets
};

}  // namespace latente
