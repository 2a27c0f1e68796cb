// Products with weights of 8 or 4 bits (tensor/quantise.h). Activations are quantised as they are packed: to
// 8 bits, with a scale for each row and group. Sums within a group are whole numbers, and groups are added in
// rising order, scale by scale, in float32: so a row has the same bits whatever the batch, the threads and
// the instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/threads.h"
#include "cpu/gemm.h"
#include "tensor/view.h"

namespace latente::quantised {

// A weight [n, k] lies in panels of 16 of its rows (the last padded with zeros): float16 scales [group, 16],
// padded to whole cache lines, then codes. 8 bits: [k / 4, 16, 4], signed. 4 bits: [k / 8, 16, 4], plus 8; a
// byte holds element i of the first four in its lower half, of the second four in the upper. k is padded to
// whole groups.
inline constexpr int64_t panel_rows = 16;

struct Form {
  int bits = 8;
  int64_t group = 64;
};
inline Form form_of(DType type, int64_t group) {
  LATENTE_ASSERT(is_quantised(type));
  return {type == DType::q8 ? 8 : 4, group};
}
inline Form form_of(const View& w) { return form_of(w.dtype, w.group); }

int64_t scale_bytes(Form form, int64_t k);  // of a panel
int64_t panel_bytes(Form form, int64_t k);
int64_t bytes(Form form, int64_t n, int64_t k);

// codes [n, k] and scales [n, groups], as quantise_rows leaves them.
void pack(ThreadPool& pool, Form form, const int8_t* codes, const float* scales, int64_t n, int64_t k,
          std::byte* panels);

// c[m, n] (+)= a · wᵀ + bias
struct Problem {
  int64_t m = 0, n = 0, k = 0;
  gemm::Lines<float> a{};  // along k
  const std::byte* panels = nullptr;
  float* c = nullptr;
  int64_t c_row = 0;
  const float* bias = nullptr;  // [n]
  bool accumulate = false;
};

// Problems of one form, which must not overlap in c.
void multiply(ThreadPool& pool, Form form, std::span<const Problem> problems);

}  // namespace latente::quantised
