// The first half of compiling: rules as transitions in no order, every state kept.
#pragma once

#include <map>
#include <vector>

#include "grammar/automaton.h"

namespace latente::grammar {

struct Transitions {
  struct Edge {
    uint32_t from;
    Automaton::Edge edge;
  };
  struct Empty {
    uint32_t from, to;
  };
  struct Call {
    uint32_t from;
    Automaton::Call call;
  };
  struct Repeat {
    uint32_t from;
    Automaton::Repetition repetition;
  };
  struct Rule {
    std::string name;
    uint32_t start, end;
  };
  std::vector<Edge> edges;
  std::vector<Empty> empties;
  std::vector<Call> calls;
  std::vector<Repeat> repetitions;  // at most one a state
  std::vector<Rule> rules;          // the grammar's, then the bodies of counted repetitions
  uint32_t states = 0;
};

Transitions transitions_of(const Grammar& grammar);
// Of one expression, as the only rule: the rules it calls and its repetitions are written out, so that there
// are neither calls nor repetitions. Error: rules that call themselves, or too many states.
Transitions transitions_in_place(const Grammar& grammar, const Expression& expression);

}  // namespace latente::grammar
