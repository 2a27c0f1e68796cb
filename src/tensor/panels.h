// Where codes and scales of weights of 8 and 4 bits (tensor/quantise.h) stand, in memory and in files
// (model/converted.h): bytes and little-endian float16 numbers, the same for every instruction set. And how
// FP8 weights are handed to a device that keeps them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor/quantise.h"
#include "tensor/view.h"

namespace latente::quantised {

// A weight [n, k] lies in panels of 16 of its rows (the last padded with zeros): float16 scales [group, 16],
// where there are offsets, these likewise, padded with zeros to whole cache lines, then codes. 8 bits: [k /
// 4, 16, 4], signed. 4 bits: [k / 8, 16, 4], plus 8; a byte holds element i of the first four in its lower
// half, of the second four in the upper. k is padded to whole groups.
inline constexpr int64_t panel_rows = 16;

struct Form {
  int bits = 8;
  int64_t group = 64;
  bool offsets = false;
};

int64_t scale_bytes(Form form, int64_t k);  // of a panel, with its offsets
int64_t panel_bytes(Form form, int64_t k);
int64_t bytes(Form form, int64_t n, int64_t k);

Form form_of(DType type, int64_t group);

// One panel of codes [rows, k] and scales [rows, groups], as quantise_rows leaves them, rows <= panel_rows;
// offsets likewise where the form has them.
void pack_panel(Form form, const int8_t* codes, const float* scales, const float* offsets, int64_t rows,
                int64_t k, std::byte* panel);

// The values of rows [first, first + rows), [rows, k].
void unpack(Form form, const std::byte* panels, int64_t k, int64_t first, int64_t rows, float* values);

// FP8 (e4m3) codes with a float32 scale for squares of 128 × 128 (DeepSeek-V3 report, section 3.3.2): a
// matrix [n, k] is scales [⌈n/128⌉, ⌈k/128⌉], padded to 16 bytes, and codes [n, k], padded likewise.
inline constexpr int64_t square = 128;
int64_t square_scale_bytes(int64_t n, int64_t k);
// From values [n, k]: a scale is the largest magnitude over 448. False when a value is not finite.
bool quantise_squares(const float* values, int64_t n, int64_t k, std::byte* matrix);

// A matrix's bytes in either form; type q8, q4, q4m or f8e4m3.
int64_t matrix_bytes(DType type, int64_t group, int64_t n, int64_t k);
// The view, without data, of a matrix [N, K] or a stack [E, N, K]; stride(0) of a stack is in bytes.
View view_of(const Shape& shape, DType type, int64_t group);
inline int64_t bytes_of(const View& view) {
  return matrix_bytes(view.dtype, view.group, view[-2], view[-1]) * (view.shape.rank() == 3 ? view[0] : 1);
}

}  // namespace latente::quantised
