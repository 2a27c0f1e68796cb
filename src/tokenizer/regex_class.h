// The lower half of the parser of regular expressions: characters, escapes and classes.
#pragma once

#include <optional>
#include <string_view>

#include "tokenizer/unicode.h"

namespace latente {

class RegexClassParser {
 public:
  // where: whose pattern it is, for messages.
  RegexClassParser(std::string_view pattern, std::string_view where);

 protected:
  static constexpr int max_depth = 50;

  struct Flags {
    bool ignore_case = false;
    bool dot_all = false;
  };

  [[noreturn]] void broken(std::string_view what) const;
  [[noreturn]] void unsupported(std::string_view what) const;

  bool done() const { return at_ == pattern_.size(); }
  char peek() const { return done() ? '\0' : pattern_[at_]; }
  bool looking_at(std::string_view text) const { return pattern_.substr(at_).starts_with(text); }
  bool take(std::string_view text);
  char32_t next();

  // Behind "[".
  unicode::CodeSet char_class(const Flags& flags, int depth);
  // \p{..}, \d, \s, \w, \h and their complements, behind the backslash.
  std::optional<unicode::CodeSet> escaped_class(const Flags& flags, bool in_class);
  char32_t escaped_character(bool in_class);
  // low..high, with the other case under (?i). Of ASCII letters, K and S have a third form.
  unicode::CodeSet fold(const Flags& flags, char32_t low, char32_t high) const;

  std::string_view pattern_, where_;
  std::size_t at_ = 0;

 private:
  unicode::CodeSet bracket_name();
  unicode::CodeSet property(const Flags& flags, bool negative);
  char32_t hexadecimal(std::size_t min_digits, std::size_t max_digits);
  char32_t valid(char32_t c) const;
};

}  // namespace latente
