// Products of bfloat16 and of FP8 on Hopper's tensor cores (product_sm90.cu).
#pragma once

#include <cstdint>

#include "cuda/context.h"

namespace latente::cuda {

// Product (product.cuh) without its types. Of each operand the contiguous axis, and the stride of the other:
// depth, or rows of a and columns of b.
struct HopperProduct {
  const void* a = nullptr;
  const void* b = nullptr;
  int64_t a_line = 0, b_line = 0, a_batch = 0, b_batch = 0;
  bool a_by_depth = true, b_by_depth = true;
  void* c = nullptr;
  int64_t c_row = 0, c_batch = 0;
  bool narrow = false;                       // c is bfloat16, else float32
  int64_t rows = 0, columns = 0, depth = 0;  // rows or depth of all experts
  int batches = 1;                           // neither grouped nor cut
  bool accumulate = false;
  const void* bias = nullptr;
  bool exact_bias = false;
  const int32_t* offsets = nullptr;
  const int32_t* gather = nullptr;
  bool by_depth = false;  // grouped along the depth
  int experts = 0;
  // Operands of e4m3, two of which count as one element of the depth and of strides, with scales for 128 of
  // the depth: [depth / 128, rows] of a; of b too, or [columns / 128, depth / 128] for squares, of each
  // expert.
  const float* a_scales = nullptr;
  const float* b_scales = nullptr;
  int64_t a_scale_line = 0, b_scale_line = 0, b_scale_batch = 0;
  bool squares = false;
  int64_t part_depth = 0;  // if not 0, the depth is cut into parts of so much, whose sums are c_batch apart
};

bool fits_hopper(const HopperProduct& p, const Context& context);
// Into how many parts the depth of a product with few tiles is best cut, so that all multiprocessors work on
// it: at most `most`.
int64_t best_parts(const HopperProduct& p, int64_t most, const Context& context);
void hopper_product(const HopperProduct& p, const char* name, const Context& context);

}  // namespace latente::cuda
