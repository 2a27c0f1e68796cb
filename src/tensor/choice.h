// How a token is chosen from a row of logits where these lie: what Backend::choose is told of each row.
//
// The tokens stand in the order of falling logits, equals by their number. A token's weight is the whole
// number below exp((logit - largest) · inverse_temperature) · 2^40, so that sums are the same in any order;
// what is less likely than 2^-40 of the first is never chosen. top_k keeps the first ones; of those, top_p
// the fewest that have this share of their weight; of those, min_p the ones with at least this share of the
// first one's. Among what is left the token is taken on which `number` of the weight falls.
#pragma once

#include <algorithm>
#include <cstdint>

namespace latente {

struct Choice {
  float inverse_temperature = 0;  // 0 = the most likely token, whatever else is asked
  int32_t top_k = 0;              // 0 = all
  float top_p = 1, min_p = 0;
  uint32_t low = 0, high = 0;  // of the number in [0, 1), in units of 2^-64

  static constexpr int64_t words = 6;           // i32 that it takes in a view
  static constexpr float one = 0x1p40f;         // weight of the first
  static constexpr float least_exponent = -28;  // exp() of it · one is below 1

  bool greedy() const { return inverse_temperature <= 0; }
  void set_temperature(double temperature) {
    constexpr double most = 1e30;  // times no difference at all is still none
    inverse_temperature = temperature > 0 ? static_cast<float>(std::min(1 / temperature, most)) : 0;
  }
  // number: a multiple of 2^-53 in [0, 1).
  void set_number(double number) {
    const auto bits = static_cast<uint64_t>(number * 0x1p53) << 11;
    low = static_cast<uint32_t>(bits), high = static_cast<uint32_t>(bits >> 32);
  }
};
static_assert(sizeof(Choice) == Choice::words * sizeof(int32_t));

}  // namespace latente
