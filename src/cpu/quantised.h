// Products with weights of 8 or 4 bits in panels (tensor/panels.h). Activations are quantised as they are
// packed: to 8 bits, with a scale for each row and group, which is rounded to float16 for groups of 32, as
// llama.cpp does. Sums within a group are whole numbers, and groups are added in rising order, scale by
// scale, in float32: so a row has the same bits whatever the batch, the threads and the instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/threads.h"
#include "cpu/gemm.h"
#include "tensor/panels.h"
#include "tensor/pending_panels.h"
#include "tensor/view.h"

namespace latente::quantised {

inline Form form_of(const View& w) { return form_of(w.dtype, w.group); }

// codes [n, k] and scales [n, groups], as quantise_rows leaves them; behind the scales offsets [n, groups]
// where the form has them.
void pack(ThreadPool& pool, Form form, const int8_t* codes, const float* scales, int64_t n, int64_t k,
          std::byte* panels);

// The same from values [n, k]; importance [k] or null. False when a value or a scale is not finite.
bool quantise(ThreadPool& pool, Form form, const float* values, const float* importance, int64_t n, int64_t k,
              std::byte* panels);

// The same from rows of blocks, as Backend::pack_blocks has them.
bool pack_blocks(ThreadPool& pool, Form form, const std::byte* blocks, int64_t n, int64_t k,
                 std::byte* panels);

// c[m, n] (+)= a · wᵀ + bias
struct Problem {
  Form form{};
  int64_t m = 0, n = 0, k = 0;
  gemm::Lines<float> a{};  // along k
  const std::byte* panels = nullptr;
  PendingMatrix pending{};  // instead of them
  float* c = nullptr;
  int64_t c_row = 0;
  const float* bias = nullptr;  // [n]
  bool accumulate = false;
};

// Problems must not overlap in c.
void multiply(ThreadPool& pool, std::span<const Problem> problems);

}  // namespace latente::quantised
