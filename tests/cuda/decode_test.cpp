// What a device writes in bfloat16 does not depend on company, drafts, or where tokens are chosen.
#include <gtest/gtest.h>

#include "base/random.h"
#include "cuda/backend.h"
#include "cuda/small_model.h"
#include "infer/engine.h"
#include "model/run_weights.h"

namespace latente {
namespace {

class CudaDecode : public testing::TestWithParam<bool> {
 protected:
  CudaDecode() : model_(load_for_running({small_config(GetParam()), nullptr}, {}, device_)) {
    Random random(7);
    for (int s = 0; s < 11; ++s) {
      std::vector<int32_t>& prompt = prompts_.emplace_back();
      for (int i = 0; i < 3 + 30 * (s % 4); ++i) prompt.push_back(static_cast<int32_t>(random.below(520)));
    }
  }

  using Texts = std::vector<std::vector<int32_t>>;
  Texts write(int64_t at_once, int64_t drafts, int64_t logprobs = -1, bool chained = true) {
    RunnerOptions options;
    options.context = 160;
    options.cache_type = DType::bf16;
    options.sequences = at_once;
    Engine engine(device_, *model_, options);
    engine.chain_passes(chained);
    Texts texts(prompts_.size());
    for (size_t s = 0; s < prompts_.size(); ++s) {
      Request request;
      request.prompt = prompts_[s];
      request.options.max_tokens = 60;
      request.options.draft = drafts;
      request.options.top_logprobs = logprobs;
      request.options.sampling = sampling_;
      request.on_token = [&texts, s](GeneratedToken token) { return texts[s].push_back(token.id), true; };
      request.on_finish = [](const GenerationStats& stats) { EXPECT_FALSE(stats.error); };
      engine.submit(std::move(request));
    }
    while (engine.step()) {
    }
    return texts;
  }

  cuda::CudaBackend device_;
  std::unique_ptr<Transformer> model_;
  Texts prompts_;
  SamplingOptions sampling_;
};

TEST_P(CudaDecode, TextsDependOnNothingElse) {
  const Texts alone = write(1, 0);
  for (const auto& text : alone) EXPECT_EQ(text.size(), 60u);
  EXPECT_NE(alone[0], alone[1]);
  EXPECT_EQ(write(1, 0, 0), alone) << "chosen by the host";
  EXPECT_EQ(write(1, 1), alone) << "one draft";
  EXPECT_EQ(write(1, 3), alone) << "three drafts";
  EXPECT_EQ(write(4, 0), alone) << "four at once";
  EXPECT_EQ(write(11, 0), alone) << "eleven at once";
  EXPECT_EQ(write(11, 2), alone) << "eleven at once, two drafts";
  EXPECT_EQ(write(11, 2, -1, false), alone) << "the same, pass by pass";
}

TEST_P(CudaDecode, SampledTextsDependOnTheSeedAlone) {
  const Texts greedy = write(1, 0);
  sampling_ = {.temperature = 0.9, .top_k = 50, .top_p = 0.95, .min_p = 0.01, .seed = 4};
  const Texts alone = write(1, 0, -1, false);
  EXPECT_NE(alone, greedy);
  EXPECT_EQ(write(1, 0), alone) << "several passes at once";
  EXPECT_EQ(write(1, 2), alone) << "two drafts";
  EXPECT_EQ(write(11, 0), alone) << "eleven at once";
  EXPECT_EQ(write(11, 1), alone) << "eleven at once, a draft each";
  sampling_.seed = 5;
  EXPECT_NE(write(11, 0), alone);
}

INSTANTIATE_TEST_SUITE_P(Queries, CudaDecode, testing::Bool());

}  // namespace
}  // namespace latente
