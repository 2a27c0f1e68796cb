// Products of bfloat16 on tensor cores, for compute capability 8.0 and later: tiles arrive in shared memory
// by asynchronous copies while those before them are multiplied. An element is one chain of m16n8k16 steps in
// rising depth, in every tile shape: its bits do not depend on how many rows there are.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/product.cuh"

namespace latente::cuda::mma {

constexpr int step = 64;  // of the depth: a stage
constexpr int chunk = 8;  // elements of a 16-byte copy

// A stage of an operand in shared memory: rows × step elements, chunk by chunk along whichever axis is
// contiguous in memory. Chunks are shuffled so that the eight rows of a matrix lie in different banks.
template <int rows, bool by_depth>
struct Tile {
  static constexpr int chunks = by_depth ? step / chunk : rows / chunk;  // of a line
  static constexpr int lines = by_depth ? rows : step;
  static constexpr int bytes = rows * step * 2;
  static_assert(chunks >= 8);

  __device__ static unsigned offset(int line, int at) {
    return static_cast<unsigned>((line * chunks + (at ^ (line & 7))) * 16);
  }
};

template <int tile_rows, int tile_columns, int warp_rows, int warp_columns, int stage_count>
struct Shape {
  static constexpr int rows = tile_rows, columns = tile_columns, stages = stage_count;
  static constexpr int m = tile_rows / warp_rows, n = tile_columns / warp_columns;  // of a warp
  static constexpr int threads = warp_rows * warp_columns * warp_size;
};
using Large = Shape<128, 128, 2, 4, 3>;
using Small = Shape<16, 64, 1, 4, 6>;  // few rows: decoding

template <class S, bool a_by_depth, bool b_by_depth, class C>
__global__ __launch_bounds__(S::threads) void product_kernel(Product<bf16, bf16, C> p) {
  using ATile = Tile<S::rows, a_by_depth>;
  using BTile = Tile<S::columns, b_by_depth>;
  extern __shared__ __align__(128) char memory[];
  const auto [first_row, end_row, first_depth, end_depth] = part_of<S::rows>(p);
  if (first_row >= end_row) return;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % warp_size, warp = thread / warp_size;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * S::columns;
  const unsigned a_memory = shared_address(memory), b_memory = a_memory + S::stages * ATile::bytes;

  // Each thread copies the same chunks of every stage.
  auto load = [&](int stage, int64_t base) {
    constexpr int a_chunks = ATile::lines * ATile::chunks, b_chunks = BTile::lines * BTile::chunks;
#pragma unroll
    for (int first = 0; first < a_chunks; first += S::threads) {
      const int i = first + thread, line = i / ATile::chunks, at = i % ATile::chunks;
      if (a_chunks % S::threads != 0 && i >= a_chunks) break;
      const int64_t row = first_row + (a_by_depth ? line : at * chunk);
      const int64_t depth = base + (a_by_depth ? at * chunk : line);
      const bool inside = row < end_row && depth < end_depth;
      const int64_t from = inside && p.gather && !p.by_depth ? p.gather[row] : row;
      const bf16* source = inside ? p.a + from * p.a_row + depth * p.a_depth : p.a;
      copy_async(a_memory + stage * ATile::bytes + ATile::offset(line, at), source, inside);
    }
#pragma unroll
    for (int first = 0; first < b_chunks; first += S::threads) {
      const int i = first + thread, line = i / BTile::chunks, at = i % BTile::chunks;
      if (b_chunks % S::threads != 0 && i >= b_chunks) break;
      const int64_t column = first_column + (b_by_depth ? line : at * chunk);
      const int64_t depth = base + (b_by_depth ? at * chunk : line);
      const bool inside = column < p.columns && depth < end_depth;
      const int64_t from = inside && p.gather && p.by_depth ? p.gather[depth] : depth;
      const bf16* source = inside ? p.b + column * p.b_row + from * p.b_depth : p.b;
      copy_async(b_memory + stage * BTile::bytes + BTile::offset(line, at), source, inside);
    }
    commit();
  };

  constexpr int warp_columns = S::columns / S::n;
  const int warp_row = warp / warp_columns * S::m, warp_column = warp % warp_columns * S::n;
  constexpr int ms = S::m / 16, ns = S::n / 16;
  float sums[ms][ns][2][4] = {};

  for (int stage = 0; stage < S::stages - 1; ++stage) load(stage, first_depth + stage * step);
  int stage = 0;
  for (int64_t base = first_depth; base < end_depth; base += step) {
    wait<S::stages - 2>();
    __syncthreads();
    load((stage + S::stages - 1) % S::stages, base + (S::stages - 1) * step);
    const unsigned a_stage = a_memory + stage * ATile::bytes, b_stage = b_memory + stage * BTile::bytes;
    const int matrix = lane / 8, r = lane % 8;
#pragma unroll
    for (int k = 0; k < step / 16; ++k) {
      unsigned a[ms][4], b[ns][4];
#pragma unroll
      for (int i = 0; i < ms; ++i) {  // matrices: rows 0-7 and 8-15, then the next 8 of the depth
        const int row = warp_row + i * 16;
        const int line = a_by_depth ? row + matrix % 2 * 8 + r : k * 16 + matrix / 2 * 8 + r;
        const int at = a_by_depth ? k * 2 + matrix / 2 : row / 8 + matrix % 2;
        load_matrices<!a_by_depth>(a[i], a_stage + ATile::offset(line, at));
      }
#pragma unroll
      for (int j = 0; j < ns; ++j) {  // matrices: depth 0-7 and 8-15, then the next 8 columns
        const int column = warp_column + j * 16;
        const int line = b_by_depth ? column + matrix / 2 * 8 + r : k * 16 + matrix % 2 * 8 + r;
        const int at = b_by_depth ? k * 2 + matrix % 2 : column / 8 + matrix / 2;
        load_matrices<!b_by_depth>(b[j], b_stage + BTile::offset(line, at));
      }
#pragma unroll
      for (int i = 0; i < ms; ++i) {
#pragma unroll
        for (int j = 0; j < ns; ++j) {
          multiply(sums[i][j][0], a[i], b[j][0], b[j][1]);
          multiply(sums[i][j][1], a[i], b[j][2], b[j][3]);
        }
      }
    }
    stage = (stage + 1) % S::stages;
  }
  wait<0>();

#pragma unroll
  for (int i = 0; i < ms; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row + warp_row + i * 16 + half * 8 + lane / 4;
      if (row >= end_row) continue;
#pragma unroll
      for (int j = 0; j < ns * 2; ++j) {
        const int64_t column = first_column + warp_column + j * 8 + lane % 4 * 2;
        if (column >= p.columns) continue;
        float two[2] = {sums[i][j / 2][j % 2][half * 2], sums[i][j / 2][j % 2][half * 2 + 1]};
        if (p.bias) two[0] += bias_at(p, column), two[1] += bias_at(p, column + 1);
        put<2>(p.accumulate, two, p.c + row * p.c_row + column);
      }
    }
  }
}

// Copies are of whole chunks, results of pairs.
template <class C>
bool fits(const Product<bf16, bf16, C>& p) {
  auto aligned = [](const void* pointer, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
  };
  const bool a_by_depth = p.a_depth == 1, b_by_depth = p.b_depth == 1;
  const int64_t a_line = a_by_depth ? p.a_row : p.a_depth, b_line = b_by_depth ? p.b_row : p.b_depth;
  const bool whole = (!(a_by_depth || b_by_depth) || p.depth % chunk == 0) &&
                     (a_by_depth || p.rows % chunk == 0) && p.columns % chunk == 0;
  const bool supported = a_by_depth ? (b_by_depth || p.b_row == 1) : (p.a_row == 1 && p.b_row == 1);
  return whole && supported && aligned(p.a, 16) && aligned(p.b, 16) && a_line % chunk == 0 &&
         b_line % chunk == 0 && p.a_batch % chunk == 0 && p.b_batch % chunk == 0 &&
         aligned(p.c, 2 * sizeof(C)) && p.c_row % 2 == 0 && p.c_batch % 2 == 0;
}

template <class S, bool a_by_depth, bool b_by_depth, class C, class GridOf>
void launch_shape(const Product<bf16, bf16, C>& p, const GridOf& grid_of, const char* name,
                  const Context& context) {
  auto kernel = product_kernel<S, a_by_depth, b_by_depth, C>;
  constexpr int bytes = S::stages * (S::rows + S::columns) * step * 2;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  check(allowed, name);
  kernel<<<grid_of(S::rows, S::columns), S::threads, bytes, context.stream>>>(p);
  check_launch(name);
}

// grid_of(rows, columns) of a tile; `rows` of a in all.
template <class C, class GridOf>
void launch(const Product<bf16, bf16, C>& p, int64_t rows, const GridOf& grid_of, const char* name,
            const Context& context) {
  if (p.a_depth != 1) return launch_shape<Large, false, false>(p, grid_of, name, context);
  if (p.b_depth != 1) return launch_shape<Large, true, false>(p, grid_of, name, context);
  const int64_t rows_a_group = p.offsets ? rows / p.experts : rows;
  if (rows_a_group <= 32) return launch_shape<Small, true, true>(p, grid_of, name, context);
  launch_shape<Large, true, true>(p, grid_of, name, context);
}

}  // namespace latente::cuda::mma
