#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/gemm_support.h"

namespace latente {
namespace {

template <class T, class S>
struct CrossEntropy {
  CrossEntropy(int64_t tokens, int64_t vocabulary, int64_t width, int64_t chunk, uint64_t seed)
      : h(1, tokens, width, 3),
        d_h(1, tokens, width, 2),
        d_w(1, vocabulary, width, 1),
        scratch(1, chunk, vocabulary),
        w(1, vocabulary, width, 2),
        nll(static_cast<size_t>(tokens)),
        weights(static_cast<size_t>(tokens)),
        predicted(static_cast<size_t>(tokens)),
        targets(static_cast<size_t>(tokens)) {
    Random random(seed);
    h.randomise(random), d_h.randomise(random), d_w.randomise(random), w.randomise(random);
    for (T& x : weights) x = static_cast<T>(static_cast<float>(random.uniform()));
    for (int32_t& t : targets) {
      t = random.chance(0.2) ? -100 : static_cast<int32_t>(random.below(static_cast<uint64_t>(vocabulary)));
    }
  }
  View loss_view() { return View(&loss, {1}, dtype_of<T>); }
  void run(CpuBackend& cpu) {
    cpu.linear_cross_entropy(h.matrix(), w.matrix(), list_view(targets), list_view(weights), scratch.matrix(),
                             list_view(nll), list_view(predicted), loss_view());
  }
  void run_with_gradient(CpuBackend& cpu, bool accumulate) {
    cpu.linear_cross_entropy_with_gradient(
        h.matrix(), w.matrix(), list_view(targets), list_view(weights), scratch.matrix(), list_view(nll),
        list_view(predicted), loss_view(), {d_h.matrix(), accumulate}, {d_w.matrix(), accumulate});
  }

  Array<T> h, d_h, d_w, scratch;
  Array<S> w;
  std::vector<T> nll, weights;
  std::vector<int32_t> predicted, targets;
  T loss = 0;
};

template <class Pair>
class Loss : public ::testing::Test {};
TYPED_TEST_SUITE(Loss, AllTypes);

TYPED_TEST(Loss, AgreesWithADoubleLoop) {
  using T = typename TypeParam::T;
  CpuBackend cpu(2);
  const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-12;
  for (const auto& [tokens, vocabulary, width, chunk] :
       {std::array<int64_t, 4>{1, 1, 1, 1}, {9, 37, 12, 4}, {50, 1500, 20, 16}, {7, 300, 270, 32}}) {
    for (bool accumulate : {false, true}) {
      CrossEntropy<T, typename TypeParam::S> c(tokens, vocabulary, width, chunk, 11);
      Array<T> d_h = c.d_h, d_w = c.d_w;
      c.run_with_gradient(cpu, accumulate);
      double loss = 0;
      std::vector<double> expected_w(static_cast<size_t>(vocabulary * width));
      for (int64_t t = 0; t < tokens; ++t) {
        std::vector<double> logits;
        for (int64_t v = 0; v < vocabulary; ++v) {
          double sum = 0;
          for (int64_t k = 0; k < width; ++k) sum += c.h.value(0, t, k) * c.w.value(0, v, k);
          logits.push_back(sum);
        }
        const double top = *std::max_element(logits.begin(), logits.end());
        double total = 0;
        for (double x : logits) total += std::exp(x - top);
        const auto at = static_cast<size_t>(t);
        const int32_t target = c.targets[at];
        const double nll = target < 0 ? 0 : top + std::log(total) - logits[static_cast<size_t>(target)];
        const double weight = target < 0 ? 0 : static_cast<double>(c.weights[at]);
        EXPECT_NEAR(static_cast<double>(c.nll[at]), nll, tolerance * (1 + nll));
        EXPECT_GE(logits[static_cast<size_t>(c.predicted[at])], top - tolerance);
        loss += weight * nll;
        std::vector<double> expected_h(static_cast<size_t>(width));
        for (int64_t v = 0; v < vocabulary; ++v) {
          const double d = weight * (std::exp(logits[static_cast<size_t>(v)] - top) / total - (v == target));
          for (int64_t k = 0; k < width; ++k) {
            expected_h[static_cast<size_t>(k)] += d * c.w.value(0, v, k);
            expected_w[static_cast<size_t>(v * width + k)] += d * c.h.value(0, t, k);
          }
        }
        for (int64_t k = 0; k < width; ++k) {
          const double want = expected_h[static_cast<size_t>(k)] + (accumulate ? d_h.value(0, t, k) : 0);
          ASSERT_NEAR(c.d_h.value(0, t, k), want, tolerance * 10);
        }
      }
      for (int64_t v = 0; v < vocabulary; ++v) {
        for (int64_t k = 0; k < width; ++k) {
          const double want =
              expected_w[static_cast<size_t>(v * width + k)] + (accumulate ? d_w.value(0, v, k) : 0);
          ASSERT_NEAR(c.d_w.value(0, v, k), want, tolerance * 10);
        }
      }
      EXPECT_NEAR(static_cast<double>(c.loss), loss, tolerance * (1 + loss));
      EXPECT_EQ(c.d_h.written_outside() + c.d_w.written_outside(), 0);

      const std::vector<T> nll = c.nll;
      const std::vector<int32_t> predicted = c.predicted;
      const T with_gradient = c.loss;
      c.run(cpu);
      EXPECT_EQ(c.nll, nll);
      EXPECT_EQ(c.predicted, predicted);
      EXPECT_EQ(c.loss, with_gradient);
    }
  }
}

TEST(LossRows, TiesGoToTheLowestIdAndMaskedRowsHaveNoGradient) {
  CpuBackend cpu(1);
  CrossEntropy<float, float> c(3, 40, 1, 2, 12);
  c.h.fill([] { return 1.0; });
  c.w.fill([] { return 0.5; });
  c.w(7, 0) = c.w(8, 0) = c.w(39, 0) = 2;
  c.targets = {-1, -1, -1};
  c.run_with_gradient(cpu, false);
  EXPECT_EQ(c.predicted, (std::vector<int32_t>{7, 7, 7}));
  EXPECT_EQ(c.nll, (std::vector<float>{0, 0, 0}));
  EXPECT_EQ(c.loss, 0);
  for (int64_t t = 0; t < 3; ++t) EXPECT_EQ(c.d_h(t, 0), 0);
  for (int64_t v = 0; v < 40; ++v) EXPECT_EQ(c.d_w(v, 0), 0);
}

TEST(LossRows, LargeLogitsStayFinite) {
  CpuBackend cpu(1);
  CrossEntropy<float, float> c(2, 50, 1, 2, 13);
  c.h.fill([] { return 1.0; });
  c.w.fill([] { return -3e4; });
  c.w(4, 0) = 3e4;
  c.targets = {4, 5};
  c.run_with_gradient(cpu, false);
  EXPECT_EQ(c.nll[0], 0);
  EXPECT_EQ(c.nll[1], 6e4f);
  EXPECT_TRUE(std::isfinite(c.d_h(1, 0)));
}

// The same bits on any number of threads, and for nll and d_h in any company.
TEST(LossRows, BitsDependNeitherOnThreadsNorOnChunks) {
  CpuBackend one(1), three(3);
  CrossEntropy<float, float> a(41, 900, 300, 41, 14), b(41, 900, 300, 41, 14), c(41, 900, 300, 6, 14);
  a.run_with_gradient(one, false);
  b.run_with_gradient(three, false);
  c.run_with_gradient(three, false);
  EXPECT_EQ(a.nll, b.nll);
  EXPECT_EQ(a.loss, b.loss);
  EXPECT_EQ(a.d_h.differences(b.d_h), 0);
  EXPECT_EQ(a.d_w.differences(b.d_w), 0);
  EXPECT_EQ(a.nll, c.nll);
  EXPECT_EQ(a.loss, c.loss);
  EXPECT_EQ(a.predicted, c.predicted);
  EXPECT_EQ(a.d_h.differences(c.d_h), 0);
}

}  // namespace
}  // namespace latente
