// Log-probabilities that the engine reports, against those of the whole text at once.
#include <gtest/gtest.h>

#include <cmath>

#include "infer/support.h"

namespace latente {
namespace {

using namespace test;

GenerationOptions few(int64_t tokens) {
  GenerationOptions options;
  options.max_tokens = tokens;
  return options;
}

TEST(Logprobs, OfARow) {
  const std::vector<float> logits = {1, 3, 3, -INFINITY, 0};
  const TokenLogprobs logprobs = logprobs_of(logits, 0, 3);
  const double normaliser = std::log(std::exp(1.0) + 2 * std::exp(3.0) + 1);
  EXPECT_NEAR(logprobs.logprob, 1 - normaliser, 1e-12);
  ASSERT_EQ(logprobs.top.size(), 3U);
  EXPECT_EQ(logprobs.top[0].first, 1);
  EXPECT_EQ(logprobs.top[1].first, 2);
  EXPECT_EQ(logprobs.top[2].first, 0);
  EXPECT_NEAR(logprobs.top[0].second, 3 - normaliser, 1e-12);
  EXPECT_EQ(logprobs_of(logits, 3, 9).logprob, -INFINITY);
  EXPECT_EQ(logprobs_of(logits, 3, 9).top.size(), 5U);
}

// With and without drafts, in pieces of any length, with other sequences beside it.
TEST(Logprobs, OfPromptAndReplyAreTheModels) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    Random random(seed);
    Tiny tiny;
    tiny.mtp = static_cast<int64_t>(random.below(3));
    tiny.vocabulary = 40;
    const Transformer model = made(tiny, seed, 0.3);
    RunnerOptions how;
    how.context = 200;
    how.page_size = random.between(1, 20);
    how.chunk = random.between(20, 90);
    how.sequences = 3;
    Engine engine(backend(), model, how);
    const std::vector<int32_t> prompt = random_tokens(random, random.between(1, 100), tiny.vocabulary);
    // What the cache holds of the prompt must not keep its tokens from being reported.
    if (random.chance(0.5)) engine.generate(prompt, few(2), {});
    Request other;
    other.prompt = random_tokens(random, 50, tiny.vocabulary);
    engine.submit(std::move(other));

    std::vector<int32_t> tokens = prompt;
    std::vector<TokenLogprobs> reported;
    GenerationStats stats;
    Request request;
    request.prompt = prompt;
    request.options.max_tokens = random.chance(0.3) ? 0 : random.between(1, 40);
    request.options.sampling.temperature = random.chance(0.5) ? 0.0 : 1.0;
    request.options.top_logprobs = 4;
    request.options.prompt_logprobs = true;
    request.on_prompt_token = [&](const TokenLogprobs& logprobs) { reported.push_back(logprobs); };
    request.on_token = [&](GeneratedToken token) {
      EXPECT_EQ(token.logprobs->token, token.id);
      reported.push_back(*token.logprobs);
      tokens.push_back(token.id);
      return true;
    };
    bool finished = false;
    request.on_finish = [&](const GenerationStats& result) { stats = result, finished = true; };
    const int64_t most = request.options.max_tokens;
    engine.submit(std::move(request));
    while (!finished) engine.step();
    EXPECT_EQ(stats.generated_tokens, most);
    EXPECT_EQ(stats.reused_tokens, 0);

    ASSERT_EQ(reported.size(), tokens.size() - 1) << "seed " << seed;
    const auto logits = uncached(model, tokens);
    for (size_t i = 0; i + 1 < tokens.size(); ++i) {
      const std::vector<float> row(logits[i].begin(), logits[i].end());
      const TokenLogprobs expected = logprobs_of(row, tokens[i + 1], 4);
      EXPECT_EQ(reported[i].token, tokens[i + 1]);
      EXPECT_NEAR(reported[i].logprob, expected.logprob, 1e-4) << "seed " << seed << " token " << i;
      ASSERT_EQ(reported[i].top.size(), 4U);
      EXPECT_NEAR(reported[i].top[0].second, expected.top[0].second, 1e-4);
    }
  }
}

TEST(Logprobs, AreNotThereUnasked) {
  const Transformer model = made({}, 1);
  Engine engine(backend(), model, {.context = 50});
  engine.generate(std::vector<int32_t>{1, 2, 3}, few(5), [](GeneratedToken token) {
    EXPECT_EQ(token.logprobs, nullptr);
    return true;
  });
  GenerationOptions options;
  options.top_logprobs = -2;
  EXPECT_THROW(engine.generate(std::vector<int32_t>{1}, options, {}), Error);
}

}  // namespace
}  // namespace latente
