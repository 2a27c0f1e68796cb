// Weights of 8 or 4 bits: whole numbers with a scale for each group of neighbours along a row,
// w[i] = scale[i / group] · code[i].
#pragma once

#include <cstdint>

namespace latente {

inline constexpr int64_t least_group = 32, most_group = 256;

constexpr int64_t groups_of(int64_t row, int64_t group) { return (row + group - 1) / group; }

// Quantises rows [n, k] (without gaps): codes [n, k] within [-127, 127] for 8 bits and [-8, 7] for 4; scales
// [n, groups_of(k, group)], each a value that float16 holds. 8 bits round to nearest. 4 bits choose, among
// the scales near the one that covers the group, that of the smallest squared error, large weights counting
// more. bits: 8 or 4; group: a multiple of 32 from least_group to most_group.
void quantise_rows(const float* rows, int64_t n, int64_t k, int bits, int64_t group, int8_t* codes,
                   float* scales);

}  // namespace latente
