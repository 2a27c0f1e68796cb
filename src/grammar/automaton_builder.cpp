#include "grammar/automaton_builder.h"

#include <algorithm>

#include "base/error.h"
#include "grammar/machine.h"

namespace latente::grammar {
namespace {

using Kind = Expression::Kind;

// What is at most this large, written out, is; other repetitions count.
constexpr uint64_t largest_written_out = 64;

// States that an expression takes, about.
uint64_t size_of(const Expression& expression) {
  switch (expression.kind) {
    case Kind::text:
      return std::max<uint64_t>(expression.text.size(), 1);
    case Kind::characters:
    case Kind::rule:
      return 1;
    case Kind::machine:
      return expression.machine->states.size();
    case Kind::repeat:
      break;
    case Kind::sequence:
    case Kind::choice: {
      uint64_t size = 1;
      for (const Expression& part : expression.parts) size += size_of(part);
      return size;
    }
  }
  const uint64_t body = size_of(expression.parts[0]);
  const uint64_t turns =
      expression.max == Expression::unlimited ? uint64_t{expression.min} + 1 : expression.max;
  return turns * body > largest_written_out ? body + 1
                                            : turns * body;  // counted, the body is a rule of its own
}

bool counted(const Expression& repeat) {
  if (repeat.max == Expression::unlimited && repeat.min <= 1) return false;
  if (repeat.min == 0 && repeat.max == 1) return false;
  const uint64_t turns = repeat.max == Expression::unlimited ? uint64_t{repeat.min} + 1 : repeat.max;
  return turns * size_of(repeat.parts[0]) > largest_written_out;
}

class Builder {
 public:
  explicit Builder(const Grammar& grammar) {
    for (const Grammar::Rule& rule : grammar.rules) add_rule(rule.name, rule.body);
    for (size_t i = 0; i < bodies_.size(); ++i) {  // grows meanwhile
      const Transitions::Rule rule = out_.rules[i];
      build(*bodies_[i], rule.start, rule.end, rule.name);
    }
  }
  // One expression, with everything in place.
  Builder(const Grammar& grammar, const Expression& expression) : in_place_(&grammar) {
    add_rule("", expression);
    build(expression, out_.rules[0].start, out_.rules[0].end, "");
  }
  Transitions take() { return std::move(out_); }

 private:
  uint32_t state() {
    if (out_.states >= Automaton::max_states) too_large();
    return out_.states++;
  }
  [[noreturn]] static void too_large() {
    fail("the grammar is too large: it needs more than {} states or {} transitions", Automaton::max_states,
         Automaton::max_edges);
  }

  uint32_t add_rule(const std::string& name, const Expression& body) {
    const uint32_t start = state(), end = state();
    out_.rules.push_back({name, start, end});
    bodies_.push_back(&body);
    return static_cast<uint32_t>(out_.rules.size() - 1);
  }

  void edge(uint32_t from, ByteRange bytes, uint32_t to) {
    if (out_.edges.size() >= Automaton::max_edges) too_large();
    out_.edges.push_back({from, {bytes.low, bytes.high, to}});
  }
  void empty(uint32_t from, uint32_t to) {
    if (out_.empties.size() >= Automaton::max_edges) too_large();
    out_.empties.push_back({from, to});
  }

  // Leads from `from` to `to` over what the expression matches. Nothing leaves `to` here, and nothing enters
  // `from`: expressions side by side may share both.
  void build(const Expression& expression, uint32_t from, uint32_t to, const std::string& rule) {
    switch (expression.kind) {
      case Kind::text:
        return text(expression.text, from, to);
      case Kind::characters:
        return characters(expression.set, from, to);
      case Kind::sequence: {
        if (expression.parts.empty()) return empty(from, to);
        uint32_t at = from;
        for (size_t i = 0; i < expression.parts.size(); ++i) {
          const uint32_t next = i + 1 == expression.parts.size() ? to : state();
          build(expression.parts[i], at, next, rule);
          at = next;
        }
        return;
      }
      case Kind::choice:
        return choose(expression, from, to, rule);
      case Kind::repeat:
        return repeat(expression, from, to, rule);
      case Kind::machine:
        return machine(*expression.machine, from, to);
      case Kind::rule:
        if (in_place_ != nullptr) {
          if (++depth_ > most_depth) fail("{}: calls itself, or nests too deep", rule);
          const Grammar::Rule& called = in_place_->rules[expression.rule];
          build(called.body, from, to, called.name);
          --depth_;
          return;
        }
        if (out_.calls.size() >= Automaton::max_edges) too_large();
        out_.calls.push_back({from, {expression.rule, to}});
    }
  }

  void machine(const Machine& machine, uint32_t from, uint32_t to) {
    const uint32_t first = out_.states;
    for (size_t i = 0; i < machine.states.size(); ++i) state();
    empty(from, first);
    for (size_t i = 0; i < machine.states.size(); ++i) {
      const uint32_t at = first + static_cast<uint32_t>(i);
      if (machine.states[i].accepts) empty(at, to);
      for (const Machine::Edge& e : machine.states[i].edges) edge(at, {e.low, e.high}, first + e.to);
    }
  }

  void text(const std::string& bytes, uint32_t from, uint32_t to) {
    if (bytes.empty()) return empty(from, to);
    uint32_t at = from;
    for (size_t i = 0; i < bytes.size(); ++i) {
      const uint32_t next = i + 1 == bytes.size() ? to : state();
      const auto byte = static_cast<uint8_t>(bytes[i]);
      edge(at, {byte, byte}, next);
      at = next;
    }
  }

  // Sequences of bytes share their ends.
  void characters(const CharSet& set, uint32_t from, uint32_t to) {
    std::map<std::vector<ByteRange>, uint32_t> tails;
    for_each_utf8_sequence(set, [&](std::span<const ByteRange> bytes) {
      uint32_t target = to;
      for (size_t i = bytes.size(); i-- > 1;) {
        auto [at, is_new] = tails.try_emplace({bytes.begin() + static_cast<ptrdiff_t>(i), bytes.end()}, 0);
        if (is_new) {
          at->second = state();
          edge(at->second, bytes[i], target);
        }
        target = at->second;
      }
      edge(from, bytes[0], target);
    });
  }

  // Texts share their beginnings: an enumeration of thousands is read by one state at a time.
  void choose(const Expression& expression, uint32_t from, uint32_t to, const std::string& rule) {
    std::map<std::pair<uint32_t, char>, uint32_t> tree;
    for (const Expression& part : expression.parts) {
      if (part.kind != Kind::text || part.text.empty()) {
        build(part, from, to, rule);
        continue;
      }
      uint32_t at = from;
      for (const char c : part.text) {
        auto [next, is_new] = tree.try_emplace({at, c}, 0);
        if (is_new) {
          next->second = state();
          const auto byte = static_cast<uint8_t>(c);
          edge(at, {byte, byte}, next->second);
        }
        at = next->second;
      }
      empty(at, to);
    }
  }

  void repeat(const Expression& expression, uint32_t from, uint32_t to, const std::string& rule) {
    const Expression& body = expression.parts[0];
    if (in_place_ == nullptr && counted(expression)) {
      const uint32_t at = state();
      empty(from, at);
      const uint32_t turn = add_rule(rule, body);
      out_.repetitions.push_back({at, {turn, expression.min, expression.max, to}});
      return;
    }
    uint32_t at = from;
    for (uint32_t i = 0; i < expression.min; ++i) {
      const uint32_t next = state();
      build(body, at, next, rule);
      at = next;
    }
    if (expression.max == Expression::unlimited) {
      const uint32_t loop = state(), back = state();
      empty(at, loop);
      build(body, loop, back, rule);
      empty(back, loop);
      return empty(loop, to);
    }
    for (uint32_t i = expression.min; i < expression.max; ++i) {
      const uint32_t next = state();
      build(body, at, next, rule);
      empty(at, to);
      at = next;
    }
    empty(at, to);
  }

  static constexpr int most_depth = 2000;

  const Grammar* in_place_ = nullptr;
  int depth_ = 0;  // of calls written out
  Transitions out_;
  std::vector<const Expression*> bodies_;
};

}  // namespace

Transitions transitions_of(const Grammar& grammar) { return Builder(grammar).take(); }

Transitions transitions_in_place(const Grammar& grammar, const Expression& expression) {
  return Builder(grammar, expression).take();
}

}  // namespace latente::grammar
