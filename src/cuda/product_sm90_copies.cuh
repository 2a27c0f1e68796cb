// Operands of Hopper's products on their way into shared memory: by the copy engine, or where rows are
// gathered by the threads of a warpgroup.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/product_sm90_tiles.cuh"

namespace latente::cuda::sm90 {

// Rows that are gathered: threads thread / 8 take every sixteenth, eight of them 128 bytes of a row. Which
// rows come next is read ahead.
template <int count>
struct GatheredRows {
  const HopperProduct& p;
  int thread;
  int index[count], next[count];  // below 0: none

  __device__ void read(int first, int end) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int row = first + i * 16 + thread / 8;
      next[i] = row < end ? p.gather[row] : -1;
    }
  }
  __device__ void advance() {
#pragma unroll
    for (int i = 0; i < count; ++i) index[i] = next[i];
  }
  // Columns column .. column + 64 of x, whose rows lie `line` apart and have `columns`.
  __device__ void copy(const void* x, int64_t line, int column, int64_t columns, uint32_t to) const {
    const int at = column + thread % 8 * 8;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int row = i * 16 + thread / 8;
      const bool inside = index[i] >= 0 && at < columns;
      const bf16* from = static_cast<const bf16*>(x) + (inside ? index[i] * line + at : 0);
      mma::copy_async(to + row * 128 + ((thread % 8 ^ row % 8) << 4), from, inside);
    }
  }
};

template <class K>
__device__ void copy_a(const HopperProduct& p, const Maps& maps, const Tiles& t, char* a, Barrier& full,
                       int depth) {
  if (K::a_by_depth) {
    const bool other = depth >= t.other_depth;
    copy_tile(a, other ? &maps.other_a : &maps.a, full, other ? depth - t.other_depth : depth, t.row,
              p.offsets ? 0 : t.outer());
  } else {
    const CUtensorMap* map = t.other ? &maps.other_a : &maps.a;
    for (int i = 0; i < 2; ++i) copy_tile(a + i * square_bytes, map, full, t.row + i * 64, depth, 0);
  }
}
template <class K>
__device__ void copy_b(const Maps& maps, const Tiles& t, char* b, Barrier& full, int depth) {
  if (K::b_by_depth) {
    copy_tile(b, &maps.b, full, depth, t.column, t.outer());
    if (K::gated) copy_tile(b + K::own_columns * 128, &maps.other_b, full, depth, t.column, t.outer());
  } else {
    const bool other = depth >= t.other_depth;
    const int from = other ? depth - t.other_depth : depth;
    for (int i = 0; i < K::columns / 64; ++i) {
      copy_tile(b + i * square_bytes, other ? &maps.other_b : &maps.b, full, t.column + i * 64, from,
                t.outer());
    }
  }
}

template <class K>
__device__ void copy_tiles(const HopperProduct& p, const Maps& maps, Shared& s, char* memory) {
  Tiles t(p, s, K::own_columns);
  Stage<K::stages> stage;
  Turn turn(p, s);
  for (; turn.tile < t.count; turn.advance()) {
    turn.ask();
    t.find(turn.tile, K::own_columns);
    for (int depth = t.first_depth; depth < t.end_depth; depth += step) {
      s.empty[stage.index].wait(stage.phase ^ 1);
      char* a = memory + stage.index * K::stage_bytes;
      s.full[stage.index].expect(K::stage_bytes);
      copy_a<K>(p, maps, t, a, s.full[stage.index], depth);
      copy_b<K>(maps, t, a + K::a_bytes, s.full[stage.index], depth);
      stage.next();
    }
    turn.tell();
  }
  turn.end();
}

// The same by all threads of the warpgroup, where rows of a, or by depth of b, are gathered.
template <class K>
__device__ void copy_gathered_tiles(const HopperProduct& p, const Maps& maps, Shared& s, char* memory) {
  constexpr bool by_depth = !K::a_by_depth;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  Tiles t(p, s, K::own_columns);
  Stage<K::stages> stage;
  GatheredRows<by_depth ? 4 : 8> rows{p, thread};
  // Rows of a are read a tile ahead, which is then known: those tiles are taken in turn.
  Turn turn(p, s);
  const int apart = static_cast<int>(gridDim.x);
  if (turn.tile < t.count) t.find(turn.tile, K::own_columns);
  if (!by_depth) rows.read(t.row, t.end_row);
  while (turn.tile < t.count) {
    if (by_depth) {
      if (thread == 0) turn.ask();
      t.find(turn.tile, K::own_columns);
    }
    const Tiles here = t;
    if (!by_depth && turn.tile + apart < t.count) t.find(turn.tile + apart, K::own_columns);
    if (by_depth) {
      rows.read(here.first_depth, here.end_depth);
    } else {
      rows.advance();
      rows.read(t.row, t.end_row);
    }
    for (int depth = here.first_depth; depth < here.end_depth; depth += step) {
      if (by_depth) {
        rows.advance();
        rows.read(depth + step, here.end_depth);
      }
      s.empty[stage.index].wait(stage.phase ^ 1);
      char* a = memory + stage.index * K::stage_bytes;
      char* b = a + K::a_bytes;
      Barrier& full = s.full[stage.index];
      if (thread == 0) {
        full.expect(by_depth ? K::a_bytes : K::b_bytes);
        if (by_depth) {
          copy_a<K>(p, maps, here, a, full, depth);
        } else {
          copy_b<K>(maps, here, b, full, depth);
        }
      }
      if (by_depth) {
        for (int i = 0; i < K::columns / 64; ++i) {
          rows.copy(p.b, p.b_line, here.column + i * 64, p.columns, shared_address(b) + i * square_bytes);
        }
      } else {
        rows.copy(p.a, p.a_line, depth, p.depth, shared_address(a));
      }
      full.arrive_after_copies();
      stage.next();
    }
    if (thread == 0) turn.tell();
    turn.hear();
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  if (thread == 0) turn.end();
}

// Rows of the depth from `first` on become zeros: they are another expert's.
template <class K>
__device__ void clear_depth(char* a, int first, int group, int thread) {
  const int4 zeros{};
  for (int i = first * 8 + thread; i < 64 * 8; i += 128) {
    reinterpret_cast<int4*>(a + group * square_bytes)[i] = zeros;
    for (int tile = group; tile < K::columns / 64; tile += 2) {
      reinterpret_cast<int4*>(a + K::a_bytes + tile * square_bytes)[i] = zeros;
    }
  }
  fence_shared_writes();
  sync_threads(1, 256);
}

}  // namespace latente::cuda::sm90
