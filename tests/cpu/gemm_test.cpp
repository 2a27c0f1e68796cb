#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/gemm_support.h"

namespace latente {
namespace {

struct Size {
  int64_t m, n, k, gap;
};
const Size sizes[] = {{1, 1, 1, 0},     {1, 17, 5, 3},    {2, 1, 300, 1},    {3, 64, 1, 0},
                      {5, 129, 33, 7},  {7, 40, 256, 0},  {8, 48, 257, 5},   {13, 31, 64, 2},
                      {1, 200, 700, 0}, {67, 65, 513, 1}, {100, 130, 90, 0}, {203, 77, 300, 4},
                      {0, 5, 8, 0},     {50, 24, 4500, 0}};

template <class Pair>
class Gemm : public ::testing::Test {};
TYPED_TEST_SUITE(Gemm, AllTypes);

TYPED_TEST(Gemm, LinearAgreesWithADoubleLoop) {
  using T = typename TypeParam::T;
  using S = typename TypeParam::S;
  CpuBackend cpu(2);
  Random random(1);
  for (const Size& z : sizes) {
    for (int mode = 0; mode < 4; ++mode) {
      const bool with_bias = mode & 1, accumulate = mode & 2;
      Array<T> x(1, z.m, z.k, z.gap), bias(1, 1, z.n), out(1, z.m, z.n, z.gap);
      Array<S> w(1, z.n, z.k, z.gap);
      x.randomise(random), w.randomise(random), bias.randomise(random), out.randomise(random);
      Array<T> before = out;
      cpu.linear(x.matrix(), w.matrix(), with_bias ? View(&bias(0, 0), {z.n}, dtype_of<T>) : View(),
                 {out.matrix(), accumulate});
      for (int64_t i = 0; i < z.m; ++i) {
        for (int64_t j = 0; j < z.n; ++j) {
          Sum sum;
          if (with_bias) sum.add(bias.value(0, 0, j));
          if (accumulate) sum.add(before.value(0, i, j));
          for (int64_t k = 0; k < z.k; ++k) sum.add(x.value(0, i, k) * w.value(0, j, k));
          ASSERT_TRUE(sum.near(out(i, j))) << z.m << "x" << z.n << "x" << z.k << " mode " << mode << " at "
                                           << i << "," << j << ": " << out(i, j) << " for " << sum.value;
        }
      }
      ASSERT_EQ(out.written_outside(), 0);
    }
  }
}

TYPED_TEST(Gemm, GradientsAgreeWithADoubleLoop) {
  using T = typename TypeParam::T;
  using S = typename TypeParam::S;
  CpuBackend cpu(2);
  Random random(2);
  for (const Size& z : sizes) {
    for (bool accumulate : {false, true}) {
      Array<T> x(1, z.m, z.k, z.gap), d_out(1, z.m, z.n, z.gap), d_x(1, z.m, z.k, z.gap);
      Array<T> d_w(1, z.n, z.k, z.gap), d_bias(1, 1, z.n);
      Array<S> w(1, z.n, z.k, z.gap);
      for (Array<T>* a : {&x, &d_out, &d_x, &d_w, &d_bias}) a->randomise(random);
      w.randomise(random);
      Array<T> x_before = d_x, w_before = d_w, bias_before = d_bias;
      cpu.linear_backward_input(d_out.matrix(), w.matrix(), {d_x.matrix(), accumulate});
      cpu.linear_backward_weight(d_out.matrix(), x.matrix(), {d_w.matrix(), accumulate});
      cpu.linear_backward_bias(d_out.matrix(), {View(&d_bias(0, 0), {z.n}, dtype_of<T>), accumulate});
      for (int64_t k = 0; k < z.k; ++k) {
        for (int64_t i = 0; i < z.m; ++i) {
          Sum sum;
          if (accumulate) sum.add(x_before.value(0, i, k));
          for (int64_t j = 0; j < z.n; ++j) sum.add(d_out.value(0, i, j) * w.value(0, j, k));
          ASSERT_TRUE(sum.near(d_x(i, k))) << z.m << "x" << z.n << "x" << z.k << " d_x " << i << "," << k;
        }
        for (int64_t j = 0; j < z.n; ++j) {
          Sum sum;
          if (accumulate) sum.add(w_before.value(0, j, k));
          for (int64_t i = 0; i < z.m; ++i) sum.add(d_out.value(0, i, j) * x.value(0, i, k));
          ASSERT_TRUE(sum.near(d_w(j, k))) << z.m << "x" << z.n << "x" << z.k << " d_w " << j << "," << k;
        }
      }
      for (int64_t j = 0; j < z.n; ++j) {
        Sum sum;
        if (accumulate) sum.add(bias_before.value(0, 0, j));
        for (int64_t i = 0; i < z.m; ++i) sum.add(d_out.value(0, i, j));
        ASSERT_TRUE(sum.near(d_bias(0, j)));
      }
      ASSERT_EQ(d_x.written_outside() + d_w.written_outside(), 0);
    }
  }
}

TYPED_TEST(Gemm, HeadLinearAgreesWithADoubleLoop) {
  using T = typename TypeParam::T;
  using S = typename TypeParam::S;
  CpuBackend cpu(2);
  Random random(3);
  for (const auto& [tokens, heads, n, k] :
       {std::array<int64_t, 4>{1, 3, 20, 40}, {5, 1, 16, 1}, {70, 4, 33, 128}}) {
    for (bool transpose : {false, true}) {
      Array<T> x(tokens, heads, k, 3, 5), out(tokens, heads, n, 2, 1);
      Array<S> w(heads, transpose ? k : n, transpose ? n : k, 4, 6);
      x.randomise(random), w.randomise(random);
      cpu.head_linear(x.cube(), w.cube(), transpose, out.cube());
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t h = 0; h < heads; ++h) {
          for (int64_t j = 0; j < n; ++j) {
            Sum sum;
            for (int64_t i = 0; i < k; ++i) {
              sum.add(x.value(t, h, i) * (transpose ? w.value(h, i, j) : w.value(h, j, i)));
            }
            ASSERT_TRUE(sum.near(out(t, h, j)));
          }
        }
      }
      ASSERT_EQ(out.written_outside(), 0);
    }
  }
}

// A row has the same bits whatever rows it stands among, and on any number of threads.
TYPED_TEST(Gemm, RowsDependNeitherOnTheirNumberNorOnThreads) {
  using T = typename TypeParam::T;
  using S = typename TypeParam::S;
  CpuBackend one(1), three(3);
  Random random(4);
  const int64_t most = 67, n = 150, k = 600;
  Array<T> x(1, 2 * most, k), bias(1, 1, n), alone(1, most, n), d_alone(1, most, k);
  Array<T> d_out(1, most, n);
  Array<S> w(1, n, k);
  x.randomise(random), w.randomise(random), bias.randomise(random), d_out.randomise(random);
  const View b(&bias(0, 0), {n}, dtype_of<T>);
  for (int64_t i = 0; i < most; ++i) {
    one.linear(x.rows(i, 1), w.matrix(), b, {alone.rows(i, 1)});
    one.linear_backward_input(d_out.rows(i, 1), w.matrix(), {d_alone.rows(i, 1)});
  }
  for (int64_t m = 1; m <= most; ++m) {
    for (CpuBackend* cpu : {&one, &three}) {
      Array<T> out(1, most, n), d_x(1, most, k);
      cpu->linear(x.rows(0, m), w.matrix(), b, {out.rows(0, m)});
      cpu->linear_backward_input(d_out.rows(0, m), w.matrix(), {d_x.rows(0, m)});
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) ASSERT_EQ(out(i, j), alone(i, j)) << "row " << i << " of " << m;
        for (int64_t j = 0; j < k; ++j) ASSERT_EQ(d_x(i, j), d_alone(i, j)) << "row " << i << " of " << m;
      }
    }
  }
}

// Packed for good, a weight gives the bits that it gives in rows; also where only some of its columns are
// used.
TYPED_TEST(Gemm, PackedWeightsGiveTheSameBits) {
  using T = typename TypeParam::T;
  using S = typename TypeParam::S;
  CpuBackend cpu(2);
  Random random(7);
  for (const Size& z : sizes) {
    if (z.n == 0 || z.k == 0) continue;
    for (int64_t m : {int64_t{1}, int64_t{2}, int64_t{3}, int64_t{7}, int64_t{20}, z.m}) {
      const int64_t begin = z.k / 3;  // columns [begin, k) of a wider weight
      Array<T> x(1, m, z.k, z.gap), part(1, m, z.k - begin), bias(1, 1, z.n);
      Array<S> w(1, z.n, z.k);
      x.randomise(random), part.randomise(random), w.randomise(random), bias.randomise(random);
      const auto packed = cpu.packed(w.matrix());
      ASSERT_TRUE(packed.has_value());
      const auto memory = cpu.allocate(packed->bytes);
      View panels = packed->view;
      panels.data = memory.get();
      cpu.pack(w.matrix(), panels);
      const View b(&bias(0, 0), {z.n}, dtype_of<T>);
      for (bool accumulate : {false, true}) {
        Array<T> want(1, m, z.n, z.gap), got(1, m, z.n, z.gap);
        want.fill([] { return 0.25; }), got.fill([] { return 0.25; });
        cpu.linear(x.matrix(), w.matrix(), b, {want.matrix(), accumulate});
        cpu.linear(x.matrix(), panels, b, {got.matrix(), accumulate});
        ASSERT_EQ(want.differences(got), 0) << m << "x" << z.n << "x" << z.k;
      }
      View some = w.matrix(), some_panels = panels;
      some.shape = some_panels.shape = {z.n, z.k - begin};
      some.data = w.data.data() + begin;
      some_panels.data = static_cast<S*>(panels.data) + begin * panels.stride(1);
      Array<T> want(1, m, z.n), got(1, m, z.n);
      cpu.linear(part.matrix(), some, {}, {want.matrix()});
      cpu.linear(part.matrix(), some_panels, {}, {got.matrix()});
      ASSERT_EQ(want.differences(got), 0) << m << "x" << z.n << "x" << z.k << " from column " << begin;
    }
  }
}

// So large that rows and depth are taken in several rounds.
TEST(GemmRounds, BitsDependNeitherOnThreadsNorOnTheRowsAround) {
  CpuBackend one(1), three(3);
  Random random(5);
  const int64_t m = 1300, n = 20, k = 4500;
  Array<float> x(1, m, k), w(1, n, k), a(1, m, n), b(1, m, n), part(1, m, n);
  x.randomise(random), w.randomise(random);
  one.linear(x.matrix(), w.matrix(), {}, {a.matrix()});
  three.linear(x.matrix(), w.matrix(), {}, {b.matrix()});
  EXPECT_EQ(a.differences(b), 0);
  for (int64_t begin = 0, count = 1; begin < m; begin += count, count = std::min(2 * count, m - begin)) {
    three.linear(x.rows(begin, count), w.matrix(), {}, {part.rows(begin, count)});
  }
  EXPECT_EQ(a.differences(part), 0);
  Array<float> d_w(1, k, n), d_w3(1, k, n);
  one.linear_backward_weight(x.matrix(), a.matrix(), {d_w.matrix()});
  three.linear_backward_weight(x.matrix(), a.matrix(), {d_w3.matrix()});
  EXPECT_EQ(d_w.differences(d_w3), 0);
  for (int64_t i : {int64_t{0}, k / 2, k - 1}) {
    for (int64_t j = 0; j < n; ++j) {
      Sum sum;
      for (int64_t t = 0; t < m; ++t) sum.add(x.value(0, t, i) * a.value(0, t, j));
      EXPECT_TRUE(sum.near(d_w(i, j)));
    }
  }
}

// Tokens spread over experts, some of which have none.
struct Experts {
  Experts(Random& random, int64_t experts, int64_t tokens, int64_t count, bool skewed) {
    std::vector<int32_t> owner;
    for (int64_t i = 0; i < count; ++i) {
      rows.push_back(static_cast<int32_t>(random.below(static_cast<uint64_t>(tokens))));
      owner.push_back(skewed && !random.chance(0.1)
                          ? 1
                          : static_cast<int32_t>(random.below(static_cast<uint64_t>(experts)) / 2 * 2));
    }
    for (int64_t e = 0; e <= experts; ++e) {
      offsets.push_back(
          static_cast<int32_t>(std::count_if(owner.begin(), owner.end(), [&](int32_t o) { return o < e; })));
    }
  }
  int64_t expert_of(int64_t row) const {
    int64_t e = 0;
    while (offsets[static_cast<size_t>(e) + 1] <= row) ++e;
    return e;
  }
  std::vector<int32_t> rows, offsets;
};

TYPED_TEST(Gemm, GroupedLinearAgreesWithADoubleLoop) {
  using T = typename TypeParam::T;
  using S = typename TypeParam::S;
  CpuBackend cpu(3);
  Random random(6);
  struct Case {
    int64_t experts, tokens, count, n, k;
    bool skewed;
  };
  for (const Case& z : {Case{5, 7, 20, 24, 40, false},
                        {3, 1, 1, 17, 9, false},
                        {8, 60, 300, 65, 270, false},
                        {6, 100, 400, 30, 31, true},
                        {4, 10, 0, 8, 8, false}}) {
    for (bool gather : {false, true}) {
      for (bool accumulate : {false, true}) {
        Experts split(random, z.experts, z.tokens, z.count, z.skewed);
        Array<T> x(1, gather ? z.tokens : z.count, z.k, 2), out(1, z.count, z.n, 1),
            d_out(1, z.count, z.n, 3);
        Array<T> d_x(1, z.count, z.k, 1), d_w(z.experts, z.n, z.k, 2, 5);
        Array<S> w(z.experts, z.n, z.k, 1, 7);
        for (Array<T>* a : {&x, &d_out, &d_x, &d_w}) a->randomise(random);
        w.randomise(random);
        Array<T> d_x_before = d_x, d_w_before = d_w;
        const View rows = gather ? list_view(split.rows) : View(), offsets = list_view(split.offsets);
        if (gather && z.count == 0) continue;
        cpu.grouped_linear(x.matrix(), rows, offsets, w.cube(), out.matrix());
        cpu.grouped_linear_backward_input(d_out.matrix(), offsets, w.cube(), {d_x.matrix(), accumulate});
        cpu.grouped_linear_backward_weight(d_out.matrix(), x.matrix(), rows, offsets,
                                           {d_w.cube(), accumulate});
        const auto source = [&](int64_t r) {
          return gather ? int64_t{split.rows[static_cast<size_t>(r)]} : r;
        };
        for (int64_t r = 0; r < z.count; ++r) {
          const int64_t e = split.expert_of(r);
          for (int64_t j = 0; j < z.n; ++j) {
            Sum sum;
            for (int64_t k = 0; k < z.k; ++k) sum.add(x.value(0, source(r), k) * w.value(e, j, k));
            ASSERT_TRUE(sum.near(out(r, j)));
          }
          for (int64_t k = 0; k < z.k; ++k) {
            Sum sum;
            if (accumulate) sum.add(d_x_before.value(0, r, k));
            for (int64_t j = 0; j < z.n; ++j) sum.add(d_out.value(0, r, j) * w.value(e, j, k));
            ASSERT_TRUE(sum.near(d_x(r, k)));
          }
        }
        for (int64_t e = 0; e < z.experts; ++e) {
          for (int64_t j = 0; j < z.n; ++j) {
            for (int64_t k = 0; k < z.k; ++k) {
              Sum sum;
              if (accumulate) sum.add(d_w_before.value(e, j, k));
              for (int64_t r = split.offsets[static_cast<size_t>(e)];
                   r < split.offsets[static_cast<size_t>(e) + 1]; ++r) {
                sum.add(d_out.value(0, r, j) * x.value(0, source(r), k));
              }
              ASSERT_TRUE(sum.near(d_w(e, j, k))) << e << " " << j << " " << k;
            }
          }
        }
        ASSERT_EQ(out.written_outside() + d_x.written_outside() + d_w.written_outside(), 0);
      }
    }
  }
}

// An expert gives a row what a plain linear layer of its weights gives it.
TYPED_TEST(Gemm, GroupedRowsHaveTheBitsOfLinear) {
  using T = typename TypeParam::T;
  using S = typename TypeParam::S;
  CpuBackend one(1), three(3);
  Random random(7);
  const int64_t experts = 6, tokens = 90, count = 500, n = 100, k = 530;
  Experts split(random, experts, tokens, count, true);
  Array<T> x(1, tokens, k), out(1, count, n), again(1, count, n), row(1, 1, n);
  Array<T> d_w(experts, n, k), d_w3(experts, n, k);
  Array<S> w(experts, n, k);
  x.randomise(random), w.randomise(random);
  const View rows = list_view(split.rows), offsets = list_view(split.offsets);
  one.grouped_linear(x.matrix(), rows, offsets, w.cube(), out.matrix());
  three.grouped_linear(x.matrix(), rows, offsets, w.cube(), again.matrix());
  EXPECT_EQ(out.differences(again), 0);
  const auto packed = three.packed(w.cube());
  const auto memory = three.allocate(packed->bytes);
  View panels = packed->view;
  panels.data = memory.get();
  three.pack(w.cube(), panels);
  three.grouped_linear(x.matrix(), rows, offsets, panels, again.matrix());
  EXPECT_EQ(out.differences(again), 0) << "packed";
  one.grouped_linear_backward_weight(out.matrix(), x.matrix(), rows, offsets, {d_w.cube()});
  three.grouped_linear_backward_weight(out.matrix(), x.matrix(), rows, offsets, {d_w3.cube()});
  EXPECT_EQ(d_w.differences(d_w3), 0);
  for (int64_t r = 0; r < count; ++r) {
    const View weights(&w(split.expert_of(r), 0, 0), {n, k}, dtype_of<S>);
    three.linear(x.rows(split.rows[static_cast<size_t>(r)], 1), weights, {}, {row.matrix()});
    for (int64_t j = 0; j < n; ++j) ASSERT_EQ(row(0, j), out(r, j)) << "row " << r;
  }
}

}  // namespace
}  // namespace latente
