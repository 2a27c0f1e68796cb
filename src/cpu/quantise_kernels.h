// Quantising weights straight into panels; compiled for each instruction set.
#pragma once

#include "cpu/quantised.h"

namespace latente::quantised {

// One panel from `count` rows [count, k], at most 16, without gaps: bit for bit what
// quantise_rows and pack make of them. importance [k] or null. False when a value or a scale is not finite.
bool quantise_panel(Form form, const float* rows, int64_t count, int64_t k, const float* importance,
                    std::byte* panel);

}  // namespace latente::quantised
