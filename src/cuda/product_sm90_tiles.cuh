// What the parts of Hopper's products share: sizes of tiles and stages, and which tile a block takes next.
#pragma once

#include "cuda/hopper.cuh"
#include "cuda/product.cuh"
#include "cuda/product_sm90.h"

namespace latente::cuda::sm90 {

constexpr int tile_rows = 128, step = 64, threads = 384, row_tiles_together = 16;
constexpr int square_bytes = 64 * 128;  // a tile of 64 rows
constexpr int most_stages = 8, most_experts = 512;

// Columns of a tile, stages, and tiles of 64 rows that each warpgroup's results leave through, in out_turns
// sets. Gated: half of the columns are the gate's, and the other half what stands at the same place beside
// it. Shallow: results take longer to write than to multiply, so more of them wait for it beside fewer
// stages.
template <int Columns, bool AByDepth, bool BByDepth, bool Gated = false, bool Shallow = false>
struct Config {
  static constexpr int columns = Columns, own_columns = Gated ? Columns / 2 : Columns;
  static constexpr int stages = Shallow ? 3 : Columns >= 192 ? 4 : Columns == 128 ? 6 : 8;
  static constexpr int out_tiles = Shallow ? 4 : Columns == 256 ? 2 : Columns / 64, out_turns = 1;
  static constexpr bool a_by_depth = AByDepth, b_by_depth = BByDepth, gated = Gated;
  static constexpr int a_bytes = tile_rows * 128, b_bytes = Columns * 128, stage_bytes = a_bytes + b_bytes;
  static constexpr int out = stages * stage_bytes, shared = out + 2 * out_tiles * square_bytes;
};

struct Maps {
  CUtensorMap a, b, c, other_a, other_b, other_c, inner, c_eights, other_c_eights, inner_eights;
};
constexpr int most_turns = 4;
// A tile as whoever copies found it, for those who multiply; none when there are no more.
struct alignas(16) Found {
  int row, end_row, column, batch, first_depth, end_depth, none, unused;
};
struct Shared {
  Barrier full[most_stages], empty[most_stages];
  Barrier told[most_turns], heard[most_turns];
  int turns[most_turns];  // the tiles that a block takes next
  Found found[most_turns];
  // Tiles of rows (or, grouped by depth in FP8, steps) of the experts before each, and of all; by depth, in
  // the upper bits, the experts in the order of their depths.
  unsigned tiles_before[most_experts + 1];
};
constexpr int order_bit = 23;
static_assert(most_experts <= 1 << (32 - order_bit));
template <int stages>
struct Stage {
  int index = 0, phase = 0;
  __device__ void next() {
    if (++index == stages) index = 0, phase ^= 1;
  }
};

// Which tile a block takes next, after its first: one thread that copies asks when it begins a tile, and
// tells the others when it has begun all of its copies.
class Turn {
 public:
  int tile = static_cast<int>(blockIdx.x);

  __device__ Turn(const HopperProduct& p, Shared& s) : p_(p), s_(s) {}

  __device__ static void init(Shared& s, int listening_warps) {
    for (int i = 0; i < most_turns; ++i) s.told[i].init(1), s.heard[i].init(listening_warps);
  }
  __device__ void ask() { next_ = p_.taken ? atomicAdd(p_.taken, 1) + static_cast<int>(gridDim.x) : 0; }
  __device__ void tell() {
    if (!p_.taken) return;
    s_.heard[at_.index].wait(at_.phase ^ 1);
    s_.turns[at_.index] = next_;
    s_.told[at_.index].arrive();
  }
  // By whoever tells.
  __device__ void advance() {
    tile = p_.taken ? next_ : tile + static_cast<int>(gridDim.x);
    at_.next();
  }
  // By whole warps that are told.
  __device__ void hear() {
    if (p_.taken) {
      s_.told[at_.index].wait(at_.phase);
      tile = s_.turns[at_.index];
      __syncwarp();
      if (threadIdx.x % warp_size == 0) s_.heard[at_.index].arrive();
    } else {
      tile += static_cast<int>(gridDim.x);
    }
    at_.next();
  }
  // By whoever asks, at the end: the last of all blocks leaves zeros.
  __device__ void end() const {
    if (!p_.taken) return;
    __threadfence();
    if (atomicAdd(p_.taken + 1, 1) == static_cast<int>(gridDim.x) - 1) p_.taken[0] = p_.taken[1] = 0;
  }

 private:
  const HopperProduct& p_;
  Shared& s_;
  Stage<most_turns> at_;
  int next_ = 0;
};

// The order of experts by depth, the greatest first. All threads of a block.
__device__ inline void sort_experts(const HopperProduct& p, unsigned* before) {
  if (!p.a_scales) {
    for (int e = static_cast<int>(threadIdx.x); e <= p.experts; e += threads) before[e] = 0;
  }
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < p.experts; e += threads) {
    const int depth = p.offsets[e + 1] - p.offsets[e];
    unsigned rank = 0;
    for (int other = 0; other < p.experts; ++other) {
      const int there = p.offsets[other + 1] - p.offsets[other];
      rank += there > depth || (there == depth && other < e);
    }
    before[rank] |= static_cast<unsigned>(e) << order_bit;
  }
}

// One warp.
__device__ inline void count_tiles(const HopperProduct& p, unsigned* before) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  int sum = 0;
  for (int base = 0; base < p.experts; base += warp_size) {
    const int expert = base + lane;
    const int rows = expert < p.experts ? p.offsets[expert + 1] - p.offsets[expert] : 0;
    const int tiles = (rows + tile_rows - 1) / tile_rows;
    int through = tiles;
    for (int distance = 1; distance < warp_size; distance *= 2) {
      const int lower = __shfl_up_sync(whole_warp, through, distance);
      if (lane >= distance) through += lower;
    }
    if (expert < p.experts) before[expert] = static_cast<unsigned>(sum + through - tiles);
    sum += __shfl_sync(whole_warp, through, warp_size - 1);
  }
  if (lane == 0) before[p.experts] = static_cast<unsigned>(sum);
}

// The tiles of a product in the order in which blocks take them: batch after batch, of each some tiles of
// rows with all columns, then the next ones, so that what is read together stays in the L2 cache.
struct Tiles {
  const HopperProduct& p;
  const unsigned* before;
  int row_tiles, column_tiles, count;
  int row = 0, end_row = 0, column = 0, batch = 0, first_depth = 0, end_depth = 0;
  bool other = false;         // Pair::rows: of the second product
  int other_depth = 1 << 30;  // Pair::depths: where that begins

  __device__ Tiles(const HopperProduct& product, const Shared& s, int width)
      : p(product), before(s.tiles_before) {
    column_tiles = static_cast<int>((p.columns + width - 1) / width);
    row_tiles = p.offsets && !p.by_depth ? static_cast<int>(before[p.experts])
                                         : static_cast<int>((p.rows + tile_rows - 1) / tile_rows);
    // In FP8 sixty-fours of rows of both follow one another, two a tile.
    if (p.pair == Pair::rows) row_tiles = p.a_scales ? static_cast<int>((p.rows + 63) / 64) : row_tiles * 2;
    const int batches = p.offsets      ? (p.by_depth ? p.experts : 1)
                        : p.part_depth ? static_cast<int>((p.depth + p.part_depth - 1) / p.part_depth)
                                       : p.batches;
    count = batches * row_tiles * column_tiles;
    end_row = static_cast<int>(p.rows), end_depth = static_cast<int>(p.depth);
    if (p.pair == Pair::depths) {
      other_depth = (end_depth + step - 1) / step * step;
      end_depth = 2 * other_depth;
    }
  }
  __device__ void find(int index, int width) {
    const int tiles = row_tiles * column_tiles;
    batch = index / tiles, index -= batch * tiles;
    const int together = row_tiles_together * column_tiles, in = index % together;
    const int first = index / together * row_tiles_together;
    const int here = min(row_tiles_together, row_tiles - first), tile = first + in % here;
    column = in / here * width;
    if (p.offsets && !p.by_depth) {
      int low = 0, high = p.experts - 1;
      while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (static_cast<int>(before[middle]) <= tile) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      batch = low;
      row = p.offsets[low] + (tile - static_cast<int>(before[low])) * tile_rows, end_row = p.offsets[low + 1];
      return;
    }
    other = p.pair == Pair::rows && !p.a_scales && tile >= row_tiles / 2;
    row = (other ? tile - row_tiles / 2 : tile) * tile_rows;
    if (p.offsets) {
      batch = static_cast<int>(before[batch] >> order_bit);
      // In FP8 each expert has whole steps.
      const auto steps = [&](int e) { return static_cast<int>(before[e] & ((1u << order_bit) - 1)) * step; };
      first_depth = p.a_scales ? steps(batch) : p.offsets[batch];
      end_depth = p.a_scales ? steps(batch + 1) : p.offsets[batch + 1];
    } else if (p.part_depth) {
      first_depth = static_cast<int>(batch * p.part_depth);
      end_depth = static_cast<int>(min(p.depth, first_depth + p.part_depth));
    }
  }
  // Where the tile is along the outer axes of operands and results.
  __device__ int outer() const { return (p.offsets && p.by_depth) || p.part_depth ? 0 : batch; }
  __device__ int64_t result() const { return p.offsets && !p.by_depth ? 0 : batch * p.c_batch; }
};

}  // namespace latente::cuda::sm90
