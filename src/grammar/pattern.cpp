#include "grammar/pattern.h"

#include <optional>

#include "base/error.h"
#include "base/utf8.h"
#include "grammar/json_text.h"
#include "grammar/scanner.h"

namespace latente::grammar {
namespace {

constexpr int most_group_nesting = 50;
constexpr uint32_t most_turns = 1'000'000;

const CharSet& digit_set() {
  static const CharSet set{{'0', '9'}};
  return set;
}
const CharSet& word_set() {
  static const CharSet set{{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}};
  return set;
}
const CharSet& space_set() {
  static const CharSet set{{'\t', '\r'},     {' ', ' '},       {0xA0, 0xA0},     {0x1680, 0x1680},
                           {0x2000, 0x200A}, {0x2028, 0x2029}, {0x202F, 0x202F}, {0x205F, 0x205F},
                           {0x3000, 0x3000}, {0xFEFF, 0xFEFF}};
  return set;
}
const CharSet& line_ends() {
  static const CharSet set{{'\n', '\n'}, {'\r', '\r'}, {0x2028, 0x2029}};
  return set;
}

class Parser : Scanner {
 public:
  Parser(std::string_view pattern, const std::string& where, const Expression& any_characters)
      : Scanner(pattern), where_(where), any_characters_(any_characters) {}

  Expression parse() {
    std::vector<Expression> all;
    do {
      const bool begins = take("^");
      bool ends = false;
      std::vector<Expression> parts;
      if (!begins) parts.push_back(any_characters_);
      parts.push_back(terms(0, &ends));
      if (!ends) parts.push_back(any_characters_);
      all.push_back(sequence(std::move(parts)));
    } while (take("|"));
    if (!done()) broken("a ) without its (");
    return all.size() == 1 ? std::move(all[0]) : choice(std::move(all));
  }

 private:
  [[noreturn]] void broken(std::string_view what) const {
    fail("{}: at character {} of the pattern: {}", where_, at_ + 1, what);
  }

  Expression alternatives(int nesting) {
    if (nesting > most_group_nesting) broken(fmt::format("groups nest deeper than {}", most_group_nesting));
    std::vector<Expression> all;
    do all.push_back(terms(nesting, nullptr));
    while (take("|"));
    return all.size() == 1 ? std::move(all[0]) : choice(std::move(all));
  }

  // ends: set when a $ ends the terms; null where none may.
  Expression terms(int nesting, bool* ends) {
    std::vector<Expression> all;
    while (!done() && peek() != '|' && peek() != ')') {
      if (take("$")) {
        if (ends == nullptr || (!done() && peek() != '|'))
          broken("$ is understood at the end of the pattern or of one of its alternatives only");
        *ends = true;
        break;
      }
      if (peek() == '^')
        broken("^ is understood at the beginning of the pattern or of one of its alternatives only");
      all.push_back(quantified(atom(nesting)));
    }
    return all.size() == 1 ? std::move(all[0]) : sequence(std::move(all));
  }

  Expression quantified(Expression part) {
    uint32_t min = 0, max = 0;
    if (take("*")) {
      max = Expression::unlimited;
    } else if (take("+")) {
      min = 1, max = Expression::unlimited;
    } else if (take("?")) {
      max = 1;
    } else if (take("{")) {
      min = number();
      max = min;
      if (take(",")) max = peek() == '}' ? Expression::unlimited : number();
      if (!take("}")) broken("expected } of a repetition");
      if (max < min) broken("a repetition's upper bound lies below its lower one");
    } else {
      return part;
    }
    take("?");  // lazy: the same texts
    if (peek() == '*' || peek() == '+' || peek() == '?' || peek() == '{')
      broken("a repetition of a repetition");
    return repeat(std::move(part), min, max);
  }

  uint32_t number() {
    if (peek() < '0' || peek() > '9') broken("expected a number");
    uint64_t value = 0;
    for (; peek() >= '0' && peek() <= '9'; ++at_) {
      value = value * 10 + static_cast<uint64_t>(peek() - '0');
      if (value > most_turns) broken(fmt::format("repetitions of more than {} are too large", most_turns));
    }
    return static_cast<uint32_t>(value);
  }

  Expression atom(int nesting) {
    if (take("(")) {
      if (take("?") && !take(":")) {
        if (!take("<") || peek() == '=' || peek() == '!') broken("look-around is not understood");
        while (!done() && peek() != '>') ++at_;
        if (!take(">")) broken("expected > of a group's name");
      }
      Expression inside = alternatives(nesting + 1);
      if (!take(")")) broken("a ( without its )");
      return inside;
    }
    if (take("[")) return json_character(char_class());
    if (take(".")) return json_character(line_ends().complement());
    if (peek() == '*' || peek() == '+' || peek() == '?' || peek() == '{') broken("nothing to repeat");
    if (peek() == '}' || peek() == ']') broken("expected \\ before a lone } or ]");
    if (!take("\\")) {
      const char32_t c = unicode::decode(text_, at_);
      return json_character({{c, c}});
    }
    if (const std::optional<CharSet> set = escaped_set()) return json_character(*set);
    const char32_t c = escaped_character(false);
    return json_character({{c, c}});
  }

  CharSet char_class() {
    const bool negated = take("^");
    CharSet set;
    while (peek() != ']') {
      if (done()) broken("a [ without its ]");
      char32_t low = 0;
      if (take("\\")) {
        if (const std::optional<CharSet> named = escaped_set()) {
          set.add(*named);
          if (peek() == '-' && at_ + 1 < text_.size() && text_[at_ + 1] != ']')
            broken("a range from a class");
          continue;
        }
        low = escaped_character(true);
      } else {
        low = unicode::decode(text_, at_);
      }
      char32_t high = low;
      if (peek() == '-' && at_ + 1 < text_.size() && text_[at_ + 1] != ']') {
        ++at_;
        if (take("\\")) {
          if (escaped_set()) broken("a range to a class");
          high = escaped_character(true);
        } else {
          high = unicode::decode(text_, at_);
        }
        if (high < low) broken("a range's first character lies behind its last");
      }
      set.add(low, high);
    }
    ++at_;
    return negated ? set.complement() : set;
  }

  // Behind a backslash.
  std::optional<CharSet> escaped_set() {
    const char c = peek();
    const CharSet* set = c == 'd' || c == 'D'   ? &digit_set()
                         : c == 'w' || c == 'W' ? &word_set()
                         : c == 's' || c == 'S' ? &space_set()
                                                : nullptr;
    if (set == nullptr) return std::nullopt;
    ++at_;
    return c >= 'a' ? *set : set->complement();
  }

  char32_t escaped_character(bool in_class) {
    if (done()) broken("a backslash at the end");
    const char c = peek();
    static constexpr std::string_view syntax = "^$\\.*+?()[]{}|/", named = "tnvfr", values = "\t\n\v\f\r";
    if (syntax.find(c) != syntax.npos || c == '-' || (c & 0x80) != 0 || (c > ' ' && c < '0') || c == '"' ||
        (c > '9' && c < 'A') || c == '_' || c == '`' || c == '~') {
      return unicode::decode(text_, at_);
    }
    if (const size_t i = named.find(c); i != named.npos) {
      ++at_;
      return static_cast<char32_t>(values[i]);
    }
    if (in_class && take("b")) return '\b';
    if (take("0")) {
      if (peek() >= '0' && peek() <= '9') broken("octal escapes are not understood");
      return 0;
    }
    if (take("x")) return hexadecimal(2);
    if (take("u")) {
      if (!take("{")) return surrogates(hexadecimal(4));
      char32_t value = 0;
      int count = 0;
      for (; peek() != '}'; ++count) value = value << 4 | hexadecimal(1);
      ++at_;
      if (count == 0 || count > 6) broken("expected 1 to 6 hexadecimal digits");
      return surrogates(value);
    }
    if (c >= '1' && c <= '9') broken("back references are not understood");
    broken(fmt::format("the escape \\{} is not understood", c));
  }

  char32_t hexadecimal(int count) {
    char32_t value = 0;
    for (int i = 0; i < count; ++i, ++at_) {
      const char c = peek(), low = static_cast<char>(c | 0x20);
      if (c >= '0' && c <= '9') {
        value = value << 4 | static_cast<char32_t>(c - '0');
      } else if (low >= 'a' && low <= 'f') {
        value = value << 4 | static_cast<char32_t>(low - 'a' + 10);
      } else {
        broken("expected a hexadecimal digit");
      }
    }
    return value;
  }

  // A pair of escapes names one character.
  char32_t surrogates(char32_t c) {
    if (c >= 0xD800 && c <= 0xDBFF && take("\\u")) {
      const char32_t low = hexadecimal(4);
      if (low >= 0xDC00 && low <= 0xDFFF) return 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00);
      broken("half of a surrogate pair");
    }
    if (c > unicode::max_code_point || (c >= 0xD800 && c <= 0xDFFF)) broken("the escape names no character");
    return c;
  }

  const std::string& where_;
  const Expression& any_characters_;
};

}  // namespace

Expression parse_pattern(std::string_view pattern, const std::string& where,
                         const Expression& any_characters) {
  return Parser(pattern, where, any_characters).parse();
}

}  // namespace latente::grammar
