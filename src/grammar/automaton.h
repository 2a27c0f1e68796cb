// A compiled grammar: one automaton over bytes a rule, whose transitions read a byte of a range, read
// nothing, or call another rule and go on behind it.
//
// Its size is linear in the grammar's. A repetition with large bounds is not written out: its state calls the
// body, and what is called carries the count (configurations.h). From every state the end of its rule can be
// reached, so that whatever has been read so far can be completed.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "grammar/grammar.h"

namespace latente::grammar {

class Automaton {
 public:
  static constexpr uint32_t none = 0xFFFFFFFF;
  static constexpr size_t max_states = size_t{1} << 20, max_edges = size_t{1} << 22;

  // Errors: a rule that calls itself before it reads anything (left recursion), a grammar that no finite text
  // matches, one that is too large.
  explicit Automaton(const Grammar& grammar);

  struct Edge {
    uint8_t low, high;
    uint32_t target;
  };
  struct Call {
    uint32_t rule, next;
  };
  // State s with a repetition, after `count` turns: below `max`, it may call the rule and come back to s with
  // count + 1; from `min` on, it may go to `next`. A turn reads at least one byte.
  struct Repetition {
    uint32_t rule, min, max, next;
  };
  struct Rule {
    std::string name;
    uint32_t start = none;  // none: nothing matches
    bool nullable = false;  // matches the empty text
    uint32_t rank = 0;      // above that of every rule that can call it before reading anything
  };

  std::span<const Edge> edges(uint32_t state) const {
    return group(edges_, states_[state].edges, states_[state + 1].edges);
  }
  std::span<const uint32_t> empties(uint32_t state) const {
    return group(empties_, states_[state].empties, states_[state + 1].empties);
  }
  std::span<const Call> calls(uint32_t state) const {
    return group(calls_, states_[state].calls, states_[state + 1].calls);
  }
  // Null where the state has none.
  const Repetition* repetition(uint32_t state) const {
    return states_[state].repetition == none ? nullptr : &repetitions_[states_[state].repetition];
  }
  bool final(uint32_t state) const { return states_[state].final; }
  // Final, and nothing else: calling another rule from before it is that rule's calling.
  bool last(uint32_t state) const { return states_[state].last; }
  size_t states() const { return states_.size() - 1; }

  const std::vector<Rule>& rules() const { return rules_; }
  uint32_t root() const { return root_; }

  // Bytes that no transition tells apart share a class.
  uint32_t class_of(uint8_t byte) const { return class_of_[byte]; }
  uint32_t classes() const { return static_cast<uint32_t>(representatives_.size()); }
  uint8_t representative(uint32_t byte_class) const { return representatives_[byte_class]; }

 private:
  struct State {
    uint32_t edges = 0, empties = 0, calls = 0;  // where its own begin
    uint32_t repetition = none;
    bool final = false, last = false;
  };
  template <class T>
  static std::span<const T> group(const std::vector<T>& all, uint32_t begin, uint32_t end) {
    return {all.data() + begin, end - begin};
  }
  void find_classes();
  void rank_rules();

  std::vector<State> states_;  // and one behind the last
  std::vector<Edge> edges_;
  std::vector<uint32_t> empties_;
  std::vector<Call> calls_;
  std::vector<Repetition> repetitions_;
  std::vector<Rule> rules_;
  uint32_t root_ = 0;
  std::array<uint8_t, 256> class_of_{};
  std::vector<uint8_t> representatives_;
};

}  // namespace latente::grammar
