#include "grammar/automaton.h"

#include <algorithm>
#include <bitset>

#include "base/error.h"
#include "grammar/automaton_builder.h"

namespace latente::grammar {
namespace {

// Indices of items by a key below `keys`: those of key k are index[begin[k]] .. index[begin[k + 1] - 1].
struct Grouped {
  template <class Items, class Key>
  Grouped(const Items& items, size_t keys, Key key) : begin(keys + 1, 0), index(items.size()) {
    for (const auto& item : items) ++begin[key(item) + 1];
    for (size_t k = 0; k < keys; ++k) begin[k + 1] += begin[k];
    std::vector<uint32_t> next(begin.begin(), begin.end() - 1);
    for (size_t i = 0; i < items.size(); ++i) index[next[key(items[i])]++] = static_cast<uint32_t>(i);
  }
  std::span<const uint32_t> of(size_t key) const {
    return {index.data() + begin[key], begin[key + 1] - begin[key]};
  }
  std::vector<uint32_t> begin, index;
};

// From which states the end of their rule can be reached; without bytes: reading nothing. Transitions are
// walked backwards from the ends; a call waits until both the called rule and what follows can end.
class Ending {
 public:
  explicit Ending(const Transitions& all)
      : all_(all),
        edges_(all.edges, all.states, [](const auto& t) { return t.edge.target; }),
        empties_(all.empties, all.states, [](const auto& t) { return t.to; }),
        calls_by_next_(all.calls, all.states, [](const auto& t) { return t.call.next; }),
        calls_by_rule_(all.calls, all.rules.size(), [](const auto& t) { return t.call.rule; }),
        repeats_by_next_(all.repetitions, all.states, [](const auto& t) { return t.repetition.next; }),
        repeats_by_rule_(all.repetitions, all.rules.size(), [](const auto& t) { return t.repetition.rule; }),
        rule_of_start_(all.states, Automaton::none) {
    for (size_t r = 0; r < all.rules.size(); ++r)
      rule_of_start_[all.rules[r].start] = static_cast<uint32_t>(r);
  }

  std::vector<bool> find(bool over_bytes) {
    ends_.assign(all_.states, false);
    todo_.clear();
    for (const Transitions::Rule& rule : all_.rules) mark(rule.end);
    while (!todo_.empty()) {
      const uint32_t state = todo_.back();
      todo_.pop_back();
      if (over_bytes) {
        for (uint32_t i : edges_.of(state)) mark(all_.edges[i].from);
      }
      for (uint32_t i : empties_.of(state)) mark(all_.empties[i].from);
      for (uint32_t i : calls_by_next_.of(state)) look_at(all_.calls[i]);
      for (uint32_t i : repeats_by_next_.of(state)) look_at(all_.repetitions[i]);
      if (const uint32_t rule = rule_of_start_[state]; rule != Automaton::none) {
        for (uint32_t i : calls_by_rule_.of(rule)) look_at(all_.calls[i]);
        for (uint32_t i : repeats_by_rule_.of(rule)) look_at(all_.repetitions[i]);
      }
    }
    return std::move(ends_);
  }

 private:
  void mark(uint32_t state) {
    if (ends_[state]) return;
    ends_[state] = true;
    todo_.push_back(state);
  }
  void look_at(const Transitions::Call& call) {
    if (ends_[call.call.next] && ends_[all_.rules[call.call.rule].start]) mark(call.from);
  }
  void look_at(const Transitions::Repeat& repeat) {
    const Automaton::Repetition& repetition = repeat.repetition;
    if (ends_[repetition.next] && (repetition.min == 0 || ends_[all_.rules[repetition.rule].start]))
      mark(repeat.from);
  }

  const Transitions& all_;
  Grouped edges_, empties_, calls_by_next_, calls_by_rule_, repeats_by_next_, repeats_by_rule_;
  std::vector<uint32_t> rule_of_start_;
  std::vector<bool> ends_;
  std::vector<uint32_t> todo_;
};

// Drops transitions that lead nowhere; a repetition that cannot turn goes straight on, and one whose turns
// may be empty needs none.
void trim(Transitions& all, const std::vector<bool>& ends, const std::vector<bool>& empty_ends) {
  const auto callable = [&](uint32_t rule) { return ends[all.rules[rule].start]; };
  std::erase_if(all.edges, [&](const auto& t) { return !ends[t.edge.target]; });
  std::erase_if(all.empties, [&](const auto& t) { return !ends[t.to]; });
  std::erase_if(all.calls, [&](const auto& t) { return !ends[t.call.next] || !callable(t.call.rule); });
  std::erase_if(all.repetitions, [&](auto& t) {
    Automaton::Repetition& repetition = t.repetition;
    if (!ends[repetition.next]) return true;
    if (callable(repetition.rule) && repetition.max > 0) {
      if (empty_ends[all.rules[repetition.rule].start]) repetition.min = 0;
      return false;
    }
    if (repetition.min == 0) all.empties.push_back({t.from, repetition.next});
    return true;
  });
}

// States that only go on to one other, reading nothing, are that other.
void follow_single_empties(Transitions& all) {
  constexpr uint32_t several = Automaton::none - 1;
  std::vector<uint32_t> alias(all.states, Automaton::none);
  for (const auto& t : all.empties) alias[t.from] = alias[t.from] == Automaton::none ? t.to : several;
  for (const auto& t : all.edges) alias[t.from] = several;
  for (const auto& t : all.calls) alias[t.from] = several;
  for (const auto& t : all.repetitions) alias[t.from] = several;
  for (const auto& rule : all.rules) alias[rule.end] = several;
  for (uint32_t state = 0; state < all.states; ++state) {
    // Chains are shortened from where they end; one that runs in a circle was trimmed away.
    std::vector<uint32_t> chain;
    uint32_t at = state;
    for (; alias[at] < several; at = alias[at]) chain.push_back(at);
    for (uint32_t link : chain) alias[link] = at;
  }
  const auto move = [&](uint32_t& target) {
    if (alias[target] < several) target = alias[target];
  };
  std::erase_if(all.empties, [&](const auto& t) { return alias[t.from] < several; });
  for (auto& t : all.empties) move(t.to);
  for (auto& t : all.edges) move(t.edge.target);
  for (auto& t : all.calls) move(t.call.next);
  for (auto& t : all.repetitions) move(t.repetition.next);
  for (auto& rule : all.rules) move(rule.start);
}

}  // namespace

Automaton::Automaton(const Grammar& grammar) : root_(grammar.root) {
  LATENTE_ASSERT(grammar.root < grammar.rules.size());
  Transitions all = transitions_of(grammar);
  std::vector<bool> ends, empty_ends;
  {
    Ending ending(all);
    ends = ending.find(true);
    empty_ends = ending.find(false);
  }
  for (const Transitions::Rule& rule : all.rules)
    rules_.push_back({rule.name, ends[rule.start] ? rule.start : none, empty_ends[rule.start]});
  if (rules_[root_].start == none) fail("the grammar's rule {} matches no finite text", rules_[root_].name);
  trim(all, ends, empty_ends);
  follow_single_empties(all);

  const Grouped edges(all.edges, all.states, [](const auto& t) { return t.from; });
  const Grouped empties(all.empties, all.states, [](const auto& t) { return t.from; });
  const Grouped calls(all.calls, all.states, [](const auto& t) { return t.from; });
  const Grouped repetitions(all.repetitions, all.states, [](const auto& t) { return t.from; });
  std::vector<bool> final(all.states, false);
  for (const Transitions::Rule& rule : all.rules) final[rule.end] = true;

  // Only states that something leads to are kept.
  std::vector<uint32_t> number(all.states, none);
  std::vector<uint32_t> kept;
  const auto keep = [&](uint32_t state) {
    if (number[state] == none) {
      number[state] = static_cast<uint32_t>(kept.size());
      kept.push_back(state);
    }
    return number[state];
  };
  for (size_t r = 0; r < rules_.size(); ++r) {
    if (rules_[r].start != none) rules_[r].start = keep(all.rules[r].start);
  }
  for (size_t i = 0; i < kept.size(); ++i) {
    const uint32_t old = kept[i];
    State state;
    state.edges = static_cast<uint32_t>(edges_.size());
    state.empties = static_cast<uint32_t>(empties_.size());
    state.calls = static_cast<uint32_t>(calls_.size());
    state.final = final[old];
    for (uint32_t t : edges.of(old)) {
      Edge edge = all.edges[t].edge;
      edge.target = keep(edge.target);
      edges_.push_back(edge);
    }
    for (uint32_t t : empties.of(old)) empties_.push_back(keep(all.empties[t].to));
    for (uint32_t t : calls.of(old)) calls_.push_back({all.calls[t].call.rule, keep(all.calls[t].call.next)});
    for (uint32_t t : repetitions.of(old)) {
      Repetition repetition = all.repetitions[t].repetition;
      repetition.next = keep(repetition.next);
      state.repetition = static_cast<uint32_t>(repetitions_.size());
      repetitions_.push_back(repetition);
    }
    state.last = state.final && state.edges == edges_.size() && state.empties == empties_.size() &&
                 state.calls == calls_.size() && state.repetition == none;
    states_.push_back(state);
  }
  State behind;
  behind.edges = static_cast<uint32_t>(edges_.size());
  behind.empties = static_cast<uint32_t>(empties_.size());
  behind.calls = static_cast<uint32_t>(calls_.size());
  states_.push_back(behind);

  rank_rules();
  find_classes();
}

void Automaton::find_classes() {
  // Bytes differ where some range begins or ends between them.
  std::bitset<257> cut;
  for (const Edge& edge : edges_) {
    cut.set(edge.low);
    cut.set(size_t{edge.high} + 1);
  }
  for (uint32_t byte = 0; byte < 256; ++byte) {
    if (byte == 0 || cut[byte]) representatives_.push_back(static_cast<uint8_t>(byte));
    class_of_[byte] = static_cast<uint8_t>(representatives_.size() - 1);
  }
}

// Orders rules so that each comes behind those that call it before reading anything; a circle of such calls
// is left recursion.
void Automaton::rank_rules() {
  std::vector<std::vector<uint32_t>> first_calls(rules_.size());
  std::vector<uint32_t> seen(states(), none), todo;
  for (uint32_t r = 0; r < rules_.size(); ++r) {
    if (rules_[r].start == none) continue;
    const auto reach = [&](uint32_t state) {
      if (seen[state] == r) return;
      seen[state] = r;
      todo.push_back(state);
    };
    const auto calls_rule = [&](uint32_t rule) { first_calls[r].push_back(rule); };
    reach(rules_[r].start);
    while (!todo.empty()) {
      const uint32_t state = todo.back();
      todo.pop_back();
      for (uint32_t to : empties(state)) reach(to);
      for (const Call& call : calls(state)) {
        calls_rule(call.rule);
        if (rules_[call.rule].nullable) reach(call.next);
      }
      if (const Repetition* repetition = this->repetition(state)) {
        calls_rule(repetition->rule);
        if (repetition->min == 0) reach(repetition->next);
      }
    }
    std::sort(first_calls[r].begin(), first_calls[r].end());
    first_calls[r].erase(std::unique(first_calls[r].begin(), first_calls[r].end()), first_calls[r].end());
  }

  // Depth first, without recursion; ranks fall in the order in which rules are left.
  enum : uint8_t { unseen, open, left };
  std::vector<uint8_t> mark(rules_.size(), unseen);
  std::vector<std::pair<uint32_t, size_t>> path;
  auto rank = static_cast<uint32_t>(rules_.size());
  for (uint32_t root = 0; root < rules_.size(); ++root) {
    if (mark[root] != unseen) continue;
    path.emplace_back(root, 0);
    mark[root] = open;
    while (!path.empty()) {
      auto& [rule, next] = path.back();
      if (next == first_calls[rule].size()) {
        mark[rule] = left;
        rules_[rule].rank = --rank;
        path.pop_back();
        continue;
      }
      const uint32_t callee = first_calls[rule][next++];
      if (mark[callee] == open) {
        fail("the grammar's rule {} is left-recursive: it calls itself{} before it reads anything",
             rules_[callee].name, callee == rule ? "" : " (through " + rules_[rule].name + ")");
      }
      if (mark[callee] == unseen) {
        mark[callee] = open;
        path.emplace_back(callee, 0);
      }
    }
  }
}

}  // namespace latente::grammar
