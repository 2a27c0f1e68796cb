// Products of bfloat16 on Hopper: blocks stay and take tile after tile; a warpgroup copies the next stages
// while two others multiply 64 rows each. An element is one chain of steps of 16 in rising depth, as in
// product_mma.cuh.
#include "cuda/product_sm90.h"

#include "cuda/hopper.cuh"
#include "cuda/product.cuh"

namespace latente::cuda {
namespace {

constexpr int tile_rows = 128, step = 64, threads = 384, row_tiles_together = 16;
constexpr int square_bytes = 64 * 128;  // a tile of 64 rows
constexpr int most_stages = 6, most_experts = 512;

template <int Columns, bool AByDepth, bool BByDepth>
struct Config {
  static constexpr int columns = Columns, stages = Columns == 256 ? 4 : Columns == 192 ? 5 : 6;
  static constexpr bool a_by_depth = AByDepth, b_by_depth = BByDepth;
  static constexpr int a_bytes = tile_rows * 128, b_bytes = Columns * 128, stage_bytes = a_bytes + b_bytes;
  static constexpr int shared = stages * stage_bytes + 1024;  // the memory may begin anywhere
};

struct Maps {
  CUtensorMap a, b;
};
struct Shared {
  Barrier full[most_stages], empty[most_stages];
  int tiles_before[most_experts + 1];  // grouped rows: tiles of rows of the experts before each, and of all
};
template <int stages>
struct Stage {
  int index = 0, phase = 0;
  __device__ void next() {
    if (++index == stages) index = 0, phase ^= 1;
  }
};

// One warp.
__device__ inline void count_tiles(const HopperProduct& p, int* before) {
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
    if (expert < p.experts) before[expert] = sum + through - tiles;
    sum += __shfl_sync(whole_warp, through, warp_size - 1);
  }
  if (lane == 0) before[p.experts] = sum;
}

// The tiles of a product in the order in which blocks take them: batch after batch, of each some tiles of
// rows with all columns, then the next ones, so that what is read together stays in the L2 cache.
struct Tiles {
  const HopperProduct& p;
  const int* before;
  int row_tiles, column_tiles, count;
  int row = 0, end_row = 0, column = 0, batch = 0, first_depth = 0, end_depth = 0;

  __device__ Tiles(const HopperProduct& product, const Shared& s, int width)
      : p(product), before(s.tiles_before) {
    column_tiles = static_cast<int>((p.columns + width - 1) / width);
    row_tiles =
        p.offsets && !p.by_depth ? before[p.experts] : static_cast<int>((p.rows + tile_rows - 1) / tile_rows);
    const int batches = p.offsets      ? (p.by_depth ? p.experts : 1)
                        : p.part_depth ? static_cast<int>((p.depth + p.part_depth - 1) / p.part_depth)
                                       : p.batches;
    count = batches * row_tiles * column_tiles;
    end_row = static_cast<int>(p.rows), end_depth = static_cast<int>(p.depth);
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
        if (before[middle] <= tile) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      batch = low;
      row = p.offsets[low] + (tile - before[low]) * tile_rows, end_row = p.offsets[low + 1];
      return;
    }
    row = tile * tile_rows;
    if (p.offsets) {
      first_depth = p.offsets[batch], end_depth = p.offsets[batch + 1];
    } else if (p.part_depth) {
      first_depth = static_cast<int>(batch * p.part_depth);
      end_depth = static_cast<int>(min(p.depth, first_depth + p.part_depth));
    }
  }
  // Where the tile is along the outer axes of operands and results.
  __device__ int outer() const { return (p.offsets && p.by_depth) || p.part_depth ? 0 : batch; }
  __device__ int64_t result() const { return p.offsets && !p.by_depth ? 0 : batch * p.c_batch; }
};

// 16 bytes, or zeros.
__device__ inline void copy_piece(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}
template <int pending>
__device__ void wait_pieces() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Rows of a that are gathered: each thread copies piece thread % 8 of every sixteenth row.
struct GatheredRows {
  const bf16* from[8];

  __device__ void find(const HopperProduct& p, const Tiles& t, int thread) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = t.row + i * 16 + thread / 8;
      from[i] = row < t.end_row ? static_cast<const bf16*>(p.a) + p.gather[row] * p.a_line : nullptr;
    }
  }
  __device__ void copy(const HopperProduct& p, uint32_t to, int depth, int thread) const {
    const int at = depth + thread % 8 * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = i * 16 + thread / 8;
      const bool inside = from[i] && at < p.depth;
      copy_piece(to + row * 128 + ((thread % 8 ^ row % 8) << 4), inside ? from[i] + at : p.a, inside);
    }
  }
};

// Rows of b that are gathered, where its depth is rows.
template <int width>
__device__ void copy_gathered_depth(const HopperProduct& p, const Tiles& t, uint32_t to, int depth,
                                    int thread) {
#pragma unroll 4
  for (int i = thread; i < step * width / 8; i += 128) {
    const int line = i / (width / 8), piece = i % (width / 8), column = t.column + piece * 8;
    const bool inside = depth + line < t.end_depth && column < p.columns;
    const bf16* from = static_cast<const bf16*>(p.b);
    if (inside) from += p.gather[depth + line] * p.b_line + column;
    copy_piece(to + piece / 8 * square_bytes + line * 128 + ((piece % 8 ^ line % 8) << 4), from, inside);
  }
}

template <class K>
__device__ void copy_tiles(const HopperProduct& p, const Maps& maps, char* memory, Shared& s) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const bool gather_rows = p.gather && !p.by_depth, gather_depth = p.gather && p.by_depth;
  if (!p.gather && thread > 0) return;
  Tiles t(p, s, K::columns);
  Stage<K::stages> stage, landed;
  GatheredRows rows;
  int in_flight = 0;
  auto land = [&] {
    fence_shared_writes();
    s.full[landed.index].arrive();
    landed.next();
    --in_flight;
  };
  for (int index = static_cast<int>(blockIdx.x); index < t.count; index += static_cast<int>(gridDim.x)) {
    t.find(index, K::columns);
    if (gather_rows) rows.find(p, t, thread);
    const int outer = t.outer();
    for (int depth = t.first_depth; depth < t.end_depth; depth += step) {
      s.empty[stage.index].wait(stage.phase ^ 1);
      char* a = memory + stage.index * K::stage_bytes;
      char* b = a + K::a_bytes;
      Barrier& full = s.full[stage.index];
      if (thread == 0) {
        full.expect((gather_rows ? 0 : K::a_bytes) + (gather_depth ? 0 : K::b_bytes));
        if (K::a_by_depth && !gather_rows) {
          copy_tile(a, &maps.a, full, depth, t.row, p.offsets ? 0 : outer);
        }
        if (!K::a_by_depth) {
          for (int i = 0; i < 2; ++i) {
            copy_tile(a + i * square_bytes, &maps.a, full, t.row + i * 64, depth, 0);
          }
        }
        if (K::b_by_depth) copy_tile(b, &maps.b, full, depth, t.column, outer);
        if (!K::b_by_depth && !gather_depth) {
          for (int i = 0; i < K::columns / 64; ++i) {
            copy_tile(b + i * square_bytes, &maps.b, full, t.column + i * 64, depth, outer);
          }
        }
      }
      if (p.gather) {
        if (gather_rows) rows.copy(p, shared_address(a), depth, thread);
        if (gather_depth) copy_gathered_depth<K::columns>(p, t, shared_address(b), depth, thread);
        asm volatile("cp.async.commit_group;" ::: "memory");
        if (++in_flight == 3) {
          wait_pieces<2>();
          land();
        }
      }
      stage.next();
    }
  }
  wait_pieces<0>();
  while (in_flight > 0) land();
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

// A warp's 16 rows from t.row + group_row on. Four lanes have two neighbouring columns of every eight each;
// they trade until each has 16 bytes.
template <int count>
__device__ void put_narrow(const HopperProduct& p, const Tiles& t, const float (&sum)[count], int group_row,
                           int lane) {
  const int q = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = t.row + group_row + lane / 4 + half * 8;
    bf16* line = static_cast<bf16*>(p.c) + t.result() + row * p.c_row + t.column;
#pragma unroll
    for (int j = 0; j < count / 4; j += 4) {  // 32 columns
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = t.column + (j + i) * 8 + q * 2;
        float two[2] = {sum[(j + i) * 4 + half * 2], sum[(j + i) * 4 + half * 2 + 1]};
        if (p.bias && column < p.columns) two[0] += bias_of(p, column), two[1] += bias_of(p, column + 1);
        if (p.accumulate && row < t.end_row && column < p.columns) {
          float before[2];
          load<2>(line + (j + i) * 8 + q * 2, before);
          two[0] += before[0], two[1] += before[1];
        }
        words[i] = pack_bf16(two[0], two[1]);
      }
      exchange(words[0], words[1], q, 1), exchange(words[2], words[3], q, 1);
      exchange(words[0], words[2], q, 2), exchange(words[1], words[3], q, 2);
      if (row < t.end_row && t.column + (j + q) * 8 < p.columns) {
        *reinterpret_cast<uint4*>(line + (j + q) * 8) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}
template <int count>
__device__ void put_wide(const HopperProduct& p, const Tiles& t, const float (&sum)[count], int group_row,
                         int lane) {
  const int q = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = t.row + group_row + lane / 4 + half * 8;
    float* line = static_cast<float*>(p.c) + t.result() + row * p.c_row + t.column;
#pragma unroll
    for (int j = 0; j < count / 4; j += 2) {  // 16 columns
      float four[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        four[i] = sum[j * 4 + half * 2 + i], four[i + 2] = sum[j * 4 + 4 + half * 2 + i];
      }
      exchange(four[0], four[2], q, 1), exchange(four[1], four[3], q, 1);
      const int at = j * 8 + q % 2 * 8 + q / 2 * 4, column = t.column + at;
      if (row >= t.end_row || column >= p.columns) continue;
      if (p.bias) {
#pragma unroll
        for (int i = 0; i < 4; ++i) four[i] += bias_of(p, column + i);
      }
      put<4>(p.accumulate, four, line + at);
    }
  }
}

template <class K>
__device__ void compute(const HopperProduct& p, char* memory, Shared& s) {
  const int group = static_cast<int>(threadIdx.x) / 128, thread = static_cast<int>(threadIdx.x) % 128;
  const int lane = thread % warp_size;
  Tiles t(p, s, K::columns);
  Stage<K::stages> stage;
  for (int index = static_cast<int>(blockIdx.x); index < t.count; index += static_cast<int>(gridDim.x)) {
    t.find(index, K::columns);
    float sum[K::columns / 2];
    if (t.first_depth >= t.end_depth) {
#pragma unroll
      for (float& x : sum) x = 0;
    }
    int last = -1;  // the stage that is being multiplied
    for (int depth = t.first_depth; depth < t.end_depth; depth += step) {
      char* a = memory + stage.index * K::stage_bytes;
      s.full[stage.index].wait(stage.phase);
      if (!K::a_by_depth && p.offsets && t.end_depth - depth < step) {
        clear_depth<K>(a, t.end_depth - depth, group, thread);
      }
      const uint64_t a_operand = K::a_by_depth ? rows_operand(a + group * square_bytes)
                                               : columns_operand(a + group * square_bytes, square_bytes);
      const uint64_t b_operand =
          K::b_by_depth ? rows_operand(a + K::a_bytes) : columns_operand(a + K::a_bytes, square_bytes);
      products_begin();
#pragma unroll
      for (int k = 0; k < step / 16; ++k) {
        wgmma<!K::b_by_depth, !K::a_by_depth>(sum, a_operand + k * (K::a_by_depth ? rows_step : columns_step),
                                              b_operand + k * (K::b_by_depth ? rows_step : columns_step),
                                              k > 0 || depth > t.first_depth);
      }
      products_commit();
      if (last >= 0) {
        products_wait<1>();
        if (lane == 0) s.empty[last].arrive();
      }
      last = stage.index;
      stage.next();
    }
    products_wait<0>();
    if (last >= 0 && lane == 0) s.empty[last].arrive();
    const int group_row = group * 64 + thread / warp_size * 16;
    if (p.narrow) {
      put_narrow(p, t, sum, group_row, lane);
    } else {
      put_wide(p, t, sum, group_row, lane);
    }
  }
}

template <class K>
__global__ __launch_bounds__(threads, 1) void product_sm90_kernel(const __grid_constant__ HopperProduct p,
                                                                  const __grid_constant__ Maps maps) {
  extern __shared__ char unaligned[];
  __shared__ Shared s;
  char* memory = unaligned + (-shared_address(unaligned) & 1023);
  if (threadIdx.x == 0) {
    prefetch_map(maps.a), prefetch_map(maps.b);
    for (int i = 0; i < K::stages; ++i) s.full[i].init(p.gather ? 129 : 1), s.empty[i].init(8);
    barriers_ready();
  }
  if (p.offsets && !p.by_depth && threadIdx.x / warp_size == 1) count_tiles(p, s.tiles_before);
  __syncthreads();
  if (threadIdx.x >= 256) {
    fewer_registers<56>();
    copy_tiles<K>(p, maps, memory, s);
  } else {
    more_registers<224>();
    compute<K>(p, memory, s);
  }
}

int64_t quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class K>
void launch(const HopperProduct& p, int64_t tiles, const char* name, const Context& context) {
  Maps maps{};
  const int64_t depth = p.depth;
  if (!(p.gather && !p.by_depth)) {
    const int64_t lines = K::a_by_depth ? p.rows : depth;
    const int64_t apart = p.batches > 1 ? p.a_batch : p.a_line * lines;
    maps.a = tile_map(p.a, K::a_by_depth ? depth : p.rows, lines, p.a_line, p.batches, apart,
                      K::a_by_depth ? tile_rows : step);
  }
  if (!(p.gather && p.by_depth)) {
    const int64_t lines = K::b_by_depth ? p.columns : depth;
    const int64_t outer = p.offsets && !p.by_depth ? p.experts : p.batches;
    const int64_t apart = outer > 1 ? p.b_batch : p.b_line * lines;
    maps.b = tile_map(p.b, K::b_by_depth ? depth : p.columns, lines, p.b_line, outer, apart,
                      K::b_by_depth ? K::columns : step);
  }
  auto kernel = product_sm90_kernel<K>;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, K::shared);
  check(allowed, name);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, context.multiprocessors));
  kernel<<<blocks, threads, K::shared, context.stream>>>(p, maps);
  check_launch(name);
}

template <int columns>
void launch_width(const HopperProduct& p, int64_t tiles, const char* name, const Context& context) {
  if (!p.a_by_depth) return launch<Config<columns, false, false>>(p, tiles, name, context);
  if (!p.b_by_depth) return launch<Config<columns, true, false>>(p, tiles, name, context);
  launch<Config<columns, true, true>>(p, tiles, name, context);
}

int64_t tiles_of(const HopperProduct& p, int width) {
  const bool grouped_rows = p.offsets && !p.by_depth;
  const int64_t row_tiles =
      quotient(p.rows, tile_rows) + (grouped_rows ? std::min<int64_t>(p.experts, p.rows) : 0);
  const int64_t batches = p.offsets && p.by_depth ? p.experts
                          : p.part_depth          ? quotient(p.depth, p.part_depth)
                                                  : p.batches;
  return row_tiles * quotient(p.columns, width) * batches;
}

// The clocks that `tiles` tiles of so much depth take, about: 64 of the depth are multiplied in 4 clocks a
// column, and results are written.
int64_t clocks_of(int64_t tiles, int64_t depth, int width, const Context& context) {
  return quotient(tiles, context.multiprocessors) *
         (quotient(depth, step) * (4 * width + 40) + 4 * width + 1000);
}

int best_width(const HopperProduct& p, const Context& context) {
  const int64_t depth = p.offsets && p.by_depth ? p.depth / p.experts : p.part_depth ? p.part_depth : p.depth;
  int best = 256;
  for (const int width : {192, 128}) {
    if (clocks_of(tiles_of(p, width), depth, width, context) <
        clocks_of(tiles_of(p, best), depth, best, context)) {
      best = width;
    }
  }
  return best;
}

}  // namespace

bool fits_hopper(const HopperProduct& p, const Context& context) {
  constexpr int64_t limit = int64_t{1} << 31;
  const int64_t whole = p.narrow ? 8 : 4;  // results in 16 bytes
  return context.compute_capability == 90 && (p.a_by_depth || !p.b_by_depth) && p.columns % 8 == 0 &&
         (!p.a_by_depth || p.depth % 8 == 0) && (p.a_by_depth || p.rows % 8 == 0) && p.depth > 0 &&
         p.rows < limit - tile_rows && p.columns < limit && p.depth < limit - step &&
         copies_tiles(p.a, p.a_line, p.batches > 1 ? p.a_batch : 8) &&
         copies_tiles(p.b, p.b_line, p.batches > 1 || p.b_batch ? p.b_batch : 8) &&
         reinterpret_cast<uintptr_t>(p.c) % 16 == 0 && p.c_row % whole == 0 && p.c_batch % whole == 0 &&
         p.experts <= most_experts;
}

int64_t best_parts(const HopperProduct& p, int64_t most, const Context& context) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t parts = 1; parts <= most; ++parts) {
    // Parts are written, read and added: at some 1400 bytes a clock, by another kernel.
    const int64_t adding = parts > 1 ? 4 * p.rows * p.columns * 2 * parts / 1400 + 4000 : 0;
    for (const int width : {128, 192, 256}) {
      const int64_t clocks =
          clocks_of(tiles_of(p, width) * parts, quotient(p.depth, parts), width, context) + adding;
      if (clocks < least) least = clocks, best = parts;
    }
  }
  return best;
}

void hopper_product(const HopperProduct& p, const char* name, const Context& context) {
  switch (const int width = best_width(p, context)) {
    case 256:
      return launch_width<256>(p, tiles_of(p, width), name, context);
    case 192:
      return launch_width<192>(p, tiles_of(p, width), name, context);
    default:
      launch_width<128>(p, tiles_of(p, width), name, context);
  }
}

}  // namespace latente::cuda
