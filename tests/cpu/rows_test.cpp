// The kernels that work row by row: the same bits for a row alone, within a batch and on any number of
// threads; strided views; destinations that are written, added to or absent; bfloat16 weights.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "cpu/gemm_support.h"

namespace latente {
namespace {

using RowTypes = ::testing::Types<float, double>;
template <class T>
class Rows : public ::testing::Test {};
TYPED_TEST_SUITE(Rows, RowTypes);

template <class T>
Array<T> random_array(int64_t rows, int64_t columns, uint64_t seed, int64_t gap = 5) {
  Random random(seed);
  return Array<T>(1, rows, columns, gap).randomise(random);
}

std::vector<int32_t> random_indices(int64_t count, int64_t bound, uint64_t seed) {
  Random random(seed);
  std::vector<int32_t> values(static_cast<size_t>(count));
  for (int32_t& value : values) value = static_cast<int32_t>(random.below(static_cast<uint64_t>(bound)));
  return values;
}

View vector_of(std::vector<int32_t>& values, int64_t begin, int64_t count) {
  return View(values.data() + begin, {count}, DType::i32);
}

// [rows, columns] as [rows, heads, columns / heads]
template <class T>
View heads(Array<T>& x, int64_t begin, int64_t count, int64_t number) {
  View view = x.rows(begin, count);
  view.shape = {count, number, x.column_count / number};
  view.strides = {x.row_stride, x.column_count / number, 1, 0};
  return view;
}

// `run(backend, outputs, begin, count)` computes the rows [begin, begin + count) of `outputs`: all at once on
// one thread, on three, and in pieces of changing size.
template <class T>
std::vector<Array<T>> same_bits(
    const std::vector<Array<T>>& empty, int64_t rows,
    const std::function<void(CpuBackend&, std::vector<Array<T>>&, int64_t, int64_t)>& run) {
  std::vector<Array<T>> whole = empty, threaded = empty, pieces = empty;
  run(threads(1), whole, 0, rows);
  run(threads(3), threaded, 0, rows);
  Random random(5);
  for (int64_t begin = 0; begin < rows;) {
    int64_t count = std::min(rows - begin, random.chance(0.7) ? 1 : random.between(2, 40));
    run(threads(1), pieces, begin, count);
    begin += count;
  }
  for (size_t i = 0; i < whole.size(); ++i) {
    EXPECT_EQ(whole[i].differences(threaded[i]), 0) << "three threads, output " << i;
    EXPECT_EQ(whole[i].differences(pieces[i]), 0) << "pieces, output " << i;
  }
  return whole;
}

constexpr int64_t rows = 900, width = 67;
template <class T>
constexpr double tolerance = sizeof(T) == 8 ? 1e-12 : 2e-5;

template <class T>
void expect_near(Array<T>& got, const std::function<double(int64_t, int64_t)>& want) {
  for (int64_t t = 0; t < got.row_count; ++t) {
    for (int64_t i = 0; i < got.column_count; ++i) {
      double expected = want(t, i);
      ASSERT_NEAR(got.value(0, t, i), expected, tolerance<T> * std::max(1.0, std::abs(expected)))
          << "row " << t << ", column " << i;
    }
  }
}

TYPED_TEST(Rows, Swiglu) {
  using T = TypeParam;
  auto gate = random_array<T>(rows, width, 1), up = random_array<T>(rows, width, 2);
  auto out =
      same_bits<T>({Array<T>(1, rows, width, 3)}, rows, [&](CpuBackend& b, auto& o, int64_t at, int64_t n) {
        b.swiglu(gate.rows(at, n), up.rows(at, n), o[0].rows(at, n));
      });
  expect_near<T>(out[0], [&](int64_t t, int64_t i) {
    double g = gate.value(0, t, i);
    return g / (1 + std::exp(-g)) * up.value(0, t, i);
  });
}

TYPED_TEST(Rows, SwigluBackward) {
  using T = TypeParam;
  auto d = random_array<T>(rows, width, 1), gate = random_array<T>(rows, width, 2),
       up = random_array<T>(rows, width, 3), before = random_array<T>(rows, width, 4);
  for (bool add_gate : {false, true}) {
    for (bool add_up : {false, true}) {
      auto out = same_bits<T>({before, before}, rows, [&](CpuBackend& b, auto& o, int64_t at, int64_t n) {
        b.swiglu_backward(d.rows(at, n), gate.rows(at, n), up.rows(at, n), {o[0].rows(at, n), add_gate},
                          {o[1].rows(at, n), add_up});
      });
      auto slope = [&](int64_t t, int64_t i) {
        double g = gate.value(0, t, i), s = 1 / (1 + std::exp(-g));
        return s + g * s * (1 - s);
      };
      expect_near<T>(out[0], [&](int64_t t, int64_t i) {
        return (add_gate ? before.value(0, t, i) : 0) + d.value(0, t, i) * up.value(0, t, i) * slope(t, i);
      });
      expect_near<T>(out[1], [&](int64_t t, int64_t i) {
        double g = gate.value(0, t, i);
        return (add_up ? before.value(0, t, i) : 0) + d.value(0, t, i) * g / (1 + std::exp(-g));
      });
      Array<T> alone = before;
      threads(1).swiglu_backward(d.matrix(), gate.matrix(), up.matrix(), {}, {alone.matrix(), add_up});
      EXPECT_EQ(alone.differences(out[1]), 0);
      alone = before;
      threads(1).swiglu_backward(d.matrix(), gate.matrix(), up.matrix(), {alone.matrix(), add_gate}, {});
      EXPECT_EQ(alone.differences(out[0]), 0);
    }
  }
}

TYPED_TEST(Rows, AddAndCopy) {
  using T = TypeParam;
  auto a = random_array<T>(rows, width, 1), b = random_array<T>(rows, width, 2);
  auto sum =
      same_bits<T>({Array<T>(1, rows, width, 1)}, rows, [&](CpuBackend& cpu, auto& o, int64_t at, int64_t n) {
        cpu.add(a.rows(at, n), b.rows(at, n), o[0].rows(at, n));
      });
  expect_near<T>(sum[0], [&](int64_t t, int64_t i) { return a.value(0, t, i) + b.value(0, t, i); });
  for (bool accumulate : {false, true}) {
    auto out = same_bits<T>({b}, rows, [&](CpuBackend& cpu, auto& o, int64_t at, int64_t n) {
      cpu.copy(a.rows(at, n), {o[0].rows(at, n), accumulate});
    });
    expect_near<T>(
        out[0], [&](int64_t t, int64_t i) { return a.value(0, t, i) + (accumulate ? b.value(0, t, i) : 0); });
  }
}

TYPED_TEST(Rows, Fill) {
  using T = TypeParam;
  auto out =
      same_bits<T>({Array<T>(1, rows, width, 2)}, rows,
                   [&](CpuBackend& b, auto& o, int64_t at, int64_t n) { b.fill(o[0].rows(at, n), 1.5); });
  expect_near<T>(out[0], [](int64_t, int64_t) { return 1.5; });
}

// S: element type of the weights.
template <class T, class S>
void check_norm() {
  auto x = random_array<T>(rows, width, 1), h = random_array<T>(rows, width, 2),
       d = random_array<T>(rows, width, 3), before = random_array<T>(rows, width, 4);
  auto weight = random_array<S>(1, width, 5);
  const double eps = 1e-3;
  for (bool weighted : {true, false}) {
    View w = weighted ? View(weight.data.data(), {width}, dtype_of<S>) : View();
    auto factor = [&](int64_t i) { return weighted ? weight.value(0, 0, i) : 1.0; };
    auto out = same_bits<T>({Array<T>(1, rows, width, 1), Array<T>(1, rows, width, 2), Array<T>(1, rows, 1),
                             Array<T>(1, rows, width, 1), Array<T>(1, rows, 1)},
                            rows, [&](CpuBackend& b, auto& o, int64_t at, int64_t n) {
                              View rstd_add = o[2].rows(at, n), rstd = o[4].rows(at, n);
                              rstd_add.shape = rstd.shape = {n};
                              b.rms_norm_add(h.rows(at, n), x.rows(at, n), w, eps, o[0].rows(at, n),
                                             o[1].rows(at, n), rstd_add);
                              b.rms_norm(x.rows(at, n), w, eps, o[3].rows(at, n), rstd);
                            });
    auto rstd_of = [&](Array<T>& of, int64_t t) {
      double sum = 0;
      for (int64_t i = 0; i < width; ++i) sum += of.value(0, t, i) * of.value(0, t, i);
      return 1 / std::sqrt(sum / width + eps);
    };
    expect_near<T>(out[0], [&](int64_t t, int64_t i) { return h.value(0, t, i) + x.value(0, t, i); });
    expect_near<T>(out[2], [&](int64_t t, int64_t) { return rstd_of(out[0], t); });
    expect_near<T>(
        out[1], [&](int64_t t, int64_t i) { return out[0].value(0, t, i) * rstd_of(out[0], t) * factor(i); });
    expect_near<T>(out[3],
                   [&](int64_t t, int64_t i) { return x.value(0, t, i) * rstd_of(x, t) * factor(i); });

    Array<T> rstd = out[4];
    for (bool accumulate : {false, true}) {
      auto gradient = same_bits<T>({before}, rows, [&](CpuBackend& b, auto& o, int64_t at, int64_t n) {
        View r = rstd.rows(at, n);
        r.shape = {n};
        b.rms_norm_backward(d.rows(at, n), x.rows(at, n), w, r, {o[0].rows(at, n), accumulate}, {});
      });
      expect_near<T>(gradient[0], [&](int64_t t, int64_t i) {
        double mean = 0, r = rstd_of(x, t);
        for (int64_t j = 0; j < width; ++j) mean += d.value(0, t, j) * factor(j) * x.value(0, t, j) / width;
        return (accumulate ? before.value(0, t, i) : 0) +
               r * (d.value(0, t, i) * factor(i) - x.value(0, t, i) * r * r * mean);
      });
      // d_weight, alone and beside d_x, on one thread and on three.
      auto sum = [&](int count, Grad d_x) {
        auto to = random_array<T>(1, width, 6, 0);
        View r = rstd.matrix(), target(to.data.data(), {width}, dtype_of<T>);
        r.shape = {rows};
        threads(count).rms_norm_backward(d.matrix(), x.matrix(), w, r, d_x, {target, accumulate});
        return to;
      };
      auto one = sum(1, {}), three = sum(3, {});
      EXPECT_EQ(one.differences(three), 0);
      Array<T> d_x = before;
      EXPECT_EQ(one.differences(sum(3, {d_x.matrix(), accumulate})), 0);
      EXPECT_EQ(d_x.differences(gradient[0]), 0);
      auto start = random_array<T>(1, width, 6, 0);
      for (int64_t i = 0; i < width; ++i) {
        double want = accumulate ? start.value(0, 0, i) : 0;
        for (int64_t t = 0; t < rows; ++t) want += d.value(0, t, i) * x.value(0, t, i) * rstd_of(x, t);
        EXPECT_NEAR(one.value(0, 0, i), want, tolerance<T> * 50);
      }
    }
  }
}

TYPED_TEST(Rows, Norm) { check_norm<TypeParam, TypeParam>(); }
TEST(RowsOfBf16, Norm) { check_norm<float, bf16>(); }

template <class T, class S>
void check_embedding() {
  const int64_t vocabulary = 50;
  auto table = random_array<S>(vocabulary, width, 1);
  std::vector<int32_t> ids = random_indices(rows, vocabulary, 2);
  auto out =
      same_bits<T>({Array<T>(1, rows, width, 3)}, rows, [&](CpuBackend& b, auto& o, int64_t at, int64_t n) {
        b.embedding(vector_of(ids, at, n), table.matrix(), o[0].rows(at, n));
      });
  expect_near<T>(out[0],
                 [&](int64_t t, int64_t i) { return table.value(0, ids[static_cast<size_t>(t)], i); });
}

TYPED_TEST(Rows, Embedding) { check_embedding<TypeParam, TypeParam>(); }
TEST(RowsOfBf16, Embedding) { check_embedding<float, bf16>(); }

TYPED_TEST(Rows, EmbeddingBackward) {
  using T = TypeParam;
  const int64_t vocabulary = 50;
  for (int64_t columns : {width, int64_t{400}}) {
    auto d = random_array<T>(rows, columns, 1), before = random_array<T>(vocabulary, columns, 2);
    std::vector<int32_t> ids = random_indices(rows, vocabulary - 3, 3);
    for (bool accumulate : {false, true}) {
      Array<T> one = before, three = before;
      threads(1).embedding_backward(vector_of(ids, 0, rows), d.matrix(), {one.matrix(), accumulate});
      threads(3).embedding_backward(vector_of(ids, 0, rows), d.matrix(), {three.matrix(), accumulate});
      EXPECT_EQ(one.differences(three), 0);
      expect_near<T>(one, [&](int64_t v, int64_t i) {
        double want = accumulate ? before.value(0, v, i) : 0;
        for (int64_t t = 0; t < rows; ++t) want += ids[static_cast<size_t>(t)] == v ? d.value(0, t, i) : 0;
        return want;
      });
    }
  }
}

TYPED_TEST(Rows, Rope) {
  using T = TypeParam;
  const int64_t number = 3, positions = 40;
  for (int64_t dim : {2, 6, 22, 64}) {
    auto x = random_array<T>(rows, number * dim, 1);
    auto table = random_array<float>(positions, dim, 2);
    std::vector<int32_t> position = random_indices(rows, positions, 3);
    for (bool interleaved : {false, true}) {
      for (bool inverse : {false, true}) {
        auto out = same_bits<T>({x}, rows, [&](CpuBackend& b, auto& o, int64_t at, int64_t n) {
          b.rope(heads(o[0], at, n, number), vector_of(position, at, n), table.matrix(), interleaved,
                 inverse);
        });
        expect_near<T>(out[0], [&](int64_t t, int64_t column) {
          int64_t i = column % dim, base = column - i, half = dim / 2;
          int64_t pair = interleaved ? i / 2 : i % half;
          bool second = interleaved ? i % 2 == 1 : i >= half;
          int64_t row = position[static_cast<size_t>(t)];
          double c = table.value(0, row, pair), s = table.value(0, row, half + pair) * (inverse ? -1 : 1);
          double a = x.value(0, t, base + (interleaved ? 2 * pair : pair));
          double b = x.value(0, t, base + (interleaved ? 2 * pair + 1 : pair + half));
          return second ? a * s + b * c : a * c - b * s;
        });
      }
    }
  }
}

TYPED_TEST(Rows, Route) {
  using T = TypeParam;
  const int64_t experts = 24, top_k = 5;
  for (GateScore score : {GateScore::sigmoid, GateScore::softmax}) {
    Routing routing{.top_k = top_k,
                    .score = score,
                    .group_score = GroupScore::top2_sum,
                    .groups = 4,
                    .top_groups = 2,
                    .normalise = score == GateScore::sigmoid,
                    .scale = 2.5};
    auto logits = random_array<T>(rows, experts, 1), bias = random_array<T>(1, experts, 2, 0),
         d = random_array<T>(rows, top_k, 3, 0);
    std::vector<int32_t> chosen(static_cast<size_t>(rows * top_k)), first;
    auto out =
        same_bits<T>({Array<T>(1, rows, experts, 1), Array<T>(1, rows, top_k), Array<T>(1, rows, experts, 2)},
                     rows, [&](CpuBackend& b, auto& o, int64_t at, int64_t n) {
                       View choices(chosen.data() + at * top_k, {n, top_k}, DType::i32);
                       b.route(logits.rows(at, n), View(bias.data.data(), {experts}, dtype_of<T>), {},
                               routing, o[0].rows(at, n), o[1].rows(at, n), choices, {}, {});
                       b.route_backward(d.rows(at, n), o[0].rows(at, n), o[1].rows(at, n), choices, {},
                                        routing, {o[2].rows(at, n), false});
                       if (n < rows) return;
                       if (first.empty()) first = chosen;
                       EXPECT_EQ(first, chosen);
                     });
    EXPECT_EQ(first, chosen);  // in pieces
    Array<T> added = random_array<T>(rows, experts, 4), before = added;
    threads(3).route_backward(d.matrix(), out[0].matrix(), out[1].matrix(),
                              View(chosen.data(), {rows, top_k}, DType::i32), {}, routing,
                              {added.matrix(), true});
    expect_near<T>(added,
                   [&](int64_t t, int64_t e) { return before.value(0, t, e) + out[2].value(0, t, e); });
  }
}

// The balance loss and its gradient are sums over tokens: the same on any number of threads.
TYPED_TEST(Rows, RouteWithBalanceLoss) {
  using T = TypeParam;
  const int64_t experts = 19, top_k = 3;
  auto logits = random_array<T>(rows, experts, 1), mask = random_array<T>(1, rows, 2, 0);
  for (T& m : mask.data) m = m > 0 ? T{1} : T{0};
  for (bool per_sequence : {true, false}) {
    Routing routing{.top_k = top_k,
                    .balance = {.alpha = 0.2,
                                .device_alpha = 0.1,
                                .communication_alpha = 0.3,
                                .devices = experts,
                                .devices_per_token = top_k,
                                .per_sequence = per_sequence,
                                .sequence_length = 90}};
    struct Result {
      Array<T> scores, weights, gradient, loss;
      std::vector<float> load;
    };
    auto run = [&](int count) {
      Result r{Array<T>(1, rows, experts), Array<T>(1, rows, top_k), Array<T>(1, rows, experts),
               Array<T>(1, 1, 1), std::vector<float>(static_cast<size_t>(experts), 2.0f)};
      std::vector<int32_t> chosen(static_cast<size_t>(rows * top_k));
      View choices(chosen.data(), {rows, top_k}, DType::i32), masks(mask.data.data(), {rows}, dtype_of<T>);
      threads(count).route(logits.matrix(), {}, masks, routing, r.scores.matrix(), r.weights.matrix(),
                           choices, View(r.load.data(), {experts}, DType::f32),
                           View(r.loss.data.data(), {1}, dtype_of<T>));
      threads(count).route_backward({}, r.scores.matrix(), r.weights.matrix(), choices, masks, routing,
                                    {r.gradient.matrix(), false});
      return r;
    };
    Result one = run(1), three = run(3);
    EXPECT_EQ(one.loss.differences(three.loss), 0);
    EXPECT_EQ(one.gradient.differences(three.gradient), 0);
    EXPECT_EQ(one.load, three.load);
    EXPECT_GT(one.loss.value(0, 0, 0), 0.1);
    float counted = 0;
    for (float count : one.load) counted += count - 2.0f;
    EXPECT_EQ(counted,
              static_cast<float>(top_k * std::count(mask.data.begin(), mask.data.begin() + rows, T{1})));
  }
}

TYPED_TEST(Rows, Combine) {
  using T = TypeParam;
  const int64_t top_k = 3;
  auto y = random_array<T>(rows * top_k, width, 1), weights = random_array<T>(rows, top_k, 2, 0),
       d = random_array<T>(rows, width, 3), before = random_array<T>(rows, width, 4);
  std::vector<int32_t> slots(static_cast<size_t>(rows * top_k));
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int32_t>(i * 7 % slots.size());
  for (bool weighted : {true, false}) {
    for (bool accumulate : {false, true}) {
      auto weight = [&](int64_t t, int64_t k) { return weighted ? weights.value(0, t, k) : 1.0; };
      auto slot = [&](int64_t t, int64_t k) { return slots[static_cast<size_t>(t * top_k + k)]; };
      auto view_of = [&](int64_t at, int64_t n) {
        return View(slots.data() + at * top_k, {n, top_k}, DType::i32);
      };
      auto out = same_bits<T>({before}, rows, [&](CpuBackend& b, auto& o, int64_t at, int64_t n) {
        b.combine(y.matrix(), weighted ? weights.rows(at, n) : View(), view_of(at, n),
                  {o[0].rows(at, n), accumulate});
      });
      expect_near<T>(out[0], [&](int64_t t, int64_t i) {
        double want = accumulate ? before.value(0, t, i) : 0;
        for (int64_t k = 0; k < top_k; ++k) want += weight(t, k) * y.value(0, slot(t, k), i);
        return want;
      });
      auto start = random_array<T>(rows * top_k, width, 5),
           start_weights = random_array<T>(rows, top_k, 6, 0);
      auto gradient =
          same_bits<T>({start, start_weights}, rows, [&](CpuBackend& b, auto& o, int64_t at, int64_t n) {
            b.combine_backward(d.rows(at, n), y.matrix(), weighted ? weights.rows(at, n) : View(),
                               view_of(at, n), {o[0].matrix(), accumulate}, {o[1].rows(at, n), accumulate});
          });
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t k = 0; k < top_k; ++k) {
          double product = accumulate ? start_weights.value(0, t, k) : 0;
          for (int64_t i = 0; i < width; ++i) {
            product += d.value(0, t, i) * y.value(0, slot(t, k), i);
            double want = (accumulate ? start.value(0, slot(t, k), i) : 0) + weight(t, k) * d.value(0, t, i);
            ASSERT_NEAR(gradient[0].value(0, slot(t, k), i), want, tolerance<T> * 10);
          }
          ASSERT_NEAR(gradient[1].value(0, t, k), product, tolerance<T> * 20);
        }
      }
    }
  }
}

}  // namespace
}  // namespace latente
