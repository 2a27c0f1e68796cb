// Products of bfloat16 and of FP8 on Hopper's tensor cores (product_sm90.cu).
#pragma once

#include <cstdint>

#include "cuda/product.cuh"

namespace latente::cuda {

// Two products in one launch: of a gate and of what it gates, whose weights have one shape.
enum class Pair : uint8_t {
  none,
  gated,   // the same a: c = a · bᵀ, other_c = a · other_bᵀ, inner = silu(c) · other_c, in bfloat16
  depths,  // c = a · bᵀ + other_a · other_bᵀ
  rows,    // the same b: c = a · bᵀ, other_c = other_a · bᵀ
};

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
  // the depth: [depth / 128, rows] of a; of b [columns / 128, depth / 128] for squares, of each expert, or
  // with by_depth, as of a, [depth / 128, columns]. Then each expert's depth begins at a multiple of 128.
  const float* a_scales = nullptr;
  const float* b_scales = nullptr;
  int64_t a_scale_line = 0, b_scale_line = 0, b_scale_batch = 0;
  bool squares = false;
  int64_t part_depth = 0;  // if not 0, the depth is cut into parts of so much, whose sums are c_batch apart
  Pair pair = Pair::none;
  const void* other_a = nullptr;
  const void* other_b = nullptr;
  const float* other_a_scales = nullptr;
  const float* other_b_scales = nullptr;
  void* other_c = nullptr;
  void* inner = nullptr;
  const float* factors = nullptr;  // of the rows of inner, or null
  // Two numbers, zeros between products: blocks then take the tiles as they get done, instead of in turn.
  int* taken = nullptr;
};

template <class C>
HopperProduct for_hopper(const Product<bf16, bf16, C>& p, int64_t rows, int64_t batches) {
  HopperProduct h;
  h.a = p.a, h.b = p.b, h.c = p.c;
  h.a_by_depth = p.a_depth == 1, h.b_by_depth = p.b_depth == 1;
  h.a_line = h.a_by_depth ? p.a_row : p.a_depth, h.b_line = h.b_by_depth ? p.b_row : p.b_depth;
  h.a_batch = p.a_batch, h.b_batch = p.b_batch, h.c_batch = p.c_batch, h.c_row = p.c_row;
  h.narrow = std::is_same_v<C, bf16>;
  h.rows = rows, h.columns = p.columns, h.depth = p.depth;
  h.batches = p.offsets || p.part_depth ? 1 : static_cast<int>(batches);
  h.accumulate = p.accumulate, h.bias = p.bias, h.exact_bias = p.exact_bias;
  h.offsets = p.offsets, h.gather = p.gather, h.by_depth = p.by_depth, h.experts = p.experts;
  h.part_depth = p.part_depth;
  return h;
}

bool fits_hopper(const HopperProduct& p, const Context& context);
// Into how many parts the depth of a product with few tiles is best cut, so that all multiprocessors work on
// it: at most `most`.
int64_t best_parts(const HopperProduct& p, int64_t most, const Context& context);
void hopper_product(const HopperProduct& p, const char* name, const Context& context);
// product_fp8_sm90.cu
void hopper_product_fp8(const HopperProduct& p, const char* name, const Context& context);

}  // namespace latente::cuda
