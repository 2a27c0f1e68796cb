// Products with weights of 8 and 4 bits, against the same arithmetic in plain loops, bit for bit, on every
// instruction set this machine has.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/gemm_support.h"
#include "hwy/targets.h"
#include "tensor/quantise.h"

namespace latente {
namespace {

struct Codes {
  Codes(Random& random, int64_t n, int64_t k, DType type, int64_t group)
      : codes(static_cast<size_t>(n * k)), scales(static_cast<size_t>(n * groups_of(k, group))) {
    std::vector<float> rows(codes.size());
    for (float& w : rows) w = static_cast<float>(random.normal());
    quantise_rows(rows.data(), n, k, type == DType::q8 ? 8 : 4, group, codes.data(), scales.data());
    if (type != DType::q4m) return;
    for (size_t i = 0, count = scales.size(); i < count; ++i)
      scales.push_back(static_cast<float>(f16(static_cast<float>(random.normal()))));
  }
  std::vector<int8_t> codes;
  std::vector<float> scales;  // and offsets
};

struct Weight {
  Weight(CpuBackend& cpu, const Shape& shape, DType type, int64_t group)
      : packed(*cpu.quantised(shape, type, group)) {
    memory = cpu.allocate(packed.bytes);
    packed.view.data = memory.get();
  }
  Backend::Packed packed;
  std::shared_ptr<void> memory;
};

struct Sum {
  float value, magnitudes;  // of its terms
};

// One element as quantised.h defines it.
Sum element(const float* x, const int8_t* codes, const float* scales, const float* offsets, int64_t k,
            int64_t group, float start) {
  float total = start, magnitudes = std::abs(start);
  for (int64_t g = 0; g * group < k; ++g) {
    const int64_t begin = g * group, end = std::min(k, begin + group);
    float extent = 0;
    for (int64_t i = begin; i < end; ++i) extent = std::max(extent, std::abs(x[i]));
    const float inverse = extent > 1e-30f ? 127 / extent : 0;
    float scale = extent / 127;
    if (group == 32 && scale >= 0x1p-17f && scale <= 65504) scale = static_cast<float>(f16(scale));
    int32_t sum = 0, ones = 0;
    for (int64_t i = begin; i < end; ++i) {
      const auto code = static_cast<int32_t>(std::nearbyint(x[i] * inverse));
      sum += codes[i] * code, ones += code;
    }
    const auto add = [&](int32_t of_codes, float by) {
      const float factor = static_cast<float>(of_codes) * scale;
      total = std::fma(factor, by, total);
      magnitudes += std::abs(factor * by);
    };
    add(sum, scales[g]);
    if (offsets) add(ones, offsets[g]);
  }
  return {total, magnitudes};
}

// Targets of quantised_kernels.cpp, one at a time; the portable one has no fused multiply-add, so its bits
// differ.
std::vector<int64_t> targets() {
  std::vector<int64_t> found;
  for (int64_t target : {HWY_AVX3_DL, HWY_AVX3, HWY_AVX2, HWY_NEON, HWY_STATIC_TARGET}) {
    if (hwy::SupportedTargets() & target) found.push_back(target);
  }
  return found;
}

struct UseTarget {
  explicit UseTarget(int64_t target) { hwy::SetSupportedTargetsForTest(target | HWY_STATIC_TARGET); }
  ~UseTarget() { hwy::SetSupportedTargetsForTest(0); }
};

struct Case {
  DType type;
  int64_t group, m, n, k;
};

class Quantised : public ::testing::TestWithParam<Case> {};

TEST_P(Quantised, LinearIsTheSumOfItsGroupsBitForBit) {
  const Case& c = GetParam();
  Random random(7);
  const Codes w(random, c.n, c.k, c.type, c.group);
  Array<float> x(1, c.m, c.k, 3), bias(1, 1, c.n);
  x.randomise(random), bias.randomise(random);
  float magnitude = 1;
  // Activations of every size that scales in float16 have, and of those they have not.
  for (int64_t i = 0; i < c.m; ++i) {
    for (int64_t at = 0; at < c.k; ++at) {
      if (at % c.group == 0) magnitude = std::ldexp(1.0f, static_cast<int>(random.below(48)) - 24);
      x(i, at) *= magnitude;
    }
  }
  for (const int64_t target : targets()) {
    const UseTarget use(target);
    CpuBackend cpu(2);
    Weight weight(cpu, {c.n, c.k}, c.type, c.group);
    cpu.pack_quantised(w.codes.data(), w.scales.data(), weight.packed.view, 0, 0, weight.packed.view[-2]);
    for (int mode = 0; mode < 3; ++mode) {
      const bool with_bias = mode == 1, accumulate = mode == 2;
      Array<float> out(1, c.m, c.n, 5);
      out.fill([] { return 0.25; });
      cpu.linear(x.matrix(), weight.packed.view, with_bias ? View(&bias(0, 0), {c.n}, DType::f32) : View(),
                 {out.matrix(), accumulate});
      for (int64_t i = 0; i < c.m; ++i) {
        for (int64_t j = 0; j < c.n; ++j) {
          const float start = with_bias ? bias(0, j) : accumulate ? 0.25f : 0.0f;
          const int64_t groups = groups_of(c.k, c.group);
          const float* scales = w.scales.data() + j * groups;
          const Sum expected =
              element(&x(i, 0), w.codes.data() + j * c.k, scales,
                      c.type == DType::q4m ? scales + c.n * groups : nullptr, c.k, c.group, start);
          if (target == HWY_STATIC_TARGET) {
            ASSERT_NEAR(out(i, j), expected.value, 1e-6 * expected.magnitudes)
                << "at " << i << ", " << j;
          } else {
            ASSERT_EQ(out(i, j), expected.value)
                << "target " << target << " mode " << mode << " at " << i << ", " << j;
          }
        }
      }
      ASSERT_EQ(out.written_outside(), 0);
    }
  }
}

// The definition and the kernels that fill panels agree to the bit, on every instruction set.
TEST_P(Quantised, PanelsAreThoseOfTheDefinition) {
  const Case c = GetParam();
  if (c.type == DType::q4m) return;  // which nothing is quantised to
  const int bits = c.type == DType::q8 ? 8 : 4;
  Random random(11);
  std::vector<float> rows(static_cast<size_t>(c.n * c.k)), importance(static_cast<size_t>(c.k));
  for (float& w : rows) w = static_cast<float>(random.normal() * std::exp(random.normal()));
  for (float& each : importance) each = static_cast<float>(std::exp(random.normal()));
  std::fill_n(rows.begin(), std::min<int64_t>(c.k, 40), 0.0f);
  std::vector<int8_t> codes(rows.size());
  std::vector<float> scales(static_cast<size_t>(c.n * groups_of(c.k, c.group)));
  for (const float* weights :
       {static_cast<const float*>(nullptr), static_cast<const float*>(importance.data())}) {
    quantise_rows(rows.data(), c.n, c.k, bits, c.group, codes.data(), scales.data(), weights);
    for (const int64_t target : targets()) {
      const UseTarget use(target);
      CpuBackend cpu(2);
      Weight expected(cpu, {c.n, c.k}, c.type, c.group), found(cpu, {c.n, c.k}, c.type, c.group);
      cpu.pack_quantised(codes.data(), scales.data(), expected.packed.view, 0, 0, c.n);
      ASSERT_TRUE(cpu.quantise(rows.data(), weights, found.packed.view, 0, 0, c.n));
      ASSERT_EQ(
          std::memcmp(expected.memory.get(), found.memory.get(), static_cast<size_t>(expected.packed.bytes)),
          0)
          << "target " << target;
      if (c.n <= 16) continue;
      // A piece of the rows, where it belongs.
      ASSERT_TRUE(cpu.quantise(rows.data(), weights, found.packed.view, 0, 0, 16));
      ASSERT_TRUE(cpu.quantise(rows.data() + 16 * c.k, weights, found.packed.view, 0, 16,
                               std::min<int64_t>(c.n - 16, 32)));
      ASSERT_EQ(
          std::memcmp(expected.memory.get(), found.memory.get(), static_cast<size_t>(expected.packed.bytes)),
          0);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, Quantised,
    ::testing::Values(Case{DType::q8, 32, 1, 16, 32}, Case{DType::q8, 64, 1, 100, 256},
                      Case{DType::q8, 128, 7, 33, 300}, Case{DType::q8, 64, 40, 130, 1100},
                      Case{DType::q8, 32, 3, 1, 8}, Case{DType::q8, 64, 200, 48, 64},
                      Case{DType::q4, 32, 1, 16, 32}, Case{DType::q4, 64, 1, 100, 256},
                      Case{DType::q4, 128, 7, 33, 300}, Case{DType::q4, 64, 40, 130, 1100},
                      Case{DType::q4, 32, 3, 1, 8}, Case{DType::q4, 64, 200, 48, 64},
                      Case{DType::q8, 256, 13, 65, 700}, Case{DType::q4, 256, 6, 65, 700},
                      Case{DType::q4m, 32, 1, 100, 256}, Case{DType::q4m, 32, 40, 130, 1100},
                      Case{DType::q4m, 64, 7, 33, 300}),
    [](const auto& test) {
      const Case& c = test.param;
      return std::string(name_of(c.type)) + "_group" + std::to_string(c.group) + "_" + std::to_string(c.m) +
             "x" + std::to_string(c.n) + "x" + std::to_string(c.k);
    });

TEST(Quantised, ExpertsHaveTheBitsOfSingleMatrices) {
  CpuBackend cpu(2);
  Random random(3);
  constexpr int64_t experts = 5, n = 40, k = 96, rows = 23;
  const std::vector<int32_t> order = {4, 0, 1, 1, 7, 3, 2, 9, 8, 5, 6, 0, 4, 3, 2, 1, 0, 9, 9, 8, 7, 6, 5};
  std::vector<int32_t> offsets = {0, 3, 3, 17, 18, 23}, sorted = order;
  Array<float> x(1, 10, k), out(1, rows, n);
  x.randomise(random);
  for (DType type : {DType::q8, DType::q4, DType::q4m}) {
    Weight stack(cpu, {experts, n, k}, type, 32);
    std::vector<Codes> codes;
    for (int64_t e = 0; e < experts; ++e) {
      codes.emplace_back(random, n, k, type, 32);
      cpu.pack_quantised(codes.back().codes.data(), codes.back().scales.data(), stack.packed.view, e, 0, n);
    }
    cpu.grouped_linear(x.matrix(), list_view(sorted), list_view(offsets), stack.packed.view, out.matrix());
    for (size_t e = 0; e < static_cast<size_t>(experts); ++e) {
      Weight single(cpu, {n, k}, type, 32);
      cpu.pack_quantised(codes[e].codes.data(), codes[e].scales.data(), single.packed.view, 0, 0, n);
      for (int32_t r = offsets[e]; r < offsets[e + 1]; ++r) {
        Array<float> alone(1, 1, n);
        cpu.linear(x.rows(order[static_cast<size_t>(r)], 1), single.packed.view, {}, {alone.matrix(), false});
        for (int64_t j = 0; j < n; ++j) ASSERT_EQ(alone(0, j), out(r, j)) << "row " << r << ", column " << j;
      }
    }
  }
}

TEST(Quantised, EmbeddingsAreRowsOfPanels) {
  CpuBackend cpu(2);
  Random random(9);
  constexpr int64_t n = 35, k = 96;
  for (DType type : {DType::q8, DType::q4, DType::q4m}) {
    const Codes w(random, n, k, type, 32);
    Weight table(cpu, {n, k}, type, 32);
    cpu.pack_quantised(w.codes.data(), w.scales.data(), table.packed.view, 0, 0, n);
    std::vector<int32_t> ids = {34, 0, 17, 17, 5};
    Array<float> out(1, 5, k, 3);
    cpu.embedding(list_view(ids), table.packed.view, out.matrix());
    for (int64_t t = 0; t < 5; ++t) {
      for (int64_t i = 0; i < k; ++i) {
        const auto at = static_cast<size_t>(ids[static_cast<size_t>(t)] * k + i);
        const float offset = type == DType::q4m ? w.scales[at / 32 + n * k / 32] : 0;
        ASSERT_EQ(out(t, i), w.scales[at / 32] * static_cast<float>(w.codes[at]) + offset);
      }
    }
    ASSERT_EQ(out.written_outside(), 0);
  }
}

TEST(Quantised, WeightsThatAreNotFiniteAreRefused) {
  CpuBackend cpu(1);
  std::vector<float> rows(20 * 70, 0.5f);
  for (DType type : {DType::q8, DType::q4}) {
    Weight weight(cpu, {20, 70}, type, 32);
    EXPECT_TRUE(cpu.quantise(rows.data(), nullptr, weight.packed.view, 0, 0, 20));
    // The last is finite, and its scale is beyond float16.
    for (float bad :
         {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity(), 1e8f}) {
      for (size_t at : {size_t{3}, size_t{19 * 70 + 69}}) {
        std::vector<float> changed = rows;
        changed[at] = bad;
        EXPECT_FALSE(cpu.quantise(changed.data(), nullptr, weight.packed.view, 0, 0, 20)) << bad << at;
      }
    }
  }
}

TEST(Quantised, WhatIsNotFiniteStaysSo) {
  CpuBackend cpu(1);
  Random random(5);
  const Codes w(random, 16, 64, DType::q8, 32);
  Weight weight(cpu, {16, 64}, DType::q8, 32);
  cpu.pack_quantised(w.codes.data(), w.scales.data(), weight.packed.view, 0, 0, weight.packed.view[-2]);
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Array<float> x(1, 2, 64), out(1, 2, 16);
    x.randomise(random);
    x(1, 40) = bad;
    cpu.linear(x.matrix(), weight.packed.view, {}, {out.matrix(), false});
    EXPECT_TRUE(std::isfinite(out(0, 3)));
    EXPECT_TRUE(std::isnan(out(1, 3)));
  }
}

}  // namespace
}  // namespace latente
