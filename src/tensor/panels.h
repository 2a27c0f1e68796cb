// Where codes and scales of weights of 8 and 4 bits (tensor/quantise.h) stand, in memory and in files
// (model/converted.h): bytes and little-endian float16 numbers, the same for every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor/quantise.h"

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

// The values of rows [first, first + rows), [rows, k].
void unpack(Form form, const std::byte* panels, int64_t k, int64_t first, int64_t rows, float* values);

}  // namespace latente::quantised
