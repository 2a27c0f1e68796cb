// Pearson's chi-square test of counts against probabilities, for tests with fixed seeds.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace latente::test {

// How far the chi-square statistic lies above its expectation, in standard deviations of a normal variable
// (Wilson and Hilferty 1931). Cells that expect fewer than five are pooled. Infinite when something of
// probability zero was counted.
inline double deviation(const std::vector<int64_t>& counts, const std::vector<double>& probabilities) {
  double total = 0;
  for (int64_t count : counts) total += static_cast<double>(count);
  double statistic = 0, pooled_count = 0, pooled_expected = 0;
  int64_t cells = 0;
  auto add = [&](double count, double expected) {
    statistic += (count - expected) * (count - expected) / expected;
    ++cells;
  };
  for (size_t i = 0; i < counts.size(); ++i) {
    double count = static_cast<double>(counts[i]), expected = probabilities[i] * total;
    if (expected == 0 && count > 0) return std::numeric_limits<double>::infinity();
    if (expected >= 5) {
      add(count, expected);
    } else {
      pooled_count += count, pooled_expected += expected;
    }
  }
  if (pooled_expected > 0) add(pooled_count, std::max(pooled_expected, 1e-3));
  if (cells < 2) return 0;
  double freedom = static_cast<double>(cells - 1), spread = 2 / (9 * freedom);
  return (std::cbrt(statistic / freedom) - (1 - spread)) / std::sqrt(spread);
}

// One chance in some 30,000 a test.
constexpr double implausible = 4.0;

}  // namespace latente::test
