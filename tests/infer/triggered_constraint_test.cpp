#include "infer/triggered_constraint.h"

#include <gtest/gtest.h>

#include "grammar/gbnf.h"
#include "infer/support.h"

namespace latente {
namespace {

using namespace test;

// Token i is the byte i; 256 ends a text, and some have several bytes.
constexpr int32_t stop = 256, both = 257;
const std::shared_ptr<const grammar::Vocabulary>& vocabulary() {
  static const auto one = [] {
    std::vector<std::string> texts(258);
    for (size_t i = 0; i < 256; ++i) texts[i] = std::string(1, static_cast<char>(i));
    texts[both] = "x<call>12";
    return std::make_shared<const grammar::Vocabulary>(texts, std::vector<int32_t>{stop});
  }();
  return one;
}

TriggeredConstraint::Mark mark(const std::string& text, const std::string& rules) {
  return {text, std::make_shared<grammar::TokenGrammar>(
                    std::make_shared<grammar::Automaton>(grammar::parse_gbnf(rules, "test")), vocabulary())};
}

TriggeredConstraint digits(TriggeredConstraint::Scope scope = {}) {
  return TriggeredConstraint({mark("<call>", "root ::= \"<call>\" [0-9]+ \".\"")}, std::move(scope));
}

bool accepts(TokenConstraint& constraint, const std::string& text) {
  return std::all_of(text.begin(), text.end(),
                     [&](char c) { return constraint.accept(static_cast<unsigned char>(c)); });
}
bool admits(TokenConstraint& constraint, int32_t token) {
  const std::span<const uint64_t> mask = constraint.admitted();
  return mask.empty() || (mask[static_cast<size_t>(token) / 64] >> (token % 64) & 1) != 0;
}

TEST(TriggeredConstraint, HoldsFromTheMarkOn) {
  TriggeredConstraint constraint = digits();
  EXPECT_TRUE(accepts(constraint, "Hello <cal, <<ca"));
  EXPECT_TRUE(admits(constraint, 'z'));
  EXPECT_TRUE(admits(constraint, stop));
  const std::unique_ptr<TokenConstraint> other = constraint.fork();
  EXPECT_TRUE(accepts(constraint, "<call>"));
  EXPECT_FALSE(admits(constraint, 'z'));
  EXPECT_FALSE(admits(constraint, stop));
  EXPECT_TRUE(admits(constraint, '7'));
  EXPECT_FALSE(constraint.accept('z'));
  EXPECT_TRUE(accepts(constraint, "12."));
  EXPECT_TRUE(constraint.finished());
  EXPECT_TRUE(accepts(*other, "zz")) << "a fork goes its own way";
  EXPECT_FALSE(other->finished());
}

TEST(TriggeredConstraint, MarksMayLieInsideOfTokens) {
  TriggeredConstraint constraint = digits();
  EXPECT_TRUE(constraint.accept(both));
  EXPECT_FALSE(admits(constraint, 'z'));
  EXPECT_TRUE(admits(constraint, '3'));
  // With what the grammar does not know: it does not hold, but at the next mark.
  TriggeredConstraint letters({mark("<call>", "root ::= \"<call>\" [a-z]+")}, {});
  EXPECT_TRUE(letters.accept(both));
  EXPECT_TRUE(admits(letters, 'Z'));
  EXPECT_TRUE(accepts(letters, "<call>"));
  EXPECT_FALSE(admits(letters, 'Z'));
}

TEST(TriggeredConstraint, NotInsideOfReasoning) {
  TriggeredConstraint constraint = digits({"<think>", "</think>"});
  EXPECT_TRUE(accepts(constraint, " \n<think>a <call>zz</think>"));
  EXPECT_TRUE(admits(constraint, 'z'));
  EXPECT_TRUE(accepts(constraint, "\nSo: <call>"));
  EXPECT_FALSE(admits(constraint, 'z'));
  TriggeredConstraint opened = digits({"<think>", "</think>", true});
  EXPECT_TRUE(accepts(opened, "<call>zz</think><call>"));
  EXPECT_FALSE(admits(opened, 'z'));
  TriggeredConstraint none = digits({"<think>", "</think>"});
  EXPECT_TRUE(accepts(none, "<thing> <call>"));
  EXPECT_FALSE(admits(none, 'z'));
}

TEST(TriggeredConstraint, AtTheBeginningAlone) {
  const auto made = [] {
    return TriggeredConstraint(
        {mark("f(", "root ::= \"f(\" [0-9] \")\""), mark("g(", "root ::= \"g(\" [a-z]")},
        {.at_beginning = true});
  };
  TriggeredConstraint constraint = made();
  EXPECT_TRUE(accepts(constraint, " \ng("));
  EXPECT_FALSE(admits(constraint, '1'));
  EXPECT_TRUE(admits(constraint, 'a'));
  TriggeredConstraint later = made();
  EXPECT_TRUE(accepts(later, "x f("));
  EXPECT_TRUE(admits(later, 'z'));
}

// Before the mark a reply is what it would be without; from there on it matches, with drafts and without.
TEST(TriggeredConstraint, InTheEngine) {
  int64_t called = 0;
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    const Transformer model = made({.mtp = 1, .vocabulary = 258}, seed, 0.3);
    const RunnerOptions how{.context = 160, .page_size = 16, .chunk = 32};
    Random random(seed);
    const std::vector<int32_t> prompt = random_tokens(random, 6, 256);
    GenerationOptions options;
    options.max_tokens = 60;
    options.draft = 0;
    Engine engine(backend(), model, how);
    const std::vector<int32_t> free = generated(engine, prompt, options).tokens;
    // What it writes as fifth counts as the mark.
    if (free[4] >= 128) continue;
    const std::string byte(1, static_cast<char>(free[4]));
    options.constraint = std::make_shared<TriggeredConstraint>(
        std::vector{mark(byte, fmt::format("root ::= [\\x{:02x}] [0-9]+ \".\"", free[4]))},
        TriggeredConstraint::Scope());
    const size_t at = static_cast<size_t>(std::find(free.begin(), free.end(), free[4]) - free.begin());
    std::vector<int32_t> want;
    for (int64_t draft : {0, 3, -1}) {
      options.draft = draft;
      Engine fresh(backend(), model, how);
      const std::vector<int32_t> text = generated(fresh, prompt, options).tokens;
      ASSERT_GT(text.size(), at + 1);
      EXPECT_TRUE(std::equal(text.begin(), text.begin() + static_cast<int64_t>(at) + 1, free.begin()));
      for (size_t i = at + 1; i < text.size(); ++i)
        EXPECT_TRUE((text[i] >= '0' && text[i] <= '9') || (text[i] == '.' && i + 1 == text.size()));
      if (draft == 0) want = text;
      EXPECT_EQ(text, want) << "draft " << draft;
    }
    ++called;
  }
  EXPECT_GT(called, 3);
}

}  // namespace
}  // namespace latente
