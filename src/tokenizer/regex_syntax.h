// The syntax tree of a regular expression; regex.h says what is understood.
#pragma once

#include <limits>
#include <string_view>
#include <vector>

#include "tokenizer/regex.h"
#include "tokenizer/unicode.h"

namespace latente {

struct RegexNode {
  enum class Kind { set, sequence, alternation, repeat, atomic, look, look_behind, assertion };
  static constexpr std::uint32_t unlimited = std::numeric_limits<std::uint32_t>::max();

  Kind kind;
  unicode::CodeSet set{};  // set, look_behind: one character of it
  std::vector<RegexNode> children{};
  std::uint32_t min = 0, max = 0;  // repeat
  RegexInstruction::Mode mode = RegexInstruction::Mode::greedy;
  bool negative = false;  // look, look_behind
  RegexInstruction::Op assertion = RegexInstruction::Op::end;
};

RegexNode parse_regex(std::string_view pattern, std::string_view where);

}  // namespace latente
