// GGML's blocks as panels, code for code; compiled for each instruction set.
#pragma once

#include "cpu/quantised.h"

namespace latente::quantised {

// Of Q8_0, Q4_0 or, for the form with offsets, Q4_K; bytes.
inline int64_t row_of_blocks(Form form, int64_t k) {
  return form.offsets ? k / 256 * 144 : k / 32 * (2 + 4 * form.bits);
}

// One panel of a form in groups of 32 from `count` rows, at most 16, of such blocks.
// False when a code is -128 or a scale is not finite, and on processors without vectors; the panel is then
// undefined.
bool panel_of_blocks(Form form, const std::byte* blocks, int64_t count, int64_t k, std::byte* panel);

}  // namespace latente::quantised
