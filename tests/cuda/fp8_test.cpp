// FP8 on a device: codes against what they stand for, products against loops in double over the same codes,
// fused quantisation against its parts, ops in FP8 beside bfloat16.
#include <numeric>
#include <tuple>

#include "attention_support.h"
#include "cuda/backend.h"
#include "ops/ops.h"
#include "tensor/device.h"

namespace latente {
namespace {

using Values = std::vector<double>;

int64_t blocks(int64_t n) { return (n + 127) / 128; }

// Codes and scales on the device.
struct Quantised {
  // Activations [rows, columns], of experts if there are any.
  Quantised(Device& device_, int64_t rows, int64_t columns, int64_t experts) : device(&device_) {
    const int64_t depth = fp8_depth(rows, experts);
    of = {matrix({rows, columns}, {blocks(columns), rows}), matrix({columns, depth}, {depth / 128, columns})};
  }
  // Weights [n, k], or a stack of them.
  Quantised(Device& device_, Shape w) : device(&device_) {
    const int64_t n = w[-2], k = w[-1], e = w.rank() == 3 ? w[0] : 0;
    const auto of_stack = [&](int64_t a, int64_t b) { return e > 0 ? Shape{e, a, b} : Shape{a, b}; };
    of = {matrix(of_stack(n, k), of_stack(blocks(n), blocks(k))),
          matrix(of_stack(k, n), of_stack(blocks(k), blocks(n)))};
  }
  Fp8Matrix matrix(Shape codes, Shape scales) {
    memory.push_back(cuda::allocate(codes.count()));
    memory.push_back(cuda::allocate(scales.count() * 4));
    return {View(memory[memory.size() - 2].get(), codes, DType::f8e4m3),
            View(memory.back().get(), scales, DType::f32)};
  }
  std::vector<uint8_t> codes(const Fp8Matrix& m) const {
    std::vector<uint8_t> bytes(static_cast<size_t>(m.codes.count()));
    cuda::download(m.codes, bytes.data(), device->stream);
    return bytes;
  }
  std::vector<float> scales(const Fp8Matrix& m) const {
    std::vector<float> scale(static_cast<size_t>(m.scales.count()));
    cuda::download(m.scales, scale.data(), device->stream);
    return scale;
  }
  // Row-major values; scale_at(matrix, row, column) is where their scale stands.
  Values read(const Fp8Matrix& m, bool squares) const {
    const std::vector<uint8_t> code = codes(m);
    const std::vector<float> scale = scales(m);
    const int64_t rows = m.codes[-2], columns = m.codes[-1];
    Values values(code.size());
    for (size_t i = 0; i < values.size(); ++i) {
      const auto at = static_cast<int64_t>(i);
      const int64_t column = at % columns, row = at / columns % rows, e = at / columns / rows;
      const int64_t s = squares ? (e * blocks(rows) + row / 128) * blocks(columns) + column / 128
                                : column / 128 * rows + row;
      float x = 0;
      convert(DType::f8e4m3, &code[i], DType::f32, &x, 1);
      values[i] = static_cast<double>(x) * static_cast<double>(scale[static_cast<size_t>(s)]);
    }
    return values;
  }

  Device* device;
  std::vector<std::shared_ptr<void>> memory;
  Fp8Operand of;
};

struct Sorted {  // rows of experts
  Sorted(Device& device, const std::vector<int64_t>& counts_)
      : counts(counts_), on_device(device, offsets_of(counts_)) {
    for (const int64_t count : counts) {
      begins.push_back(rows), padded.push_back(depth);
      rows += count, depth += blocks(count) * 128;
    }
  }
  static std::vector<int32_t> offsets_of(const std::vector<int64_t>& counts) {
    std::vector<int32_t> offsets{0};
    for (const int64_t count : counts) offsets.push_back(offsets.back() + static_cast<int32_t>(count));
    return offsets;
  }
  int64_t experts() const { return static_cast<int64_t>(counts.size()); }
  // The expert of a sorted row.
  size_t of(int64_t row) const {
    size_t e = 0;
    while (row >= begins[e] + counts[e]) ++e;
    return e;
  }
  std::vector<int64_t> counts, begins, padded;
  int64_t rows = 0, depth = 0;
  DeviceIndices on_device;
};

class Fp8 : public testing::Test {
 protected:
  void SetUp() override {
    if (device_.context.compute_capability != 90) GTEST_SKIP() << "needs compute capability 9.0";
  }
  // Of very different sizes, along rows and columns.
  DeviceTensor values(Shape shape, DType type = DType::bf16) {
    DeviceTensor t(device_, shape, type);
    t.set([&] { return random_.normal() * std::exp2(12 * random_.uniform() - 6); });
    return t;
  }
  Quantised rows(const DeviceTensor& x) {
    Quantised q(device_, x.view[0], x.view[1], 0);
    cuda::quantise_fp8(x.view, {}, {}, q.of, device_.context);
    return q;
  }
  Quantised rows(const DeviceTensor& x, const Sorted& sorted, View gathered = {}) {
    Quantised q(device_, sorted.rows, x.view[1], sorted.experts());
    cuda::quantise_fp8(x.view, gathered, sorted.on_device.view, q.of, device_.context);
    return q;
  }
  Quantised weight(const DeviceTensor& w) {
    Quantised q(device_, w.view.shape);
    cuda::quantise_fp8_weight(w.view, q.of, device_.context);
    return q;
  }
  // The codes of `got`, [R, C] or transposed, within their rounding of at(row, column), the scales exact; a
  // column that `source` sends below 0 holds zeros.
  static void expect_codes(
      const Quantised& q, const Fp8Matrix& m, bool squares, const std::function<double(int64_t, int64_t)>& at,
      const std::function<bool(int64_t)>& padding = [](int64_t) { return false; }) {
    const Values got = q.read(m, squares);
    const std::vector<float> scale = q.scales(m);
    const std::vector<uint8_t> codes = q.codes(m);
    const int64_t rows = m.codes[-2], columns = m.codes[-1];
    std::vector<double> most(scale.size());
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          const auto s =
              static_cast<size_t>(squares ? i / 128 * blocks(columns) + j / 128 : j / 128 * rows + i);
          const auto k = static_cast<size_t>(i * columns + j);
          if (padding(j)) {
            if (pass == 1 && codes[k] != 0) FAIL() << "row " << i << ", column " << j << ": padding not zero";
            continue;
          }
          const double want = at(i, j);
          if (pass == 0) {
            most[s] = std::max(most[s], std::abs(want));
          } else {  // three bits after the leading one; 2^-9 is the least magnitude of a code
            ASSERT_LE(std::abs(got[k] - want),
                      std::max(std::abs(want) / 15.9, static_cast<double>(scale[s]) / 1023))
                << i << ", " << j;
          }
        }
      }
    }
    for (size_t s = 0; s < most.size(); ++s) {
      if (most[s] > 0) {
        EXPECT_NEAR(static_cast<double>(scale[s]), most[s] / 448, most[s] * 1e-9);
      }
    }
  }

  // sum over k of a[i, k] · b[j, k] for i < m, j < n, where rows of a and b begin at multiples of their line
  static Values product(const Values& a, int64_t a_at, int64_t a_line, const Values& b, int64_t b_at,
                        int64_t b_line, int64_t m, int64_t n, int64_t k) {
    Values c(static_cast<size_t>(m * n));
    in_parallel(m, [&](int64_t i) {
      for (int64_t j = 0; j < n; ++j) {
        const double* left = a.data() + a_at + i * a_line;
        const double* right = b.data() + b_at + j * b_line;
        double sum = 0;
        for (int64_t l = 0; l < k; ++l) sum += left[l] * right[l];
        c[static_cast<size_t>(i * n + j)] = sum;
      }
    });
    return c;
  }
  // x [R, K] by the weights of each row's expert, [E, N, K].
  static Values grouped(const Sorted& sorted, const Values& x, const Values& w, int64_t n, int64_t k) {
    Values all;
    for (size_t e = 0; e < sorted.counts.size(); ++e) {
      const Values some =
          product(x, sorted.begins[e] * k, k, w, static_cast<int64_t>(e) * n * k, k, sorted.counts[e], n, k);
      all.insert(all.end(), some.begin(), some.end());
    }
    return all;
  }
  // Written over NaN, then added to numbers; beside it nothing is touched.
  void expect_writes(Shape shape, DType type, const Values& want, const std::function<void(Grad)>& write) {
    DeviceTensor out(device_, shape, type, 8, 0);
    write({out.view, false});
    EXPECT_LT(distance(out.read(), want), type == DType::f32 ? 1e-3 : 4e-3);
    EXPECT_EQ(out.written_outside, 0);
    const double size = std::sqrt(std::inner_product(want.begin(), want.end(), want.begin(), 0.0) /
                                  static_cast<double>(std::max<size_t>(want.size(), 1)));
    out.set([&] { return size * random_.normal(); });
    Values sum = out.values;
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += want[i];
    write({out.view, true});
    EXPECT_LT(distance(out.read(), sum), type == DType::f32 ? 1e-3 : 6e-3);
    EXPECT_EQ(out.written_outside, 0);
  }

  Device device_{int64_t{64} << 20};
  Random random_{11};
};

TEST_F(Fp8, CodesAreWithinTheirRounding) {
  for (const auto& [n, k] : {std::tuple{int64_t{1}, int64_t{16}}, {64, 128}, {200, 272}, {130, 1040}}) {
    SCOPED_TRACE(testing::Message() << n << " x " << k);
    const DeviceTensor x = values({n, k});
    const auto at = [&, k = k](int64_t i, int64_t j) { return x.values[static_cast<size_t>(i * k + j)]; };
    const Quantised q = rows(x);
    expect_codes(q, q.of.along, false, at);
    expect_codes(
        q, q.of.across, false, [&](int64_t i, int64_t j) { return at(j, i); },
        [n = n](int64_t j) { return j >= n; });
  }
  for (const auto& [n, k] : {std::tuple{int64_t{16}, int64_t{16}}, {64, 128}, {208, 272}, {704, 400}}) {
    SCOPED_TRACE(testing::Message() << "weight " << n << " x " << k);
    const DeviceTensor w = values({n, k});
    const auto at = [&, k = k](int64_t i, int64_t j) { return w.values[static_cast<size_t>(i * k + j)]; };
    const Quantised q = weight(w);
    expect_codes(q, q.of.along, true, at);
    expect_codes(q, q.of.across, true, [&](int64_t i, int64_t j) { return at(j, i); });
  }
}

TEST_F(Fp8, CodesOfExpertsRows) {
  const int64_t k = 144, tokens = 90;
  const Sorted sorted(device_, {130, 0, 1, 70, 203});
  std::vector<int32_t> order(static_cast<size_t>(sorted.rows));
  for (int32_t& row : order) row = static_cast<int32_t>(random_.below(tokens));
  const DeviceIndices gathered(device_, order);
  const DeviceTensor x = values({tokens, k});
  const Quantised q = rows(x, sorted, gathered.view);
  const auto at = [&](int64_t row, int64_t j) {
    return x.values[static_cast<size_t>(order[static_cast<size_t>(row)] * k + j)];
  };
  expect_codes(q, q.of.along, false, at);
  // Column p of the transposed codes is a row of the expert whose part it is in, or padding.
  std::vector<int64_t> row_of(static_cast<size_t>(q.of.across.codes[1]), -1);
  for (size_t e = 0; e < sorted.counts.size(); ++e) {
    for (int64_t i = 0; i < sorted.counts[e]; ++i)
      row_of[static_cast<size_t>(sorted.padded[e] + i)] = sorted.begins[e] + i;
  }
  expect_codes(
      q, q.of.across, false, [&](int64_t i, int64_t p) { return at(row_of[static_cast<size_t>(p)], i); },
      [&](int64_t p) { return row_of[static_cast<size_t>(p)] < 0; });
}

TEST_F(Fp8, StacksAreQuantisedAsTheirMatrices) {
  const int64_t n = 208, k = 272;
  const DeviceTensor w = values({3, n, k});
  const Quantised stack = weight(w);
  for (int64_t e = 0; e < 3; ++e) {
    DeviceTensor one(device_, {n, k}, DType::bf16);
    std::copy_n(w.values.begin() + e * n * k, n * k, one.values.begin());
    one.upload();
    const Quantised alone = weight(one);
    for (const auto side : {&Fp8Operand::along, &Fp8Operand::across}) {
      const Fp8Matrix &all = stack.of.*side, &mine = alone.of.*side;
      const std::vector<uint8_t> codes = stack.codes(all), want = alone.codes(mine);
      EXPECT_TRUE(std::equal(want.begin(), want.end(), codes.begin() + e * n * k));
      const std::vector<float> scales = stack.scales(all), want_scales = alone.scales(mine);
      EXPECT_TRUE(std::equal(want_scales.begin(), want_scales.end(),
                             scales.begin() + e * static_cast<int64_t>(want_scales.size())));
    }
  }
}

TEST_F(Fp8, LinearAndItsGradients) {
  for (const auto& [t, n, k] : {std::tuple{int64_t{1}, int64_t{16}, int64_t{16}},
                                {16, 64, 128},
                                {304, 272, 528},
                                {128, 128, 1024},
                                {1037, 400, 144},
                                {700, 704, 2048},
                                {2560, 576, 256},
                                {260, 3072, 400}}) {
    SCOPED_TRACE(testing::Message() << t << " x " << n << " x " << k);
    const DeviceTensor x = values({t, k}), d_out = values({t, n}), w = values({n, k});
    const Quantised xq = rows(x), dq = rows(d_out), wq = weight(w);
    const Values xv = xq.read(xq.of.along, false), dv = dq.read(dq.of.along, false);
    const Values wv = wq.read(wq.of.along, true), wt = wq.read(wq.of.across, true);
    for (const DType type : {DType::bf16, DType::f32}) {
      expect_writes({t, n}, type, product(xv, 0, k, wv, 0, k, t, n, k), [&](Grad out) {
        cuda::linear_fp8(xq.of.along, wq.of.along, {}, {}, out, device_.context);
      });
    }
    expect_writes({t, k}, DType::bf16, product(dv, 0, n, wt, 0, n, t, k, n), [&](Grad out) {
      cuda::linear_fp8(dq.of.along, wq.of.across, {}, {}, out, device_.context);
    });
    const int64_t depth = xq.of.across.codes[1];
    const Values want =
        product(dq.read(dq.of.across, false), 0, depth, xq.read(xq.of.across, false), 0, depth, n, k, depth);
    expect_writes({n, k}, DType::f32, want, [&](Grad out) {
      cuda::linear_fp8_backward_weight(dq.of.across, xq.of.across, {}, out, device_.context);
    });
  }
}

TEST_F(Fp8, Bias) {
  const int64_t t = 150, n = 80, k = 256;
  const DeviceTensor x = values({t, k}), w = values({n, k});
  const Quantised xq = rows(x), wq = weight(w);
  const Values plain = product(xq.read(xq.of.along, false), 0, k, wq.read(wq.of.along, true), 0, k, t, n, k);
  for (const DType type : {DType::bf16, DType::f32}) {
    const DeviceTensor bias = values({n}, type);
    Values want = plain;
    for (size_t i = 0; i < want.size(); ++i) want[i] += bias.values[i % static_cast<size_t>(n)];
    DeviceTensor out(device_, {t, n}, DType::bf16);
    cuda::linear_fp8(xq.of.along, wq.of.along, {}, bias.view, {out.view, false}, device_.context);
    EXPECT_LT(distance(out.read(), want), 4e-3);
  }
}

TEST_F(Fp8, Experts) {
  for (const auto& [n, k] : {std::tuple{int64_t{272}, int64_t{400}}, {704, 512}, {512, 704}, {16, 1024}}) {
    for (const std::vector<int64_t>& counts :
         {std::vector<int64_t>{130, 0, 1, 70, 303}, {0, 3, 0}, {128, 256, 0, 0}, {0, 0, 1000}}) {
      SCOPED_TRACE(testing::Message() << n << " x " << k << ", " << counts.size() << " experts");
      const Sorted sorted(device_, counts);
      const int64_t experts = sorted.experts(), r = sorted.rows;
      const View offsets = sorted.on_device.view;
      const DeviceTensor x = values({r, k}), d_out = values({r, n}), w = values({experts, n, k});
      const Quantised xq = rows(x, sorted), dq = rows(d_out, sorted), wq = weight(w);
      const Values wv = wq.read(wq.of.along, true), wt = wq.read(wq.of.across, true);
      expect_writes(
          {r, n}, DType::bf16, grouped(sorted, xq.read(xq.of.along, false), wv, n, k),
          [&](Grad out) { cuda::linear_fp8(xq.of.along, wq.of.along, offsets, {}, out, device_.context); });
      expect_writes(
          {r, k}, DType::bf16, grouped(sorted, dq.read(dq.of.along, false), wt, k, n),
          [&](Grad out) { cuda::linear_fp8(dq.of.along, wq.of.across, offsets, {}, out, device_.context); });
      const int64_t line = xq.of.across.codes[1];
      const Values dv = dq.read(dq.of.across, false), xv = xq.read(xq.of.across, false);
      Values want;
      for (size_t e = 0; e < counts.size(); ++e) {
        const int64_t at = sorted.padded[e];
        const Values one = product(dv, at, line, xv, at, line, n, k, blocks(counts[e]) * 128);
        want.insert(want.end(), one.begin(), one.end());
      }
      expect_writes({experts, n, k}, DType::f32, want, [&](Grad out) {
        cuda::linear_fp8_backward_weight(dq.of.across, xq.of.across, offsets, out, device_.context);
      });
    }
  }
}

TEST_F(Fp8, Gates) {
  for (const auto& [f, k] : {std::tuple{int64_t{272}, int64_t{400}}, {704, 512}, {128, 2048}, {16, 128}}) {
    for (const std::vector<int64_t>& counts : {std::vector<int64_t>{}, {130, 0, 1, 70, 303}, {0, 3, 0}}) {
      SCOPED_TRACE(testing::Message() << f << " x " << k << ", " << counts.size() << " experts");
      const bool dense = counts.empty();
      const Sorted sorted(device_, dense ? std::vector<int64_t>{333} : counts);
      const int64_t experts = sorted.experts(), r = sorted.rows;
      const View offsets = dense ? View() : sorted.on_device.view;
      const Shape shape = dense ? Shape{f, k} : Shape{experts, f, k};
      const DeviceTensor x = values({r, k}), d_gated = values({r, f}), d_risen = values({r, f});
      DeviceTensor gate = values(shape), up = values(shape);
      for (DeviceTensor* w : {&gate, &up}) w->set([&] { return random_.normal() / (64 * std::sqrt(k)); });
      const auto quantise = [&](const DeviceTensor& y) { return dense ? rows(y) : rows(y, sorted); };
      const Quantised xq = quantise(x), dg = quantise(d_gated), dr = quantise(d_risen);
      const Quantised gq = weight(gate), uq = weight(up);
      const Values xv = xq.read(xq.of.along, false);
      const Values g = grouped(sorted, xv, gq.read(gq.of.along, true), f, k);
      const Values u = grouped(sorted, xv, uq.read(uq.of.along, true), f, k);
      DeviceTensor gated(device_, {r, f}, DType::bf16, 8, 0), risen(device_, {r, f}, DType::bf16, 8, 0),
          out(device_, {r, f}, DType::bf16, 8, 0);
      const DeviceTensor factors = values({r}, DType::f32);
      cuda::gated_linear_fp8(xq.of.along, gq.of.along, uq.of.along, offsets, dense ? View() : factors.view,
                             gated.view, risen.view, out.view, device_.context);
      EXPECT_LT(distance(gated.read(), g), 4e-3);
      EXPECT_LT(distance(risen.read(), u), 4e-3);
      Values inner(g.size());
      for (size_t i = 0; i < inner.size(); ++i) {
        inner[i] = gated.values[i] / (1 + std::exp(-gated.values[i])) * risen.values[i];
        if (!dense) inner[i] *= factors.values[i / static_cast<size_t>(f)];
      }
      EXPECT_LT(distance(out.read(), inner), 4e-3);
      EXPECT_EQ(gated.written_outside + risen.written_outside + out.written_outside, 0);

      Values want = grouped(sorted, dg.read(dg.of.along, false), gq.read(gq.of.across, true), k, f);
      const Values more = grouped(sorted, dr.read(dr.of.along, false), uq.read(uq.of.across, true), k, f);
      for (size_t i = 0; i < want.size(); ++i) want[i] += more[i];
      expect_writes({r, k}, DType::bf16, want, [&](Grad d_x) {
        cuda::gated_linear_fp8_backward_input(dg.of.along, dr.of.along, gq.of.across, uq.of.across, offsets,
                                              d_x, device_.context);
      });

      // Gradients of both weights in one launch have the bits of two.
      for (const bool accumulate : {false, true}) {
        std::vector<DeviceTensor> d_w;
        for (int i = 0; i < 4; ++i) {
          d_w.emplace_back(device_, shape, DType::f32, 8, 0);
          if (accumulate) d_w.back().set([] { return 0.5; });
        }
        const auto grad = [&](size_t i) { return Grad{d_w[i].view, accumulate}; };
        cuda::linear_fp8_backward_weight(dg.of.across, xq.of.across, offsets, grad(0), device_.context);
        cuda::linear_fp8_backward_weight(dr.of.across, xq.of.across, offsets, grad(1), device_.context);
        cuda::gated_linear_fp8_backward_weight(dg.of.across, dr.of.across, xq.of.across, offsets, grad(2),
                                               grad(3), device_.context);
        EXPECT_EQ(d_w[2].read(), d_w[0].read());
        EXPECT_EQ(d_w[3].read(), d_w[1].read());
        EXPECT_EQ(d_w[2].written_outside + d_w[3].written_outside, 0);
      }
    }
  }
}

// Quantising where a gradient is made gives the codes of quantising it afterwards.
TEST_F(Fp8, FusedQuantisation) {
  const int64_t tokens = 210, top_k = 3, columns = 272, experts = 4;
  std::vector<std::vector<int32_t>> choices(static_cast<size_t>(experts));  // of each expert, in order
  for (int32_t c = 0; c < tokens * top_k; ++c) choices[random_.below(3)].push_back(c);
  std::vector<int64_t> counts;
  std::vector<int32_t> token_of, slots(static_cast<size_t>(tokens * top_k));
  for (const std::vector<int32_t>& mine : choices) {
    counts.push_back(static_cast<int64_t>(mine.size()));
    for (const int32_t choice : mine) {
      slots[static_cast<size_t>(choice)] = static_cast<int32_t>(token_of.size());
      token_of.push_back(choice / static_cast<int32_t>(top_k));
    }
  }
  const Sorted sorted(device_, counts);
  const DeviceIndices slots_on_device(device_, slots, {tokens, top_k}), rows_on_device(device_, token_of);
  const View offsets = sorted.on_device.view;
  const auto expect_same = [](const Quantised& got, const Quantised& want) {
    EXPECT_EQ(got.codes(got.of.along), want.codes(want.of.along));
    EXPECT_EQ(got.scales(got.of.along), want.scales(want.of.along));
    EXPECT_EQ(got.codes(got.of.across), want.codes(want.of.across));
    EXPECT_EQ(got.scales(got.of.across), want.scales(want.of.across));
  };
  const int64_t r = sorted.rows;
  for (const View& at : {View(), offsets}) {
    const DeviceTensor d = values({r, columns}), gated = values({r, columns}), risen = values({r, columns});
    DeviceTensor d_gated(device_, {r, columns}, DType::bf16), d_risen(device_, {r, columns}, DType::bf16);
    cuda::swiglu_backward(d.view, gated.view, risen.view, {d_gated.view, false}, {d_risen.view, false},
                          device_.context);
    const int64_t count = at ? experts : 0;
    const Quantised first(device_, r, columns, count), second(device_, r, columns, count);
    cuda::swiglu_backward_fp8(d.view, gated.view, risen.view, {}, {}, at, first.of, second.of, {},
                              device_.context);
    expect_same(first, at ? rows(d_gated, sorted) : rows(d_gated));
    expect_same(second, at ? rows(d_risen, sorted) : rows(d_risen));
    if (!at) continue;
    // Of rows times weights: powers of two, so that the gradients of their products are exact.
    DeviceTensor weights(device_, {tokens, top_k}, DType::f32), factors(device_, {r}, DType::f32);
    weights.set([&] { return std::exp2(static_cast<double>(random_.below(5)) - 4); });
    cuda::sort_weights(weights.view, slots_on_device.view, factors.view, device_.context);
    factors.read();
    DeviceTensor scaled = values({r, columns});
    for (size_t i = 0; i < scaled.values.size(); ++i)
      scaled.values[i] = d.values[i] * factors.values[i / static_cast<size_t>(columns)];
    scaled.upload();
    cuda::swiglu_backward(scaled.view, gated.view, risen.view, {d_gated.view, false}, {d_risen.view, false},
                          device_.context);
    Values want(static_cast<size_t>(tokens * top_k));
    for (size_t c = 0; c < want.size(); ++c) {
      EXPECT_EQ(factors.values[static_cast<size_t>(slots[c])], weights.values[c]);
      for (int64_t j = 0; j < columns; ++j) {
        const auto i = static_cast<size_t>(slots[c] * columns + j);
        want[c] += d.values[i] * gated.values[i] / (1 + std::exp(-gated.values[i])) * risen.values[i];
      }
    }
    DeviceTensor d_weights(device_, {tokens, top_k}, DType::f32, 2, 1);
    for (const double times : {1.0, 2.0}) {  // written over NaN, then added to
      cuda::swiglu_backward_fp8(d.view, gated.view, risen.view, factors.view, slots_on_device.view, at,
                                first.of, second.of, {d_weights.view, times > 1}, device_.context);
      Values sum = want;
      for (double& x : sum) x *= times;
      EXPECT_LT(distance(d_weights.read(), sum), 1e-5);
      EXPECT_EQ(d_weights.written_outside, 0);
    }
    expect_same(first, rows(d_gated, sorted));
    expect_same(second, rows(d_risen, sorted));
  }
}

// -- ops --

class Fp8Ops : public testing::Test {
 protected:
  void SetUp() override {
    if (!backend_.multiplies_fp8()) GTEST_SKIP() << "needs compute capability 9.0";
  }
  Tensor on_device(Shape shape, DType type, double scale) {
    Tensor tensor = parameter(shape, type);
    std::vector<float> numbers(static_cast<size_t>(shape.count()));
    for (float& x : numbers) x = static_cast<float>(scale * random_.normal());
    allocate(backend_, tensor);
    HostWriter writer(backend_, tensor.view());
    convert(DType::f32, numbers.data(), type, writer.view().data, shape.count());
    writer.finish();
    return tensor;
  }
  Values read(const View& view) {
    const HostCopy copy = on_host(backend_, view);
    Values numbers(static_cast<size_t>(view.count()));
    convert(view.dtype, copy.view.data, DType::f64, numbers.data(), view.count());
    return numbers;
  }
  // A parameter as a value of the plan, with its gradient.
  static Tensor leaf(Plan& plan, const Tensor& from) {
    Tensor out = plan.intermediate(from.shape(), from.dtype());
    plan.record(
        "leaf", {from}, {out},
        [=](Backend& b) {
          b.copy(from.view(), {out.view(), false});
        },
        [=](Gradients& g) { g.share(from, g.of(out)); });
    return out;
  }
  // A loss whose gradient with respect to x is `factors`.
  static Tensor probe(Plan& plan, const Tensor& x, const Tensor& factors) {
    Tensor loss = plan.intermediate({1}, DType::f32);
    plan.record(
        "probe", {x, factors}, {loss}, [=](Backend& b) { b.fill(loss.view(), 0); },
        [=](Gradients& g) {
          auto d_x = g.slot(x);
          g.plan().record("probe_backward", {factors}, {d_x.tensor},
                          [=](Backend& b) { b.copy(factors.view(), d_x.view()); });
        });
    return loss;
  }
  // What `build` makes of the parameters, and their gradients, after two runs.
  std::vector<Values> run(bool fp8, const std::vector<Tensor>& parameters, const Tensor& factors,
                          const std::function<Tensor(Plan&)>& build) {
    for (const Tensor& p : parameters) p.value().grad.reset(), p.value().fp8.reset();
    Plan plan(backend_, {.training = true, .fresh_gradients = true, .fp8 = fp8});
    const Tensor out = build(plan);
    plan.keep(out);
    plan.backward({probe(plan, out, factors)});
    plan.compile();
    for (const Tensor& p : parameters) {
      if (p.value().grad) allocate(backend_, Tensor(p.value().grad));
      if (!p.value().fp8) continue;
      const Fp8Tensors& of = *p.value().fp8;
      for (const Tensor& t : {of.codes, of.scales, of.across_codes, of.across_scales}) allocate(backend_, t);
    }
    plan.allocate();
    for (int i = 0; i < 2; ++i) plan.run();  // one by one, then recorded
    std::vector<Values> results{read(out.view())};
    for (const Tensor& p : parameters) results.push_back(read(Tensor(p.value().grad).view()));
    return results;
  }
  // Codes have three bits after the leading one: rounding errors of some 2.6 % of a number (root mean
  // square), so of 3.7 % of a sum of products of two independent ones, and 2.6 % more for each product that
  // the result then goes through. Below a fifth of that FP8 was not at work.
  static void expect_near(const std::vector<Values>& got, const std::vector<Values>& want, double tolerance) {
    ASSERT_EQ(got.size(), want.size());
    for (size_t i = 0; i < got.size(); ++i) {
      double difference = 0, norm = 0;
      for (size_t j = 0; j < want[i].size(); ++j) {
        difference += (got[i][j] - want[i][j]) * (got[i][j] - want[i][j]);
        norm += want[i][j] * want[i][j];
      }
      const double apart = std::sqrt(difference / norm);
      EXPECT_LT(apart, tolerance) << "result " << i;
      EXPECT_GT(apart, 0.005) << "result " << i;
    }
  }
  void compare(const std::vector<Tensor>& parameters, const Tensor& factors, double tolerance,
               const std::function<Tensor(Plan&)>& build) {
    const std::vector<Values> in_fp8 = run(true, parameters, factors, build);
    expect_near(in_fp8, run(false, parameters, factors, build), tolerance);
    EXPECT_EQ(in_fp8, run(true, parameters, factors, build)) << "another run has other bits";
  }

  cuda::CudaBackend backend_;
  Random random_{3};
};

TEST_F(Fp8Ops, Linear) {
  const int64_t t = 300, n = 208, k = 384;
  const Tensor x = on_device({t, k}, DType::bf16, 1), w = on_device({n, k}, DType::bf16, 1 / std::sqrt(k));
  const Tensor second = on_device({n, k}, DType::bf16, 1 / std::sqrt(k));
  const Tensor factors = on_device({t, n}, DType::bf16, 1e-4);
  compare({x, w}, factors, 0.05, [&](Plan& plan) { return linear(leaf(plan, x), w); });
  // Two readers of one x, the second onto the first's result; a weight that is a part of another.
  compare({x, w, second}, factors, 0.05, [&](Plan& plan) {
    const Tensor at = leaf(plan, x);
    return linear_onto(linear(at, w), at, second);
  });
  const Tensor wide = on_device({n, 2 * k}, DType::bf16, 1 / std::sqrt(k));
  compare({x, wide}, factors, 0.05, [&](Plan& plan) {
    const Tensor at = leaf(plan, x);
    return linear_onto(linear(at, wide.columns(0, k)), at, wide.columns(k, 2 * k));
  });
}

TEST_F(Fp8Ops, GatedLinear) {
  const int64_t t = 300, f = 208, k = 384;
  const Tensor x = on_device({t, k}, DType::bf16, 1), gate = on_device({f, k}, DType::bf16, 1 / std::sqrt(k));
  const Tensor up = on_device({f, k}, DType::bf16, 1 / std::sqrt(k));
  const Tensor down = on_device({k, f}, DType::bf16, 1 / std::sqrt(f));
  compare({x, gate, up, down}, on_device({t, k}, DType::bf16, 1e-4), 0.09,
          [&](Plan& plan) { return linear(gated_linear(leaf(plan, x), gate, up), down); });
}

TEST_F(Fp8Ops, Experts) {
  const int64_t t = 300, f = 80, k = 256, experts = 8, top_k = 3;
  const Tensor x = on_device({t, k}, DType::bf16, 1);
  const Tensor gate = on_device({experts, f, k}, DType::bf16, 1 / std::sqrt(k));
  const Tensor up = on_device({experts, f, k}, DType::bf16, 1 / std::sqrt(k));
  const Tensor down = on_device({experts, k, f}, DType::bf16, 1 / std::sqrt(f));
  const Tensor weights = on_device({t, top_k}, DType::f32, 1);
  std::vector<int32_t> chosen;
  for (int64_t i = 0; i < t; ++i) {  // none of them the last expert
    const auto first = static_cast<int32_t>(random_.below(7));
    for (int32_t j = 0; j < top_k; ++j) chosen.push_back((first + j * 2) % 7);
  }
  compare({x, gate, up, down, weights}, on_device({t, k}, DType::bf16, 1e-4), 0.09, [&](Plan& plan) {
    Tensor ids = plan.input("experts", {t, top_k}, DType::i32);
    allocate(backend_, ids);
    backend_.upload(chosen.data(), ids.view());
    const ExpertOrder order = expert_order(ids, experts);
    const Tensor at = leaf(plan, weights), none;
    const bool early = plan.multiplies_fp8();
    const Tensor inner = expert_gated_linear(leaf(plan, x), order, gate, up, early ? at : none);
    return combined_expert_linear(inner, order, down, early ? none : at);
  });
}

TEST_F(Fp8Ops, WeightsOfOddSizesAreAnError) {
  const Tensor x = on_device({32, 40}, DType::bf16, 1), w = on_device({16, 40}, DType::bf16, 1);
  w.value().name = "q_proj.weight";
  Plan plan(backend_, {.training = true, .fp8 = true});
  try {
    linear(leaf(plan, x), w);
    FAIL() << "expected an error";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("q_proj.weight: FP8"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace latente
