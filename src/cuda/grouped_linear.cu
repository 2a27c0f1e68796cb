#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/runtime.h"

namespace latente::cuda {
namespace {

constexpr unsigned whole_warp = 0xffffffffu;
constexpr int tile_rows = 64, tile_columns = 64, tile_depth = 16;
constexpr int side = 16;              // threads: side × side
constexpr int each = 64 / side;       // a thread computes each × each elements, `side` apart
constexpr int pitch = tile_rows + 2;  // of a tile in shared memory: lanes of a warp store to different banks
static_assert(tile_rows == tile_columns && tile_depth == side);

template <class T, class W>
struct Operands {
  const T* x;
  int64_t x_stride;
  const int32_t* rows;  // or null
  const int32_t* offsets;
  const W* w;
  int64_t w_expert_stride, w_stride;
  T* out;
  int64_t out_stride;
  int experts, depth, columns;
};

template <class T>
__device__ T widen(T weight) {
  return weight;
}
__device__ float widen(bf16 weight) { return __uint_as_float(static_cast<unsigned>(weight.bits) << 16); }

struct Tile {
  int expert, begin,
      end;  // sorted rows begin..end, all of one expert; end = begin when there is no such tile
};

// Experts' rows are cut into tiles of tile_rows, expert after expert; finds the `index`th. All lanes of a
// warp call it and get the same answer.
__device__ Tile find_tile(const int32_t* offsets, int experts, int index) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int before = 0;  // tiles of the experts below `base`
  for (int base = 0; base < experts; base += 32) {
    const int expert = base + lane;
    const int first = expert < experts ? offsets[expert] : 0;
    const int last = expert < experts ? offsets[expert + 1] : 0;
    const int tiles = (last - first + tile_rows - 1) / tile_rows;
    int through = tiles;  // tiles of the experts base..expert
    for (int step = 1; step < 32; step *= 2) {
      const int lower = __shfl_up_sync(whole_warp, through, step);
      if (lane >= step) through += lower;
    }
    const unsigned past = __ballot_sync(whole_warp, before + through > index);
    if (past) {
      const int owner = __ffs(static_cast<int>(past)) - 1;
      const int begin = first + (index - before - (through - tiles)) * tile_rows;
      const int found = __shfl_sync(whole_warp, begin, owner);
      return {base + owner, found, min(found + tile_rows, __shfl_sync(whole_warp, last, owner))};
    }
    before += __shfl_sync(whole_warp, through, 31);
  }
  return {0, 0, 0};
}

// The host knows how many tiles there can be at most, not which experts they belong to: a block finds its own
// from the offsets, and those past the last tile leave at once. An element's sum runs over the depth in
// order, whatever tile it falls in.
template <class T, class W>
__global__ __launch_bounds__(side* side) void grouped_linear_kernel(Operands<T, W> p) {
  __shared__ T x_tile[tile_depth][pitch];
  __shared__ T w_tile[tile_depth][pitch];
  const Tile tile = find_tile(p.offsets, p.experts, static_cast<int>(blockIdx.x));
  if (tile.begin == tile.end) return;

  const int thread = static_cast<int>(threadIdx.x);
  const int column_of_thread = thread % side, row_of_thread = thread / side;
  const int first_column = static_cast<int>(blockIdx.y) * tile_columns;
  const W* w = p.w + tile.expert * p.w_expert_stride;

  const T* x_rows[each];  // the rows and columns this thread loads, null past the end
  const W* w_rows[each];
  for (int i = 0; i < each; ++i) {
    const int row = tile.begin + row_of_thread + i * side;
    const int column = first_column + row_of_thread + i * side;
    x_rows[i] = row < tile.end ? p.x + (p.rows ? p.rows[row] : row) * p.x_stride : nullptr;
    w_rows[i] = column < p.columns ? w + column * p.w_stride : nullptr;
  }

  T x_next[each], w_next[each];  // on their way while the tiles before them are multiplied
  auto load = [&](int base) {
    const int k = base + column_of_thread;
    for (int i = 0; i < each; ++i) {
      x_next[i] = x_rows[i] && k < p.depth ? x_rows[i][k] : T{0};
      w_next[i] = w_rows[i] && k < p.depth ? static_cast<T>(widen(w_rows[i][k])) : T{0};
    }
  };

  T sums[each][each] = {};
  load(0);
  for (int base = 0; base < p.depth; base += tile_depth) {
    for (int i = 0; i < each; ++i) {
      x_tile[column_of_thread][row_of_thread + i * side] = x_next[i];
      w_tile[column_of_thread][row_of_thread + i * side] = w_next[i];
    }
    __syncthreads();
    load(base + tile_depth);
#pragma unroll
    for (int d = 0; d < tile_depth; ++d) {
      T x[each], weight[each];
      for (int i = 0; i < each; ++i) x[i] = x_tile[d][row_of_thread + i * side];
      for (int j = 0; j < each; ++j) weight[j] = w_tile[d][column_of_thread + j * side];
      for (int i = 0; i < each; ++i) {
        for (int j = 0; j < each; ++j) sums[i][j] = fma(x[i], weight[j], sums[i][j]);
      }
    }
    __syncthreads();
  }

  for (int i = 0; i < each; ++i) {
    const int64_t row = tile.begin + row_of_thread + i * side;
    if (row >= tile.end) break;
    for (int j = 0; j < each; ++j) {
      const int column = first_column + column_of_thread + j * side;
      if (column < p.columns) p.out[row * p.out_stride + column] = sums[i][j];
    }
  }
}

template <class T, class W>
void launch(const View& x, const View& rows, const View& offsets, const View& w, const View& out,
            StreamHandle stream) {
  const int64_t experts = w[0], row_count = out[0];
  // Every expert with rows may end in a tile that is not full.
  const int64_t used = std::min(experts, row_count);
  const int64_t tiles = (row_count + used * (tile_rows - 1)) / tile_rows;
  const int64_t column_tiles = (w[1] + tile_columns - 1) / tile_columns;
  const Operands<T, W> operands{x.as<T>(),
                                x.stride(0),
                                rows.as_or_null<int32_t>(),
                                offsets.as<int32_t>(),
                                w.as<W>(),
                                w.stride(0),
                                w.stride(1),
                                out.as<T>(),
                                out.stride(0),
                                static_cast<int>(experts),
                                static_cast<int>(w[2]),
                                static_cast<int>(w[1])};
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(column_tiles));
  grouped_linear_kernel<T, W><<<grid, side * side, 0, stream>>>(operands);
  check_launch("grouped_linear");
}

}  // namespace

void grouped_linear(View x, View rows, View offsets, View w, View out, const Context& context) {
  LATENTE_ASSERT(offsets.count() == w[0] + 1 && x[1] == w[2] && out[1] == w[1]);
  LATENTE_ASSERT((rows ? rows.count() : x[0]) == out[0]);
  if (out.count() == 0) return;
  if (x.dtype == DType::f64) {
    launch<double, double>(x, rows, offsets, w, out, context.stream);
  } else if (w.dtype == DType::bf16) {
    launch<float, bf16>(x, rows, offsets, w, out, context.stream);
  } else {
    launch<float, float>(x, rows, offsets, w, out, context.stream);
  }
}

}  // namespace latente::cuda
