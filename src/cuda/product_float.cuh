// Products in float32. An element is one chain over the depth, or in rows as many chains as a warp has lanes,
// whatever tile or kernel it falls to.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/product.cuh"

namespace latente::cuda {

// A thread has 8 rows and 4 · Groups columns.
template <int Rows, int Groups>
struct FloatTile {
  static constexpr int rows = Rows, columns = 128, depth = 16, groups = Groups;
  static constexpr int across = columns / (4 * Groups), threads = rows / 8 * across;
};

// Operands of any types and strides.
template <class K, class A, class B, class C>
__global__ __launch_bounds__(K::threads) void product_kernel(Product<A, B, C> p) {
  __shared__ __align__(16) float a_tile[K::depth][K::rows + 4], b_tile[K::depth][K::columns + 4];
  const auto [first_row, end_row, first_depth, end_depth] = part_of<K::rows>(p);
  if (first_row >= end_row) return;
  const int thread = static_cast<int>(threadIdx.x), x = thread % K::across, y = thread / K::across;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * K::columns;
  float sums[8][K::groups][4] = {};
  // The next step's elements arrive in registers while this one's are multiplied: read wherever the nearest
  // one is, so that no branch stands between the reads. Neighbouring threads read along the contiguous axis.
  float a_next[K::depth * K::rows / K::threads], b_next[K::depth * K::columns / K::threads];
  const bool a_along = p.a_depth == 1, b_along = p.b_depth == 1;
  const auto a_place = [&](int at) { return a_along ? at / K::depth : at % K::rows; };
  const auto a_step = [&](int at) { return a_along ? at % K::depth : at / K::rows; };
  const auto b_place = [&](int at) { return b_along ? at / K::depth : at % K::columns; };
  const auto b_step = [&](int at) { return b_along ? at % K::depth : at / K::columns; };
  const auto read = [&](int64_t base) {
#pragma unroll
    for (int i = 0; i < K::depth * K::rows / K::threads; ++i) {
      const int at = i * K::threads + thread;
      const int64_t row = min(first_row + a_place(at), end_row - 1), k = base + a_step(at);
      const int64_t from = p.gather && !p.by_depth ? p.gather[row] : row;
      const float value = widen(p.a[from * p.a_row + min(k, end_depth - 1) * p.a_depth]);
      a_next[i] = k < end_depth ? value : 0;
    }
#pragma unroll
    for (int i = 0; i < K::depth * K::columns / K::threads; ++i) {
      const int at = i * K::threads + thread;
      const int64_t column = min(first_column + b_place(at), p.columns - 1), k = base + b_step(at);
      const int64_t inside = min(k, end_depth - 1);
      const int64_t from = p.gather && p.by_depth ? p.gather[inside] : inside;
      const float value = widen(p.b[column * p.b_row + from * p.b_depth]);
      b_next[i] = k < end_depth ? value : 0;
    }
  };
  if (first_depth < end_depth) read(first_depth);
  for (int64_t base = first_depth; base < end_depth; base += K::depth) {
#pragma unroll
    for (int i = 0; i < K::depth * K::rows / K::threads; ++i) {
      const int at = i * K::threads + thread;
      a_tile[a_step(at)][a_place(at)] = a_next[i];
    }
#pragma unroll
    for (int i = 0; i < K::depth * K::columns / K::threads; ++i) {
      const int at = i * K::threads + thread;
      b_tile[b_step(at)][b_place(at)] = b_next[i];
    }
    __syncthreads();
    if (base + K::depth < end_depth) read(base + K::depth);
#pragma unroll
    for (int k = 0; k < K::depth; ++k) {
      float a[2][4], b[K::groups][4];
      for (int i = 0; i < 2; ++i) load<4>(a_tile[k] + y * 8 + i * 4, a[i]);
      for (int g = 0; g < K::groups; ++g) load<4>(b_tile[k] + (g * K::across + x) * 4, b[g]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        for (int j = 0; j < 4 * K::groups; ++j)
          sums[i][j / 4][j % 4] = fmaf(a[i / 4][i % 4], b[j / 4][j % 4], sums[i][j / 4][j % 4]);
      }
    }
    __syncthreads();
  }
  const bool packs = p.c_row % 4 == 0 && reinterpret_cast<uintptr_t>(p.c) % (4 * sizeof(C)) == 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t row = first_row + y * 8 + i;
    if (row >= end_row) break;
#pragma unroll
    for (int g = 0; g < K::groups; ++g) {
      const int64_t column = first_column + (g * K::across + x) * 4;
      const int count = static_cast<int>(min(int64_t{4}, p.columns - column));
      float(&four)[4] = sums[i][g];
      C* to = p.c + row * p.c_row + column;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (p.bias && j < count) four[j] += bias_at(p, column + j);
      }
      if (packs && count == 4) {
        put<4>(p.accumulate, four, to);
        continue;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j < count) to[j] = narrow<C>(p.accumulate ? widen(to[j]) + four[j] : four[j]);
      }
    }
  }
}

// For few columns of float32, as of routers. A block a row, or some columns of one: its warps take the
// columns in turn, lanes share the depth.
constexpr int row_threads = 256, row_warps = row_threads / warp_size;
constexpr int64_t most_row_columns = 256, most_row_depth = 8192;
template <class A>
__global__ __launch_bounds__(row_threads) void row_kernel(Product<A, float, float> p) {
  extern __shared__ __align__(16) float row[];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % warp_size,
            depth = static_cast<int>(p.depth);
  const int64_t first = static_cast<int64_t>(blockIdx.y) * row_warps + thread / warp_size;
  if (first < p.columns) {
    for (int k = lane * 32; k < depth; k += warp_size * 32)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(p.b + first * p.b_row + k));
  }
  wait_for_earlier_kernels();
  for (int k = thread * 4; k < depth; k += row_threads * 4) {
    float x[4];
    load<4>(p.a + blockIdx.x * p.a_row + k, x);
    store<4>(x, row + k);
  }
  __syncthreads();
#pragma unroll 4
  for (int64_t column = first; column < p.columns; column += static_cast<int64_t>(gridDim.y) * row_warps) {
    float sum = 0;
    for (int k = lane * 4; k < depth; k += warp_size * 4) {
      float x[4], w[4];
      load<4>(row + k, x);
      load<4>(p.b + column * p.b_row + k, w);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum = fmaf(x[j], w[j], sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) p.c[blockIdx.x * p.c_row + column] = sum;
  }
}

// Lanes trade halves of what they have until each has its share of the sums whole, in the order of
// warp_sum().
template <int half, int distance, int count>
__device__ void trade_halves(float (&sums)[count], int lane) {
  const bool high = lane & distance;
#pragma unroll
  for (int i = 0; i < half; ++i) {
    const float other = __shfl_xor_sync(whole_warp, high ? sums[i] : sums[i + half], distance);
    sums[i] = (high ? sums[i + half] : sums[i]) + other;
  }
  if constexpr (distance > 1) trade_halves<half / 2, distance / 2>(sums, lane);
}

// The same sums in the same order for many rows: a warp has 4 rows and 16 columns at once, whose weights the
// block keeps in shared memory, some of the depth at a time.
constexpr int warp_rows = 4, column_tile = 16, row_tile = warp_rows * row_warps, row_chunk = 512;
constexpr int64_t enough_row_tiles = 16;
template <class A>
__global__ __launch_bounds__(row_threads, 2) void many_rows_kernel(Product<A, float, float> p) {
  __shared__ __align__(16) float w[column_tile][row_chunk];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % warp_size;
  const int depth = static_cast<int>(p.depth), columns = static_cast<int>(p.columns);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * row_tile + thread / warp_size * warp_rows;
  const int first_column = static_cast<int>(blockIdx.y) * column_tile;
  const A* rows[warp_rows];
#pragma unroll
  for (int r = 0; r < warp_rows; ++r) rows[r] = p.a + min(first_row + r, p.rows - 1) * p.a_row;
  float sums[warp_rows * column_tile] = {};
  wait_for_earlier_kernels();
  for (int base = 0; base < depth; base += row_chunk) {
    __syncthreads();
#pragma unroll
    for (int at = thread * 4; at < column_tile * row_chunk; at += row_threads * 4) {
      const int column = at / row_chunk, k = at % row_chunk;
      float four[4] = {};
      if (first_column + column < columns && base + k < depth)
        load<4>(p.b + (first_column + column) * p.b_row + base + k, four);
      store<4>(four, w[column] + k);
    }
    __syncthreads();
#pragma unroll 1
    for (int k = lane * 4; k < row_chunk; k += warp_size * 4) {
      // Beyond the depth weights are zeros.
      const int at = min(base + k, depth - 4);
      float x[warp_rows][4];
#pragma unroll
      for (int r = 0; r < warp_rows; ++r) load<4>(rows[r] + at, x[r]);
#pragma unroll
      for (int column = 0; column < column_tile; ++column) {
        float four[4];
        load<4>(w[column] + k, four);
#pragma unroll
        for (int r = 0; r < warp_rows; ++r) {
          float& sum = sums[r * column_tile + column];
          for (int j = 0; j < 4; ++j) sum = fmaf(x[r][j], four[j], sum);
        }
      }
    }
  }
  trade_halves<warp_rows * column_tile / 2, warp_size / 2>(sums, lane);
  const int64_t row = first_row + lane * 2 / column_tile;
  const int column = first_column + lane * 2 % column_tile;
  if (row >= p.rows) return;
  if (column < columns) p.c[row * p.c_row + column] = sums[0];
  if (column + 1 < columns) p.c[row * p.c_row + column + 1] = sums[1];
}

}  // namespace latente::cuda
