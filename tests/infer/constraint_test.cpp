// Replies under a grammar, with and without drafts.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "grammar/gbnf.h"
#include "grammar/json_schema.h"
#include "infer/engine.h"
#include "infer/grammar_constraint.h"
#include "infer/sequence_runner.h"
#include "infer/support.h"

namespace latente {
namespace {

using namespace test;

constexpr int32_t stop = 0;

const std::vector<std::string>& texts() {
  static const std::vector<std::string> all{
      "",   "a",   "b",  "c",  "{",   "}",     "[",     "]",    "\"",  ":",  ",",   "0",    "1",    "2",
      "-",  ".",   "\n", " ",  "\":", "\",",   "\"}",   "{\"",  "\"a", "tr", "ue",  "\xC3", "\xA9", "é",
      "ab", "abc", "12", "}}", "]]",  "\",\"", "\":\"", "null", "",    "e",  "1,2", "\\"};
  return all;
}

std::string text_of(const std::vector<int32_t>& tokens) {
  std::string text;
  for (int32_t token : tokens) text += texts()[static_cast<size_t>(token)];
  return text;
}

struct Grammar {
  std::shared_ptr<const grammar::Automaton> automaton;
  std::shared_ptr<const grammar::TokenGrammar> tokens;
  bool json = false;
};

Grammar compiled(std::string_view text, const std::vector<int32_t>& stops) {
  Grammar made;
  made.json = text.starts_with('{');
  made.automaton = std::make_shared<const grammar::Automaton>(made.json ? grammar::parse_json_schema(text)
                                                                        : grammar::parse_gbnf(text));
  made.tokens = std::make_shared<const grammar::TokenGrammar>(
      made.automaton, std::make_shared<const grammar::Vocabulary>(texts(), stops));
  return made;
}

const char* const grammars[] = {
    R"({"type":"object","properties":{"a":{"type":"string","maxLength":6},"b":{"type":"array","items":{"type":"integer","minimum":0,"maximum":21},"maxItems":4}},"required":["a","b"],"additionalProperties":false})",
    R"({"type":"array","items":{"anyOf":[{"type":"boolean"},{"enum":["abc","é",12]}]},"minItems":2,"maxItems":6})",
    "root ::= [a-c]{3,9} | \"é\" root",
    "root ::= (\"ab\" | \"a\" \"b\" | \"c\")* \"2\"?",
    "root ::= \"abc\" \"12\"",
    R"({"properties":{"c":{"$ref":"#"},"a":{"type":"null"}},"required":["a"]})"};

// The most likely token that may come, one pass after the other; what may come is tried, not taken from
// masks.
Text tried(const Transformer& model, const RunnerOptions& how, std::span<const int32_t> prompt,
           const GenerationOptions& options, const Grammar& grammar) {
  SequenceRunner runner(backend(), model, how);
  grammar::Matcher matcher(grammar.tokens);
  std::vector<int32_t> sequence(prompt.begin(), prompt.end());
  std::vector<float> logits = copy_of(runner.forward(prompt, 0, 1));
  Text text;
  while (static_cast<int64_t>(text.tokens.size()) < options.max_tokens) {
    int32_t best = -1;
    for (int32_t token = 0; token < static_cast<int32_t>(texts().size()); ++token) {
      grammar::Matcher copy = matcher;
      const auto i = static_cast<size_t>(token);
      if (copy.accept(token) && (best < 0 || logits[i] > logits[static_cast<size_t>(best)])) best = token;
    }
    EXPECT_GE(best, 0);
    EXPECT_TRUE(matcher.accept(best));
    if (std::count(options.stop_tokens.begin(), options.stop_tokens.end(), best) > 0) {
      text.finish = Finish::stop_token;
      return text;
    }
    text.tokens.push_back(best);
    sequence.push_back(best);
    if (matcher.finished()) {
      text.finish = Finish::complete;
      return text;
    }
    logits =
        copy_of(runner.forward(std::span(&sequence.back(), 1), static_cast<int64_t>(sequence.size()) - 1, 1));
  }
  text.finish = Finish::length;
  return text;
}

TEST(Constraint, GreedyTextDoesNotDependOnDrafts) {
  int64_t complete = 0, stopped = 0, accepted = 0, drafted = 0, whole = 0;
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    Random random(seed);
    Tiny tiny;
    tiny.vocabulary = static_cast<int64_t>(texts().size());
    tiny.mtp = random.between(1, 2);
    Transformer model = made(tiny, seed, random.uniform(0.05, 0.5));
    GenerationOptions options;
    options.max_tokens = random.between(3, 120);
    if (random.chance(0.7)) options.stop_tokens = {stop};
    const Grammar grammar = compiled(grammars[seed % std::size(grammars)], options.stop_tokens);
    options.constraint = std::make_shared<GrammarConstraint>(grammar.tokens);
    const std::vector<int32_t> prompt = random_tokens(random, random.between(1, 10), tiny.vocabulary);
    const RunnerOptions how{.context = 160, .page_size = 16, .chunk = 32};
    const Text want = tried(model, how, prompt, options, grammar);
    if (want.finish != Finish::length) {
      ++whole;
      ASSERT_TRUE(grammar::matches(grammar.automaton, text_of(want.tokens)));
      if (grammar.json) {
        EXPECT_FALSE(nlohmann::json::parse(text_of(want.tokens), nullptr, false).is_discarded());
      }
    }
    complete += want.finish == Finish::complete ? 1 : 0;
    stopped += want.finish == Finish::stop_token ? 1 : 0;
    Engine again(backend(), model, how);
    for (int64_t depth = -1; depth <= 7; ++depth) {
      options.draft = depth;
      Engine engine(backend(), model, how);
      GenerationStats stats;
      ASSERT_EQ(generated(engine, prompt, options, &stats), want) << "seed " << seed << ", draft " << depth;
      accepted += stats.accepted, drafted += stats.drafted;
      // The options' constraint is as it was: another reply begins anew.
      ASSERT_EQ(generated(again, prompt, options), want) << "seed " << seed << ", draft " << depth;
    }
  }
  EXPECT_GT(whole, 25);
  EXPECT_GT(complete, 10);
  EXPECT_GT(stopped, 2);
  EXPECT_GT(accepted, drafted / 10);
}

TEST(Constraint, SampledTextMatches) {
  int64_t whole = 0;
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    Random random(seed, 1);
    Tiny tiny;
    tiny.vocabulary = static_cast<int64_t>(texts().size());
    tiny.mtp = 1;
    Transformer model = made(tiny, seed, 0.3);
    GenerationOptions options;
    options.max_tokens = 150;
    options.stop_tokens = {stop};
    options.sampling.temperature = 1.5;
    options.sampling.seed = seed;
    options.draft = random.between(-1, 3);
    const Grammar grammar = compiled(grammars[seed % std::size(grammars)], options.stop_tokens);
    options.constraint = std::make_shared<GrammarConstraint>(grammar.tokens);
    Engine engine(backend(), model, {.context = 200, .page_size = 16, .chunk = 32});
    const Text text = generated(engine, random_tokens(random, 4, tiny.vocabulary), options);
    grammar::Matcher matcher(grammar.tokens);
    for (int32_t token : text.tokens) ASSERT_TRUE(matcher.accept(token));
    if (text.finish == Finish::length) continue;
    ++whole;
    EXPECT_TRUE(grammar::matches(grammar.automaton, text_of(text.tokens))) << text_of(text.tokens);
  }
  EXPECT_GT(whole, 40);
}

// Sequences side by side, some under the same grammar, some under none: each as it is alone.
TEST(Constraint, SequencesDoNotMeddle) {
  Tiny tiny;
  tiny.vocabulary = static_cast<int64_t>(texts().size());
  tiny.mtp = 1;
  Transformer model = made(tiny, 5, 0.2);
  RunnerOptions how{.context = 120, .page_size = 16, .chunk = 32};
  how.sequences = 4;
  Random random(2);
  std::vector<Text> want, got(12);
  Engine together(backend(), model, how);
  std::vector<std::shared_ptr<const GrammarConstraint>> constraints;
  for (const char* text : grammars)
    constraints.push_back(std::make_shared<GrammarConstraint>(compiled(text, {stop}).tokens));
  for (size_t i = 0; i < got.size(); ++i) {
    Request request;
    request.prompt = random_tokens(random, random.between(1, 12), tiny.vocabulary);
    request.options.max_tokens = 50;
    request.options.stop_tokens = {stop};
    request.options.draft = static_cast<int64_t>(i % 4) - 1;
    if (i % 5 != 4) request.options.constraint = constraints[i % 3];
    Engine alone(backend(), model, how);
    want.push_back(generated(alone, request.prompt, request.options));
    request.on_token = [&got, i](GeneratedToken token) {
      got[i].tokens.push_back(token.id);
      return true;
    };
    request.on_finish = [&got, i](const GenerationStats& stats) { got[i].finish = stats.finish; };
    together.submit(std::move(request));
  }
  while (together.step()) {
  }
  EXPECT_EQ(got, want);
}

TEST(Constraint, NothingMayBeWritten) {
  Tiny tiny;
  tiny.vocabulary = static_cast<int64_t>(texts().size());
  Transformer model = made(tiny, 1);
  GenerationOptions options;
  options.constraint = std::make_shared<GrammarConstraint>(compiled("root ::= \"\"", {}).tokens);
  Engine engine(backend(), model);
  const std::vector<int32_t> prompt{1, 2};
  const Text text = generated(engine, prompt, options);
  EXPECT_TRUE(text.tokens.empty());
  EXPECT_EQ(text.finish, Finish::complete);
}

}  // namespace
}  // namespace latente
