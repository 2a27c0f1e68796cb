// GGML's blocks as panels, code for code; compiled for each instruction set.
#pragma once

#include "cpu/quantised.h"

namespace latente::quantised {

// One panel of a form of 8 or 4 bits in groups of 32 from `count` rows, at most 16, of blocks of Q8_0 or Q4_0.
// False when a code is -128 or a scale is not finite, and on processors without vectors; the panel is then
// undefined.
bool panel_of_blocks(Form form, const std::byte* blocks, int64_t count, int64_t k, std::byte* panel);

}  // namespace latente::quantised
