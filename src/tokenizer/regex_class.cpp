#include "tokenizer/regex_class.h"

#include <algorithm>

#include "base/error.h"

namespace latente {

using unicode::CodeSet;

RegexClassParser::RegexClassParser(std::string_view pattern, std::string_view where)
    : pattern_(pattern), where_(where) {
  if (unicode::valid_prefix(pattern) != pattern.size()) fail("{}: expected UTF-8", where);
}

void RegexClassParser::broken(std::string_view what) const {
  fail("{}: expected a regular expression, found {} at byte {} of '{}'", where_, what, at_, pattern_);
}

void RegexClassParser::unsupported(std::string_view what) const {
  fail("{}: {} is not supported (byte {} of '{}')", where_, what, at_, pattern_);
}

bool RegexClassParser::take(std::string_view text) {
  if (!looking_at(text)) return false;
  at_ += text.size();
  return true;
}

char32_t RegexClassParser::next() {
  if (done()) broken("the end");
  return unicode::decode(pattern_, at_);
}

CodeSet RegexClassParser::char_class(const Flags& flags, int depth) {
  if (depth > max_depth) fail("{}: expected at most {} nested classes", where_, max_depth);
  const bool negative = take("^");
  CodeSet out;
  std::optional<CodeSet> left;  // of an intersection
  bool first = true;
  while (true) {
    if (done()) broken("no ']'");
    if (!first && take("]")) break;
    if (first && looking_at("]")) unsupported("']' at the start of a class or of a part of an intersection");
    if (first && looking_at("&&")) unsupported("an intersection with nothing");
    first = false;
    if (take("&&")) {
      left = left ? unicode::intersect(*left, out) : out;
      out = {};
      first = true;
      continue;
    }
    if (take("[:")) {
      out = unicode::unite(out, bracket_name());
      continue;
    }
    if (take("[")) {
      out = unicode::unite(out, char_class(flags, depth + 1));
      continue;
    }
    char32_t low;
    if (take("\\")) {
      if (auto named = escaped_class(flags, true)) {
        out = unicode::unite(out, *named);
        if (looking_at("-") && !looking_at("-]")) unsupported("a range behind a named class");
        continue;
      }
      low = escaped_character(true);
    } else {
      low = next();
    }
    char32_t high = low;
    if (looking_at("-") && !looking_at("-]")) {
      ++at_;
      if (looking_at("[")) unsupported("a range to a class");
      if (take("\\")) {
        if (escaped_class(flags, true)) unsupported("a range to a named class");
        high = escaped_character(true);
      } else {
        high = next();
      }
      if (high < low) broken("a range from high to low");
    }
    out = unicode::unite(out, fold(flags, low, high));
  }
  if (left) out = unicode::intersect(*left, out);
  return negative ? unicode::complement(out) : out;
}

CodeSet RegexClassParser::bracket_name() {
  const std::size_t close = pattern_.find(":]", at_);
  if (close == std::string_view::npos) unsupported("'[:' without ':]'");
  std::string_view name = pattern_.substr(at_, close - at_);
  at_ = close + 2;
  const bool negative = name.starts_with('^');
  if (negative) name.remove_prefix(1);
  CodeSet set;
  if (name == "space") {
    set = unicode::space;
  } else if (name == "digit") {
    set = unicode::category("Nd");
  } else if (name == "punct") {
    set = unicode::unite(unicode::category("P"), unicode::category("S"));
  } else if (name == "word") {
    set = unicode::word_of_regex_class();
  } else {
    unsupported("this bracket name");
  }
  return negative ? unicode::complement(set) : set;
}

std::optional<CodeSet> RegexClassParser::escaped_class(const Flags& flags, bool in_class) {
  const char letter = peek();
  switch (letter) {
    case 'p':
    case 'P':
      ++at_;
      return property(flags, letter == 'P');
    case 'd':
      ++at_;
      return unicode::category("Nd");
    case 'D':
      ++at_;
      return unicode::complement(unicode::category("Nd"));
    case 's':
      ++at_;
      return unicode::space;
    case 'S':
      ++at_;
      return unicode::complement(unicode::space);
    case 'w':
      ++at_;
      return in_class ? unicode::word_of_regex_class() : unicode::letters_and_digits_of_regex();
    case 'W':
      ++at_;
      return unicode::complement(in_class ? unicode::word_of_regex_class()
                                          : unicode::letters_and_digits_of_regex());
    case 'h':
      ++at_;
      return CodeSet{{'0', '9'}, {'A', 'F'}, {'a', 'f'}};
    case 'H':
      ++at_;
      return unicode::complement({{'0', '9'}, {'A', 'F'}, {'a', 'f'}});
    default:
      return std::nullopt;
  }
}

CodeSet RegexClassParser::property(const Flags& flags, bool negative) {
  if (!take("{")) unsupported("\\p without braces");
  if (take("^")) negative = !negative;
  const std::size_t close = pattern_.find('}', at_);
  if (close == std::string_view::npos) broken("no '}'");
  const std::string_view name = pattern_.substr(at_, close - at_);
  CodeSet set;
  if (name == "Han") {
    set = unicode::han;
  } else if (name == "Hiragana") {
    set = unicode::hiragana;
  } else if (name == "Katakana") {
    set = unicode::katakana;
  } else if (name == "Hangul") {
    set = unicode::hangul;
  } else {
    set = unicode::category(name);
    if (set.empty()) unsupported(fmt::format("the property '{}'", name));
    if (flags.ignore_case && (name == "Lu" || name == "Ll" || name == "Lt")) {
      unsupported("a cased property under (?i)");
    }
  }
  at_ = close + 1;
  return negative ? unicode::complement(set) : set;
}

char32_t RegexClassParser::hexadecimal(std::size_t min_digits, std::size_t max_digits) {
  char32_t value = 0;
  std::size_t digits = 0;
  for (; digits < max_digits && !done(); ++digits, ++at_) {
    const char c = peek();
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                             : -1;
    if (digit < 0) break;
    value = value << 4 | static_cast<char32_t>(digit);
  }
  if (digits < min_digits) broken("too few hexadecimal digits");
  return value;
}

char32_t RegexClassParser::escaped_character(bool in_class) {
  const char32_t c = next();
  char32_t value;
  switch (c) {
    case 't':
      return '\t';
    case 'n':
      return '\n';
    case 'r':
      return '\r';
    case 'f':
      return '\f';
    case 'v':
      return '\v';
    case 'a':
      return '\a';
    case 'e':
      return 0x1B;
    case 'b':
      if (in_class) return '\b';
      break;
    case 'x':
      if (take("{")) {
        value = hexadecimal(1, 8);
        if (!take("}")) broken("no '}'");
      } else {
        value = hexadecimal(1, 2);
        if (value > 0x7F) unsupported("\\x of a byte above 7f");
      }
      return valid(value);
    case 'u':
      return valid(hexadecimal(4, 4));
    default:
      break;
  }
  if ((c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) {
    unsupported(fmt::format("the escape '\\{}'", static_cast<char>(c)));
  }
  return c;
}

char32_t RegexClassParser::valid(char32_t c) const {
  if (c > unicode::max_code_point || (c >= 0xD800 && c < 0xE000)) broken("no code point");
  return c;
}

CodeSet RegexClassParser::fold(const Flags& flags, char32_t low, char32_t high) const {
  CodeSet out{{low, high}};
  if (!flags.ignore_case) return out;
  if (high > 0x7F) {
    const CodeSet cased = unicode::unite(unicode::category("L"), unicode::category("M"));
    for (const auto range : cased) {
      if (range.first <= high && std::max<char32_t>(low, 0x80) <= range.last) {
        unsupported("a letter beyond ASCII under (?i)");
      }
    }
  }
  for (char32_t c = low; c <= std::min<char32_t>(high, 0x7F); ++c) {
    const char32_t other = c >= 'a' && c <= 'z' ? c - 32 : c >= 'A' && c <= 'Z' ? c + 32 : c;
    out = unicode::unite(out, {{other, other}});
    if (c == 'k' || c == 'K') out = unicode::unite(out, {{0x212A, 0x212A}});
    if (c == 's' || c == 'S') out = unicode::unite(out, {{0x17F, 0x17F}});
  }
  return out;
}

}  // namespace latente
