#include "tensor/quantise.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "tensor/dtype.h"

namespace latente {
namespace {

float rounded_scale(float scale) { return static_cast<float>(f16(scale)); }

// Adding and taking away 1.5·2^23 rounds a small number to the nearest integer, ties to even; unlike a call
// of nearbyint, compilers make vectors of it.
float round_to_integer(float x) {
  constexpr float magic = 12582912.0f;
  return (x + magic) - magic;
}

float inverse_of(float scale) { return scale != 0 ? 1 / scale : 0; }

float extent_of(const float* x, int64_t count) {
  float extent = 0;
  for (int64_t i = 0; i < count; ++i) extent = std::max(extent, std::abs(x[i]));
  return extent;
}

void round_group(const float* x, int64_t count, float scale, float low, float high, int8_t* codes) {
  const float inverse = inverse_of(scale);
  for (int64_t i = 0; i < count; ++i) {
    codes[i] = static_cast<int8_t>(std::clamp(round_to_integer(x[i] * inverse), low, high));
  }
}

// How well `scale` can do: the best scale for the codes it gives, and their squared error, less a constant.
struct Fit {
  float scale, gain;
};
Fit fit(const float* x, const float* importance, float mean_square, int64_t count, float scale) {
  const float inverse = inverse_of(scale);
  float xq = 0, qq = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float q = std::clamp(round_to_integer(x[i] * inverse), -8.0f, 7.0f);
    const float weight = importance ? importance[i] : x[i] * x[i] + mean_square;
    xq += weight * x[i] * q;
    qq += weight * q * q;
  }
  if (qq <= 0) return {0, 0};
  return {xq / qq, xq * xq / qq};
}

float best_scale_of_four_bits(const float* x, const float* importance, int64_t count) {
  float extreme = 0, squares = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (std::abs(x[i]) > std::abs(extreme)) extreme = x[i];
    squares += x[i] * x[i];
  }
  const float mean_square = squares / static_cast<float>(count);
  Fit best{extreme / -8, -1};
  for (float divisor : four_bit_divisors) {
    const Fit candidate = fit(x, importance, mean_square, count, extreme / divisor);
    if (candidate.gain > best.gain) best = candidate;
  }
  return best.scale;
}

}  // namespace

void quantise_rows(const float* rows, int64_t n, int64_t k, int bits, int64_t group, int8_t* codes,
                   float* scales, const float* importance) {
  LATENTE_ASSERT((bits == 8 || bits == 4) && group % 32 == 0 && group >= least_group && group <= most_group);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t at = 0; at < k; at += group) {
      const int64_t count = std::min(group, k - at);
      const float* x = rows + r * k + at;
      const float scale = rounded_scale(
          bits == 8 ? extent_of(x, count) / 127
                    : best_scale_of_four_bits(x, importance ? importance + at : nullptr, count));
      round_group(x, count, scale, bits == 8 ? -127.0f : -8.0f, bits == 8 ? 127.0f : 7.0f,
                  codes + r * k + at);
      *scales++ = scale;
    }
  }
}

}  // namespace latente
