#include "grammar/matcher.h"

#include <gtest/gtest.h>

#include <cstring>

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

// Around the bounds of counted repetitions, too, at every place.
TEST(Matcher, MasksNearBoundsAreWhatTryingTokensFinds) {
  const std::pair<const char*, const char*> cases[] = {
      {"root ::= [ab]{66,70} \"b\"?", "ab"},
      {"root ::= ([ab] | \"c\" \"a\"?){65,80} \"ab\"", "acb"},
      {"root ::= x{0,70} y{70,}\nx ::= \"a\" | \"é\" | \"bb\"\ny ::= [ab]", "aéb"},
      {"root ::= (\"a\"{0,66} \"b\"){3,65} \"c\"*", "aab"},
      {"root ::= (\"ab\"{33,34} \"a\"?)*", "ab"},
      {"root ::= \"c\" ([a-c]{68} | \"a\"{67}) end\nend ::= \"b\" | \"\"", "a"},
  };
  int64_t masks = 0;
  for (const auto& [grammar, piece] : cases) {
    Random random(5);
    std::vector<std::string> tokens = random_tokens(random, 300);
    for (int64_t i = 0; i < 60; ++i) {
      std::string text;
      for (int64_t j = random.between(1, 12); j > 0; --j) text += random.chance(0.8) ? "a" : "b";
      tokens.push_back(text);
    }
    const auto vocabulary = std::make_shared<Vocabulary>(tokens, std::vector<int32_t>{});
    Matcher matcher(std::make_shared<TokenGrammar>(compiled(std::string_view(grammar)), vocabulary));
    std::vector<uint64_t> mask(vocabulary->words());
    matcher.accept_text("c");
    for (size_t i = 0;
         i < 150 && matcher.accept_text(std::string_view(piece).substr(i % std::strlen(piece), 1)); ++i) {
      matcher.admitted(mask);
      ++masks;
      for (int32_t token = 0; token < static_cast<int32_t>(tokens.size()); ++token) {
        Matcher copy = matcher;
        ASSERT_EQ(admits(mask, token), copy.accept(token))
            << grammar << ", after " << i << ", token " << tokens[static_cast<size_t>(token)];
      }
    }
  }
  EXPECT_GT(masks, 400);
}

// A text that goes on for long does not make what is known of it larger.
struct Long {
  const char* grammar;
  std::string piece;  // repeated
};

TEST(Matcher, WorkAndMemoryAreBounded) {
  const Long cases[] = {
      {"root ::= (\"a\" | \"a\")*", "a"},
      {"root ::= ((\"a\"? \"a\"?)* (\"a\"* \"a\"*)*)*", "a"},
      {"root ::= x x x x\nx ::= y*\ny ::= z z?\nz ::= \"a\" | \"aa\" | \"a\" z", "a"},
      {"root ::= \"a\" root | \"\"", "a"},
      {"root ::= item*\nitem ::= \"(\" [^()]* \")\" | \"(\" [a-z]* \")\"", "(abc)"},
      {"root ::= \"a\"{0,100000} \"b\"?", "a"},
      {"root ::= (\"a\" | \"aa\"){0,100000} (\"a\"{0,1000}){0,1000}", "a"},
      {"root ::= ((\"a\"{0,100}){0,100}){0,100}", "a"},
      {"root ::= s*\ns ::= t | t s\nt ::= \"a\" | \"a\" t", "a"},
      {"root ::= (.* \"x\" .*)*", "ax"},
  };
  for (const Long& one : cases) {
    auto all = std::make_shared<Configurations>(compiled(one.grammar), 16);
    uint32_t at = all->start();
    size_t items = 0;
    for (int i = 0; i < 20000; ++i) {
      for (const char c : one.piece) {
        if (all->full()) all->collect(std::span(&at, 1));
        at = all->step(at, static_cast<uint8_t>(c));
        ASSERT_NE(at, Configurations::none) << one.grammar << " " << i;
      }
      items = std::max(items, all->items(at).size());
    }
    EXPECT_LT(items, 40U) << one.grammar;
    EXPECT_LT(all->work(), 20000U * one.piece.size() * 200) << one.grammar;
    EXPECT_LT(all->memory_bytes(), size_t{100} << 20) << one.grammar;
  }
}

// Repetitions with huge bounds: the same masks at every place far from them.
TEST(Matcher, CountsFarFromTheirBoundsAreAlike) {
  Configurations all(compiled("root ::= [ab]{5000,100000}"), 20);
  std::set<uint32_t> canonical;
  uint32_t at = all.start();
  for (int i = 0; i < 100000; ++i) {
    if (all.full()) {
      all.collect(std::span(&at, 1));
      canonical.clear();
    }
    canonical.insert(all.canonical(at));
    at = all.step(at, 'a');
    ASSERT_NE(at, Configurations::none);
    ASSERT_EQ(all.can_end(at), i + 1 >= 5000);
    ASSERT_LT(canonical.size(), 60U);
  }
  EXPECT_EQ(all.step(at, 'a'), Configurations::none);
}

// Nesting beyond the limit is not admitted; before it, all is as without.
TEST(Matcher, NestingIsLimited) {
  Configurations::Limits limits;
  limits.depth = 50;
  Configurations all(compiled("root ::= \"(\" root \")\" | \"x\""), 8, limits);
  uint32_t at = all.start();
  int depth = 0;
  for (uint32_t next = at; (next = all.step(at, '(')) != Configurations::none && !all.items(next).empty();
       ++depth)
    at = next;
  EXPECT_GT(depth, 45);
  EXPECT_LT(depth, 52);
  at = all.step(at, 'x');
  for (int i = 0; i < depth; ++i) {
    ASSERT_NE(at, Configurations::none);
    ASSERT_FALSE(all.can_end(at));
    at = all.step(at, ')');
  }
  EXPECT_TRUE(all.can_end(at));
}

// A grammar for which bounded work cannot do says so.
TEST(Matcher, TooAmbiguousIsAnError) {
  Configurations::Limits limits;
  limits.depth = 1 << 20;
  limits.step = 1 << 13;
  Configurations all(compiled("root ::= \"a\" root \"a\" | \"b\" root \"b\" | \"a\" | \"b\""), 8, limits);
  uint32_t at = all.start();
  try {
    for (int i = 0; i < 100000; ++i) {
      if (all.full()) all.collect(std::span(&at, 1));
      at = all.step(at, 'a');
      ASSERT_NE(at, Configurations::none);
    }
    FAIL() << "palindromes of any length";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("too ambiguous: more than 8192 ways"), std::string::npos)
        << error.what();
  }
}

// Thousands of ways to read each place of a text cost whoever asks for the masks an error, and everybody else
// no more than half a second.
TEST(Matcher, MasksThatCostTooMuchAreAnError) {
  std::string rules = "root ::= (r0";
  for (int i = 1; i < 1000; ++i) rules += " | r" + std::to_string(i);
  rules += ")*\n";
  for (int i = 0; i < 1000; ++i)
    rules += fmt::format("r{} ::= [a-z]{{{},{}}} \"x\"?\n", i, 1 + i % 7, 20 + i);
  std::vector<std::string> tokens;
  for (char a = 'a'; a < 'm'; ++a) {
    for (char b = 'a'; b < 'm'; ++b) {
      for (char c = 'a'; c < 'm'; ++c) tokens.push_back({a, b, c});
    }
  }
  Matcher matcher(std::make_shared<const TokenGrammar>(
      compiled(rules), std::make_shared<const Vocabulary>(tokens, std::vector<int32_t>{})));
  std::vector<uint64_t> mask((tokens.size() + 63) / 64);
  int masks = 0;
  EXPECT_THROW(
      for (; masks < 100; ++masks) {
        matcher.admitted(mask);
        ASSERT_TRUE(matcher.accept(masks));
      },
      TooMuch);
  EXPECT_LT(masks, 50);
}

// Little memory: everything is dropped now and then, and nothing changes.
TEST(Matcher, CollectingChangesNothing) {
  Configurations::Limits small;
  small.configurations = 12;
  int64_t collections = 0, steps = 0;
  for (uint64_t seed = 1; seed <= 300; ++seed) {
    Random random(seed, 3);
    const Grammar grammar = RandomGrammar(random).make();
    std::shared_ptr<const Automaton> automaton;
    try {
      automaton = compiled(grammar);
    } catch (const Error&) {
      continue;
    }
    Configurations large(automaton, 8), little(automaton, 8, small);
    uint32_t a = large.start(), b = little.start();
    for (int i = 0; i < 40; ++i) {
      if (little.full()) little.collect(std::span(&b, 1));
      std::vector<uint8_t> bytes;
      for (int byte = 0; byte < 256; ++byte) {
        if (large.step(a, static_cast<uint8_t>(byte)) != Configurations::none)
          bytes.push_back(static_cast<uint8_t>(byte));
      }
      if (bytes.empty()) break;
      const uint8_t byte = bytes[random.below(bytes.size())];
      a = large.step(a, byte), b = little.step(b, byte);
      ASSERT_NE(b, Configurations::none);
      ASSERT_EQ(large.can_end(a), little.can_end(b));
      ASSERT_EQ(large.items(a).size(), little.items(b).size());
      ++steps;
    }
    collections += static_cast<int64_t>(little.collections());
  }
  EXPECT_GT(collections, 100);
  EXPECT_GT(steps, 1000);
}

}  // namespace
}  // namespace latente::grammar
