// What a device writes in bfloat16 does not depend on company, drafts, or where tokens are chosen.
#include <gtest/gtest.h>

#include "base/random.h"
#include "cuda/backend.h"
#include "infer/engine.h"
#include "model/run_weights.h"

namespace latente {
namespace {

Config config_of(bool compressed_queries) {
  Config config;
  config.model_type = "deepseek_v3";
  config.vocab_size = 520;
  config.hidden_size = 128;
  config.intermediate_size = 192;
  config.moe_intermediate_size = 64;
  config.num_hidden_layers = 3;
  config.num_mtp_layers = 1;
  config.num_attention_heads = config.num_key_value_heads = 4;
  config.n_shared_experts = 1;
  config.n_routed_experts = 8;
  config.num_experts_per_tok = 3;
  config.q_lora_rank = compressed_queries ? 96 : 0;
  config.kv_lora_rank = 192;
  config.qk_rope_head_dim = 32;
  config.qk_nope_head_dim = 64;
  config.v_head_dim = 64;
  config.first_k_dense_replace = 1;
  config.topk_method = "noaux_tc";
  return config;
}

class CudaDecode : public testing::TestWithParam<bool> {
 protected:
  CudaDecode() : model_(load_for_running({config_of(GetParam()), nullptr}, {}, device_)) {
    Random random(7);
    for (int s = 0; s < 11; ++s) {
      std::vector<int32_t>& prompt = prompts_.emplace_back();
      for (int i = 0; i < 3 + 13 * (s % 4); ++i) prompt.push_back(static_cast<int32_t>(random.below(520)));
    }
  }

  using Texts = std::vector<std::vector<int32_t>>;
  Texts write(int64_t at_once, int64_t drafts, int64_t logprobs = -1) {
    RunnerOptions options;
    options.context = 160;
    options.cache_type = DType::bf16;
    options.sequences = at_once;
    Engine engine(device_, *model_, options);
    Texts texts(prompts_.size());
    for (size_t s = 0; s < prompts_.size(); ++s) {
      Request request;
      request.prompt = prompts_[s];
      request.options.max_tokens = 60;
      request.options.draft = drafts;
      request.options.top_logprobs = logprobs;
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
}

INSTANTIATE_TEST_SUITE_P(Queries, CudaDecode, testing::Bool());

}  // namespace
}  // namespace latente
