// Results of Hopper's products on their way out.
#pragma once

#include "cuda/product_sm90_tiles.cuh"

namespace latente::cuda::sm90 {

__device__ inline float bias_of(const HopperProduct& p, int column) {
  return p.exact_bias ? static_cast<const float*>(p.bias)[column]
                      : widen(static_cast<const bf16*>(p.bias)[column]);
}

// Lanes that differ in a bit exchange: the lower one's high for the higher one's low.
template <class T>
__device__ void exchange(T& low, T& high, int lane, int bit) {
  const T got = __shfl_xor_sync(whole_warp, lane & bit ? low : high, bit);
  (lane & bit ? low : high) = got;
}

__device__ inline void store_matrices(uint32_t to, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x[0]),
               "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

// Until the thread's stores, but for the last groups of them, have read shared memory.
template <int groups>
__device__ void stores_wait_but() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(groups) : "memory");
}

// The maps of what a product writes, in boxes of 64 rows, and of experts' last rows of eight.
inline void map_results(const HopperProduct& p, Maps& maps) {
  const bool grouped_rows = p.offsets && !p.by_depth;
  const int64_t outer = p.offsets      ? (p.by_depth ? p.experts : 1)
                        : p.part_depth ? (p.depth + p.part_depth - 1) / p.part_depth
                                       : p.batches;
  const auto map = [&](const void* c, CUtensorMap& to, CUtensorMap& eights) {
    if (!c) return;
    const auto map_of = [&](int box_rows) {
      return tile_map(c, p.columns, p.rows, p.c_row, outer, outer > 1 ? p.c_batch : p.c_row * p.rows,
                      box_rows, p.narrow);
    };
    to = map_of(64);
    if (grouped_rows) eights = map_of(8);
  };
  map(p.c, maps.c, maps.c_eights);
  map(p.other_c, maps.other_c, maps.other_c_eights);
  map(p.inner, maps.inner, maps.inner_eights);
}

struct Target {
  const CUtensorMap* map;
  const CUtensorMap* eights;
  void* c;
};

// One warpgroup's rows of a tile on their way out, some columns at a time: through tiles of 64 rows in shared
// memory, which the copy engine writes while the next products run.
template <class K>
struct Output {
  const HopperProduct& p;
  char* out;
  int group, thread, lane = thread % warp_size, q = lane % 4;
  int warp_row = thread / warp_size * 16;  // of the warpgroup's 64
  mutable int turn = 0;                    // which set of tiles in shared memory is written next

  // What stands at a thread's places of columns first .. first + 16, two neighbours of bfloat16 a word.
  __device__ void read_before(const Tiles& t, const void* c, int first, uint32_t (&before)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = t.column + first + i / 2 * 8 + q * 2;
      const int row = t.row + group * 64 + warp_row + i % 2 * 8 + lane / 4;
      const bf16* from = static_cast<const bf16*>(c) + t.result() + row * p.c_row + column;
      before[i] = row < t.end_row && column < p.columns ? *reinterpret_cast<const uint32_t*>(from) : 0;
    }
  }
  // Columns first .. first + 16 of the warp's rows to a tile: as bfloat16. plain: without bias, and nothing
  // to add to.
  template <bool plain>
  __device__ void narrow(const Tiles& t, const float* sum, const uint32_t (&before)[4], int first, char* tile,
                         int at) const {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // rows 0-7 and 8-15, then the next eight columns
      const int column = t.column + first + i / 2 * 8 + q * 2;
      float two[2] = {sum[i * 2], sum[i * 2 + 1]};
      if (!plain && p.bias && column < p.columns) {
        two[0] += bias_of(p, column), two[1] += bias_of(p, column + 1);
      }
      if (!plain && p.accumulate) {
        two[0] += __uint_as_float(before[i] << 16), two[1] += __uint_as_float(before[i] & 0xffff0000);
      }
      words[i] = pack_bf16(two[0], two[1]);
    }
    const int row = warp_row + lane % 16, piece = at / 8 + lane / 16;
    store_matrices(shared_address(tile) + row * 128 + ((piece ^ row % 8) << 4), words);
  }
  // As float32: four lanes have two neighbouring columns of every eight each, and trade for four.
  template <bool plain>
  __device__ void wide(const Tiles& t, const float* sum, int first, char* tile, int at) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float four[4] = {sum[half * 2], sum[half * 2 + 1], sum[4 + half * 2], sum[4 + half * 2 + 1]};
      exchange(four[0], four[2], q, 1), exchange(four[1], four[3], q, 1);
      const int own = q % 2 * 8 + q / 2 * 4, column = t.column + first + own;
      if (!plain && p.bias && column < p.columns) {
#pragma unroll
        for (int i = 0; i < 4; ++i) four[i] += bias_of(p, column + i);
      }
      const int row = warp_row + half * 8 + lane / 4, piece = (at + own) / 4;
      store<4>(four, reinterpret_cast<float*>(tile + row * 128 + ((piece ^ row % 8) << 4)));
    }
  }

  // The tile's sums from column `begin` on, `columns` of them.
  template <int tile_width, bool plain, int begin = 0, int columns = K::columns, int count>
  __device__ void put(const Tiles& t, const Target& to, const float (&sum)[count]) const {
    const bool grouped_rows = p.offsets && !p.by_depth;
    const int rows = min(64, t.end_row - t.row - group * 64), outer = static_cast<int>(t.batch);
#pragma unroll
    for (int first = 0; first < columns; first += K::out_tiles * tile_width) {
      char* const own = out + turn * K::out_tiles * square_bytes;
      // All that is added to is read at once, not a piece before each piece's store.
      uint32_t before[plain || tile_width != 64 ? 1 : K::out_tiles * 4][4] = {};
      if (!plain && tile_width == 64 && p.accumulate) {
#pragma unroll
        for (int i = 0; i < K::out_tiles * tile_width && first + i < columns; i += 16)
          read_before(t, to.c, first + i, before[i / 16]);
      }
      if (thread < warp_size) stores_wait_but<K::out_turns - 1>();
      sync_threads(2 + group, 128);
#pragma unroll
      for (int i = 0; i < K::out_tiles * tile_width && first + i < columns; i += 16) {
        char* tile = own + i / tile_width * square_bytes;
        if constexpr (tile_width == 64) {
          narrow<plain>(t, sum + (begin + first + i) / 2, before[plain ? 0 : i / 16], first + i, tile,
                        i % tile_width);
        } else {
          wide<plain>(t, sum + (begin + first + i) / 2, first + i, tile, i % tile_width);
        }
      }
      fence_shared_writes();
      sync_threads(2 + group, 128);
      // Of an expert's last rows whole eights are copied, by a lane each.
      const bool cut = grouped_rows && rows < 64;
      const CUtensorMap* map = cut ? to.eights : to.map;
      const int boxes = cut ? rows / 8 : 1, box = lane % 8;
      for (int tile = lane / 8; thread < warp_size && box < boxes && tile < K::out_tiles; tile += 4) {
        const int column = first + tile * tile_width;
        if (column >= columns || t.column + column >= p.columns || rows <= 0) continue;
        const char* from = own + tile * square_bytes + box * 1024;
        const int row = t.row + group * 64 + box * 8;
        if (p.accumulate && tile_width == 32) {
          add_tile(map, from, t.column + column, row, grouped_rows ? 0 : outer);
        } else {
          store_tile(map, from, t.column + column, row, grouped_rows ? 0 : outer);
        }
      }
      stores_commit();
      if (K::out_turns > 1) turn ^= 1;
      if (grouped_rows && rows > 0) {
        for (int i = thread; i < rows % 8 * 8 * K::out_tiles; i += 128) {
          const int tile = i / (rows % 8 * 8), row = rows / 8 * 8 + i / 8 % (rows % 8), piece = i % 8;
          const int column = first + tile * tile_width + piece * tile_width / 8;
          if (column >= columns || t.column + column >= p.columns) continue;
          const int4 x = *reinterpret_cast<const int4*>(own + tile * square_bytes + row * 128 +
                                                        ((piece ^ row % 8) << 4));
          const int64_t at = (t.row + group * 64 + row) * p.c_row + t.column + column;
          if (tile_width == 64) {
            *reinterpret_cast<int4*>(static_cast<bf16*>(to.c) + at) = x;
          } else {
            float four[4] = {__int_as_float(x.x), __int_as_float(x.y), __int_as_float(x.z),
                             __int_as_float(x.w)};
            latente::cuda::put<4>(p.accumulate, four, static_cast<float*>(to.c) + at);
          }
        }
      }
    }
  }
};

template <class K>
__device__ void put_sums(const Output<K>& output, const Tiles& t, const HopperProduct& p, const Maps& maps,
                         float (&sum)[K::columns / 2]) {
  const Target to =
      t.other ? Target{&maps.other_c, &maps.other_c_eights, p.other_c} : Target{&maps.c, &maps.c_eights, p.c};
  if (p.narrow && !p.bias && !p.accumulate) {
    output.template put<64, true>(t, to, sum);
  } else if (p.narrow) {
    output.template put<64, false>(t, to, sum);
  } else if (!p.bias) {
    output.template put<32, true>(t, to, sum);
  } else {
    output.template put<32, false>(t, to, sum);
  }
}

// The gate's half of the sums, the other half, and what comes of both as they were rounded.
template <class K>
__device__ void put_gated(const Output<K>& output, const Tiles& t, const HopperProduct& p, const Maps& maps,
                          float (&sum)[K::columns / 2]) {
  constexpr int half = K::own_columns, count = half / 2;
  output.template put<64, true, 0, half>(t, {&maps.c, &maps.c_eights, p.c}, sum);
  output.template put<64, true, half, half>(t, {&maps.other_c, &maps.other_c_eights, p.other_c}, sum);
  float factor[2] = {1, 1};  // of the thread's rows
  if (p.factors) {
    const int row = t.row + output.group * 64 + output.warp_row + output.lane / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) factor[i] = row + i * 8 < t.end_row ? p.factors[row + i * 8] : 0;
  }
#pragma unroll
  for (int i = 0; i < count; ++i) {
    sum[i] = factor[i / 2 % 2] * swiglu_of(widen(narrow<bf16>(sum[i])), widen(narrow<bf16>(sum[count + i])));
  }
  output.template put<64, true, 0, half>(t, {&maps.inner, &maps.inner_eights, p.inner}, sum);
}

}  // namespace latente::cuda::sm90
