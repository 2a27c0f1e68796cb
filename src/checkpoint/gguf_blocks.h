// GGML's element types: blocks of quantised values with their scales, as GGUF files hold them. A row is a
// whole number of blocks. Layouts: https://github.com/ggml-org/ggml, src/ggml-common.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace latente {

enum class GgmlType : uint32_t {
  f32 = 0,
  f16 = 1,
  q4_0 = 2,
  q4_1 = 3,
  q5_0 = 6,
  q5_1 = 7,
  q8_0 = 8,
  q2_k = 10,
  q3_k = 11,
  q4_k = 12,
  q5_k = 13,
  q6_k = 14,
  iq2_xxs = 16,
  iq2_xs = 17,
  iq3_xxs = 18,
  iq1_s = 19,
  iq4_nl = 20,
  iq3_s = 21,
  iq2_s = 22,
  iq4_xs = 23,
  i8 = 24,
  i16 = 25,
  i32 = 26,
  i64 = 27,
  f64 = 28,
  iq1_m = 29,
  bf16 = 30,
  tq1_0 = 34,
  tq2_0 = 35,
  mxfp4 = 39,
  nvfp4 = 40,
};

struct GgmlBlock {
  GgmlType type;
  std::string_view name;  // "Q4_K"
  int64_t values;         // in a block
  int64_t bytes;          // of a block
};

// Nothing for numbers that name no type of a file.
std::optional<GgmlType> ggml_type(uint32_t number);
const GgmlBlock& block_of(GgmlType type);
inline std::string_view name_of(GgmlType type) { return block_of(type).name; }

// True for the types that decode() knows: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K, IQ4_NL
// and IQ4_XS.
bool can_decode(GgmlType type);

// `count` values, a whole number of blocks, to float32. The blocks need no alignment.
void decode(GgmlType type, const std::byte* blocks, int64_t count, float* values);

// What types come to that are whole numbers with a scale for each 32 values: signed codes of 8 bits (Q8_0,
// Q5_0, IQ4_NL) or 4 (Q4_0), or of 4 with an offset for each 32 besides (Q4_1, Q4_K). bits is 0 for others.
struct CodeForm {
  int bits = 0;
  bool offsets = false;
};
CodeForm code_form(GgmlType type);
// Their codes [count] and scales [count / 32], behind which come offsets [count / 32]. Without offsets,
// decode()'s values are scale · code to the bit, and the scales are float16 numbers; with offsets,
// scale · code + offset but for rounding, and neither need be.
void decode_codes(GgmlType type, const std::byte* blocks, int64_t count, int8_t* codes, float* scales);

}  // namespace latente
