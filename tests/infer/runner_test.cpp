#include "infer/sequence_runner.h"

#include <gtest/gtest.h>

#include "infer/support.h"

namespace latente {
namespace {

using namespace test;

struct Family {
  const char* name;
  Tiny tiny;
};
void PrintTo(const Family& family, std::ostream* out) { *out << family.name; }

class RunnerTest : public testing::TestWithParam<Family> {
 protected:
  std::vector<int32_t> tokens(int64_t count, uint64_t seed = 3) const {
    Random random(seed);
    return random_tokens(random, count, GetParam().tiny.vocabulary);
  }
};

std::span<const int32_t> part(const std::vector<int32_t>& tokens, int64_t first, int64_t count) {
  return std::span(tokens).subspan(static_cast<size_t>(first), static_cast<size_t>(count));
}

// One token a pass attends over the latents (absorbed); `uncached` expands keys and values.
TEST_P(RunnerTest, CachedEqualsUncached) {
  for (DType type : {DType::f32, DType::f64}) {
    Transformer model = made(GetParam().tiny, 5, 1.0, type);
    std::vector<int32_t> ids = tokens(45);
    std::vector<std::vector<double>> want = uncached(model, ids);
    SequenceRunner runner(backend(), model, {.context = 64, .page_size = 7, .chunk = 16});
    for (int64_t t = 0; t < 45; ++t) {
      std::span<float> row = runner.forward(part(ids, t, 1), t, 1);
      ASSERT_EQ(row.size(), want[0].size());
      EXPECT_LT(distance(row, want[static_cast<size_t>(t)]), type == DType::f64 ? 2e-7 : 1e-5)
          << "token " << t;
    }
  }
}

TEST_P(RunnerTest, ChunkedPromptEqualsWhole) {
  Transformer model = made(GetParam().tiny, 6);
  std::vector<int32_t> ids = tokens(75);
  std::vector<std::vector<double>> want = uncached(model, ids);
  for (int64_t page : {1, 5, 64}) {
    for (int64_t chunk : {1, 3, 8, 9, 15, 16, 17, 33, 74, 75, 128}) {
      SequenceRunner runner(backend(), model, {.context = 75, .page_size = page, .chunk = chunk});
      for (int64_t first = 0; first < 75; first += chunk) {
        int64_t count = std::min(chunk, 75 - first), wanted = std::min<int64_t>(count, 8);
        std::span<float> rows = runner.forward(part(ids, first, count), first, wanted);
        for (int64_t r = 0; r < wanted; ++r) {
          size_t at = static_cast<size_t>(first + count - wanted + r), width = want[0].size();
          EXPECT_LT(distance(rows.subspan(static_cast<size_t>(r) * width, width), want[at]), 1e-5)
              << "chunk " << chunk << ", page " << page << ", token " << at;
        }
      }
    }
  }
}

// What verification rests on: a row's logits do not depend on how many tokens share the pass.
TEST_P(RunnerTest, RowsAreTheSameBitsInEveryPass) {
  for (DType type : {DType::f32, DType::bf16, DType::f64}) {
    for (DType cache : {DType::f32, DType::bf16}) {
      Transformer model = made(GetParam().tiny, 7, 1.0, type);
      RunnerOptions how{.context = 128, .page_size = 16, .chunk = 32, .cache_type = cache};
      SequenceRunner alone(backend(), model, how), together(backend(), model, how);
      std::vector<int32_t> ids = tokens(100);
      alone.forward(part(ids, 0, 20), 0, 1);
      together.forward(part(ids, 0, 20), 0, 1);
      int64_t first = 20;
      for (int64_t count : {2, 3, 4, 5, 6, 7, 8, 1, 8}) {
        std::vector<float> want;
        for (int64_t t = first; t < first + count; ++t) {
          std::span<float> row = alone.forward(part(ids, t, 1), t, 1);
          want.insert(want.end(), row.begin(), row.end());
        }
        EXPECT_EQ(copy_of(together.forward(part(ids, first, count), first, count)), want)
            << name_of(type) << " weights, " << name_of(cache) << " cache, " << count << " tokens";
        first += count;
      }
    }
  }
}

TEST_P(RunnerTest, RowsAreTheSameBitsOnEveryNumberOfThreads) {
  Transformer model = made(GetParam().tiny, 8);
  CpuBackend three(3);
  RunnerOptions how{.context = 64, .page_size = 16, .chunk = 32};
  SequenceRunner one(backend(), model, how), more(three, model, how);
  std::vector<int32_t> ids = tokens(40);
  EXPECT_EQ(copy_of(one.forward(part(ids, 0, 30), 0, 8)), copy_of(more.forward(part(ids, 0, 30), 0, 8)));
  EXPECT_EQ(copy_of(one.forward(part(ids, 30, 5), 30, 5)), copy_of(more.forward(part(ids, 30, 5), 30, 5)));
}

TEST_P(RunnerTest, RunningAPositionAgainOverwritesIt) {
  Transformer model = made(GetParam().tiny, 9);
  RunnerOptions how{.context = 64, .page_size = 4, .chunk = 8};
  SequenceRunner straight(backend(), model, how), detour(backend(), model, how);
  std::vector<int32_t> ids = tokens(24), others = tokens(24, 4);
  for (int64_t first = 0; first < 16; first += 8) straight.forward(part(ids, first, 8), first, 1);
  std::vector<float> want = copy_of(straight.forward(part(ids, 16, 3), 16, 3));
  for (int64_t first = 0; first < 8; first += 8) detour.forward(part(ids, first, 8), first, 1);
  detour.forward(part(others, 8, 8), 8, 1);
  detour.forward(part(others, 16, 8), 16, 1);
  detour.forward(part(ids, 8, 8), 8, 1);
  EXPECT_EQ(copy_of(detour.forward(part(ids, 16, 3), 16, 3)), want);
}

TEST_P(RunnerTest, ABf16CacheHalvesMemoryAndStaysClose) {
  Transformer model = made(GetParam().tiny, 10);
  RunnerOptions wide{.context = 64, .page_size = 16, .chunk = 32}, narrow = wide;
  narrow.cache_type = DType::bf16;
  SequenceRunner exact(backend(), model, wide), rounded(backend(), model, narrow);
  EXPECT_EQ(exact.runner().cache_bytes_per_token(), 4 * model.cache_values_per_token());
  EXPECT_EQ(rounded.runner().cache_bytes_per_token(), 2 * model.cache_values_per_token());
  EXPECT_LT(rounded.runner().memory_bytes(), exact.runner().memory_bytes());
  std::vector<int32_t> ids = tokens(40);
  std::vector<std::vector<double>> want = uncached(model, ids);
  exact.forward(part(ids, 0, 30), 0, 1);
  rounded.forward(part(ids, 0, 30), 0, 1);
  double largest = 0;
  for (int64_t t = 30; t < 40; ++t) {
    EXPECT_LT(distance(exact.forward(part(ids, t, 1), t, 1), want[static_cast<size_t>(t)]), 1e-5);
    double off = distance(rounded.forward(part(ids, t, 1), t, 1), want[static_cast<size_t>(t)]);
    EXPECT_LT(off, 0.1) << "token " << t;
    largest = std::max(largest, off);
  }
  EXPECT_GT(largest, 1e-4);
}

// Eight bits a latent and the rotary part in bfloat16. (Where rounding changes a choice of experts, logits of
// these tiny models change a lot: the middle of all tokens is what counts.) It is a latent cache's form only.
TEST_P(RunnerTest, NarrowCachesAreSmallAndStayClose) {
  Transformer model = made(GetParam().tiny, 10);
  std::vector<int32_t> ids = tokens(40);
  std::vector<std::vector<double>> want = uncached(model, ids);
  for (DType type : {DType::u8, DType::f8e4m3}) {
    RunnerOptions how{.context = 64, .page_size = 16, .chunk = 32, .cache_type = type};
    if (!model.config().is_mla()) {
      EXPECT_THROW(SequenceRunner(backend(), model, how), Error);
      continue;
    }
    SequenceRunner runner(backend(), model, how), other(backend(), model, how);
    const Config& config = model.config();
    EXPECT_EQ(runner.runner().cache_bytes_per_token(),
              (config.num_hidden_layers + config.num_mtp_layers) *
                  (config.kv_lora_rank + 2 * config.qk_rope_head_dim + 4));
    // A long piece expands what the cache holds, rounded; single tokens read it as it is.
    for (bool together : {true, false}) {
      std::vector<double> off;
      for (int64_t t = 0; t < 40;) {
        const int64_t count = together && t == 0 ? 30 : 1;
        std::span<float> row = runner.forward(part(ids, t, count), t, 1);
        t += count;
        off.push_back(distance(row, want[static_cast<size_t>(t - 1)]));
      }
      std::sort(off.begin(), off.end());
      EXPECT_LT(off[off.size() / 2], type == DType::u8 ? 0.02 : 0.06) << name_of(type);
      EXPECT_GT(off[off.size() / 2], 1e-5);
    }
    // The same bits for any rows.
    other.forward(part(ids, 0, 30), 0, 1);
    runner.forward(part(ids, 0, 30), 0, 1);
    std::vector<float> single;
    for (int64_t t = 30; t < 36; ++t) {
      std::span<float> logits = runner.forward(part(ids, t, 1), t, 1);
      single.insert(single.end(), logits.begin(), logits.end());
    }
    EXPECT_EQ(copy_of(other.forward(part(ids, 30, 6), 30, 6)), single);
  }
}

// Modules over their own caches, in chunks, on the hidden states that the level below left.
TEST_P(RunnerTest, ModulesEqualUncached) {
  const Tiny& tiny = GetParam().tiny;
  if (tiny.mtp == 0) GTEST_SKIP() << "has no modules";
  Transformer model = made(tiny, 11);
  std::vector<int32_t> ids = tokens(41);
  for (int64_t chunk : {1, 5, 8, 9, 16, 24, 64}) {
    SequenceRunner runner(backend(), model, {.context = 64, .page_size = 8, .chunk = chunk});
    std::vector<std::vector<std::vector<double>>> want;
    for (int64_t k = 0; k < tiny.mtp; ++k) want.push_back(uncached(model, ids, k));
    for (int64_t first = 0; first < 41; first += chunk) {
      int64_t count = std::min(chunk, 41 - first);
      runner.forward(part(ids, first, count), first, 1);
      for (int64_t k = 0; k < tiny.mtp; ++k) {
        int64_t known = std::min(count, 41 - (k + 1) - first);
        if (known <= 0) continue;
        std::span<float> row = runner.predict(k, part(ids, first + k + 1, known), first);
        // float32's rounding grows from module to module.
        EXPECT_LT(distance(row, want[static_cast<size_t>(k)][static_cast<size_t>(first + known - 1)]),
                  1e-5 * static_cast<double>(k + 1))
            << "module " << k << ", chunk " << chunk << ", position " << first + known - 1;
      }
    }
  }
}

// Every token that runs has its choices counted, of main layers and modules; padding and nobody else's.
TEST_P(RunnerTest, CountsExperts) {
  const Tiny& tiny = GetParam().tiny;
  Transformer model = made(tiny, 12);
  const std::vector<int32_t> ids = tokens(45);
  RunnerOptions how{.context = 64, .page_size = 8, .chunk = 64};
  how.count_experts = true;
  SequenceRunner runner(backend(), model, how), silent(backend(), model, {.context = 64, .page_size = 8});
  const std::span<float> logits = runner.forward(part(ids, 0, 37), 0, 1);  // of 40 rows
  EXPECT_EQ(copy_of(logits), copy_of(silent.forward(part(ids, 0, 37), 0, 1))) << "counting changes nothing";
  EXPECT_TRUE(silent.runner().expert_loads().empty());
  for (int64_t t = 37; t < 41; ++t) runner.forward(part(ids, t, 1), t, 1);
  for (int64_t k = 0; k < tiny.mtp; ++k) runner.predict(k, part(ids, k + 1, 33), 0);

  const Config& config = model.config();
  int64_t layers = 0;
  for (int64_t i = 0; i < config.num_hidden_layers + tiny.mtp; ++i) layers += config.is_moe_layer(i) ? 1 : 0;
  for (int again = 0; again < 2; ++again) {
    const auto& loads = runner.runner().expert_loads();
    ASSERT_EQ(std::ssize(loads), layers);
    for (const auto& [layer, counts] : loads) {
      EXPECT_TRUE(config.is_moe_layer(layer));
      EXPECT_EQ(std::ssize(counts), config.n_routed_experts);
      EXPECT_EQ(std::accumulate(counts.begin(), counts.end(), int64_t{0}),
                config.num_experts_per_tok * (layer < config.num_hidden_layers ? 41 : 33))
          << "layer " << layer;
    }
  }
}

TEST(Runner, ForgetsThePlansUsedLeast) {
  Transformer model = made({}, 7);
  Random random(3);
  const std::vector<int32_t> ids = random_tokens(random, 45, Tiny{}.vocabulary);
  SequenceRunner runner(backend(), model, {.context = 64, .page_size = 8, .chunk = 64});
  const std::vector<float> first = copy_of(runner.forward(part(ids, 0, 1), 0, 1));
  for (int64_t count = 1; count <= 45; ++count) {
    for (int64_t wanted = 0; wanted <= count; ++wanted) runner.forward(part(ids, 0, count), 0, wanted);
    EXPECT_EQ(copy_of(runner.forward(part(ids, 0, 1), 0, 1)), first);
  }
  EXPECT_EQ(runner.runner().plans(), Runner::most_plans);
  const int64_t recorded = runner.runner().recorded();
  EXPECT_GT(recorded, static_cast<int64_t>(Runner::most_plans));
  runner.forward(part(ids, 0, 1), 0, 1);
  EXPECT_EQ(runner.runner().recorded(), recorded) << "what is used often stays";
}

INSTANTIATE_TEST_SUITE_P(Families, RunnerTest,
                         testing::Values(Family{"v3", {}}, Family{"v3_mtp1", {.mtp = 1}},
                                         Family{"v3_mtp3_tied", {.mtp = 3, .tied = true}},
                                         Family{"v3_biased", {.mtp = 1, .compressed = false, .bias = true}},
                                         Family{"v2", {.family = "deepseek_v2"}},
                                         Family{"gqa", {.family = "llama"}}),
                         [](const auto& one) { return std::string(one.param.name); });

}  // namespace
}  // namespace latente
