#include "infer/calibration.h"

#include <gtest/gtest.h>

#include "infer/support.h"

namespace latente {
namespace {

using namespace test;

// Columns by their mean squares, as calibrate() gives them.
std::vector<double> shares(const std::vector<double>& squares) {
  const double mean =
      std::accumulate(squares.begin(), squares.end(), 0.0) / static_cast<double>(squares.size());
  std::vector<double> result;
  for (double square : squares) result.push_back(square / mean + 1e-3);
  return result;
}

TEST(Calibration, ColumnsAreTheMeanSquaresOfWhatTheyMeet) {
  Tiny tiny;
  tiny.layers = 3;
  for (const char* family : {"deepseek_v3", "llama"}) {
    tiny.family = family;
    Transformer model = made(tiny, 5);
    Random random(6);
    const auto ids = random_tokens(random, 70, tiny.vocabulary);
    CalibrationOptions options;
    options.context = 32;
    int64_t last = 0;
    options.progress = [&](int64_t done, int64_t total) {
      EXPECT_EQ(total, 64);
      last = done;
    };
    const Importance importance = calibrate(backend(), model, ids, options);
    EXPECT_EQ(last, 64);

    // The first layer's queries read the normed embeddings, of the whole readings only.
    const float* table = model.model.embed_tokens.weight.view().as<float>();
    const Norm& norm = model.model.layers[0].input_layernorm;
    std::vector<double> squares(static_cast<size_t>(tiny.hidden));
    for (size_t t = 0; t < 64; ++t) {
      const float* row = table + ids[t] * tiny.hidden;
      double sum = 0;
      for (int64_t i = 0; i < tiny.hidden; ++i) sum += static_cast<double>(row[i]) * row[i];
      const double inverse = 1 / std::sqrt(sum / static_cast<double>(tiny.hidden) + norm.eps);
      for (int64_t i = 0; i < tiny.hidden; ++i)
        squares[static_cast<size_t>(i)] += std::pow(row[i] * inverse * norm.weight.view().as<float>()[i], 2);
    }
    const bool mla = family != std::string("llama");
    const auto found = importance.find(mla ? "model.layers.0.self_attn.q_a_proj.weight"
                                           : "model.layers.0.self_attn.q_proj.weight");
    ASSERT_NE(found, importance.end());
    const std::vector<double> expected = shares(squares);
    ASSERT_EQ(found->second.size(), expected.size());
    for (size_t i = 0; i < expected.size(); ++i)
      EXPECT_NEAR(found->second[i], expected[i], 1e-4 * expected[i]);

    // Every matrix that is quantised has its own, experts as far as tokens met them.
    int64_t experts = 0;
    model.for_each([&](const std::string& path, Tensor& tensor) {
      if (tensor.shape().rank() < 2 || path.ends_with("embed_tokens.weight")) return;
      if (!is_expert_stack(path)) {
        ASSERT_TRUE(importance.contains(path)) << path;
        EXPECT_EQ(static_cast<int64_t>(importance.at(path).size()), tensor[1]) << path;
        return;
      }
      for (int64_t e = 0; e < tensor[0]; ++e) {
        const auto one = importance.find(expert_path(path, e));
        if (one == importance.end()) continue;
        ++experts;
        EXPECT_EQ(static_cast<int64_t>(one->second.size()), tensor[2]);
        for (float column : one->second) EXPECT_GT(column, 0);
      }
    });
    EXPECT_EQ(experts > 24, mla);  // of 2 layers, 8 experts, 3 matrices
  }
}

TEST(Calibration, ShortTextsAreErrors) {
  const Transformer model = made({}, 5);
  const std::vector<int32_t> ids(100);
  EXPECT_THROW(calibrate(backend(), model, ids), Error);
}

}  // namespace
}  // namespace latente
