#include "grammar/gbnf.h"

#include <algorithm>
#include <map>

#include "base/error.h"
#include "base/utf8.h"
#include "grammar/scanner.h"

namespace latente::grammar {
namespace {

constexpr int most_nesting = 100;
constexpr uint32_t most_turns = 1'000'000;

bool is_name_character(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_';
}

class Parser : Scanner {
 public:
  Parser(std::string_view text, const std::string& name) : Scanner(text), name_(name) {}

  Grammar parse() {
    if (const size_t valid = unicode::valid_prefix(text_); valid != text_.size())
      broken(valid, "the text is not UTF-8");
    skip_space(true);
    while (!done()) rule();
    for (size_t r = 0; r < grammar_.rules.size(); ++r) {
      if (!defined_[r]) broken(first_use_[r], fmt::format("no rule is named {}", grammar_.rules[r].name));
    }
    const auto root = index_.find("root");
    if (root == index_.end()) broken(text_.size(), "expected a rule named root");
    grammar_.root = root->second;
    return std::move(grammar_);
  }

 private:
  [[noreturn]] void broken(size_t at, const std::string& what) const {
    const std::string_view before = text_.substr(0, at);
    const auto line = std::count(before.begin(), before.end(), '\n') + 1;
    const size_t start = before.rfind('\n') + 1;  // npos + 1 = 0
    fail("{}:{}:{}: {}", name_, line, at - start + 1, what);
  }
  [[noreturn]] void expected(const std::string& what) const {
    std::string found = "the end";
    if (!done()) {
      found = text_.substr(at_, unicode::length(text_[at_]));
      found = found == "\n" || found == "\r" ? "the end of the line" : "'" + found + "'";
    }
    broken(at_, fmt::format("expected {}, found {}", what, found));
  }

  void skip_space(bool lines) {
    for (; !done(); ++at_) {
      const char c = text_[at_];
      if (c == '#') {
        at_ = std::min(text_.find('\n', at_), text_.size());
        if (done() || !lines) return;
      } else if (c != ' ' && c != '\t' && !(lines && (c == '\n' || c == '\r'))) {
        return;
      }
    }
  }

  uint32_t rule_named(std::string_view name, size_t at) {
    auto [found, is_new] =
        index_.try_emplace(std::string(name), static_cast<uint32_t>(grammar_.rules.size()));
    if (is_new) {
      grammar_.rules.push_back({std::string(name)});
      defined_.push_back(false);
      first_use_.push_back(at);
    }
    return found->second;
  }
  std::string_view take_name() {
    const size_t begin = at_;
    while (is_name_character(peek())) ++at_;
    if (at_ == begin) expected("the name of a rule");
    return text_.substr(begin, at_ - begin);
  }

  void rule() {
    const size_t begin = at_;
    const std::string_view name = take_name();
    skip_space(false);
    if (!take("::=")) expected("::=");
    const uint32_t rule = rule_named(name, begin);
    if (defined_[rule]) broken(begin, fmt::format("rule {} is defined twice", name));
    defined_[rule] = true;
    skip_space(true);
    Expression body = alternatives(0);
    grammar_.rules[rule].body = std::move(body);
    if (!done() && peek() != '\n' && peek() != '\r') expected("a part of the rule, | or the end of the line");
    skip_space(true);
  }

  Expression alternatives(int nesting) {
    if (nesting > most_nesting) broken(at_, fmt::format("parentheses nest deeper than {}", most_nesting));
    std::vector<Expression> all;
    all.push_back(parts(nesting));
    while (take("|")) {
      skip_space(true);
      all.push_back(parts(nesting));
    }
    return all.size() == 1 ? std::move(all[0]) : choice(std::move(all));
  }

  Expression parts(int nesting) {
    std::vector<Expression> all;
    while (true) {
      const size_t begin = at_;
      const char c = peek();
      if (c == '"') {
        all.push_back(quoted());
      } else if (c == '[') {
        all.push_back(char_class());
      } else if (c == '(') {
        ++at_;
        skip_space(true);
        all.push_back(alternatives(nesting + 1));
        if (!take(")")) expected("a part of the rule, | or )");
      } else if (c == '.') {
        ++at_;
        all.push_back(one_of(CharSet::all()));
      } else if (is_name_character(c)) {
        all.push_back(call(rule_named(take_name(), begin)));
      } else if (c == '<' || c == '!') {
        broken(at_, "references to tokens are not understood");
      } else if (c == '*' || c == '+' || c == '?' || c == '{') {
        if (all.empty()) expected("something to repeat");
        all.back() = repeated(std::move(all.back()));
      } else {
        return all.size() == 1 ? std::move(all[0]) : sequence(std::move(all));
      }
      skip_space(nesting > 0);
    }
  }

  Expression repeated(Expression part) {
    if (++repeats_ > most_nesting * 1000) broken(at_, "too many repetitions");
    if (take("*")) return wrap(std::move(part), 0, Expression::unlimited);
    if (take("+")) return wrap(std::move(part), 1, Expression::unlimited);
    if (take("?")) return wrap(std::move(part), 0, 1);
    const size_t begin = at_;
    ++at_;
    skip_space(true);
    const uint32_t min = number();
    uint32_t max = min;
    skip_space(true);
    if (take(",")) {
      skip_space(true);
      max = peek() == '}' ? Expression::unlimited : number();
      skip_space(true);
    }
    if (!take("}")) expected("} of a repetition");
    if (max < min) broken(begin, fmt::format("expected {{m,n}} with m at most n, found {{{},{}}}", min, max));
    return wrap(std::move(part), min, max);
  }

  // Repetitions of repetitions nest without parentheses: a**.
  Expression wrap(Expression part, uint32_t min, uint32_t max) {
    int depth = 1;
    for (const Expression* at = &part; at->kind == Expression::Kind::repeat; at = &at->parts[0]) ++depth;
    if (depth > most_nesting) broken(at_, fmt::format("repetitions nest deeper than {}", most_nesting));
    return repeat(std::move(part), min, max);
  }

  uint32_t number() {
    if (peek() < '0' || peek() > '9') expected("a number");
    const size_t begin = at_;
    uint64_t value = 0;
    for (; peek() >= '0' && peek() <= '9'; ++at_) {
      value = value * 10 + static_cast<uint64_t>(peek() - '0');
      if (value > most_turns)
        broken(begin, fmt::format("repetitions of more than {} are too large", most_turns));
    }
    return static_cast<uint32_t>(value);
  }

  char32_t character() {
    if (!take("\\")) return unicode::decode(text_, at_);
    const size_t begin = at_;
    if (done()) expected("an escaped character");
    const char c = text_[at_++];
    switch (c) {
      case 'n':
        return '\n';
      case 'r':
        return '\r';
      case 't':
        return '\t';
      case '"':
      case '\\':
      case '[':
      case ']':
        return static_cast<char32_t>(c);
      case 'x':
        return hexadecimal(2);
      case 'u':
        return hexadecimal(4);
      case 'U':
        return hexadecimal(8);
      default:
        at_ = begin;
        expected("an escape: one of n r t \" \\ [ ] x u U");
    }
  }

  char32_t hexadecimal(int digits) {
    const size_t begin = at_ - 2;
    char32_t value = 0;
    for (int i = 0; i < digits; ++i, ++at_) {
      const char c = peek(), low = static_cast<char>(c | 0x20);
      if (c >= '0' && c <= '9') {
        value = value << 4 | static_cast<char32_t>(c - '0');
      } else if (low >= 'a' && low <= 'f') {
        value = value << 4 | static_cast<char32_t>(low - 'a' + 10);
      } else {
        expected(fmt::format("{} hexadecimal digits", digits));
      }
    }
    if (value > unicode::max_code_point || (value >= 0xD800 && value <= 0xDFFF))
      broken(begin, "the escape names no character");
    return value;
  }

  Expression quoted() {
    const size_t begin = at_++;
    std::string bytes;
    while (peek() != '"') {
      if (done() || peek() == '\n') broken(begin, "the literal has no closing \"");
      unicode::append(bytes, character());
    }
    ++at_;
    return literal(bytes);
  }

  Expression char_class() {
    const size_t begin = at_++;
    const bool negated = take("^");
    CharSet set;
    while (peek() != ']') {
      if (done() || peek() == '\n') broken(begin, "the class has no closing ]");
      const size_t at = at_;
      const char32_t low = character();
      char32_t high = low;
      if (peek() == '-' && at_ + 1 < text_.size() && text_[at_ + 1] != ']') {
        ++at_;
        if (peek() == '\n') broken(begin, "the class has no closing ]");
        high = character();
      }
      if (high < low) broken(at, "the range's first character lies behind its last");
      set.add(low, high);
    }
    ++at_;
    return one_of(negated ? set.complement() : std::move(set));
  }

  const std::string& name_;
  int repeats_ = 0;
  Grammar grammar_;
  std::map<std::string, uint32_t, std::less<>> index_;
  std::vector<bool> defined_;
  std::vector<size_t> first_use_;
};

}  // namespace

Grammar parse_gbnf(std::string_view text, const std::string& name) { return Parser(text, name).parse(); }

}  // namespace latente::grammar
