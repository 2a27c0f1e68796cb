#include "tokenizer/regex_syntax.h"

#include <algorithm>
#include <optional>

#include "base/error.h"

namespace latente {

namespace {

using Kind = RegexNode::Kind;
using Op = RegexInstruction::Op;
using Mode = RegexInstruction::Mode;
using unicode::CodeSet;

struct Flags {
  bool ignore_case = false;
  bool dot_all = false;
};

class Parser {
 public:
  Parser(std::string_view pattern, std::string_view where) : pattern_(pattern), where_(where) {
    if (unicode::valid_prefix(pattern) != pattern.size()) fail("{}: expected UTF-8", where);
  }

  RegexNode parse() {
    RegexNode root = alternation({}, 0);
    if (!done()) broken("unmatched ')'");
    return root;
  }

 private:
  static constexpr int max_depth = 50;
  static constexpr std::uint32_t max_count = 1000;

  [[noreturn]] void broken(std::string_view what) const {
    fail("{}: expected a regular expression, found {} at byte {} of '{}'", where_, what, at_, pattern_);
  }
  [[noreturn]] void unsupported(std::string_view what) const {
    fail("{}: {} is not supported (byte {} of '{}')", where_, what, at_, pattern_);
  }

  bool done() const { return at_ == pattern_.size(); }
  char peek() const { return done() ? '\0' : pattern_[at_]; }
  bool looking_at(std::string_view text) const { return pattern_.substr(at_).starts_with(text); }
  bool take(std::string_view text) {
    if (!looking_at(text)) return false;
    at_ += text.size();
    return true;
  }
  char32_t next() {
    if (done()) broken("the end");
    return unicode::decode(pattern_, at_);
  }

  // Options set by "(?i)" at the start of a group hold to its end, across '|'.
  RegexNode alternation(Flags flags, int depth) {
    if (depth > max_depth) fail("{}: expected at most {} nested groups", where_, max_depth);
    while (flag_setting(flags)) continue;
    RegexNode out{.kind = Kind::alternation};
    out.children.push_back(sequence(flags, depth));
    while (take("|")) out.children.push_back(sequence(flags, depth));
    if (out.children.size() == 1) {
      RegexNode only = std::move(out.children[0]);
      return only;
    }
    return out;
  }

  RegexNode sequence(const Flags& flags, int depth) {
    RegexNode out{.kind = Kind::sequence};
    char32_t previous_literal = 0;
    while (!done() && peek() != '|' && peek() != ')') {
      if (Flags ignored = flags; flag_setting(ignored)) unsupported("an option in the middle of a group");
      char32_t literal = 0;
      RegexNode node = atom(flags, depth, literal);
      if (flags.ignore_case) check_multi_character_folding(previous_literal, literal);
      previous_literal = literal;
      out.children.push_back(quantified(std::move(node)));
    }
    return out;
  }

  // "(?i)", "(?m)", "(?-i)" and the like, which hold for what follows.
  bool flag_setting(Flags& flags) {
    if (!looking_at("(?")) return false;
    const std::size_t close = pattern_.find_first_not_of("imx-", at_ + 2);
    if (close == std::string_view::npos || close == at_ + 2 || pattern_[close] != ')') return false;
    at_ += 2;
    flags = read_flags(flags);
    ++at_;
    return true;
  }

  Flags read_flags(Flags flags) {
    bool on = true;
    while (peek() != ':' && peek() != ')') {
      switch (next()) {
        case '-':
          on = false;
          break;
        case 'i':
          flags.ignore_case = on;
          break;
        case 'm':
          flags.dot_all = on;
          break;
        default:
          unsupported("this group option");
      }
    }
    return flags;
  }

  RegexNode group(Flags flags, int depth) {
    const auto closed = [&](RegexNode node) {
      if (!take(")")) broken("no ')'");
      return node;
    };
    if (!take("?")) return closed(alternation(flags, depth + 1));
    if (take(":")) return closed(alternation(flags, depth + 1));
    if (take(">")) {
      RegexNode out{.kind = Kind::atomic};
      out.children.push_back(alternation(flags, depth + 1));
      return closed(std::move(out));
    }
    if (looking_at("=") || looking_at("!")) {
      RegexNode out{.kind = Kind::look};
      out.negative = next() == '!';
      out.children.push_back(alternation(flags, depth + 1));
      return closed(std::move(out));
    }
    if (looking_at("<=") || looking_at("<!")) {
      ++at_;
      RegexNode out{.kind = Kind::look_behind};
      out.negative = next() == '!';
      const RegexNode body = alternation(flags, depth + 1);
      const RegexNode* only = &body;
      while (only->kind == Kind::sequence && only->children.size() == 1) only = &only->children[0];
      if (only->kind != Kind::set) unsupported("lookbehind over more than one character");
      out.set = only->set;
      return closed(std::move(out));
    }
    if (peek() == '#') {
      at_ = std::min(pattern_.find(')', at_), pattern_.size());
      return closed(RegexNode{.kind = Kind::sequence});
    }
    if (std::string_view("imx-").find(peek()) != std::string_view::npos && !done()) {
      const Flags inner = read_flags(flags);
      if (!take(":")) broken("no ':'");
      return closed(alternation(inner, depth + 1));
    }
    unsupported("this kind of group");
  }

  RegexNode atom(const Flags& flags, int depth, char32_t& literal) {
    if (take("(")) return group(flags, depth);
    if (take("[")) return set_node(char_class(flags, depth));
    if (take(".")) {
      return {.kind = Kind::set,
              .set = flags.dot_all ? unicode::complement({}) : unicode::complement({{'\n', '\n'}})};
    }
    if (take("^")) return {.kind = Kind::assertion, .assertion = Op::line_begin};
    if (take("$")) return {.kind = Kind::assertion, .assertion = Op::line_end};
    if (looking_at("*") || looking_at("+") || looking_at("?")) broken("a repetition of nothing");
    if (take("\\")) {
      switch (peek()) {
        case 'A':
          ++at_;
          return {.kind = Kind::assertion, .assertion = Op::text_begin};
        case 'z':
          ++at_;
          return {.kind = Kind::assertion, .assertion = Op::text_end};
        case 'Z':
          ++at_;
          return {.kind = Kind::assertion, .assertion = Op::text_end_line};
        case 'b':
          ++at_;
          return {.kind = Kind::assertion, .assertion = Op::word_boundary};
        case 'B':
          ++at_;
          return {.kind = Kind::assertion, .assertion = Op::not_word_boundary};
        default:
          break;
      }
      if (const auto named = escaped_class(flags, false)) return {.kind = Kind::set, .set = *named};
      literal = escaped_character(false);
    } else {
      literal = next();
    }
    return set_node(fold(flags, literal, literal));
  }

  static RegexNode set_node(CodeSet set) { return {.kind = Kind::set, .set = std::move(set)}; }

  RegexNode quantified(RegexNode node) {
    while (true) {
      std::uint32_t min, max;
      bool interval = false;
      if (take("*")) {
        min = 0, max = RegexNode::unlimited;
      } else if (take("+")) {
        min = 1, max = RegexNode::unlimited;
      } else if (take("?")) {
        min = 0, max = 1;
      } else if (read_interval(min, max)) {
        interval = true;
      } else {
        return node;
      }
      Mode mode = Mode::greedy;
      if (looking_at("?")) {
        if (interval && min == max) unsupported("'?' behind a fixed count");
        ++at_;
        mode = Mode::lazy;
      } else if (looking_at("+") && !interval) {
        ++at_;
        mode = Mode::possessive;
      }
      // As in Ruby, '+' behind a count is not possessive but repeats the repetition.
      const bool again = interval && mode == Mode::greedy && looking_at("+");
      if (!again && (looking_at("*") || looking_at("+") || looking_at("?")))
        unsupported("a repetition of a repetition");
      if (node.kind != Kind::set && node.kind != Kind::sequence && node.kind != Kind::alternation &&
          node.kind != Kind::atomic && node.kind != Kind::repeat) {
        unsupported("a repetition of an assertion");
      }
      RegexNode out{.kind = Kind::repeat, .min = min, .max = max, .mode = mode};
      out.children.push_back(std::move(node));
      node = std::move(out);
      std::uint32_t unused;
      const std::size_t here = at_;
      if (read_interval(unused, unused)) {
        at_ = here;
        unsupported("a repetition of a repetition");
      }
    }
  }

  // {n} {n,} {,m} {n,m}; other braces are literal.
  bool read_interval(std::uint32_t& min, std::uint32_t& max) {
    if (peek() != '{') return false;
    std::size_t at = at_ + 1;
    const auto number = [&]() -> std::optional<std::uint32_t> {
      std::optional<std::uint32_t> value;
      for (; at < pattern_.size() && pattern_[at] >= '0' && pattern_[at] <= '9'; ++at) {
        value = std::min<std::uint32_t>(
            value.value_or(0) * 10 + static_cast<std::uint32_t>(pattern_[at] - '0'), max_count + 1);
      }
      return value;
    };
    const auto low = number();
    std::optional<std::uint32_t> high = low;
    if (at < pattern_.size() && pattern_[at] == ',') {
      ++at;
      high = number();
      if (!low && !high) return false;
      if (!high) high = RegexNode::unlimited;
    }
    if (!high || at >= pattern_.size() || pattern_[at] != '}') return false;
    min = low.value_or(0);
    max = *high;
    if (min > max_count || (max > max_count && max != RegexNode::unlimited)) {
      fail("{}: expected repetition counts up to {}", where_, max_count);
    }
    if (min > max) broken("a count from high to low");
    at_ = at + 1;
    return true;
  }

  // Behind "[".
  CodeSet char_class(const Flags& flags, int depth) {
    if (depth > max_depth) fail("{}: expected at most {} nested classes", where_, max_depth);
    const bool negative = take("^");
    CodeSet out;
    bool first = true;
    while (true) {
      if (done()) broken("no ']'");
      if (!first && take("]")) break;
      if (first && looking_at("]")) unsupported("']' at the start of a class");
      first = false;
      if (looking_at("&&")) unsupported("the intersection '&&'");
      if (take("[:")) {
        out = unicode::unite(std::move(out), bracket_name());
        continue;
      }
      if (take("[")) {
        out = unicode::unite(std::move(out), char_class(flags, depth + 1));
        continue;
      }
      char32_t low;
      if (take("\\")) {
        if (auto named = escaped_class(flags, true)) {
          out = unicode::unite(std::move(out), *named);
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
      out = unicode::unite(std::move(out), fold(flags, low, high));
    }
    return negative ? unicode::complement(out) : out;
  }

  CodeSet bracket_name() {
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

  // \p{..}, \d, \s, \w, \h and their complements, behind the backslash.
  std::optional<CodeSet> escaped_class(const Flags& flags, bool in_class) {
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

  CodeSet property(const Flags& flags, bool negative) {
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

  char32_t hexadecimal(std::size_t min_digits, std::size_t max_digits) {
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

  char32_t escaped_character(bool in_class) {
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

  char32_t valid(char32_t c) const {
    if (c > unicode::max_code_point || (c >= 0xD800 && c < 0xE000)) broken("no code point");
    return c;
  }

  // low..high, with the other case under (?i). Of ASCII letters, K and S have a third form.
  CodeSet fold(const Flags& flags, char32_t low, char32_t high) const {
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
      out = unicode::unite(std::move(out), {{other, other}});
      if (c == 'k' || c == 'K') out = unicode::unite(std::move(out), {{0x212A, 0x212A}});
      if (c == 's' || c == 'S') out = unicode::unite(std::move(out), {{0x17F, 0x17F}});
    }
    return out;
  }

  // Pairs such as "ss", which one character (ß) would match under (?i).
  void check_multi_character_folding(char32_t a, char32_t b) const {
    const auto lower = [](char32_t c) { return c >= 'A' && c <= 'Z' ? c + 32 : c; };
    const std::u32string pair{lower(a), lower(b)};
    for (const char32_t* folded : {U"ss", U"ff", U"fi", U"fl", U"st"}) {
      if (pair == folded) unsupported("a pair of letters that is also one character under (?i)");
    }
  }

  std::string_view pattern_, where_;
  std::size_t at_ = 0;
};

}  // namespace

RegexNode parse_regex(std::string_view pattern, std::string_view where) {
  return Parser(pattern, where).parse();
}

}  // namespace latente
