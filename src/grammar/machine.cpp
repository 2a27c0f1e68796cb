#include "grammar/machine.h"

#include <algorithm>
#include <map>
#include <optional>

#include "base/error.h"
#include "grammar/automaton_builder.h"

namespace latente::grammar {
namespace {

constexpr uint32_t nowhere = 0xFFFFFFFF;

[[noreturn]] void too_large() {
  fail("what is to hold at once needs more than {} states", Machine::most_states);
}

// States of a machine under construction, each of which stands for a `Name` of the things it is made of.
template <class Name>
class Naming {
 public:
  explicit Naming(Machine& out) : out_(out) {}
  uint32_t state(const Name& name) {
    auto [at, is_new] = numbers_.try_emplace(name, static_cast<uint32_t>(out_.states.size()));
    if (is_new) {
      if (out_.states.size() >= Machine::most_states) too_large();
      out_.states.emplace_back();
      names_.push_back(&at->first);
    }
    return at->second;
  }
  // The name of state `i`; null behind the last.
  const Name* name(size_t i) const { return i < names_.size() ? names_[i] : nullptr; }

 private:
  Machine& out_;
  std::map<Name, uint32_t> numbers_;
  std::vector<const Name*> names_;
};

class Determiniser {
 public:
  explicit Determiniser(const Transitions& from)
      : edges_(from.states), empties_(from.states), end_(from.rules[0].end) {
    for (const Transitions::Edge& edge : from.edges) edges_[edge.from].push_back(edge.edge);
    for (const Transitions::Empty& empty : from.empties) empties_[empty.from].push_back(empty.to);
    start_ = from.rules[0].start;
  }

  Machine run() {
    Machine out;
    Naming<std::vector<uint32_t>> naming(out);
    naming.state(closure({start_}));
    size_t work = 0;
    for (size_t i = 0; const std::vector<uint32_t>* set = naming.name(i); ++i) {
      out.states[i].accepts = std::binary_search(set->begin(), set->end(), end_);
      std::vector<Automaton::Edge> all;
      for (const uint32_t state : *set) all.insert(all.end(), edges_[state].begin(), edges_[state].end());
      // Between two neighbouring bounds every byte leads to the same states.
      std::vector<int> bounds;
      for (const Automaton::Edge& edge : all) {
        bounds.push_back(edge.low);
        bounds.push_back(edge.high + 1);
      }
      std::sort(bounds.begin(), bounds.end());
      bounds.erase(std::unique(bounds.begin(), bounds.end()), bounds.end());
      work += set->size() + all.size() * bounds.size();
      if (work > most_work) too_large();
      std::vector<Machine::Edge> edges;
      for (size_t k = 0; k + 1 < bounds.size(); ++k) {
        std::vector<uint32_t> targets;
        for (const Automaton::Edge& edge : all) {
          if (edge.low <= bounds[k] && bounds[k] <= edge.high) targets.push_back(edge.target);
        }
        if (targets.empty()) continue;
        edges.push_back({static_cast<uint8_t>(bounds[k]), static_cast<uint8_t>(bounds[k + 1] - 1),
                         naming.state(closure(std::move(targets)))});
      }
      out.states[i].edges = std::move(edges);
    }
    return out;
  }

 private:
  static constexpr size_t most_work = size_t{1} << 25;

  std::vector<uint32_t> closure(std::vector<uint32_t> states) const {
    std::sort(states.begin(), states.end());
    states.erase(std::unique(states.begin(), states.end()), states.end());
    std::vector<uint32_t> todo = states;
    while (!todo.empty()) {
      const uint32_t state = todo.back();
      todo.pop_back();
      for (const uint32_t to : empties_[state]) {
        const auto at = std::lower_bound(states.begin(), states.end(), to);
        if (at != states.end() && *at == to) continue;
        if (states.size() >= Machine::most_states / 4) too_large();
        states.insert(at, to);
        todo.push_back(to);
      }
    }
    return states;
  }

  std::vector<std::vector<Automaton::Edge>> edges_;
  std::vector<std::vector<uint32_t>> empties_;
  uint32_t start_, end_;
};

// Texts of `a` that match `b` (wanted), or do not.
Machine product(const Machine& a, const Machine& b, bool wanted) {
  Machine out;
  Naming<std::pair<uint32_t, uint32_t>> naming(out);
  naming.state({0, 0});
  for (size_t i = 0; const auto* name = naming.name(i); ++i) {
    const auto [mine, theirs] = *name;
    const bool matches = theirs != nowhere && b.states[theirs].accepts;
    out.states[i].accepts = a.states[mine].accepts && matches == wanted;
    std::vector<Machine::Edge> edges;
    for (const Machine::Edge& edge : a.states[mine].edges) {
      int at = edge.low;
      const auto add = [&](int last, uint32_t to) {
        if (last < at) return;
        if (to != nowhere || !wanted)
          edges.push_back(
              {static_cast<uint8_t>(at), static_cast<uint8_t>(last), naming.state({edge.to, to})});
        at = last + 1;
      };
      if (theirs != nowhere) {
        for (const Machine::Edge& other : b.states[theirs].edges) {  // in order
          if (other.high < at || other.low > edge.high) continue;
          add(other.low - 1, nowhere);
          add(std::min(other.high, edge.high), other.to);
        }
      }
      add(edge.high, nowhere);
    }
    out.states[i].edges = std::move(edges);
  }
  return out;
}

}  // namespace

bool Machine::empty() const {
  return std::none_of(states.begin(), states.end(), [](const State& state) { return state.accepts; });
}

bool Machine::matches(std::string_view text) const {
  uint32_t at = 0;
  for (const char c : text) {
    const auto byte = static_cast<uint8_t>(c);
    const std::vector<Edge>& edges = states[at].edges;
    const auto edge = std::find_if(edges.begin(), edges.end(),
                                   [&](const Edge& e) { return e.low <= byte && byte <= e.high; });
    if (edge == edges.end()) return false;
    at = edge->to;
  }
  return states[at].accepts;
}

Machine machine_of(const Grammar& grammar, const Expression& expression) {
  return Determiniser(transitions_in_place(grammar, expression)).run();
}

Machine both_of(const Machine& a, const Machine& b) { return product(a, b, true); }

Machine first_only(const Machine& a, const Machine& b) { return product(a, b, false); }

Expression expression_of(Machine machine) {
  return {.kind = Expression::Kind::machine, .machine = std::make_shared<const Machine>(std::move(machine))};
}

}  // namespace latente::grammar
