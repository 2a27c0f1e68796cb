#include "grammar/machine.h"

#include <algorithm>
#include <deque>
#include <utility>

#include "base/error.h"
#include "grammar/automaton_builder.h"
#include "grammar/intern_table.h"

namespace latente::grammar {
namespace {

constexpr uint32_t nowhere = 0xFFFFFFFF;

[[noreturn]] void too_large() {
  fail("what is to hold at once needs more than {} states", Machine::most_states);
}

uint64_t hash_of(const std::vector<uint32_t>& set) {
  uint64_t hash = set.size();
  for (const uint32_t state : set) hash = mix(hash, state);
  return hash;
}
uint64_t hash_of(const std::pair<uint32_t, uint32_t>& pair) { return mix(mix(0, pair.first), pair.second); }

// States of a machine under construction, each of which stands for a `Name` of the things it is made of.
template <class Name>
class Naming {
 public:
  explicit Naming(Machine& out) : out_(out) {}
  uint32_t state(Name name) {
    return numbers_.find(
        hash_of(name), [&](uint32_t number) { return names_[number] == name; },
        [&] {
          if (out_.states.size() >= Machine::most_states) too_large();
          out_.states.emplace_back();
          names_.push_back(std::move(name));
          return static_cast<uint32_t>(names_.size() - 1);
        });
  }
  // The name of state `i`; null behind the last. It stays where it is.
  const Name* name(size_t i) const { return i < names_.size() ? &names_[i] : nullptr; }

 private:
  Machine& out_;
  InternTable numbers_;
  std::deque<Name> names_;
};

class Determiniser {
 public:
  Determiniser(const Transitions& from, Work& work)
      : work_(work), edges_(from.states), empties_(from.states), seen_(from.states), end_(from.rules[0].end) {
    work_.spend(from.states + from.edges.size() + from.empties.size());
    for (const Transitions::Edge& edge : from.edges) edges_[edge.from].push_back(edge.edge);
    for (const Transitions::Empty& empty : from.empties) empties_[empty.from].push_back(empty.to);
    start_ = from.rules[0].start;
  }

  Machine run() {
    Machine out;
    Naming<std::vector<uint32_t>> naming(out);
    naming.state(closure({start_}));
    for (size_t i = 0; const std::vector<uint32_t>* set = naming.name(i); ++i) {
      out.states[i].accepts = std::binary_search(set->begin(), set->end(), end_);
      std::vector<Automaton::Edge> all;
      for (const uint32_t state : *set) all.insert(all.end(), edges_[state].begin(), edges_[state].end());
      work_.spend(set->size() + all.size());
      std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.low < b.low; });
      // Between two neighbouring bounds every byte leads to the same states.
      std::vector<int> bounds;
      for (const Automaton::Edge& edge : all) {
        bounds.push_back(edge.low);
        bounds.push_back(edge.high + 1);
      }
      std::sort(bounds.begin(), bounds.end());
      bounds.erase(std::unique(bounds.begin(), bounds.end()), bounds.end());
      std::vector<Machine::Edge> edges;
      std::vector<Automaton::Edge> open;  // that read the bytes from bounds[k] on
      size_t next = 0;
      for (size_t k = 0; k + 1 < bounds.size(); ++k) {
        std::erase_if(open, [&](const Automaton::Edge& edge) { return edge.high < bounds[k]; });
        for (; next < all.size() && all[next].low == bounds[k]; ++next) open.push_back(all[next]);
        if (open.empty()) continue;
        std::vector<uint32_t> targets;
        for (const Automaton::Edge& edge : open) targets.push_back(edge.target);
        edges.push_back({static_cast<uint8_t>(bounds[k]), static_cast<uint8_t>(bounds[k + 1] - 1),
                         naming.state(closure(targets))});
      }
      out.states[i].edges = std::move(edges);
    }
    return out;
  }

 private:
  // Sorted, with what can be reached reading nothing.
  std::vector<uint32_t> closure(const std::vector<uint32_t>& states) {
    std::vector<uint32_t> all;
    ++round_;
    const auto reach = [&](uint32_t state) {
      if (std::exchange(seen_[state], round_) != round_) all.push_back(state);
    };
    work_.spend(1 + states.size());
    for (const uint32_t state : states) reach(state);
    for (size_t i = 0; i < all.size(); ++i) {
      work_.spend(1 + empties_[all[i]].size());
      for (const uint32_t to : empties_[all[i]]) reach(to);
    }
    std::sort(all.begin(), all.end());
    return all;
  }

  Work& work_;
  std::vector<std::vector<Automaton::Edge>> edges_;
  std::vector<std::vector<uint32_t>> empties_;
  std::vector<uint64_t> seen_;  // in which closure
  uint64_t round_ = 0;
  uint32_t start_ = 0, end_;
};

// Texts of `a` that match `b` (wanted), or do not.
Machine product(const Machine& a, const Machine& b, bool wanted, Work& work) {
  static const std::vector<Machine::Edge> no_edges;
  Machine out;
  Naming<std::pair<uint32_t, uint32_t>> naming(out);
  naming.state({0, 0});
  for (size_t i = 0; const auto* name = naming.name(i); ++i) {
    const auto [mine, theirs] = *name;
    const bool matches = theirs != nowhere && b.states[theirs].accepts;
    out.states[i].accepts = a.states[mine].accepts && matches == wanted;
    const std::vector<Machine::Edge>& others = theirs != nowhere ? b.states[theirs].edges : no_edges;
    std::vector<Machine::Edge> edges;
    auto other = others.begin();
    work.spend(2 + a.states[mine].edges.size() + others.size());
    for (const Machine::Edge& edge : a.states[mine].edges) {
      int at = edge.low;
      const auto add = [&](int last, uint32_t to) {
        if (last < at) return;
        work.spend(1);
        if (to != nowhere || !wanted)
          edges.push_back(
              {static_cast<uint8_t>(at), static_cast<uint8_t>(last), naming.state({edge.to, to})});
        at = last + 1;
      };
      while (other != others.end() && other->high < at) ++other;
      while (other != others.end() && other->low <= edge.high) {
        add(other->low - 1, nowhere);
        add(std::min(other->high, edge.high), other->to);
        if (other->high > edge.high) break;  // it goes on in the next edge
        ++other;
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

Machine machine_of(const Grammar& grammar, const Expression& expression, Work& work) {
  return Determiniser(transitions_in_place(grammar, expression), work).run();
}

Machine both_of(const Machine& a, const Machine& b, Work& work) { return product(a, b, true, work); }

Machine first_only(const Machine& a, const Machine& b, Work& work) { return product(a, b, false, work); }

Expression expression_of(Machine machine) {
  return {.kind = Expression::Kind::machine, .machine = std::make_shared<const Machine>(std::move(machine))};
}

}  // namespace latente::grammar
