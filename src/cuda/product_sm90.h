// Products of bfloat16 on Hopper's tensor cores (product_sm90.cu).
#pragma once

#include <cstdint>

#include "cuda/context.h"

namespace latente::cuda {

// Product (product.cuh) without its types. Of each operand the contiguous axis and the stride of the other:
// depth, or rows of a and columns of b.
struct HopperProduct {
  const void* a = nullptr;
  const void* b = nullptr;
  int64_t a_line = 0, b_line = 0, b_batch = 0;
  bool a_by_depth = true, b_by_depth = true;
  void* c = nullptr;
  int64_t c_row = 0, c_batch = 0;
  bool narrow = false;                       // c is bfloat16, else float32
  int64_t rows = 0, columns = 0, depth = 0;  // rows or depth of all experts
  bool accumulate = false;
  const void* bias = nullptr;
  bool exact_bias = false;
  const int32_t* offsets = nullptr;
  const int32_t* gather = nullptr;
  bool by_depth = false;
  int experts = 0;
  // Not grouped, by depth: sums of `part` of the depth each, c_batch apart; 0 for one of all.
  int64_t part = 0;
};

bool fits_hopper(const HopperProduct& p, const Context& context);
void hopper_product(HopperProduct p, const char* name, const Context& context);

}  // namespace latente::cuda
