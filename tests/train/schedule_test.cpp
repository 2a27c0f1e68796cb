#include "train/schedule.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <random>

#include "base/error.h"

namespace latente {
namespace {

ScheduleOptions options_of(ScheduleKind kind) {
  ScheduleOptions options;
  options.kind = kind;
  options.lr = 1;
  options.warmup_steps = 10;
  return options;
}

TEST(Schedule, WarmUpIsLinearAndReachesTheRate) {
  for (const auto& [name, kind] : EnumNames<ScheduleKind>::values) {
    const auto options = options_of(kind);
    for (int step = 0; step < 10; ++step) {
      EXPECT_DOUBLE_EQ(learning_rate(options, step, 1000), (step + 1) / 10.0) << name;
    }
    EXPECT_NEAR(learning_rate(options, 10, 1000), 1, 1e-4) << name;
  }
}

TEST(Schedule, NoKindJumpsOrRisesAfterTheWarmUp) {
  for (const auto& [name, kind] : EnumNames<ScheduleKind>::values) {
    for (const auto& [shape_name, shape] : EnumNames<DecayShape>::values) {
      auto options = options_of(kind);
      options.decay = shape;
      for (int step = 10; step < 2000; ++step) {
        const double before = learning_rate(options, step - 1, 2000),
                     now = learning_rate(options, step, 2000);
        ASSERT_LE(now, before) << name << " " << step;
        ASSERT_GE(now, 0);
        // The deepseek kind drops to its last rate at once; √ falls by √(1/400) in the first of its steps.
        ASSERT_LE(before - now, shape == DecayShape::sqrt || kind == ScheduleKind::deepseek ? 0.07 : 0.005)
            << name << " " << shape_name << " " << step;
      }
    }
  }
}

TEST(Schedule, CosineEndsAtItsLowest) {
  auto options = options_of(ScheduleKind::cosine);
  EXPECT_DOUBLE_EQ(learning_rate(options, 999, 1000), 0.1);
  EXPECT_DOUBLE_EQ(learning_rate(options, 5000, 1000), 0.1);
  options.min_lr = 0;
  EXPECT_NEAR(learning_rate(options, 504, 1000), 0.5, 2e-3);
  options.warmup_steps = 0;
  for (int step = 0; step < 11; ++step) {
    EXPECT_NEAR(learning_rate(options, step, 11), 0.5 + 0.5 * std::cos(std::numbers::pi * step / 10), 1e-12);
  }
}

TEST(Schedule, WsdIsConstantUntilItsLastShare) {
  auto options = options_of(ScheduleKind::wsd);
  EXPECT_EQ(learning_rate(options, 799, 1000), 1);
  EXPECT_LT(learning_rate(options, 800, 1000), 1);
  EXPECT_NEAR(learning_rate(options, 899, 1000), 0.5, 1e-9);
  EXPECT_EQ(learning_rate(options, 999, 1000), 0);
  options.decay = DecayShape::sqrt;
  EXPECT_NEAR(learning_rate(options, 849, 1000), 0.5, 1e-9);
  options.decay = DecayShape::cosine;
  EXPECT_NEAR(learning_rate(options, 849, 1000), 0.5 + std::sqrt(0.125), 1e-9);
  options.decay_share = 0;
  EXPECT_EQ(learning_rate(options, 998, 1000), 1);
}

// Steps of a thousandth of a trillion tokens, the rates as the report gives them.
TEST(Schedule, DeepseekHasThePublishedPhases) {
  ScheduleOptions options;
  options.kind = ScheduleKind::deepseek;
  options.warmup_steps = 1;
  const auto rate = [&](double trillions) {
    return learning_rate(options, std::llround(trillions * 1000), 14800);
  };
  EXPECT_EQ(rate(5), 2.2e-4);
  EXPECT_EQ(rate(10), 2.2e-4);
  EXPECT_NEAR(rate(12.15), 0.5 * (2.2e-4 + 2.2e-5), 1e-9);
  EXPECT_NEAR(rate(14.3), 2.2e-5, 1e-12);
  EXPECT_NEAR(rate(14.632), 2.2e-5, 1e-12);
  EXPECT_NEAR(rate(14.633), 7.3e-6, 1e-12);
  EXPECT_NEAR(rate(14.799), 7.3e-6, 1e-12);
  EXPECT_EQ(value_at(0.3, 0.1, DeepseekPhases::constant_until, 9999, 14800), 0.3);
  EXPECT_EQ(value_at(0.3, 0.1, DeepseekPhases::constant_until, 10000, 14800), 0.1);
}

TEST(Schedule, TinyRunsAreFinite) {
  std::mt19937 random(std::random_device{}());
  for (int round = 0; round < 3000; ++round) {
    ScheduleOptions options;
    options.kind = EnumNames<ScheduleKind>::values[random() % 4].second;
    options.decay = EnumNames<DecayShape>::values[random() % 3].second;
    options.decay_share = std::min(1.0, (random() % 12) / 10.0);
    const int64_t steps = 1 + random() % 5;
    options.warmup_steps = random() % (steps + 1);
    check_schedule(options, steps);
    for (int64_t step = 0; step < steps + 2; ++step) {
      const double rate = learning_rate(options, step, steps);
      ASSERT_TRUE(rate >= 0 && rate <= options.lr) << rate;
    }
  }
}

TEST(Schedule, BadOptionsAreNamed) {
  const auto error_of = [](auto change, int64_t steps = 100) -> std::string {
    ScheduleOptions options;
    change(options);
    try {
      check_schedule(options, steps);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_EQ(error_of([](auto& o) { o.lr = -1; }), "lr: expected a rate of at least 0, found -1");
  EXPECT_EQ(error_of([](auto& o) { o.warmup_steps = 101; }),
            "warmup_steps: expected a number in [0, steps = 100], found 101");
  EXPECT_EQ(error_of([](auto& o) { o.min_lr = 1; }), "min_lr: expected a rate in [0, lr = 0.00022], found 1");
  EXPECT_EQ(error_of([](auto& o) { o.decay_share = 2; }), "decay_share: expected a share in [0, 1], found 2");
  EXPECT_EQ(error_of([](auto&) {}, 0), "steps: expected at least 1, found 0");
  EXPECT_EQ(error_of([](auto&) {}), "no error");
}

TEST(Schedule, TokensBecomeSteps) {
  EXPECT_EQ(steps_for_tokens(1, 4096), 1);
  EXPECT_EQ(steps_for_tokens(4096, 4096), 1);
  EXPECT_EQ(steps_for_tokens(4097, 4096), 2);
  EXPECT_EQ(steps_for_tokens(INT64_MAX, 1), INT64_MAX);
  EXPECT_THROW(steps_for_tokens(0, 1), Error);
  EXPECT_THROW(steps_for_tokens(1, 0), Error);
}

}  // namespace
}  // namespace latente
