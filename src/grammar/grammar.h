// A context-free grammar: what parsers of GBNF and of JSON Schema make, and the automaton is compiled from.
#pragma once

#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "grammar/char_set.h"

namespace latente::grammar {

struct Machine;  // grammar/machine.h

struct Expression {
  enum class Kind : uint8_t { text, characters, sequence, choice, repeat, rule, machine };
  static constexpr uint32_t unlimited = std::numeric_limits<uint32_t>::max();

  Kind kind = Kind::text;
  std::string text{};               // text: bytes as they are
  CharSet set{};                    // characters: one of these
  std::vector<Expression> parts{};  // sequence, choice (of none: nothing matches), repeat (one part)
  uint32_t min = 0, max = 0;        // repeat
  uint32_t rule = 0;                // rule: index in Grammar::rules
  std::shared_ptr<const Machine> machine{};
};

inline Expression literal(std::string_view text) {
  return {.kind = Expression::Kind::text, .text = std::string(text)};
}
inline Expression one_of(CharSet set) {
  return {.kind = Expression::Kind::characters, .set = std::move(set)};
}
inline Expression sequence(std::vector<Expression> parts) {
  return {.kind = Expression::Kind::sequence, .parts = std::move(parts)};
}
inline Expression choice(std::vector<Expression> parts) {
  return {.kind = Expression::Kind::choice, .parts = std::move(parts)};
}
inline Expression repeat(Expression part, uint32_t min, uint32_t max) {
  Expression out{.kind = Expression::Kind::repeat, .min = min, .max = max};
  out.parts.push_back(std::move(part));
  return out;
}
inline Expression optional(Expression part) { return repeat(std::move(part), 0, 1); }
inline Expression call(uint32_t rule) { return {.kind = Expression::Kind::rule, .rule = rule}; }

struct Grammar {
  struct Rule {
    std::string name;  // for messages
    Expression body{};
  };
  std::vector<Rule> rules;
  uint32_t root = 0;
};

}  // namespace latente::grammar
