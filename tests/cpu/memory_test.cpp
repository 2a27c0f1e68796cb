// Memory, element-wise odds and ends, and the optimizer's kernels.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "cpu/gemm_support.h"

namespace latente {
namespace {

template <class T>
View view_of(std::vector<T>& x) {
  return View(x.data(), {static_cast<int64_t>(x.size())}, dtype_of<T>);
}

template <class T>
std::vector<T> random_vector(size_t count, uint64_t seed, double scale = 1.0) {
  Random random(seed);
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(scale * random.normal());
  return values;
}

TEST(Memory, ComesZeroedAndAligned) {
  CpuBackend& cpu = threads(1);
  EXPECT_EQ(cpu.name(), "cpu");
  for (int64_t bytes : {0, 1, 100, 5 << 20}) {
    std::shared_ptr<void> memory = cpu.allocate(bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(memory.get()) % 64, 0u);
    const char* at = static_cast<const char*>(memory.get());
    for (int64_t i = 0; i < bytes; i += 97) EXPECT_EQ(at[i], 0);
  }
  EXPECT_THROW(cpu.allocate(int64_t{1} << 60), Error);
}

TEST(Memory, UploadAndDownload) {
  CpuBackend& cpu = threads(1);
  std::vector<float> from = random_vector<float>(1000, 1), there(1000), back(1000);
  cpu.upload(from.data(), view_of(there));
  cpu.synchronize();
  cpu.download(view_of(there), back.data());
  EXPECT_EQ(from, back);
}

template <class T>
void check_finite() {
  for (int count : {1, 3}) {
    for (int64_t bad : {0, 66, 8000, 59999}) {
      Array<T> x(1, 1000, 60, 4);  // NaN between the rows
      x.fill([] { return 1.0; });
      EXPECT_TRUE(threads(count).all_finite(x.matrix()));
      for (float value : {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::quiet_NaN()}) {
        x(bad / 60, bad % 60) = T(value);
        EXPECT_FALSE(threads(count).all_finite(x.matrix()));
      }
    }
  }
}

TEST(AllFinite, FindsOneBadElement) {
  check_finite<float>();
  check_finite<double>();
  check_finite<bf16>();
  std::vector<double> large = {1e300, -1e300};  // beyond float32
  EXPECT_TRUE(threads(1).all_finite(view_of(large)));
  std::vector<int32_t> integers = {-1, 2};
  EXPECT_TRUE(threads(1).all_finite(view_of(integers)));
}

TEST(Fill, EveryType) {
  std::vector<bf16> narrow(3);
  threads(1).fill(view_of(narrow), 1.5);
  std::vector<int32_t> integers(3);
  threads(1).fill(view_of(integers), -2);
  std::vector<double> wide(50000);
  threads(3).fill(view_of(wide), 0.1);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(static_cast<float>(narrow[i]), 1.5f);
    EXPECT_EQ(integers[i], -2);
  }
  EXPECT_EQ(std::count(wide.begin(), wide.end(), 0.1), 50000);
}

TEST(Copy, OfThreeAxesAndOfIntegers) {
  Array<float> from(3, 4, 5, 2, 7), to(3, 4, 5, 1, 0);
  Random random(1);
  from.randomise(random);
  threads(1).copy(from.cube(), {to.cube(), false});
  for (int64_t o = 0; o < 3; ++o) {
    for (int64_t r = 0; r < 4; ++r) {
      for (int64_t c = 0; c < 5; ++c) EXPECT_EQ(from(o, r, c), to(o, r, c));
    }
  }
  std::vector<int32_t> ids = {1, 2, 3}, copied(3);
  threads(1).copy(view_of(ids), {view_of(copied), false});
  EXPECT_EQ(ids, copied);
}

template <class T>
void check_squares() {
  for (size_t count : {0u, 1u, 5u, 1000u, 300000u}) {
    std::vector<T> x = random_vector<T>(count, 1);
    long double sum = 0;
    for (T value : x) sum += static_cast<long double>(value) * static_cast<long double>(value);
    double one = 0.5, three = 0.5;
    threads(1).add_sum_of_squares(view_of(x), View(&one, {1}, DType::f64));
    threads(3).add_sum_of_squares(view_of(x), View(&three, {1}, DType::f64));
    EXPECT_EQ(one, three);
    EXPECT_NEAR(one, static_cast<double>(sum) + 0.5, 1e-12 * (static_cast<double>(sum) + 0.5));
  }
  Array<T> strided(1, 300, 70, 3);  // NaN between the rows
  strided.fill([] { return 2.0; });
  double sum = 0;
  threads(3).add_sum_of_squares(strided.matrix(), View(&sum, {1}, DType::f64));
  EXPECT_EQ(sum, 4.0 * 300 * 70);
}

TEST(SumOfSquares, IsExactEnoughAndIndependentOfThreads) {
  check_squares<float>();
  check_squares<double>();
}

struct Moments {
  double p, m, v;
};
Moments adamw(Moments now, double g, const double* scalars, const AdamW& how) {
  g *= scalars[1];
  now.m = how.beta1 * now.m + (1 - how.beta1) * g;
  now.v = how.beta2 * now.v + (1 - how.beta2) * g * g;
  double direction = now.m / scalars[2] / (std::sqrt(now.v / scalars[3]) + how.epsilon);
  now.p -= scalars[0] * (direction + how.weight_decay * now.p);
  return now;
}

// P: the parameter's type; T: the gradient's; M: that of moments. Those of M are within `rounding` of their
// size.
template <class P, class T, class M = T>
void check_adamw(double tolerance, double rounding = 0) {
  const size_t count = 50007;
  AdamW how{.beta1 = 0.9, .beta2 = 0.95, .epsilon = 1e-8, .weight_decay = 0.1};
  struct State {
    std::vector<P> parameter;
    std::vector<T> master;
    std::vector<M> m, v;
  };
  std::vector<T> start = random_vector<T>(count, 1);
  State one{std::vector<P>(count), start, std::vector<M>(count), std::vector<M>(count)};
  for (size_t i = 0; i < count; ++i) one.parameter[i] = P(start[i]);
  State three = one;
  std::vector<Moments> want;
  for (T p : start) want.push_back({static_cast<double>(p), 0, 0});
  constexpr bool narrow = sizeof(P) == 2;
  for (int step = 1; step <= 4; ++step) {
    std::vector<T> gradient = random_vector<T>(count, static_cast<uint64_t>(10 + step), 0.01);
    gradient[3] = 0;
    double scalars[4] = {1e-2, 0.7, 1 - std::pow(how.beta1, step), 1 - std::pow(how.beta2, step)};
    for (State* s : {&one, &three}) {
      threads(s == &one ? 1 : 3)
          .adamw(view_of(s->parameter), narrow ? view_of(s->master) : View(), view_of(gradient),
                 view_of(s->m), view_of(s->v), View(scalars, {4}, DType::f64), how);
    }
    for (size_t i = 0; i < count; ++i) {
      want[i] = adamw(want[i], static_cast<double>(gradient[i]), scalars, how);
    }
  }
  for (size_t i = 0; i < count; ++i) {
    if constexpr (narrow) {
      ASSERT_NEAR(static_cast<double>(one.master[i]), want[i].p, tolerance + rounding * 0.1);
      ASSERT_EQ(one.parameter[i].bits, P(one.master[i]).bits);
      ASSERT_EQ(one.parameter[i].bits, three.parameter[i].bits);
    } else {
      ASSERT_NEAR(static_cast<double>(one.parameter[i]), want[i].p, tolerance + rounding * 0.1);
      ASSERT_EQ(one.parameter[i], three.parameter[i]);
    }
    const auto value = [](M x) { return static_cast<double>(static_cast<T>(x)); };
    ASSERT_NEAR(value(one.m[i]), want[i].m, tolerance + rounding * std::abs(want[i].m));
    ASSERT_NEAR(value(one.v[i]), want[i].v, tolerance + rounding * want[i].v);
    ASSERT_EQ(value(one.m[i]), value(three.m[i]));
    ASSERT_EQ(value(one.v[i]), value(three.v[i]));
  }
}

TEST(AdamwKernel, FollowsItsEquations) {
  check_adamw<double, double>(1e-13);
  check_adamw<float, float>(2e-6);
  check_adamw<bf16, float>(2e-6);
  check_adamw<bf16, float, bf16>(2e-5, 0.02);
  check_adamw<float, float, bf16>(2e-5, 0.02);
}

TEST(RoutingBias, MovesAgainstTheLoad) {
  std::vector<float> load = {4, 0, 2, 2};
  std::vector<float> bias = {0.5f, 0.5f, 0.5f, -0.5f};
  threads(1).update_routing_bias(view_of(load), view_of(bias), 0.25);
  EXPECT_EQ(bias, (std::vector<float>{0.25f, 0.75f, 0.5f, -0.5f}));
  EXPECT_EQ(load, std::vector<float>(4, 0.0f));
  std::vector<double> wide = {1, 1};
  load = {3, 1};
  threads(1).update_routing_bias(view_of(load), view_of(wide), 0.125);
  EXPECT_EQ(wide, (std::vector<double>{0.875, 1.125}));
}

}  // namespace
}  // namespace latente
