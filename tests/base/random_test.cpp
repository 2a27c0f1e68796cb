#include "base/random.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <set>
#include <vector>

namespace latente {
namespace {

using Block = std::array<uint32_t, 4>;

// The known answers published with Random123 for philox4x32 of 10 rounds.
TEST(Random, PhiloxGivesThePublishedAnswers) {
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}), (Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}),
            (Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Random, AStateContinuesTheSequenceExactly) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  for (int words = 0; words < 9; ++words) {
    Random first(seed, 7);
    for (int i = 0; i < words; ++i) first.next_u32();
    Random second(first.state());
    for (int i = 0; i < 20; ++i) {
      ASSERT_EQ(first.normal(), second.normal());
      ASSERT_EQ(first.below(1000), second.below(1000));
      ASSERT_EQ(first.next_u32(), second.next_u32());
    }
    EXPECT_EQ(first.state(), second.state());
  }
}

TEST(Random, SeekGoesBack) {
  Random random(1, 2);
  std::vector<uint32_t> words(50);
  for (auto& word : words) word = random.next_u32();
  random.seek(13);
  EXPECT_EQ(random.next_u32(), words[13]);
  random.seek(0);
  EXPECT_EQ(random.next_u32(), words[0]);
}

TEST(Random, SeedsAndStreamsDiffer) {
  std::set<uint64_t> seen;
  for (uint64_t seed : {uint64_t{0}, uint64_t{1}, uint64_t{1} << 32}) {
    for (uint64_t stream : {uint64_t{0}, uint64_t{1}, uint64_t{1} << 32}) {
      seen.insert(Random(seed, stream).next_u64());
    }
  }
  EXPECT_EQ(seen.size(), 9u);
}

TEST(Random, BoundedIntegersAreUniform) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  Random random(seed);
  constexpr int kinds = 7, draws = 140000;
  std::array<int, kinds> counts{};
  for (int i = 0; i < draws; ++i) ++counts.at(random.below(kinds));
  double chi2 = 0;
  for (int count : counts) chi2 += std::pow(count - draws / kinds, 2) / (double(draws) / kinds);
  EXPECT_LT(chi2, 35.9);  // six degrees of freedom: passed by chance but for 3 in a million
}

// With bound 2^63 + 2^62 a plain remainder would give the lower third twice as often as the rest.
TEST(Random, BoundedIntegersHaveNoBiasForHugeBounds) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  Random random(seed);
  const uint64_t bound = (uint64_t{1} << 63) + (uint64_t{1} << 62);
  int low = 0;
  for (int i = 0; i < 30000; ++i) {
    const uint64_t value = random.below(bound);
    ASSERT_LT(value, bound);
    low += value < (uint64_t{1} << 62);
  }
  EXPECT_NEAR(low, 10000, 6 * std::sqrt(30000 * (1.0 / 3) * (2.0 / 3)));
}

TEST(Random, BetweenReachesBothEnds) {
  Random random(3);
  std::set<int64_t> seen;
  for (int i = 0; i < 200; ++i) seen.insert(random.between(-2, 2));
  EXPECT_EQ(seen, (std::set<int64_t>{-2, -1, 0, 1, 2}));
  random.between(INT64_MIN, INT64_MAX);
}

TEST(Random, NormalsHaveTheMomentsOfANormal) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  constexpr int n = 200000;
  std::vector<float> filled(n);
  fill_normal(filled, seed, 5);
  std::vector<float> drawn(n);
  Random random(seed, 6);
  for (auto& value : drawn) value = static_cast<float>(random.normal());
  for (const auto& values : {filled, drawn}) {
    double mean = 0, square = 0, fourth = 0, neighbours = 0;
    for (int i = 0; i < n; ++i) {
      mean += values[i] / n;
      square += std::pow(values[i], 2) / n;
      fourth += std::pow(values[i], 4) / n;
      if (i > 0) neighbours += values[i] * values[i - 1] / n;
    }
    const double six_sigma = 6 / std::sqrt(double(n));
    EXPECT_NEAR(mean, 0, six_sigma);
    EXPECT_NEAR(square, 1, std::sqrt(2.0) * six_sigma);
    EXPECT_NEAR(fourth, 3, std::sqrt(96.0) * six_sigma);
    EXPECT_NEAR(neighbours, 0, six_sigma);
  }
}

TEST(Random, FillsAreTheSameHoweverCut) {
  std::random_device device;
  const uint64_t seed = device();
  SCOPED_TRACE(seed);
  std::vector<float> whole(101), parts(101);
  for (auto fill : {fill_normal, fill_uniform}) {
    fill(whole, seed, 9, 1000003, -1, 3);
    for (size_t at = 0; at < parts.size();) {
      const size_t count = std::min<size_t>(device() % 5, parts.size() - at);
      fill(std::span(parts).subspan(at, count), seed, 9, 1000003 + at, -1, 3);
      at += count;
    }
    EXPECT_EQ(whole, parts);
  }
}

TEST(Random, UniformsStayInside) {
  std::vector<float> values(100000);
  fill_uniform(values, 11, 0, 0, -2, 3);
  EXPECT_GE(*std::min_element(values.begin(), values.end()), -2.f);
  EXPECT_LT(*std::max_element(values.begin(), values.end()), 3.f);
  EXPECT_NEAR(std::accumulate(values.begin(), values.end(), 0.0) / 100000, 0.5, 6 * 5 / std::sqrt(12e5));
  Random random(1);
  for (int i = 0; i < 1000; ++i) {
    const double narrow = random.uniform(1, std::nextafter(1, 2));
    ASSERT_EQ(narrow, 1);
  }
}

TEST(Random, ShuffleIsAPermutationAndReachesEveryOne) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::set<std::vector<int>> seen;
  for (uint64_t stream = 0; stream < 300; ++stream) {
    std::vector<int> items{0, 1, 2, 3};
    Random(seed, stream).shuffle(std::span(items));
    seen.insert(items);
    std::sort(items.begin(), items.end());
    ASSERT_EQ(items, (std::vector<int>{0, 1, 2, 3}));
  }
  EXPECT_EQ(seen.size(), 24u);
}

}  // namespace
}  // namespace latente
