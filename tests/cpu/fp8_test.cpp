// Weights of FP8 as they are stored, codes with a scale for each 128 rows and columns: against loops in
// double, and the same bits whatever the batch, the threads and the instruction set.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <utility>
#include <vector>

#include "cpu/gemm_support.h"
#include "hwy/targets.h"

namespace latente {
namespace {

bool is_number(int64_t code) { return (code & 0x7f) != 0x7f; }

float value_of(uint8_t code) { return static_cast<float>(std::bit_cast<f8e4m3>(code)); }

// Matrices [n, k].
struct Stored {
  Stored(Random& random, int64_t matrices, int64_t n, int64_t k)
      : codes(static_cast<size_t>(matrices * n * k)),
        columns(k),
        blocks((n + 127) / 128 * ((k + 127) / 128)) {
    for (int64_t i = 0; i < matrices * blocks; ++i)
      scales.push_back(static_cast<float>(std::exp(random.uniform(std::log(1e-6), std::log(100.0)))));
    for (uint8_t& code : codes) {
      do code = static_cast<uint8_t>(random.below(256));
      while (!is_number(code));
    }
  }
  // Of the first matrix.
  float code(int64_t row, int64_t column) const {
    return value_of(codes[static_cast<size_t>(row * columns + column)]);
  }
  float scale(int64_t row, int64_t column) const {
    return scales[static_cast<size_t>(row / 128 * ((columns + 127) / 128) + column / 128)];
  }
  std::vector<uint8_t> codes;
  int64_t columns, blocks;  // of a matrix
  std::vector<float> scales;
};

struct Packed {
  Packed(CpuBackend& cpu, Stored& stored, const Shape& shape) {
    const Backend::Packed form = *cpu.packed(View(nullptr, shape, DType::f8e4m3));
    memory = cpu.allocate(form.bytes);
    view = form.view;
    view.data = memory.get();
    const int64_t matrices = shape.rank() == 3 ? shape[0] : 1, size = shape[-2] * shape[-1];
    for (int64_t i = 0; i < matrices; ++i) {
      const View codes(stored.codes.data() + i * size, {shape[-2], shape[-1]}, DType::f8e4m3);
      fits = cpu.pack_fp8(codes, stored.scales.data() + i * stored.blocks, view, i) && fits;
    }
  }
  View view;
  std::shared_ptr<void> memory;
  bool fits = true;
};

// Of gemm_kernels.cpp.
std::vector<int64_t> gemm_targets() {
  std::vector<int64_t> found;
  for (int64_t target : {HWY_AVX3, HWY_AVX2, HWY_NEON, HWY_STATIC_TARGET}) {
    if (hwy::SupportedTargets() & target) found.push_back(target);
  }
  return found;
}

// Rows of ordinary numbers, with zeros, of numbers that count as zero with small scales, and of all sizes.
void fill_rows(Random& random, Array<float>& x) {
  x.randomise(random);
  for (int64_t i = 0; i < x.row_count; ++i) {
    for (int64_t k = 0; k < x.column_count; ++k) {
      const double ordinary = static_cast<double>(x(i, k));
      if (i % 5 == 1) x(i, k) = static_cast<float>(ordinary * 1e-27);
      if (i % 5 == 2) x(i, k) = static_cast<float>(ordinary * std::exp(random.uniform(-80.0, 10.0)));
      if (i % 5 == 3 && k % 3 == 0) x(i, k) = 0;
    }
  }
}

// x · wᵀ + bias in double, and as far as float32 may be from it.
struct Expected {
  Expected(const Stored& stored, Array<float>& x, Array<float>* bias, int64_t n) {
    const int64_t k = x.column_count;
    for (int64_t i = 0; i < x.row_count; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        double sum = bias ? static_cast<double>((*bias)(0, j)) : 0, magnitude = std::abs(sum);
        for (int64_t at = 0; at < k; ++at) {
          const double product = static_cast<double>(x(i, at)) * static_cast<double>(stored.scale(j, at)) *
                                 static_cast<double>(stored.code(j, at));
          sum += product, magnitude += std::abs(product);
        }
        values.push_back(sum);
        const double zeros = 0x1p-93 * 448 * static_cast<double>(k);
        margins.push_back(2e-6 * magnitude + zeros);
      }
    }
  }
  std::vector<double> values, margins;
};

TEST(Fp8Weights, AreNearTheProductInDoubleWithTheSameBitsForAnyBatch) {
  Random random(5);
  constexpr int64_t most = 100;
  for (const auto& [n, k] :
       {std::pair<int64_t, int64_t>{16, 128}, {200, 384}, {130, 1408}, {777, 390}, {5, 66}, {640, 2}}) {
    Stored stored(random, 1, n, k);
    Array<float> x(1, most, k, 3), bias(1, 1, n), fused(1, most, n);
    fill_rows(random, x), bias.randomise(random);
    const View b = n == 200 ? View(&bias(0, 0), {n}, DType::f32) : View();
    const Expected expected(stored, x, b ? &bias : nullptr, n);
    bool is_first = true;
    for (const int64_t target : gemm_targets()) {
      hwy::SetSupportedTargetsForTest(target | HWY_STATIC_TARGET);
      Array<float> want(1, most, n);
      for (const int count : {1, 3}) {
        const Packed w(threads(count), stored, {n, k});
        ASSERT_TRUE(w.fits);
        for (const int64_t m : {most, int64_t{1}, int64_t{2}, int64_t{3}, int64_t{4}, int64_t{5}, int64_t{6},
                                int64_t{9}, int64_t{13}, int64_t{40}}) {
          const int64_t first = m % 7 * (most - m) / 7;
          Array<float> out(1, m, n, 5);
          threads(count).linear(x.rows(first, m), w.view, b, {out.matrix(), false});
          EXPECT_EQ(out.written_outside(), 0);
          for (int64_t i = 0; i < m; ++i) {
            for (int64_t j = 0; j < n; ++j) {
              if (m == most && count == 1) want(i, j) = out(i, j);
              ASSERT_EQ(out(i, j), want(first + i, j))
                  << n << " x " << k << ", " << m << " rows, " << count << " threads, target " << target;
            }
          }
        }
      }
      hwy::SetSupportedTargetsForTest(0);
      for (int64_t i = 0; i < most * n; ++i) {
        const auto at = static_cast<size_t>(i);
        ASSERT_NEAR(static_cast<double>(want.data[at]), expected.values[at], expected.margins[at])
            << n << " x " << k << ", row " << i / n << ", target " << target;
      }
      if (target == HWY_STATIC_TARGET) continue;  // may have no fused multiply-add
      if (!std::exchange(is_first, false)) {
        EXPECT_EQ(want.differences(fused), 0) << target;
      }
      fused = want;
    }
  }
}

// A row of one element has one product: the value of a code and a scale, rounded.
TEST(Fp8Weights, EachCodeIsExact) {
  Random random(8);
  const int64_t n = 48, k = 256;
  Stored stored(random, 1, n, k);
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = 0; i < k; ++i)
      stored.codes[static_cast<size_t>(j * k + i)] = static_cast<uint8_t>(is_number(i) ? i : 0);
  for (const int64_t target : gemm_targets()) {
    hwy::SetSupportedTargetsForTest(target | HWY_STATIC_TARGET);
    const Packed w(threads(1), stored, {n, k});
    Array<float> x(1, k, k), one(1, 1, n), many(1, k, n);
    x.fill([] { return 0.0f; });
    for (int64_t i = 0; i < k; ++i) x(i, i) = 1;
    threads(1).linear(x.matrix(), w.view, {}, {many.matrix(), false});
    for (int64_t i = 0; i < k; ++i) {
      threads(1).linear(x.rows(i, 1), w.view, {}, {one.matrix(), false});
      for (int64_t j = 0; j < n; ++j) {
        ASSERT_EQ(one(0, j), stored.code(j, i) * stored.scale(j, i)) << "code " << i;
        ASSERT_EQ(many(i, j), one(0, j)) << "code " << i;
      }
    }
    hwy::SetSupportedTargetsForTest(0);
  }
}

TEST(Fp8Weights, WhatIsAddedToIsRoundedOnce) {
  Random random(9);
  const int64_t n = 80, k = 128;
  Stored stored(random, 1, n, k);
  const Packed w(threads(3), stored, {n, k});
  for (const int64_t m : {1, 20}) {
    Array<float> x(1, m, k), sum(1, m, n), product(1, m, n);
    x.randomise(random), sum.randomise(random);
    const Array<float> before = sum;
    threads(3).linear(x.matrix(), w.view, {}, {product.matrix(), false});
    threads(3).linear(x.matrix(), w.view, {}, {sum.matrix(), true});
    for (size_t i = 0; i < static_cast<size_t>(m * n); ++i)
      ASSERT_EQ(sum.data[i], before.data[i] + product.data[i]);
  }
}

TEST(Fp8Weights, OfExperts) {
  Random random(6);
  const int64_t experts = 5, n = 144, k = 160;
  Stored stored(random, experts, n, k);
  CpuBackend cpu(2);
  const Packed w(cpu, stored, {experts, n, k});
  std::vector<int32_t> offsets = {0, 1, 1, 20, 22, 23};
  Array<float> x(1, 23, k), out(1, 23, n), want(1, 1, n);
  x.randomise(random);
  const View ends(offsets.data(), {experts + 1}, DType::i32);
  cpu.grouped_linear(x.matrix(), {}, ends, w.view, out.matrix());
  for (int64_t e = 0; e < experts; ++e) {
    View expert(static_cast<f8e4m3*>(w.view.data) + e * w.view.stride(0), {n, k}, DType::f8e4m3);
    expert.layout = Layout::panels;
    expert.strides = {w.view.stride(1), w.view.stride(2)};
    for (int64_t i = offsets[static_cast<size_t>(e)]; i < offsets[static_cast<size_t>(e) + 1]; ++i) {
      cpu.linear(x.rows(i, 1), expert, {}, {want.matrix(), false});
      for (int64_t j = 0; j < n; ++j) ASSERT_EQ(out(i, j), want(0, j)) << i;
    }
  }
}

TEST(Fp8Weights, WhatIsNotFiniteIsRefused) {
  Random random(7);
  CpuBackend cpu(2);
  Stored stored(random, 1, 32, 64);
  stored.codes[100] = 0xff;
  EXPECT_FALSE(Packed(cpu, stored, {32, 64}).fits);
  stored.codes[100] = 0x7e;
  EXPECT_TRUE(Packed(cpu, stored, {32, 64}).fits);
  stored.scales[0] = std::nanf("");
  EXPECT_FALSE(Packed(cpu, stored, {32, 64}).fits);
  stored.scales[0] = 129;
  EXPECT_FALSE(Packed(cpu, stored, {32, 64}).fits);
  EXPECT_FALSE(cpu.packed(View(nullptr, {4, 3}, DType::f8e4m3)));
}

}  // namespace
}  // namespace latente
