// What the kernels of expanded attention's gradient on Hopper share.
#pragma once

#include <algorithm>
#include <climits>

#include "cuda/attention_sm90.h"
#include "cuda/hopper.cuh"

namespace latente::cuda {

constexpr int block_rows = 64;
constexpr int block_bytes = block_rows * 128;  // of a tile of 64 columns
constexpr int most_blocks = 1 << 14;           // of block_rows tokens

template <int stages>
struct Stage {
  int index = 0, phase = 0;
  __device__ void next() {
    if (++index == stages) index = 0, phase ^= 1;
  }
  __device__ int before() const { return index > 0 ? index - 1 : stages - 1; }
};

struct Maps {
  CUtensorMap q, k, rope, v, d_out;
};

using Gradient = Backward<__nv_bfloat16>;

// Rows of keys: their own columns, then the shared rotary ones.
__device__ inline void copy_keys(char* to, int tile, int tiles, const Maps& maps, int nope_tiles,
                                 Barrier& done, int row, int group) {
  for (int j = 0; j < tiles; ++j) {
    const bool rope = j >= nope_tiles;
    copy_tile(to + j * tile, rope ? &maps.rope : &maps.k, done, (rope ? j - nope_tiles : j) * tile_columns,
              row, rope ? 0 : group);
  }
}

// [64, 64] products of the rows from `row` of the owned tiles and of the walked ones.
template <int steps, int own_bytes>
__device__ void begin_product(float (&d)[32], const char* own, const char* walked) {
#pragma unroll
  for (int step = 0; step < steps; ++step) {
    wgmma<0>(d, rows_operand(own + step / 4 * own_bytes + step % 4 * 32),
             rows_operand(walked + step / 4 * block_bytes + step % 4 * 32), step > 0);
  }
}
// sum (+)= p · walked rows
template <int registers>
__device__ void begin_sum(float (&sum)[registers], const uint32_t (&p)[16], const char* walked, bool add) {
  const uint64_t operand = columns_operand(walked, block_bytes);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const uint32_t a[4] = {p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3]};
    wgmma<1>(sum, a, operand + step * columns_step, step > 0 || add);
  }
}
__device__ inline void pack(const float (&x)[32], uint32_t (&p)[16]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) p[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
}

__device__ inline float2 two_of(const float* x, int i) { return *reinterpret_cast<const float2*>(x + i); }

inline CUtensorMap map_of(const Rows<const __nv_bfloat16>& x, int64_t tokens, int width, int64_t heads,
                          int rows) {
  return tile_map(x.data, width, tokens, x.token, heads, heads > 1 ? x.head : x.token, rows);
}
inline Maps maps_of(const Gradient& b, int query_rows, int key_rows) {
  const Expanded<__nv_bfloat16>& a = b.forward;
  const CUtensorMap k = map_of(a.k, a.tokens, a.nope, a.groups, key_rows);
  return {map_of(a.q, a.tokens, a.nope + a.rope, a.heads, query_rows), k,
          a.rope ? map_of(a.k_rope, a.tokens, a.rope, 1, key_rows) : k,
          map_of(a.v, a.tokens, a.value, a.groups, key_rows),
          map_of(b.d_out, a.tokens, a.value, a.heads, query_rows)};
}

// Numbers of scratch that attention_backward_kept_sm90 takes.
inline int64_t kept_numbers(int64_t blocks) { return blocks + 1 + 2 * ceil_div(blocks, 2); }

// The gradient where those of scores are kept between two kernels, so that scores are computed once. Whether
// that is all: false for widths that it has no kernels for, where the workspace is too small, and where the
// device has yet to find whether it is large enough; then the rest is to run under the condition.
// ranges: the lowest and the highest start in each block of tokens; before [kept_numbers(blocks)] is scratch.
bool attention_backward_kept_sm90(const Gradient& b, const GradRows& d_k_rope, const int2* ranges,
                                  int* before, const Context& context, Condition& otherwise);

}  // namespace latente::cuda
