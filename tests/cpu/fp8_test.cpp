// Weights of FP8 as they are stored, codes with a scale for each 128 rows and columns: the bits of float32
// weights that hold the products of both.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <vector>

#include "cpu/gemm_support.h"
#include "hwy/targets.h"

namespace latente {
namespace {

// Matrices [n, k].
struct Stored {
  Stored(Random& random, int64_t matrices, int64_t n, int64_t k)
      : codes(static_cast<size_t>(matrices * n * k)), blocks((n + 127) / 128 * ((k + 127) / 128)) {
    for (int64_t i = 0; i < matrices * blocks; ++i)
      scales.push_back(static_cast<float>(std::exp(random.uniform(-12.0, 1.0))));
    for (uint8_t& code : codes) {
      do code = static_cast<uint8_t>(random.below(256));
      while ((code & 0x7f) == 0x7f);
    }
    const int64_t across = (k + 127) / 128;
    for (int64_t i = 0; i < matrices * n * k; ++i) {
      const int64_t matrix = i / (n * k), row = i / k % n, column = i % k;
      const float scale = scales[static_cast<size_t>(matrix * blocks + row / 128 * across + column / 128)];
      values.push_back(static_cast<float>(std::bit_cast<f8e4m3>(codes[static_cast<size_t>(i)])) * scale);
    }
  }
  std::vector<uint8_t> codes;
  int64_t blocks;  // of a matrix
  std::vector<float> scales, values;
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

TEST(Fp8Weights, MultiplyAsTheirValuesInFloat32) {
  Random random(5);
  for (const auto& [n, k] :
       {std::pair<int64_t, int64_t>{16, 128}, {200, 384}, {130, 1408}, {5, 66}, {640, 2}}) {
    Stored stored(random, 1, n, k);
    for (const int64_t target : gemm_targets()) {
      hwy::SetSupportedTargetsForTest(target | HWY_STATIC_TARGET);
      CpuBackend cpu(2);
      const Packed w(cpu, stored, {n, k});
      ASSERT_TRUE(w.fits);
      for (const int64_t m : {1, 2, 5, 6, 13, 40, 100}) {
        Array<float> x(1, m, k, 3), bias(1, 1, n), out(1, m, n, 5), want(1, m, n, 5);
        x.randomise(random), bias.randomise(random);
        const View b = m == 2 ? View(&bias(0, 0), {n}, DType::f32) : View();
        cpu.linear(x.matrix(), w.view, b, {out.matrix(), false});
        cpu.linear(x.matrix(), View(stored.values.data(), {n, k}, DType::f32), b, {want.matrix(), false});
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < n; ++j)
            ASSERT_EQ(out(i, j), want(i, j)) << n << " x " << k << ", " << m << " rows";
        EXPECT_EQ(out.written_outside(), 0);
      }
      hwy::SetSupportedTargetsForTest(0);
    }
  }
}

TEST(Fp8Weights, OfExperts) {
  Random random(6);
  const int64_t experts = 5, n = 144, k = 160;
  Stored stored(random, experts, n, k);
  CpuBackend cpu(2);
  const Packed w(cpu, stored, {experts, n, k});
  std::vector<int32_t> offsets = {0, 1, 1, 20, 22, 23};
  Array<float> x(1, 23, k), out(1, 23, n), want(1, 23, n);
  x.randomise(random);
  const View ends(offsets.data(), {experts + 1}, DType::i32);
  cpu.grouped_linear(x.matrix(), {}, ends, w.view, out.matrix());
  cpu.grouped_linear(x.matrix(), {}, ends, View(stored.values.data(), {experts, n, k}, DType::f32),
                     want.matrix());
  for (int64_t i = 0; i < 23; ++i)
    for (int64_t j = 0; j < n; ++j) ASSERT_EQ(out(i, j), want(i, j)) << i;
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
  EXPECT_FALSE(cpu.packed(View(nullptr, {4, 3}, DType::f8e4m3)));
}

}  // namespace
}  // namespace latente
