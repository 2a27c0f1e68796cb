// Deterministic finite automata over bytes, for what grammars have no words for: texts that match two
// expressions, or one and not another.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "grammar/grammar.h"
#include "grammar/work.h"

namespace latente::grammar {

// State 0 is the first; a byte that no edge reads leads nowhere. Edges of a state are in order and do not
// overlap.
struct Machine {
  static constexpr size_t most_states = size_t{1} << 16;

  struct Edge {
    uint8_t low, high;
    uint32_t to;
  };
  struct State {
    std::vector<Edge> edges{};
    bool accepts = false;
  };
  std::vector<State> states;

  bool empty() const;  // no text matches
  bool matches(std::string_view text) const;
};

// Of an expression whose rules do not call themselves. Error: it needs too many states, or too much work.
Machine machine_of(const Grammar& grammar, const Expression& expression, Work& work);
// Texts that match both, and those that match `a` only. Error: too many states, or too much work.
Machine both_of(const Machine& a, const Machine& b, Work& work);
Machine first_only(const Machine& a, const Machine& b, Work& work);

Expression expression_of(Machine machine);

}  // namespace latente::grammar
