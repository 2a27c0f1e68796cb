// What every product of the backend is, and which tile of it a block has.
#pragma once

#include "cuda/elements.cuh"

namespace latente::cuda {

// c[m, n] (+)= sum over k of a[m, k] · b[n, k] + bias[n]
template <class A, class B, class C>
struct Product {
  const A* a = nullptr;
  int64_t a_row = 0, a_depth = 1;  // strides
  const B* b = nullptr;
  int64_t b_row = 0, b_depth = 1;
  C* c = nullptr;
  int64_t c_row = 0;
  int64_t rows = 0, columns = 0, depth = 0;
  bool accumulate = false;
  const void* bias = nullptr;  // f32, or as B
  bool exact_bias = false;
  int64_t a_batch = 0, b_batch = 0, c_batch = 0;  // grid.z
  // Grouped: rows offsets[e] .. offsets[e + 1] of a and c meet b + e · b_batch (grid.x is tiles of all
  // experts), or with by_depth those are the depth that c + e · c_batch sums over (grid.z is e). `gather` is
  // the row of a, or with by_depth the depth of b, that stands for a sorted row.
  const int32_t* offsets = nullptr;
  const int32_t* gather = nullptr;
  bool by_depth = false;
  int experts = 0;
  // Otherwise, if not 0: part grid.z of the depth is this long, and its sum goes to c + z · c_batch.
  int64_t part_depth = 0;
};

// The sorted rows begin .. end, all of one expert; end = begin when there is no such tile.
struct ExpertTile {
  int expert, begin, end;
};

// Experts' rows are cut into tiles of `rows`, expert after expert; finds the `index`th. All lanes of a warp
// call it and get the same answer.
__device__ inline ExpertTile find_tile(const int32_t* offsets, int experts, int rows, int index) {
  const int lane = static_cast<int>(threadIdx.x % warp_size);
  int before = 0;  // tiles of the experts below `base`
  for (int base = 0; base < experts; base += warp_size) {
    const int expert = base + lane;
    const int first = expert < experts ? offsets[expert] : 0;
    const int last = expert < experts ? offsets[expert + 1] : 0;
    const int tiles = (last - first + rows - 1) / rows;
    int through = tiles;  // tiles of the experts base..expert
    for (int step = 1; step < warp_size; step *= 2) {
      const int lower = __shfl_up_sync(whole_warp, through, step);
      if (lane >= step) through += lower;
    }
    const unsigned past = __ballot_sync(whole_warp, before + through > index);
    if (past) {
      const int owner = __ffs(static_cast<int>(past)) - 1;
      const int begin = first + (index - before - (through - tiles)) * rows;
      const int found = __shfl_sync(whole_warp, begin, owner);
      return {base + owner, found, min(found + rows, __shfl_sync(whole_warp, last, owner))};
    }
    before += __shfl_sync(whole_warp, through, warp_size - 1);
  }
  return {0, 0, 0};
}

// The most tiles of `rows` that any sizes of groups can need.
inline int64_t most_tiles(int64_t count, int64_t experts, int64_t rows) {
  return (count + std::min(count, experts) * (rows - 1)) / rows;
}

// The rows and the depth that a block has of a product, whose operands move to the block's batch or expert.
struct Part {
  int64_t first_row, end_row, first_depth, end_depth;
};
template <int tile_rows, class A, class B, class C>
__device__ Part part_of(Product<A, B, C>& p) {
  Part part{static_cast<int64_t>(blockIdx.x) * tile_rows, p.rows, 0, p.depth};
  if (p.offsets && p.by_depth) {
    part.first_depth = p.offsets[blockIdx.z], part.end_depth = p.offsets[blockIdx.z + 1];
    p.c += blockIdx.z * p.c_batch;
  } else if (p.offsets) {
    const ExpertTile tile = find_tile(p.offsets, p.experts, tile_rows, static_cast<int>(blockIdx.x));
    part.first_row = tile.begin, part.end_row = tile.end;
    p.b += tile.expert * p.b_batch;
  } else if (p.part_depth > 0) {
    part.first_depth = blockIdx.z * p.part_depth;
    part.end_depth = min(part.first_depth + p.part_depth, p.depth);
    p.c += blockIdx.z * p.c_batch;
  } else {
    p.a += blockIdx.z * p.a_batch, p.b += blockIdx.z * p.b_batch, p.c += blockIdx.z * p.c_batch;
  }
  return part;
}

template <class A, class B, class C>
__device__ float bias_at(const Product<A, B, C>& p, int64_t column) {
  return p.exact_bias ? static_cast<const float*>(p.bias)[column]
                      : widen(static_cast<const B*>(p.bias)[column]);
}

// out [rows, columns] (+)= the sum of parts [count, rows, columns], in order.
void sum_parts(const float* parts, int count, int64_t rows, int64_t columns, float* out, int64_t out_row,
               bool accumulate, const char* name, const Context& context);

}  // namespace latente::cuda
