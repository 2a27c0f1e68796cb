// Random grammars, and two slow ways to the answers that the automaton gives.
#pragma once

#include <memory>
#include <set>
#include <string>

#include "base/random.h"
#include "base/utf8.h"
#include "grammar/gbnf.h"
#include "grammar/machine.h"
#include "grammar/matcher.h"

namespace latente::grammar::test {

inline std::shared_ptr<const Automaton> compiled(const Grammar& grammar) {
  return std::make_shared<const Automaton>(grammar);
}
inline std::shared_ptr<const Automaton> compiled(std::string_view gbnf) { return compiled(parse_gbnf(gbnf)); }

// Where expressions that begin at some place of a text can end, straight from their definition.
class Definition {
 public:
  Definition(const Grammar& grammar, std::string_view text) : grammar_(grammar), text_(text) {}

  bool matches() { return ends(grammar_.rules[grammar_.root].body, 0).count(text_.size()) > 0; }

 private:
  using Places = std::set<size_t>;

  const Places& rule(uint32_t number, size_t at) {
    auto [found, is_new] = known_.try_emplace({number, at});
    if (is_new) found->second = ends(grammar_.rules[number].body, at);
    return found->second;
  }

  Places ends(const Expression& expression, size_t at) {
    using Kind = Expression::Kind;
    switch (expression.kind) {
      case Kind::text:
        return text_.substr(at).starts_with(expression.text) ? Places{at + expression.text.size()} : Places{};
      case Kind::characters: {
        size_t have = 0, want = 0;
        if (at == text_.size() || unicode::valid_character(text_, at, have, want) == 0) return {};
        size_t next = at;
        const char32_t c = unicode::decode(text_, next);
        return expression.set.contains(c) ? Places{next} : Places{};
      }
      case Kind::sequence: {
        Places now{at};
        for (const Expression& part : expression.parts) now = step(part, now);
        return now;
      }
      case Kind::choice: {
        Places all;
        for (const Expression& part : expression.parts) all.merge(ends(part, at));
        return all;
      }
      case Kind::repeat: {
        Places now{at}, all;
        for (uint32_t turn = 0;; ++turn) {
          if (turn >= expression.min) {
            const size_t before = all.size();
            all.insert(now.begin(), now.end());
            // Beyond the lower bound, what adds no place adds none later.
            if (before == all.size() && turn > expression.min) return all;
          }
          if (turn == expression.max || now.empty()) return all;
          // Empty turns: more of them change nothing.
          if (turn > text_.size() + 1 && turn < expression.min && now == step(expression.parts[0], now))
            turn = expression.min - 1;
          now = step(expression.parts[0], now);
        }
      }
      case Kind::machine: {
        Places all;
        for (size_t end = at; end <= text_.size(); ++end) {
          if (expression.machine->matches(text_.substr(at, end - at))) all.insert(end);
        }
        return all;
      }
      case Kind::rule:
        return rule(expression.rule, at);
    }
    return {};
  }

  Places step(const Expression& part, const Places& from) {
    Places all;
    for (size_t at : from) all.merge(ends(part, at));
    return all;
  }

  const Grammar& grammar_;
  std::string_view text_;
  std::map<std::pair<uint32_t, size_t>, Places> known_;
};

// Rules that call only later ones before they have read something: none is left-recursive.
class RandomGrammar {
 public:
  explicit RandomGrammar(Random& random) : random_(random) {}

  Grammar make() {
    Grammar grammar;
    rules_ = static_cast<uint32_t>(random_.between(1, 6));
    for (rule_ = 0; rule_ < rules_; ++rule_)
      grammar.rules.push_back({"r" + std::to_string(rule_), expression(4, false)});
    return grammar;
  }

 private:
  // after: something has been read.
  Expression expression(int depth, bool after) {
    switch (random_.below(depth == 0 ? 2 : 8)) {
      case 0:
        return text();
      case 1: {
        static const CharRange ranges[] = {{'a', 'a'}, {'a', 'b'}, {'b', 'c'}, {U'é', U'中'}, {'a', U'中'}};
        CharSet set{ranges[random_.below(5)]};
        return one_of(random_.chance(0.1) ? set.complement() : set);
      }
      case 2:
      case 3: {
        std::vector<Expression> parts;
        const int64_t count = random_.between(0, 4);
        for (int64_t i = 0; i < count; ++i) {
          parts.push_back(expression(depth - 1, after));
          after = after || parts.back().kind == Expression::Kind::characters ||
                  (parts.back().kind == Expression::Kind::text && !parts.back().text.empty());
        }
        return sequence(std::move(parts));
      }
      case 4: {
        std::vector<Expression> parts;
        const int64_t count = random_.between(1, 4);
        for (int64_t i = 0; i < count; ++i) parts.push_back(expression(depth - 1, after));
        return choice(std::move(parts));
      }
      case 5: {
        static const std::pair<uint32_t, uint32_t> bounds[] = {{0, Expression::unlimited},
                                                               {1, Expression::unlimited},
                                                               {0, 1},
                                                               {2, 3},
                                                               {3, Expression::unlimited},
                                                               {0, 70},
                                                               {70, 90},
                                                               {66, Expression::unlimited},
                                                               {0, 200},
                                                               {0, 100000},
                                                               {1, 12345},
                                                               {2, 2}};
        const auto [min, max] = bounds[random_.below(std::size(bounds))];
        return repeat(expression(depth - 1, after), min, max);
      }
      default: {
        const uint32_t first = after ? 0 : rule_ + 1;
        if (first >= rules_) return text();
        return call(first + static_cast<uint32_t>(random_.below(rules_ - first)));
      }
    }
  }
  Expression text() {
    static const char* const texts[] = {"a", "b", "c", "ab", "ba", "aa", "é", "中", "", "abc"};
    return literal(texts[random_.below(10)]);
  }

  Random& random_;
  uint32_t rules_ = 0, rule_ = 0;
};

// Short texts and pieces of characters, some of them twice.
inline std::vector<std::string> random_tokens(Random& random, int64_t count) {
  static const char* const pieces[] = {"a",  "b",    "c",    "aa",       "ab",   "é",
                                       "中", "\xC3", "\xA9", "\xE4\xB8", "\xAD", "x"};
  std::vector<std::string> tokens;
  for (int64_t i = 0; i < count; ++i) {
    std::string text;
    const int64_t length = random.between(0, 5);
    for (int64_t j = 0; j < length; ++j) text += pieces[random.below(std::size(pieces))];
    tokens.push_back(text);
  }
  return tokens;
}

inline bool admits(std::span<const uint64_t> mask, int32_t token) {
  return (mask[static_cast<size_t>(token) / 64] >> (token % 64) & 1) != 0;
}

}  // namespace latente::grammar::test
