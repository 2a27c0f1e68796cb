// Weights of 8 or 4 bits: whole numbers with a scale for each group of neighbours along a row,
// w[i] = scale[i / group] · code[i]. Of type q4m, which only files of other programs bring along, each group
// has an offset besides: w[i] = scale[i / group] · code[i] + offset[i / group].
#pragma once

#include <array>
#include <cstdint>

namespace latente {

inline constexpr int64_t least_group = 32, default_group = 64, most_group = 256;

constexpr int64_t groups_of(int64_t row, int64_t group) { return (row + group - 1) / group; }

// The definition; Backend::quantise does the same for a device. Quantises rows [n, k] (without gaps): codes
// [n, k] within [-127, 127] for 8 bits and [-8, 7] for 4; scales [n, groups_of(k, group)], each a value that
// float16 holds. 8 bits round to nearest. 4 bits choose, among the scales near the one that covers the group,
// that of the smallest squared error. bits: 8 or 4; group: a multiple of 32 from least_group to most_group.
// importance [k] or null, for 4 bits: what a squared error in each column counts; without it, that of a weight
// w counts w² + the mean of the group's squares.
void quantise_rows(const float* rows, int64_t n, int64_t k, int bits, int64_t group, int8_t* codes,
                   float* scales, const float* importance = nullptr);

// Where the search for a scale of 4 bits begins: a group's extreme divided by these. The extreme becomes -8,
// or nearly; a negative scale turns the range round.
inline constexpr std::array four_bit_divisors = {-9.2f, -8.6f, -8.0f, -7.5f, -7.0f, -6.5f, 7.0f, 7.5f, 8.0f};

}  // namespace latente
