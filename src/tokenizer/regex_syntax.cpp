#include "tokenizer/regex_syntax.h"

#include <algorithm>
#include <optional>

#include "base/error.h"
#include "tokenizer/regex_class.h"

namespace latente {

namespace {

using NodeKind = RegexNode::Kind;
using Op = RegexInstruction::Op;
using Mode = RegexInstruction::Mode;
using unicode::CodeSet;

class Parser : RegexClassParser {
 public:
  using RegexClassParser::RegexClassParser;

  RegexNode parse() {
    RegexNode root = alternation({}, 0);
    if (!done()) broken("unmatched ')'");
    return root;
  }

 private:
  static constexpr std::uint32_t max_count = 1000;

  // Options set by "(?i)" at the start of a group hold to its end, across '|'.
  RegexNode alternation(Flags flags, int depth) {
    if (depth > max_depth) fail("{}: expected at most {} nested groups", where_, max_depth);
    while (flag_setting(flags)) continue;
    RegexNode out{.kind = NodeKind::alternation};
    out.children.push_back(sequence(flags, depth));
    while (take("|")) out.children.push_back(sequence(flags, depth));
    if (out.children.size() == 1) {
      RegexNode only = std::move(out.children[0]);
      return only;
    }
    return out;
  }

  RegexNode sequence(const Flags& flags, int depth) {
    RegexNode out{.kind = NodeKind::sequence};
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
      RegexNode out{.kind = NodeKind::atomic};
      out.children.push_back(alternation(flags, depth + 1));
      return closed(std::move(out));
    }
    if (looking_at("=") || looking_at("!")) {
      RegexNode out{.kind = NodeKind::look};
      out.negative = next() == '!';
      out.children.push_back(alternation(flags, depth + 1));
      return closed(std::move(out));
    }
    if (looking_at("<=") || looking_at("<!")) {
      ++at_;
      RegexNode out{.kind = NodeKind::look_behind};
      out.negative = next() == '!';
      const RegexNode body = alternation(flags, depth + 1);
      const RegexNode* only = &body;
      while (only->kind == NodeKind::sequence && only->children.size() == 1) only = &only->children[0];
      if (only->kind != NodeKind::set) unsupported("lookbehind over more than one character");
      out.set = only->set;
      return closed(std::move(out));
    }
    if (peek() == '#') {
      at_ = std::min(pattern_.find(')', at_), pattern_.size());
      return closed(RegexNode{.kind = NodeKind::sequence});
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
      return {.kind = NodeKind::set,
              .set = flags.dot_all ? unicode::complement({}) : unicode::complement({{'\n', '\n'}})};
    }
    if (take("^")) return {.kind = NodeKind::assertion, .assertion = Op::line_begin};
    if (take("$")) return {.kind = NodeKind::assertion, .assertion = Op::line_end};
    if (looking_at("*") || looking_at("+") || looking_at("?")) broken("a repetition of nothing");
    if (take("\\")) {
      switch (peek()) {
        case 'A':
          ++at_;
          return {.kind = NodeKind::assertion, .assertion = Op::text_begin};
        case 'z':
          ++at_;
          return {.kind = NodeKind::assertion, .assertion = Op::text_end};
        case 'Z':
          ++at_;
          return {.kind = NodeKind::assertion, .assertion = Op::text_end_line};
        case 'b':
          ++at_;
          return {.kind = NodeKind::assertion, .assertion = Op::word_boundary};
        case 'B':
          ++at_;
          return {.kind = NodeKind::assertion, .assertion = Op::not_word_boundary};
        default:
          break;
      }
      if (const auto named = escaped_class(flags, false)) return {.kind = NodeKind::set, .set = *named};
      literal = escaped_character(false);
    } else {
      literal = next();
    }
    return set_node(fold(flags, literal, literal));
  }

  static RegexNode set_node(CodeSet set) { return {.kind = NodeKind::set, .set = std::move(set)}; }

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
      if (node.kind != NodeKind::set && node.kind != NodeKind::sequence &&
          node.kind != NodeKind::alternation && node.kind != NodeKind::atomic &&
          node.kind != NodeKind::repeat) {
        unsupported("a repetition of an assertion");
      }
      RegexNode out{.kind = NodeKind::repeat, .min = min, .max = max, .mode = mode};
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

  // Pairs such as "ss", which one character (ß) would match under (?i).
  void check_multi_character_folding(char32_t a, char32_t b) const {
    const auto lower = [](char32_t c) { return c >= 'A' && c <= 'Z' ? c + 32 : c; };
    const std::u32string pair{lower(a), lower(b)};
    for (const char32_t* folded : {U"ss", U"ff", U"fi", U"fl", U"st"}) {
      if (pair == folded) unsupported("a pair of letters that is also one character under (?i)");
    }
  }
};

}  // namespace

RegexNode parse_regex(std::string_view pattern, std::string_view where) {
  return Parser(pattern, where).parse();
}

}  // namespace latente
