#include "tensor/quantise.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "base/random.h"
#include "tensor/dtype.h"
#include "tensor/panels.h"

namespace latente {
namespace {

struct Quantised {
  Quantised(const std::vector<float>& row, int bits, int64_t group)
      : codes(row.size()), scales(static_cast<size_t>(groups_of(static_cast<int64_t>(row.size()), group))) {
    quantise_rows(row.data(), 1, static_cast<int64_t>(row.size()), bits, group, codes.data(), scales.data());
    for (size_t i = 0; i < row.size(); ++i) {
      values.push_back(scales[i / static_cast<size_t>(group)] * codes[i]);
      squared_error += std::pow(values[i] - row[i], 2.0);
    }
  }
  std::vector<int8_t> codes;
  std::vector<float> scales, values;
  double squared_error = 0;
};

std::vector<float> normal_row(int64_t count, uint64_t seed) {
  Random random(seed);
  std::vector<float> row(static_cast<size_t>(count));
  for (float& x : row) x = static_cast<float>(random.normal());
  return row;
}

TEST(Quantise, EightBitsErrByHalfAStepAtMost) {
  const auto row = normal_row(1000, 1);
  const Quantised q(row, 8, 64);
  for (size_t i = 0; i < row.size(); ++i) {
    // The scale itself was rounded to 11 bits.
    EXPECT_LE(std::abs(q.values[i] - row[i]), 0.5f * q.scales[i / 64] + std::abs(row[i]) / 2048) << i;
    EXPECT_GE(q.codes[i], -127);
    EXPECT_EQ(q.scales[i / 64], static_cast<float>(f16(q.scales[i / 64])));
  }
}

TEST(Quantise, FourBitsBeatRoundingToNearest) {
  double nearest = 0, ours = 0;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const auto row = normal_row(320, seed);
    const Quantised q(row, 4, 32);
    ours += q.squared_error;
    for (size_t g = 0; g < 10; ++g) {
      float extent = 0;
      for (size_t i = 0; i < 32; ++i) extent = std::max(extent, std::abs(row[32 * g + i]));
      for (size_t i = 0; i < 32; ++i) {
        const float step = extent / 7, x = row[32 * g + i];
        nearest += std::pow(std::nearbyint(x / step) * step - x, 2.0);
      }
    }
    for (int8_t code : q.codes) {
      EXPECT_GE(code, -8);
      EXPECT_LE(code, 7);
    }
  }
  EXPECT_LT(ours, 0.85 * nearest);
}

// The error that importance speaks of falls; the others may rise.
TEST(Quantise, ImportantColumnsAreKeptCloser) {
  double alike = 0, weighted = 0;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const auto row = normal_row(320, seed);
    std::vector<float> importance(row.size());
    for (size_t i = 0; i < row.size(); ++i) importance[i] = i % 7 == 0 ? 20.0f : 0.1f;
    std::vector<int8_t> codes(row.size());
    std::vector<float> scales(10);
    for (const float* columns :
         {static_cast<const float*>(nullptr), static_cast<const float*>(importance.data())}) {
      quantise_rows(row.data(), 1, 320, 4, 32, codes.data(), scales.data(), columns);
      for (size_t i = 0; i < row.size(); ++i)
        (columns ? weighted : alike) += importance[i] * std::pow(scales[i / 32] * codes[i] - row[i], 2.0);
    }
  }
  EXPECT_LT(weighted, 0.9 * alike);
}

TEST(Quantise, ZerosAndSmallGroupsStayWhatTheyAre) {
  std::vector<float> row(70, 0.0f);
  row[69] = -2.0f;
  for (int bits : {8, 4}) {
    const Quantised q(row, bits, 32);
    for (size_t i = 0; i < 69; ++i) EXPECT_EQ(q.values[i], 0.0f);
    EXPECT_NEAR(q.values[69], -2.0f, 2e-3);
  }
}

TEST(Quantise, SquaresHaveTheirLargestMagnitudeAt448) {
  const int64_t n = 150, k = 270;
  std::vector<float> values = normal_row(n * k, 3);
  for (int64_t i = 0; i < n * k; ++i) values[static_cast<size_t>(i)] *= i / k < 128 ? 1.0f : 1e-6f;
  const auto bytes = static_cast<size_t>(quantised::matrix_bytes(DType::f8e4m3, quantised::square, n, k));
  EXPECT_GE(bytes, static_cast<size_t>(6 * 4 + n * k));
  std::vector<std::byte> matrix(bytes);
  ASSERT_TRUE(quantised::quantise_squares(values.data(), n, k, matrix.data()));
  const auto* scales = reinterpret_cast<const float*>(matrix.data());
  const auto* codes = reinterpret_cast<const f8e4m3*>(matrix.data() + quantised::square_scale_bytes(n, k));
  for (int64_t square = 0; square < 6; ++square) {
    float largest = 0;
    for (int64_t row = square / 3 * 128; row < std::min<int64_t>(n, square / 3 * 128 + 128); ++row) {
      for (int64_t c = square % 3 * 128; c < std::min<int64_t>(k, square % 3 * 128 + 128); ++c) {
        const float code = static_cast<float>(codes[row * k + c]),
                    value = values[static_cast<size_t>(row * k + c)];
        largest = std::max(largest, std::abs(code));
        EXPECT_NEAR(code * scales[square], value, std::abs(value) / 16 + scales[square] / 512);
      }
    }
    EXPECT_EQ(largest, 448.0f);
  }
  values[77] = std::nanf("");
  EXPECT_FALSE(quantised::quantise_squares(values.data(), n, k, matrix.data()));
}

}  // namespace
}  // namespace latente
