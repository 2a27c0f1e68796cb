// Products on a device against loops in double: sizes of several tiles, strides, experts without rows and
// with most of them, results added or written over NaN.
#include <numeric>
#include <tuple>

#include "attention_support.h"
#include "cuda/split_linear.h"

namespace latente {
namespace {

class Products : public testing::TestWithParam<DType> {
 protected:
  // Within what `type` holds of sums over `depth`.
  void expect_near(const std::vector<double>& got, const std::vector<double>& want, DType type) {
    EXPECT_LT(distance(got, want), type == DType::bf16 ? 4e-3 : 1e-4);
  }
  // c[i, j] = sum over k of a(i, k) · b(j, k)
  template <class A, class B>
  std::vector<double> product(int64_t rows, int64_t columns, int64_t depth, A a, B b) {
    std::vector<double> c(static_cast<size_t>(rows * columns));
    in_parallel(rows, [&](int64_t i) {
      for (int64_t j = 0; j < columns; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < depth; ++k) sum += a(i, k) * b(j, k);
        c[static_cast<size_t>(i * columns + j)] = sum;
      }
    });
    return c;
  }
  // Writes over NaN, then adds to values; the padding must stay NaN.
  void check(DeviceTensor& out, const std::vector<double>& want, const std::function<void(Grad)>& run) {
    std::fill(out.values.begin(), out.values.end(), nan);
    out.upload();
    run({out.view, false});
    expect_near(out.read(), want, out.view.dtype);
    EXPECT_EQ(out.written_outside, 0);
    out.randomise(random_);
    std::vector<double> sum = out.values;
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += want[i];
    run({out.view, true});
    expect_near(out.read(), sum, out.view.dtype);
    EXPECT_EQ(out.written_outside, 0);
  }
  static double at(const DeviceTensor& t, int64_t i, int64_t j) {
    return t.values[static_cast<size_t>(i * t.view.shape[-1] + j)];
  }
  DeviceTensor normals(Shape shape, DType type, int64_t left = 0, int64_t right = 0) {
    DeviceTensor t(device_, shape, type, left, right);
    t.randomise(random_);
    return t;
  }

  Device device_;
  Random random_{7};
};

TEST_P(Products, Dense) {
  const DType type = GetParam();
  for (const auto& [rows, columns, depth, pad] : {std::tuple{1, 64, 64, 0},
                                                  {5, 24, 40, 8},
                                                  {65, 136, 72, 16},
                                                  {300, 264, 520, 0},
                                                  {257, 512, 192, 64},
                                                  {33, 7, 13, 3},
                                                  {2100, 192, 64, 0},
                                                  {1300, 40, 256, 8}}) {
    SCOPED_TRACE(testing::Message() << rows << " x " << columns << " x " << depth << ", padded by " << pad);
    DeviceTensor x = normals({rows, depth}, type, pad, pad), w = normals({columns, depth}, type, 0, pad);
    DeviceTensor d_out = normals({rows, columns}, type, pad, 0);
    const cuda::Context& context = device_.context;
    const auto y = product(
        rows, columns, depth, [&](int64_t i, int64_t k) { return at(x, i, k); },
        [&](int64_t j, int64_t k) { return at(w, j, k); });
    for (const DType bias_type : {DType::f32, type}) {
      DeviceTensor bias = normals({columns}, bias_type);
      auto with_bias = y;
      for (size_t i = 0; i < y.size(); ++i) with_bias[i] += bias.values[i % static_cast<size_t>(columns)];
      DeviceTensor out(device_, {rows, columns}, bias_type, pad, 0);
      check(out, with_bias, [&](Grad to) { cuda::linear(x.view, w.view, bias.view, to, context); });
    }
    DeviceTensor d_x(device_, {rows, depth}, type, 0, pad), d_w(device_, {columns, depth}, DType::f32);
    check(d_x,
          product(
              rows, depth, columns, [&](int64_t i, int64_t k) { return at(d_out, i, k); },
              [&](int64_t j, int64_t k) { return at(w, k, j); }),
          [&](Grad to) { cuda::linear_backward_input(d_out.view, w.view, to, context); });
    check(d_w,
          product(
              columns, depth, rows, [&](int64_t i, int64_t k) { return at(d_out, k, i); },
              [&](int64_t j, int64_t k) { return at(x, k, j); }),
          [&](Grad to) { cuda::linear_backward_weight(d_out.view, x.view, to, context); });
  }
}

TEST_P(Products, Grouped) {
  const DType type = GetParam();
  for (const bool gathered : {false, true}) {
    for (const auto& counts : {std::vector<int64_t>{130, 0, 1, 70, 0, 63, 200},
                               {0, 0, 700, 3},
                               {5, 0, 9, 2},
                               std::vector<int64_t>(40, 37)}) {
      for (const auto& [columns, depth, pad] : {std::tuple{136, 72, 0}, {320, 200, 8}, {24, 40, 16}}) {
        const auto experts = static_cast<int64_t>(counts.size());
        std::vector<int32_t> offsets{0};
        for (const int64_t count : counts) offsets.push_back(offsets.back() + static_cast<int32_t>(count));
        const int64_t sorted = offsets.back(), tokens = gathered ? sorted / 2 + 1 : sorted;
        SCOPED_TRACE(testing::Message() << experts << " experts, " << sorted << " rows, " << columns << " x "
                                        << depth << (gathered ? ", gathered" : ""));
        std::vector<int32_t> rows(static_cast<size_t>(sorted)), expert_of(static_cast<size_t>(sorted));
        for (int64_t e = 0; e < experts; ++e) {
          for (int32_t r = offsets[static_cast<size_t>(e)]; r < offsets[static_cast<size_t>(e + 1)]; ++r) {
            expert_of[static_cast<size_t>(r)] = static_cast<int32_t>(e);
          }
        }
        for (int32_t r = 0; r < sorted; ++r) {
          rows[static_cast<size_t>(r)] =
              gathered ? static_cast<int32_t>(random_.below(static_cast<uint64_t>(tokens))) : r;
        }
        auto row = [&](int64_t r) { return rows[static_cast<size_t>(r)]; };
        DeviceIndices on_device(device_, offsets), rows_on_device(device_, rows);
        const View row_view = gathered ? rows_on_device.view : View();
        DeviceTensor x = normals({tokens, depth}, type, pad, pad),
                     w = normals({experts, columns, depth}, type);
        DeviceTensor d_out = normals({sorted, columns}, type, 0, pad);
        DeviceTensor out(device_, {sorted, columns}, type, pad, 0), d_x(device_, {sorted, depth}, type);
        DeviceTensor d_w(device_, {experts, columns, depth}, DType::f32);
        std::vector<double> y(static_cast<size_t>(sorted * columns)), dx(static_cast<size_t>(sorted * depth));
        std::vector<double> dw(static_cast<size_t>(experts * columns * depth), 0.0);
        in_parallel(sorted, [&](int64_t r) {
          for (int64_t j = 0; j < columns; ++j) {
            for (int64_t k = 0; k < depth; ++k) {
              const double weight = w.at(expert_of[static_cast<size_t>(r)], j, k);
              y[static_cast<size_t>(r * columns + j)] += at(x, row(r), k) * weight;
              dx[static_cast<size_t>(r * depth + k)] += at(d_out, r, j) * weight;
            }
          }
        });
        in_parallel(columns, [&](int64_t j) {
          for (int64_t r = 0; r < sorted; ++r) {
            for (int64_t k = 0; k < depth; ++k) {
              dw[static_cast<size_t>((expert_of[static_cast<size_t>(r)] * columns + j) * depth + k)] +=
                  at(d_out, r, j) * at(x, row(r), k);
            }
          }
        });
        const cuda::Context& context = device_.context;
        cuda::grouped_linear(x.view, row_view, on_device.view, w.view, out.view, context);
        expect_near(out.read(), y, type);
        EXPECT_EQ(out.written_outside, 0);
        check(d_x, dx, [&](Grad to) {
          cuda::grouped_linear_backward_input(d_out.view, on_device.view, w.view, to, context);
        });
        check(d_w, dw, [&](Grad to) {
          cuda::grouped_linear_backward_weight(d_out.view, x.view, row_view, on_device.view, to, context);
        });
        if (type == DType::bf16) {
          DeviceTensor narrow(device_, {experts, columns, depth}, type);
          check(narrow, dw, [&](Grad to) {
            cuda::grouped_linear_backward_weight(d_out.view, x.view, row_view, on_device.view, to, context);
          });
        }
      }
    }
  }
}

// Sizes on both sides of every change of kernels and tiles.
constexpr int64_t companies[] = {1,  2,  3,  4,  5,   7,   8,   9,   15,  16,  17,  24,  31,  32,  33,  48,
                                 63, 64, 65, 96, 127, 128, 129, 192, 200, 255, 256, 257, 288, 300, 513, 1100};

TEST_P(Products, OfARowHaveTheSameBitsInAnyCompany) {
  const DType type = GetParam();
  constexpr int64_t most = 1100;
  for (const auto& [columns, depth, spread] :
       {std::tuple{512, 2048, 0}, {264, 200, 0}, {136, 4104, 24}, {2048, 512, 12}, {1000, 72, 40}}) {
    // Also numbers of very different sizes, whose sums show in which order they were added.
    auto any = [&, wide = spread] {
      return random_.normal() * std::exp2(static_cast<double>(wide) * (random_.uniform() - 0.5));
    };
    DeviceTensor x(device_, {most, depth}, type), w(device_, {columns, depth}, type);
    DeviceTensor d_out(device_, {most, columns}, type);
    x.set(any), w.set(any), d_out.set(any);
    DeviceTensor all(device_, {most, columns}, DType::f32), all_dx(device_, {most, depth}, DType::f32);
    cuda::linear(x.view, w.view, {}, {all.view, false}, device_.context);
    cuda::linear_backward_input(d_out.view, w.view, {all_dx.view, false}, device_.context);
    const std::vector<double> want = all.read(), want_dx = all_dx.read();
    auto first = [](View view, int64_t rows) {
      view.shape = {rows, view.shape[1]};
      return view;
    };
    for (const int64_t rows : companies) {
      DeviceTensor some(device_, {rows, columns}, DType::f32), some_dx(device_, {rows, depth}, DType::f32);
      cuda::linear(first(x.view, rows), w.view, {}, {some.view, false}, device_.context);
      const std::vector<double>& got = some.read();
      EXPECT_TRUE(std::equal(got.begin(), got.end(), want.begin()))
          << rows << " rows, " << columns << " x " << depth;
      cuda::linear_backward_input(first(d_out.view, rows), w.view, {some_dx.view, false}, device_.context);
      const std::vector<double>& got_dx = some_dx.read();
      EXPECT_TRUE(std::equal(got_dx.begin(), got_dx.end(), want_dx.begin()))
          << rows << " rows' gradients, " << columns << " x " << depth;
    }
  }
}

TEST_P(Products, OfARowAndHeadsHaveTheSameBitsInAnyCompany) {
  const DType type = GetParam();
  constexpr int64_t most = 300, heads = 5;
  for (const bool transpose : {false, true}) {
    for (const auto& [columns, depth] : {std::tuple{512, 128}, {128, 512}, {40, 24}}) {
      DeviceTensor x = normals({most, heads, depth}, type);
      DeviceTensor w = normals(transpose ? Shape{heads, depth, columns} : Shape{heads, columns, depth}, type);
      std::vector<double> want;
      for (const int64_t rows : {most, int64_t{1}, int64_t{2}, int64_t{8}, int64_t{16}, int64_t{17},
                                 int64_t{32}, int64_t{33}, int64_t{64}, int64_t{129}, int64_t{256}}) {
        DeviceTensor out(device_, {rows, heads, columns}, type);
        View some = x.view;
        some.shape = {rows, heads, depth};
        cuda::head_linear(some, w.view, transpose, out.view, device_.context);
        const std::vector<double>& got = out.read();
        if (want.empty()) {
          want = got;
          std::vector<double> sums(want.size());
          for (int64_t t = 0; t < most; ++t) {
            for (int64_t h = 0; h < heads; ++h) {
              for (int64_t j = 0; j < columns; ++j) {
                double& sum = sums[static_cast<size_t>((t * heads + h) * columns + j)];
                for (int64_t k = 0; k < depth; ++k) {
                  sum += x.at(t, h, k) * (transpose ? w.at(h, k, j) : w.at(h, j, k));
                }
              }
            }
          }
          expect_near(want, sums, type);
        }
        EXPECT_TRUE(std::equal(got.begin(), got.end(), want.begin()))
            << rows << " rows, " << columns << " x " << depth << (transpose ? ", transposed" : "");
      }
    }
  }
}

TEST_P(Products, OfExpertsRowsHaveTheSameBitsInAnyCompany) {
  const DType type = GetParam();
  constexpr int64_t most = 1300, experts = 3, columns = 200, depth = 328;
  DeviceTensor x = normals({most, depth}, type), w = normals({experts, columns, depth}, type);
  // All rows to expert 1, the first `rows` of them: alone, or after rows of another.
  std::vector<double> want;
  for (const int64_t before : {0, 40}) {
    for (const int64_t rows : {1200, 1, 2, 8, 17, 33, 64, 96, 100, 128, 130, 300, 700}) {
      const auto all = static_cast<int32_t>(before + rows);
      DeviceIndices offsets(device_, {0, static_cast<int32_t>(before), all, all});
      std::vector<int32_t> order;
      for (int32_t r = 0; r < all; ++r) order.push_back(r < before ? r : r - static_cast<int32_t>(before));
      DeviceIndices gather(device_, order);
      DeviceTensor out(device_, {all, columns}, DType::f32);
      cuda::grouped_linear(x.view, gather.view, offsets.view, w.view, out.view, device_.context);
      const std::vector<double>& got = out.read();
      if (want.empty()) want = got;
      EXPECT_TRUE(std::equal(got.begin() + before * columns, got.end(), want.begin()))
          << rows << " rows after " << before;
    }
  }
}

// Of float32 by bfloat16, on tensor cores.
TEST_P(Products, Routers) {
  const cuda::Context& context = device_.context;
  if (GetParam() == DType::f32 || context.compute_capability != 90) GTEST_SKIP() << "of bfloat16, on Hopper";
  for (const auto& [rows, columns, depth, pad] :
       {std::tuple{1024, 64, 200, 0}, {3001, 8, 72, 8}, {1500, 256, 136, 16}, {4100, 40, 520, 0}}) {
    SCOPED_TRACE(testing::Message() << rows << " x " << columns << " x " << depth << ", padded by " << pad);
    DeviceTensor x = normals({rows, depth}, DType::bf16, pad, pad);
    DeviceTensor w = normals({columns, depth}, DType::f32, 0, pad);
    DeviceTensor d_out = normals({rows, columns}, DType::f32, pad, pad);
    DeviceTensor out(device_, {rows, columns}, DType::f32, 0, pad);
    ASSERT_TRUE(cuda::split_linear(x.view, w.view, out.view, context));
    EXPECT_LT(
        distance(out.read(), product(
                                 rows, columns, depth, [&](int64_t i, int64_t k) { return at(x, i, k); },
                                 [&](int64_t j, int64_t k) { return at(w, j, k); })),
        1e-6);
    EXPECT_EQ(out.written_outside, 0);
    DeviceTensor d_x(device_, {rows, depth}, DType::bf16, 0, pad), d_w(device_, {columns, depth}, DType::f32);
    check(d_x,
          product(
              rows, depth, columns, [&](int64_t i, int64_t k) { return at(d_out, i, k); },
              [&](int64_t j, int64_t k) { return at(w, k, j); }),
          [&](Grad to) { ASSERT_TRUE(cuda::split_linear_backward_input(d_out.view, w.view, to, context)); });
    const auto want = product(
        columns, depth, rows, [&](int64_t i, int64_t k) { return at(d_out, k, i); },
        [&](int64_t j, int64_t k) { return at(x, k, j); });
    check(d_w, want,
          [&](Grad to) { ASSERT_TRUE(cuda::split_linear_backward_weight(d_out.view, x.view, to, context)); });
    cuda::linear_backward_weight(d_out.view, x.view, {d_w.view, false}, context);
    EXPECT_LT(distance(d_w.read(), want), 2e-6);
  }
}

INSTANTIATE_TEST_SUITE_P(Types, Products, testing::Values(DType::f32, DType::bf16),
                         [](const auto& type) { return std::string(name_of(type.param)); });

}  // namespace
}  // namespace latente
