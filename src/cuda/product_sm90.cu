// Products of bfloat16 on Hopper: blocks stay and take tile after tile; a warpgroup copies the next stages
// while two others multiply 64 rows each. An element is one chain of steps of 16 in rising depth, as in
// product_mma.cuh.
#include "cuda/hopper.cuh"
#include "cuda/product.cuh"
#include "cuda/product_sm90.h"

namespace latente::cuda {
namespace {

constexpr int tile_rows = 128, step = 64, threads = 384, row_tiles_together = 16;
constexpr int square_bytes = 64 * 128;  // a tile of 64 rows
constexpr int most_stages = 6;

template <int Columns, bool AByDepth, bool BByDepth>
struct Config {
  static constexpr int columns = Columns, stages = Columns == 256 ? 4 : 6;
  static constexpr bool a_by_depth = AByDepth, b_by_depth = BByDepth;
  static constexpr int a_bytes = tile_rows * 128, b_bytes = Columns * 128, stage_bytes = a_bytes + b_bytes;
  static constexpr int shared = stages * stage_bytes + 1024;  // the memory may begin anywhere
};

struct Maps {
  CUtensorMap a, b;
};
struct Barriers {
  Barrier full[most_stages], empty[most_stages];
};
template <int stages>
struct Stage {
  int index = 0, phase = 0;
  __device__ void next() {
    if (++index == stages) index = 0, phase ^= 1;
  }
};

// The tiles of a product in the order in which blocks take them: by depth batch after batch, else some tiles
// of rows with all columns, then the next ones, so that what is read together stays in the L2 cache.
struct Tiles {
  const HopperProduct& p;
  int row_tiles, column_tiles, count;
  int row = 0, end_row = 0, column = 0, batch = 0, first_depth = 0, end_depth = 0;

  __device__ Tiles(const HopperProduct& product, int width) : p(product) {
    column_tiles = static_cast<int>((p.columns + width - 1) / width);
    row_tiles = static_cast<int>((p.rows + tile_rows - 1) / tile_rows);
    int batches = 1;
    if (p.by_depth) {
      batches = p.offsets ? p.experts : p.part ? static_cast<int>((p.depth + p.part - 1) / p.part) : 1;
    } else if (p.offsets) {
      int tiles = 0;
      for (int e = static_cast<int>(threadIdx.x) % warp_size; e < p.experts; e += warp_size) {
        tiles += (p.offsets[e + 1] - p.offsets[e] + tile_rows - 1) / tile_rows;
      }
      row_tiles = __reduce_add_sync(whole_warp, tiles);
    }
    count = batches * row_tiles * column_tiles;
  }
  __device__ void find(int index, int width) {
    if (p.by_depth) {
      const int tiles = row_tiles * column_tiles, in = index % tiles;
      batch = index / tiles;
      row = in % row_tiles * tile_rows, column = in / row_tiles * width;
      end_row = static_cast<int>(p.rows);
      first_depth = p.offsets ? p.offsets[batch] : static_cast<int>(batch * p.part);
      end_depth = p.offsets ? p.offsets[batch + 1]
                  : p.part  ? static_cast<int>(min(p.depth, first_depth + p.part))
                            : static_cast<int>(p.depth);
      return;
    }
    const int together = row_tiles_together * column_tiles, in = index % together;
    const int first = index / together * row_tiles_together;
    const int here = min(row_tiles_together, row_tiles - first), tile = first + in % here;
    column = in / here * width;
    end_depth = static_cast<int>(p.depth);
    if (p.offsets) {
      const ExpertTile found = find_tile(p.offsets, p.experts, tile_rows, tile);
      row = found.begin, end_row = found.end, batch = found.expert;
    } else {
      row = tile * tile_rows, end_row = static_cast<int>(p.rows);
    }
  }
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
  constexpr int pieces = width / 8, lines = 128 / pieces;
  const int piece = thread % pieces, column = t.column + piece * 8;
#pragma unroll 4
  for (int i = 0; i < step; i += lines) {
    const int line = i + thread / pieces;
    const bool inside = depth + line < t.end_depth && column < p.columns;
    const bf16* from = static_cast<const bf16*>(p.b);
    if (inside) from += p.gather[depth + line] * p.b_line + column;
    copy_piece(to + piece / 8 * square_bytes + line * 128 + ((piece % 8 ^ line % 8) << 4), from, inside);
  }
}

template <class K>
__device__ void copy_tiles(const HopperProduct& p, const Maps& maps, char* memory, Barriers& s) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const bool gather_rows = p.gather && !p.by_depth, gather_depth = p.gather && p.by_depth;
  if (!p.gather && thread >= warp_size) return;
  Tiles t(p, K::columns);
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
    for (int depth = t.first_depth; depth < t.end_depth; depth += step) {
      s.empty[stage.index].wait(stage.phase ^ 1);
      char* a = memory + stage.index * K::stage_bytes;
      char* b = a + K::a_bytes;
      Barrier& full = s.full[stage.index];
      if (thread == 0) {
        full.expect((gather_rows ? 0 : K::a_bytes) + (gather_depth ? 0 : K::b_bytes));
        if (K::a_by_depth && !gather_rows) copy_tile(a, &maps.a, full, depth, t.row, 0);
        if (!K::a_by_depth) {
          for (int i = 0; i < 2; ++i)
            copy_tile(a + i * square_bytes, &maps.a, full, t.row + i * 64, depth, 0);
        }
        const int outer = p.by_depth ? 0 : t.batch;
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

// Lane q of four has word q of each of them afterwards.
__device__ inline void transpose_words(uint32_t (&w)[4], int q) {
  auto exchange = [&](uint32_t& low, uint32_t& high, int bit) {
    const uint32_t got = __shfl_xor_sync(whole_warp, q & bit ? low : high, bit);
    (q & bit ? low : high) = got;
  };
  exchange(w[0], w[1], 1), exchange(w[2], w[3], 1);
  exchange(w[0], w[2], 2), exchange(w[1], w[3], 2);
}

template <int count>
__device__ void put_tile(const HopperProduct& p, const Tiles& t, float (&sum)[count], int group_row,
                         int lane) {
  const int q = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = t.row + group_row + lane / 4 + half * 8;
    const bool inside = row < t.end_row;
    const int64_t line = (p.by_depth ? t.batch * p.c_batch : 0) + row * p.c_row;
#pragma unroll
    for (int j = 0; j < count / 4; j += 4) {  // 32 columns
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = t.column + (j + i) * 8 + q * 2;
        const bool here = inside && column < p.columns;
        float two[2] = {sum[(j + i) * 4 + half * 2], sum[(j + i) * 4 + half * 2 + 1]};
        if (p.bias && here) two[0] += bias_of(p, column), two[1] += bias_of(p, column + 1);
        if (!p.narrow) {
          if (here) put<2>(p.accumulate, two, static_cast<float*>(p.c) + line + column);
          continue;
        }
        if (p.accumulate && here) {
          float before[2];
          load<2>(static_cast<const bf16*>(p.c) + line + column, before);
          two[0] += before[0], two[1] += before[1];
        }
        words[i] = pack_bf16(two[0], two[1]);
      }
      if (!p.narrow) continue;
      transpose_words(words, q);
      const int column = t.column + (j + q) * 8;
      if (inside && column < p.columns) {
        *reinterpret_cast<uint4*>(static_cast<bf16*>(p.c) + line + column) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

template <class K>
__device__ void compute(const HopperProduct& p, char* memory, Barriers& s) {
  const int group = static_cast<int>(threadIdx.x) / 128, thread = static_cast<int>(threadIdx.x) % 128;
  const int lane = thread % warp_size;
  Tiles t(p, K::columns);
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
    put_tile(p, t, sum, group * 64 + thread / warp_size * 16, lane);
  }
}

template <class K>
__global__ __launch_bounds__(threads, 1) void product_sm90_kernel(const __grid_constant__ HopperProduct p,
                                                                  const __grid_constant__ Maps maps) {
  extern __shared__ char unaligned[];
  __shared__ Barriers s;
  char* memory = unaligned + (-shared_address(unaligned) & 1023);
  if (threadIdx.x == 0) {
    for (int i = 0; i < K::stages; ++i) s.full[i].init(p.gather ? 129 : 1), s.empty[i].init(8);
    barriers_ready();
  }
  __syncthreads();
  if (threadIdx.x >= 256) {
    fewer_registers<56>();
    copy_tiles<K>(p, maps, memory, s);
  } else {
    more_registers<224>();
    compute<K>(p, memory, s);
  }
}

template <class K>
void launch(const HopperProduct& p, int64_t tiles, const char* name, const Context& context) {
  Maps maps{};
  const int64_t depth = p.depth;
  if (!(p.gather && !p.by_depth)) {
    maps.a = K::a_by_depth ? tile_map(p.a, depth, p.rows, p.a_line, 1, p.a_line * p.rows, tile_rows)
                           : tile_map(p.a, p.rows, depth, p.a_line, 1, p.a_line * depth, step);
  }
  if (!(p.gather && p.by_depth)) {
    const int64_t outer = p.offsets && !p.by_depth ? p.experts : 1;
    const int64_t lines = K::b_by_depth ? p.columns : depth;
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

// out (+)= the sum of the parts, in order
__global__ __launch_bounds__(256) void add_parts_kernel(const float* parts, int count, int64_t rows,
                                                        int64_t columns, float* out, int64_t out_row,
                                                        bool accumulate) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x) * 4;
  if (at >= rows * columns) return;
  float sum[4] = {};
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    float part[4];
    load<4>(parts + i * rows * columns + at, part);
    for (int j = 0; j < 4; ++j) sum[j] += part[j];
  }
  put<2>(accumulate, reinterpret_cast<float(&)[2]>(sum[0]), out + at / columns * out_row + at % columns);
  put<2>(accumulate, reinterpret_cast<float(&)[2]>(sum[2]), out + at / columns * out_row + at % columns + 2);
}

template <int columns>
void launch_width(const HopperProduct& p, int64_t tiles, const char* name, const Context& context) {
  if (!p.a_by_depth) return launch<Config<columns, false, false>>(p, tiles, name, context);
  if (!p.b_by_depth) return launch<Config<columns, true, false>>(p, tiles, name, context);
  launch<Config<columns, true, true>>(p, tiles, name, context);
}

int64_t quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

bool fits_hopper(const HopperProduct& p, const Context& context) {
  constexpr int64_t limit = int64_t{1} << 31;
  const auto c = reinterpret_cast<uintptr_t>(p.c);
  return context.compute_capability == 90 && (p.a_by_depth || !p.b_by_depth) && p.columns % 8 == 0 &&
         (!p.a_by_depth || p.depth % 8 == 0) && (p.a_by_depth || p.rows % 8 == 0) && p.depth > 0 &&
         p.rows < limit - tile_rows && p.columns < limit && p.depth < limit - step &&
         copies_tiles(p.a, p.a_line, 8) && copies_tiles(p.b, p.b_line, 8) && p.b_batch % 8 == 0 &&
         c % 16 == 0 && p.c_row % (p.narrow ? 8 : 2) == 0 && p.c_batch % (p.narrow ? 8 : 2) == 0;
}

void hopper_product(HopperProduct p, const char* name, const Context& context) {
  const bool grouped_rows = p.offsets && !p.by_depth;
  const int64_t row_tiles = quotient(p.rows, tile_rows) + (grouped_rows ? p.experts : 0);
  const int64_t batches = p.offsets && p.by_depth ? p.experts : 1;
  auto tiles = [&](int64_t width) { return row_tiles * quotient(p.columns, width) * batches; };
  // A wide tile takes less than two narrow ones.
  const int64_t machine = context.multiprocessors;
  const bool wide_tiles = 9 * quotient(tiles(256), machine) <= 5 * quotient(tiles(128), machine);
  int64_t count = tiles(wide_tiles ? 256 : 128);
  void* out = p.c;
  const int64_t out_row = p.c_row;
  const bool accumulate = p.accumulate;
  int64_t parts = 1;
  if (p.by_depth && !p.offsets && !p.narrow && 2 * count <= machine) {
    const int64_t bytes = 4 * p.rows * p.columns;
    parts = std::min({machine / count, quotient(p.depth, 512), context.workspace_bytes / bytes});
    p.part = parts > 1 ? quotient(quotient(p.depth, step), parts) * step : 0;
    parts = parts > 1 ? quotient(p.depth, p.part) : 1;
    if (parts > 1) {
      p.c = context.workspace, p.c_row = p.columns, p.c_batch = p.rows * p.columns, p.accumulate = false;
      count *= parts;
    } else {
      p.part = 0;
    }
  }
  if (wide_tiles) {
    launch_width<256>(p, count, name, context);
  } else {
    launch_width<128>(p, count, name, context);
  }
  if (parts > 1) {
    add_parts_kernel<<<blocks_for(p.rows * p.columns, 1024), 256, 0, context.stream>>>(
        static_cast<const float*>(context.workspace), static_cast<int>(parts), p.rows, p.columns,
        static_cast<float*>(out), out_row, accumulate);
    check_launch(name);
  }
}

}  // namespace latente::cuda
