// Models run with weights of 8 and 4 bits.
#include "model/quantised.h"

#include <gtest/gtest.h>

#include "checkpoint/support.h"
#include "infer/support.h"
#include "model/run_weights.h"

namespace latente {
namespace {

using namespace test;

// The model as saved and loaded again in `type`.
std::unique_ptr<Transformer> requantised(Transformer& model, DType type, DType base) {
  const TemporaryDirectory directory;
  save_model(model, directory.at("model"), {});
  const Checkpoint checkpoint(directory.at("model"));
  auto loaded = std::make_unique<Transformer>(load_config(checkpoint), base);
  QuantisedOptions options;
  options.type = type;
  options.group = 32;
  load_quantised(*loaded, checkpoint, backend(), options);
  return loaded;
}

struct Precision {
  DType type;
  double error;
};

class Quantised : public ::testing::TestWithParam<Precision> {};

TEST_P(Quantised, LogitsAreNearThoseOfTheWeightsItCameFrom) {
  for (const char* family : {"deepseek_v3", "deepseek_v2", "llama"}) {
    for (bool compressed : {false, true}) {
      Tiny tiny;
      tiny.family = family;
      tiny.compressed = compressed;
      tiny.hidden = 64;
      tiny.bias = compressed;
      Transformer model = made(tiny, 5);
      const auto loaded = requantised(model, GetParam().type, DType::f32);
      Random random(9);
      const auto ids = random_tokens(random, 20, tiny.vocabulary);
      const auto want = uncached(model, ids), got = uncached(*loaded, ids);
      double difference = 0, norm = 0;
      for (size_t t = 0; t < want.size(); ++t) {
        for (size_t i = 0; i < want[t].size(); ++i) {
          difference += std::pow(got[t][i] - want[t][i], 2), norm += want[t][i] * want[t][i];
        }
      }
      EXPECT_LT(std::sqrt(difference / norm), GetParam().error) << family << compressed;
      EXPECT_GT(difference, 0);

      // Over the cache, the up-projection of the latent is another rounding of the same weights.
      RunnerOptions how;
      how.context = 32;
      SequenceRunner runner(backend(), *loaded, how);
      std::vector<float> last;
      for (size_t t = 0; t < ids.size(); ++t)
        last = copy_of(runner.forward(std::span(&ids[t], 1), static_cast<int64_t>(t), 1));
      EXPECT_LT(distance(last, want.back()), 2 * GetParam().error) << family << compressed;
    }
  }
}

// Rounding of activations goes by row, so a row's bits do not depend on how many are verified with it.
TEST_P(Quantised, SpeculativeTextIsPlainText) {
  GenerationStats all;
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    Random random(seed);
    Tiny tiny;
    tiny.mtp = 1 + static_cast<int64_t>(random.below(2));
    tiny.compressed = random.chance(0.5);
    tiny.tied = random.chance(0.3);
    Transformer model = made(tiny, seed, random.uniform(0.05, 0.4));
    const auto loaded = requantised(model, GetParam().type, random.chance(0.5) ? DType::f32 : DType::bf16);
    RunnerOptions how;
    how.context = 80;
    const auto prompt = random_tokens(random, random.between(1, 12), tiny.vocabulary);
    GenerationOptions options;
    options.max_tokens = 40;
    const Text want = plain(*loaded, how, prompt, options);
    for (int64_t depth : {-1, 1, 2, 5}) {
      Engine engine(backend(), *loaded, how);
      options.draft = depth;
      GenerationStats stats;
      ASSERT_EQ(generated(engine, prompt, options, &stats), want) << "seed " << seed << ", draft " << depth;
      all.drafted += stats.drafted, all.accepted += stats.accepted;
    }
  }
  EXPECT_GT(all.acceptance(), 0.05);
  EXPECT_LT(all.acceptance(), 0.95);
}

INSTANTIATE_TEST_SUITE_P(Types, Quantised,
                         ::testing::Values(Precision{DType::q8, 0.1}, Precision{DType::q4, 0.5}),
                         [](const auto& test) { return std::string(name_of(test.param.type)); });

// A float64 checkpoint's activations would be float64, which quantised weights cannot meet.
TEST(RunWeights, EveryStoredTypeRunsInEveryForm) {
  for (DType stored : {DType::f64, DType::f32, DType::bf16}) {
    Transformer model = made({}, 3);
    const TemporaryDirectory directory;
    SaveOptions how;
    how.weights = stored;
    save_model(model, directory.at("model"), how);
    for (const char* type : {"auto", "f32", "bf16", "f64", "int8", "int4"}) {
      RunWeights weights;
      weights.type = type;
      const auto loaded = load_for_running(open_model(directory.at("model")), weights, backend());
      RunnerOptions options;
      options.context = 8;
      SequenceRunner runner(backend(), *loaded, options);
      const std::vector<int32_t> ids{1, 2, 3};
      for (float logit : runner.forward(ids, 0, 1)) ASSERT_TRUE(std::isfinite(logit)) << type;
    }
    RunWeights unknown;
    unknown.type = "f16";
    EXPECT_THROW(load_for_running(open_model(directory.at("model")), unknown, backend()), Error);
  }
}

TEST(QuantisedOptions, SenselessOnesAreRefused) {
  Transformer model(tiny_config({}), DType::f32);
  QuantisedOptions options;
  options.group = 48;
  EXPECT_THROW(initialise_quantised(model, 1, backend(), options), Error);
  options.group = 64, options.type = DType::f16;
  EXPECT_THROW(initialise_quantised(model, 1, backend(), options), Error);
}

}  // namespace
}  // namespace latente
