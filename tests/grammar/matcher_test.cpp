#include "grammar/matcher.h"

#include <gtest/gtest.h>

#include <chrono>

#include "base/error.h"
#include "grammar/support.h"

namespace latente::grammar {
namespace {

using namespace test;

// Texts are matched as the grammar's definition says: random grammars, texts made of their alphabet.
TEST(Matcher, MatchesWhatTheGrammarSays) {
  int64_t grammars = 0, matched = 0, refused = 0;
  for (uint64_t seed = 1; seed <= 3000; ++seed) {
    Random random(seed);
    const Grammar grammar = RandomGrammar(random).make();
    std::shared_ptr<const Automaton> automaton;
    try {
      automaton = compiled(grammar);
    } catch (const Error& error) {
      // A rule may still call itself first, through something that can be empty, or never end.
      ASSERT_TRUE(std::string(error.what()).find("left-recursive") != std::string::npos ||
                  std::string(error.what()).find("no finite text") != std::string::npos)
          << error.what();
      continue;
    }
    ++grammars;
    static const char* const pieces[] = {"a", "b", "c", "é", "中"};
    std::set<std::string> texts{""};
    for (int64_t i = 0; i < 30; ++i) {
      std::string text;
      const int64_t length = random.between(1, i < 20 ? 4 : 9);
      for (int64_t j = 0; j < length; ++j) text += pieces[random.below(i % 2 == 0 ? 2 : 5)];
      texts.insert(text);
    }
    for (const std::string& text : texts) {
      const bool want = Definition(grammar, text).matches();
      ASSERT_EQ(matches(automaton, text), want) << "seed " << seed << ", text " << text;
      (want ? matched : refused) += 1;
    }
  }
  EXPECT_GT(grammars, 1000);
  EXPECT_GT(matched, 3000);
  EXPECT_GT(refused, 3000);
}

// Masks are what trying each token finds, along random walks; copies are not changed by what is done to
// others; and every admitted place can be left or ended.
TEST(Matcher, MasksAreWhatTryingTokensFinds) {
  int64_t masks = 0, ends = 0;
  for (uint64_t seed = 1; seed <= 2000; ++seed) {
    Random random(seed, 7);
    const Grammar grammar = RandomGrammar(random).make();
    std::shared_ptr<const Automaton> automaton;
    try {
      automaton = compiled(grammar);
    } catch (const Error&) {
      continue;
    }
    const std::vector<std::string> tokens = random_tokens(random, random.between(5, 150));
    auto vocabulary = std::make_shared<Vocabulary>(tokens, std::vector<int32_t>{1, 3});
    Matcher matcher(std::make_shared<TokenGrammar>(automaton, vocabulary));
    std::vector<uint64_t> mask(vocabulary->words() + 1), again(mask.size());
    for (int step = 0; step < 25; ++step) {
      matcher.admitted(mask);
      ++masks;
      EXPECT_EQ(mask.back(), 0U);
      std::vector<int32_t> next;
      for (int32_t token = 0; token < static_cast<int32_t>(tokens.size()); ++token) {
        Matcher copy = matcher;
        const bool accepted = copy.accept(token);
        ASSERT_EQ(admits(mask, token), accepted)
            << "seed " << seed << ", step " << step << ", token " << token;
        if (accepted) next.push_back(token);
        if (token == 1) {
          ASSERT_EQ(accepted, matcher.can_end());
          ends += accepted ? 1 : 0;
        }
      }
      ASSERT_FALSE(matcher.accept(-1));
      ASSERT_FALSE(matcher.accept(static_cast<int32_t>(tokens.size())));
      matcher.admitted(again);
      ASSERT_EQ(mask, again);
      ASSERT_TRUE(matcher.can_end() || !matcher.finished());
      if (next.empty()) break;
      ASSERT_TRUE(matcher.accept(next[random.below(next.size())]));
      if (matcher.finished() && !matcher.can_end()) break;  // a stop token came
    }
  }
  EXPECT_GT(masks, 3000);
  EXPECT_GT(ends, 300);
}

}  // namespace
}  // namespace latente::grammar
