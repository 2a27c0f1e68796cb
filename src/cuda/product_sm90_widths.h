// How wide tiles of Hopper's products are best, from the time they take.
#pragma once

#include "cuda/product_sm90_tiles.cuh"

namespace latente::cuda::sm90 {

inline int64_t quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t tiles_of(const HopperProduct& p, int width) {
  const bool grouped_rows = p.offsets && !p.by_depth;
  const bool packed = p.pair == Pair::rows && p.a_scales;  // sixty-fours of rows, two a tile
  const int64_t row_tiles =
      packed ? quotient(p.rows, tile_rows / 2)
             : quotient(p.rows, tile_rows) + (grouped_rows ? std::min<int64_t>(p.experts, p.rows) : 0);
  const int64_t batches = p.offsets && p.by_depth ? p.experts
                          : p.part_depth          ? quotient(p.depth, p.part_depth)
                                                  : p.batches;
  return row_tiles * quotient(p.columns, p.pair == Pair::gated ? width / 2 : width) * batches *
         (p.pair == Pair::rows && !packed ? 2 : 1);
}

// The clocks that a tile of so much depth takes, about: a step is multiplied in 4 clocks a column, while the
// next one arrives at some 60 bytes a clock; results are written.
inline int64_t tile_clocks(int64_t rows, int64_t depth, int width) {
  const int64_t arrive = (std::min<int64_t>(rows, tile_rows) + width) * 128 / 60;
  return quotient(depth, step) * (std::max<int64_t>(4 * width, arrive) + 40) + 2 * width + 800;
}

inline int best_width(const HopperProduct& p, std::initializer_list<int> widths, const Context& context) {
  const bool experts_depth = p.offsets && p.by_depth;
  const int64_t depth = (experts_depth  ? p.depth / p.experts
                         : p.part_depth ? p.part_depth
                                        : p.depth) *
                        (p.pair == Pair::depths ? 2 : 1);
  int best = 256;
  int64_t least = INT64_MAX;
  for (const int width : widths) {
    if (width == 64 && !p.b_by_depth) break;
    if (width == 192 && p.pair == Pair::gated) continue;
    const int64_t clocks = tile_clocks(p.rows, depth, width), tiles = tiles_of(p, width);
    const int64_t machine = context.multiprocessors;
    // Depths of experts differ: the last tile may be one of the deepest.
    const int64_t all =
        experts_depth ? tiles * clocks / machine + 3 * clocks : quotient(tiles, machine) * clocks;
    if (all < least) least = all, best = width;
  }
  return best;
}

}  // namespace latente::cuda::sm90
