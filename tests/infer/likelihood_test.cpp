#include "infer/likelihood.h"

#include <gtest/gtest.h>

#include "infer/support.h"
#include "model/quantised.h"

namespace latente {
namespace {

using namespace test;

double score(const std::vector<double>& logits, int32_t token) {
  double sum = 0;
  for (double logit : logits) sum += std::exp(logit);
  return std::log(sum) - logits[static_cast<size_t>(token)];
}

// Each token by a reading of its own window, with nothing but the model's logits.
TEST(Likelihood, TokensAreScoredByTheFirstWindowThatHoldsThem) {
  for (const char* family : {"deepseek_v3", "llama"}) {
    Tiny tiny;
    tiny.family = family;
    const Transformer model = made(tiny, 3);
    Random random(4);
    struct Case {
      int64_t tokens, context, stride;
    };
    for (const Case& c : {Case{20, 20, 10}, Case{20, 32, 16}, Case{50, 16, 5}, Case{47, 16, 15},
                          Case{2, 8, 4}, Case{300, 256, 128}}) {
      const auto ids = random_tokens(random, c.tokens, tiny.vocabulary);
      LikelihoodOptions options;
      options.context = c.context, options.stride = c.stride;
      int64_t last = 0;
      options.progress = [&](int64_t done, int64_t total) {
        EXPECT_GT(done, last);
        EXPECT_EQ(total, c.tokens);
        last = done;
      };
      const auto scores = negative_log_likelihoods(backend(), model, ids, options);
      EXPECT_EQ(last, c.tokens);
      ASSERT_EQ(scores.size(), ids.size() - 1);
      for (int64_t t = 1; t < c.tokens; ++t) {
        // The first window that reaches beyond t; the last one ends with the text.
        const int64_t length = std::min(c.context, c.tokens);
        int64_t begin = 0;
        while (begin + length <= t) begin += c.stride;
        begin = std::min(begin, c.tokens - length);
        const auto logits = uncached(
            model, std::span(ids).subspan(static_cast<size_t>(begin), static_cast<size_t>(t - begin)));
        EXPECT_NEAR(scores[static_cast<size_t>(t - 1)], score(logits.back(), ids[static_cast<size_t>(t)]),
                    2e-4)
            << t << " of " << c.tokens;
      }
      // Over a cache: the same numbers, but for the order of sums.
      options.cache = DType::f32;
      options.progress = nullptr;
      const auto cached = negative_log_likelihoods(backend(), model, ids, options);
      ASSERT_EQ(cached.size(), scores.size());
      for (size_t i = 0; i < scores.size(); ++i) EXPECT_NEAR(cached[i], scores[i], 2e-4);
    }
  }
}

TEST(Likelihood, QuantisedModelsAreScored) {
  Transformer model(tiny_config({}), DType::bf16);
  initialise_quantised(model, 1, backend(), {.type = DType::q4});
  const std::vector<int32_t> ids{1, 2, 3, 4, 5, 6, 7};
  for (double nll : negative_log_likelihoods(backend(), model, ids)) EXPECT_NEAR(nll, std::log(64.0), 1.5);
}

TEST(Likelihood, SenselessRequestsAreErrors) {
  const Transformer model = made({}, 3);
  const std::vector<int32_t> ids{1, 2, 3};
  LikelihoodOptions options;
  options.stride = options.context;
  EXPECT_THROW(negative_log_likelihoods(backend(), model, ids, options), Error);
  EXPECT_THROW(negative_log_likelihoods(backend(), model, std::span(ids).first(1)), Error);
}

TEST(Perplexity, FiguresAreThoseOfTheirDefinitions) {
  const std::vector<double> scores{1, 2, 3, 6};
  const Perplexity result = perplexity_of(scores);
  EXPECT_EQ(result.tokens, 4);
  EXPECT_DOUBLE_EQ(result.mean, 3);
  EXPECT_DOUBLE_EQ(result.standard_error, std::sqrt(14.0 / 3 / 4));
  EXPECT_DOUBLE_EQ(result.perplexity(), std::exp(3.0));
  EXPECT_DOUBLE_EQ(result.bits_per_byte(24), 12 / std::log(2.0) / 24);
}

}  // namespace
}  // namespace latente
