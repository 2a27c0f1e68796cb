#include "grammar/machine.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "grammar/support.h"

namespace latente::grammar {
namespace {

using namespace test;

// Random texts of few different characters, among them ones of several bytes.
std::string random_text(Random& random) {
  std::string text;
  for (int64_t length = random.between(0, 6); length > 0; --length) {
    const char* const pieces[] = {"a", "b", "c", "é", "😀"};
    text += pieces[random.below(5)];
  }
  return text;
}

Expression random_expression(Random& random, int depth) {
  switch (depth == 0 ? random.below(2) : random.below(5)) {
    case 0:
      return literal(random_text(random).substr(0, 1) == "a" ? "a" : "é");
    case 1:
      return one_of(random.chance(0.5) ? CharSet{{'a', 'b'}} : CharSet{{'b', 0x1F600}});
    case 2:
      return sequence({random_expression(random, depth - 1), random_expression(random, depth - 1)});
    case 3:
      return choice({random_expression(random, depth - 1), random_expression(random, depth - 1)});
    default: {
      const auto min = static_cast<uint32_t>(random.below(3));
      const uint32_t max =
          random.chance(0.5) ? Expression::unlimited : min + static_cast<uint32_t>(random.below(3));
      return repeat(random_expression(random, depth - 1), min, max);
    }
  }
}

Grammar of_expression(Expression expression) {
  Grammar grammar;
  grammar.rules.push_back({"root", std::move(expression)});
  return grammar;
}

bool matches_expression(const Expression& expression, const std::string& text) {
  const Grammar grammar = of_expression(expression);
  return Definition(grammar, text).matches();
}

TEST(Machine, SaysOfTextsWhatTheExpressionsSay) {
  int64_t matched = 0, both = 0, first = 0;
  for (uint64_t seed = 1; seed <= 150; ++seed) {
    Random random(seed);
    const Expression a = random_expression(random, 3), b = random_expression(random, 3);
    Work work;
    const Machine of_a = machine_of({}, a, work), of_b = machine_of({}, b, work);
    const Machine of_both = both_of(of_a, of_b, work), of_first = first_only(of_a, of_b, work);
    bool any_of_both = false;
    for (int i = 0; i < 60; ++i) {
      const std::string text = random_text(random);
      const bool in_a = matches_expression(a, text), in_b = matches_expression(b, text);
      ASSERT_EQ(of_a.matches(text), in_a) << "seed " << seed << ": " << text;
      ASSERT_EQ(of_both.matches(text), in_a && in_b) << "seed " << seed << ": " << text;
      ASSERT_EQ(of_first.matches(text), in_a && !in_b) << "seed " << seed << ": " << text;
      any_of_both |= in_a && in_b;
      matched += in_a, both += in_a && in_b, first += in_a && !in_b;
    }
    if (!any_of_both) continue;
    // Compiled into a grammar it is the same again.
    EXPECT_FALSE(of_both.empty());
    const auto automaton = compiled(of_expression(expression_of(of_both)));
    for (int i = 0; i < 20; ++i) {
      const std::string text = random_text(random);
      ASSERT_EQ(matches(automaton, text), of_both.matches(text)) << "seed " << seed << ": " << text;
    }
  }
  EXPECT_GT(matched, 500);
  EXPECT_GT(both, 100);
  EXPECT_GT(first, 200);
}

TEST(Machine, ReadsRulesInPlaceUnlessTheyCallThemselves) {
  Grammar grammar;
  grammar.rules.push_back({"pair", sequence({call(1), literal("-"), call(1)})});
  grammar.rules.push_back({"digits", repeat(one_of({{'0', '9'}}), 1, 3)});
  Work work;
  const Machine machine = machine_of(grammar, call(0), work);
  EXPECT_TRUE(machine.matches("12-345"));
  EXPECT_FALSE(machine.matches("12-3456"));
  EXPECT_TRUE(first_only(machine, machine, work).empty());
  grammar.rules.push_back(
      {"nested", choice({literal("x"), sequence({literal("("), call(2), literal(")")})})});
  EXPECT_THROW(machine_of(grammar, call(2), work), Error);
  EXPECT_THROW(machine_of(grammar, repeat(literal("abcdefgh"), 50'000, 50'000), work), Error);
}

}  // namespace
}  // namespace latente::grammar
