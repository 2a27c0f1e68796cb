// FP8 on a device: codes against what they stand for, products against loops in double over the same codes.
#include <tuple>

#include "attention_support.h"

namespace latente {
namespace {

class Fp8 : public testing::Test {
 protected:
  void SetUp() override {
    if (device_.context.compute_capability != 90) GTEST_SKIP() << "needs compute capability 9.0";
  }
  struct Quantised {
    Quantised(Device& device, Shape shape, Shape scale_shape, bool squares)
        : codes_memory(cuda::allocate(shape.count())), scales(device, scale_shape, DType::f32) {
      of = {View(codes_memory.get(), shape, DType::f8e4m3), scales.view, squares};
    }
    // Row-major values as the codes and scales have them.
    std::vector<double> read() {
      const View& v = of.codes;
      std::vector<f8e4m3> codes(static_cast<size_t>(v.count()));
      cuda::download(v, codes.data(), scales.device->stream);
      const std::vector<double>& scale = scales.read();
      const int rank = v.shape.rank();
      const int64_t columns = v[rank - 1], rows = v[rank - 2];
      std::vector<double> values(codes.size());
      for (size_t i = 0; i < values.size(); ++i) {
        const auto at = static_cast<int64_t>(i);
        const int64_t column = at % columns, row = at / columns % rows, matrix = at / columns / rows;
        const int64_t in_row = of.scales.shape[rank - 1];
        const int64_t s = of.squares ? (matrix * of.scales[rank - 2] + row / 128) * in_row + column / 128
                                     : column / 128 * in_row + row;
        float code = 0;
        convert(DType::f8e4m3, &codes[i], DType::f32, &code, 1);
        values[i] = static_cast<double>(code) * scale[static_cast<size_t>(s)];
      }
      return values;
    }
    std::shared_ptr<void> codes_memory;
    DeviceTensor scales;
    cuda::Codes of;
  };
  static int64_t blocks(int64_t n) { return (n + 127) / 128; }
  Quantised rows(const DeviceTensor& x) {
    Quantised q(device_, x.view.shape, {blocks(x.view[1]), x.view[0]}, false);
    cuda::quantise_rows(x.view, q.of.codes, q.of.scales, device_.context);
    return q;
  }
  Quantised columns(const DeviceTensor& x) {
    Quantised q(device_, {x.view[1], x.view[0]}, {blocks(x.view[0]), x.view[1]}, false);
    cuda::quantise_columns(x.view, q.of.codes, q.of.scales, device_.context);
    return q;
  }
  std::pair<Quantised, Quantised> squares(const DeviceTensor& w) {
    const int64_t n = w.view[0], k = w.view[1];
    std::pair q{Quantised(device_, {n, k}, {blocks(n), blocks(k)}, true),
                Quantised(device_, {k, n}, {blocks(k), blocks(n)}, true)};
    cuda::quantise_squares(w.view, q.first.of.codes, q.first.of.scales, q.second.of.codes, q.second.of.scales,
                           device_.context);
    return q;
  }
  // Of very different sizes.
  DeviceTensor values(Shape shape, DType type) {
    DeviceTensor t(device_, shape, type);
    t.set([&] { return random_.normal() * std::exp2(8 * random_.uniform()); });
    return t;
  }
  static std::vector<double> product(const std::vector<double>& a, const std::vector<double>& b, int64_t m,
                                     int64_t n, int64_t k) {
    std::vector<double> c(static_cast<size_t>(m * n));
    in_parallel(m, [&](int64_t i) {
      for (int64_t j = 0; j < n; ++j) {
        double sum = 0;
        for (int64_t l = 0; l < k; ++l)
          sum += a[static_cast<size_t>(i * k + l)] * b[static_cast<size_t>(j * k + l)];
        c[static_cast<size_t>(i * n + j)] = sum;
      }
    });
    return c;
  }
  void expect_product(Quantised& a, Quantised& b) {
    const int64_t m = a.of.codes[0], n = b.of.codes[0], k = a.of.codes[1];
    const std::vector<double> want = product(a.read(), b.read(), m, n, k);
    for (const DType type : {DType::f32, DType::bf16}) {
      DeviceTensor out(device_, {m, n}, type, 8, 0);
      cuda::product_fp8(a.of, b.of, {out.view, false}, device_.context);
      EXPECT_LT(distance(out.read(), want), type == DType::f32 ? 1e-3 : 4e-3);
      EXPECT_EQ(out.written_outside, 0);
      out.randomise(random_);
      std::vector<double> sum = out.values;
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += want[i];
      cuda::product_fp8(a.of, b.of, {out.view, true}, device_.context);
      EXPECT_LT(distance(out.read(), sum), type == DType::f32 ? 1e-3 : 6e-3);
    }
  }

  Device device_;
  Random random_{11};
};

TEST_F(Fp8, CodesAreWithinTheirRounding) {
  for (const DType type : {DType::f32, DType::bf16}) {
    for (const auto& [n, k] : {std::tuple{int64_t{64}, int64_t{128}}, {200, 272}, {16, 1040}}) {
      DeviceTensor x = values({n, k}, type);
      auto at = [&x = x, k = k](int64_t i, int64_t j) { return x.values[static_cast<size_t>(i * k + j)]; };
      auto check = [&](Quantised q, bool transposed) {
        const std::vector<double> got = q.read();
        const std::vector<double> scale = q.scales.values;
        const int64_t rows_of = q.of.codes[0], columns_of = q.of.codes[1], in_row = q.of.scales[1];
        std::vector<double> most(scale.size());
        for (int pass = 0; pass < 2; ++pass) {
          for (int64_t i = 0; i < rows_of; ++i) {
            for (int64_t j = 0; j < columns_of; ++j) {
              const double want = transposed ? at(j, i) : at(i, j);
              const auto s =
                  static_cast<size_t>(q.of.squares ? i / 128 * in_row + j / 128 : j / 128 * in_row + i);
              if (pass == 0) {
                most[s] = std::max(most[s], std::abs(want));
              } else {  // three bits after the leading one; 2^-9 is the least magnitude of a code
                ASSERT_LE(std::abs(got[static_cast<size_t>(i * columns_of + j)] - want),
                          std::max(std::abs(want) / 15.9, scale[s] / 1023))
                    << i << ", " << j;
              }
            }
          }
        }
        for (size_t s = 0; s < most.size(); ++s) EXPECT_NEAR(scale[s], most[s] / 448, most[s] * 1e-9);
      };
      check(rows(x), false);
      check(columns(x), true);
      auto [straight, transposed] = squares(x);
      check(std::move(straight), false);
      check(std::move(transposed), true);
    }
  }
}

TEST_F(Fp8, LinearAndItsGradients) {
  for (const auto& [tokens, n, k] : {std::tuple{int64_t{16}, int64_t{64}, int64_t{128}},
                                     {304, 272, 528},
                                     {128, 128, 1024},
                                     {1040, 400, 144}}) {
    SCOPED_TRACE(testing::Message() << tokens << " x " << n << " x " << k);
    DeviceTensor x = values({tokens, k}, DType::bf16), d_out = values({tokens, n}, DType::bf16);
    DeviceTensor w = values({n, k}, DType::bf16);
    auto [straight, transposed] = squares(w);
    Quantised x_rows = rows(x), d_rows = rows(d_out), x_columns = columns(x), d_columns = columns(d_out);
    expect_product(x_rows, straight);
    expect_product(d_rows, transposed);
    expect_product(d_columns, x_columns);
  }
}

TEST_F(Fp8, Experts) {
  const int64_t n = 272, k = 400;
  for (const std::vector<int64_t>& counts : {std::vector<int64_t>{130, 0, 1, 70, 203}, {0, 3, 0}}) {
    const auto experts = static_cast<int64_t>(counts.size());
    std::vector<int32_t> offsets{0};
    for (const int64_t count : counts) offsets.push_back(offsets.back() + static_cast<int32_t>(count));
    const int64_t sorted = offsets.back();
    DeviceIndices on_device(device_, offsets);
    DeviceTensor x = values({sorted, k}, DType::bf16);
    Quantised a = rows(x), w(device_, {experts, n, k}, {experts, blocks(n), blocks(k)}, true);
    for (int64_t e = 0; e < experts; ++e) {
      DeviceTensor one = values({n, k}, DType::bf16);
      auto [straight, transposed] = squares(one);
      auto copy = [&](void* to, const View& from) {
        cuda::check(cudaMemcpyAsync(to, from.data, static_cast<size_t>(from.bytes()),
                                    cudaMemcpyDeviceToDevice, device_.stream),
                    "copy");
      };
      copy(static_cast<char*>(w.of.codes.data) + e * n * k, straight.of.codes);
      copy(w.of.scales.as<float>() + e * w.of.scales.stride(0), straight.of.scales);
      device_.stream.synchronize();
    }
    const std::vector<double> av = a.read(), wv = w.read();
    std::vector<double> want;
    for (int64_t e = 0; e < experts; ++e) {
      const auto from = av.begin() + offsets[static_cast<size_t>(e)] * k;
      const std::vector<double> some(from, from + counts[static_cast<size_t>(e)] * k);
      const std::vector<double> matrix(wv.begin() + e * n * k, wv.begin() + (e + 1) * n * k);
      const std::vector<double> y = product(some, matrix, counts[static_cast<size_t>(e)], n, k);
      want.insert(want.end(), y.begin(), y.end());
    }
    DeviceTensor out(device_, {sorted, n}, DType::bf16, 0, 8);
    cuda::grouped_product_fp8(a.of, on_device.view, w.of, out.view, device_.context);
    EXPECT_LT(distance(out.read(), want), 4e-3);
    EXPECT_EQ(out.written_outside, 0);
  }
}

}  // namespace
}  // namespace latente
