// Products on Hopper: blocks stay and take tile after tile; a warpgroup copies the next stages while two
// others multiply 64 rows each. In bfloat16 an element is one chain of steps of 16 in rising depth, as in
// product_mma.cuh. In FP8, whose products the tensor cores add in fewer bits, sums over 128 of the depth are
// scaled and added in float32 (DeepSeek-V3 report, section 3.3.2).
#include "cuda/product_sm90.h"

#include "cuda/hopper.cuh"
#include "cuda/product.cuh"

namespace latente::cuda {
namespace {

constexpr int tile_rows = 128, step = 64, threads = 384, row_tiles_together = 16;
constexpr int square_bytes = 64 * 128;  // a tile of 64 rows
constexpr int most_stages = 8, most_experts = 512;

// Columns of a tile, stages, and tiles of 64 rows that each warpgroup's results leave through.
template <int Columns, bool AByDepth, bool BByDepth, bool Fp8 = false>
struct Config {
  static constexpr int columns = Columns;
  static constexpr int stages = Columns >= 192 ? 4 : Columns == 128 ? 6 : 8;
  static constexpr int out_tiles = Columns == 256 ? 2 : Columns / 64;
  static constexpr bool a_by_depth = AByDepth, b_by_depth = BByDepth, fp8 = Fp8;
  static constexpr int a_bytes = tile_rows * 128, b_bytes = Columns * 128, stage_bytes = a_bytes + b_bytes;
  static constexpr int out = stages * stage_bytes, shared = out + 2 * out_tiles * square_bytes;
};

struct Maps {
  CUtensorMap a, b, c;
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
      copy_piece(to + row * 128 + ((thread % 8 ^ row % 8) << 4), from, inside);
    }
  }
};

template <class K>
__device__ void copy_a(const HopperProduct& p, const Maps& maps, const Tiles& t, char* a, Barrier& full,
                       int depth) {
  if (K::a_by_depth) {
    copy_tile(a, &maps.a, full, depth, t.row, p.offsets ? 0 : t.outer());
  } else {
    for (int i = 0; i < 2; ++i) copy_tile(a + i * square_bytes, &maps.a, full, t.row + i * 64, depth, 0);
  }
}
template <class K>
__device__ void copy_b(const Maps& maps, const Tiles& t, char* b, Barrier& full, int depth) {
  if (K::b_by_depth) {
    copy_tile(b, &maps.b, full, depth, t.column, t.outer());
  } else {
    for (int i = 0; i < K::columns / 64; ++i) {
      copy_tile(b + i * square_bytes, &maps.b, full, t.column + i * 64, depth, t.outer());
    }
  }
}

template <class K>
__device__ void copy_tiles(const HopperProduct& p, const Maps& maps, Shared& s, char* memory) {
  Tiles t(p, s, K::columns);
  Stage<K::stages> stage;
  for (int index = static_cast<int>(blockIdx.x); index < t.count; index += static_cast<int>(gridDim.x)) {
    t.find(index, K::columns);
    for (int depth = t.first_depth; depth < t.end_depth; depth += step) {
      s.empty[stage.index].wait(stage.phase ^ 1);
      char* a = memory + stage.index * K::stage_bytes;
      s.full[stage.index].expect(K::stage_bytes);
      copy_a<K>(p, maps, t, a, s.full[stage.index], depth);
      copy_b<K>(maps, t, a + K::a_bytes, s.full[stage.index], depth);
      stage.next();
    }
  }
}

// The same by all threads of the warpgroup, where rows of a, or by depth of b, are gathered.
template <class K>
__device__ void copy_gathered_tiles(const HopperProduct& p, const Maps& maps, Shared& s, char* memory) {
  constexpr bool by_depth = !K::a_by_depth;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  Tiles t(p, s, K::columns);
  Stage<K::stages> stage, landed;
  GatheredRows<by_depth ? 4 : 8> rows{p, thread};
  int in_flight = 0;
  auto land = [&] {
    fence_shared_writes();
    s.full[landed.index].arrive();
    landed.next();
    --in_flight;
  };
  const int first = static_cast<int>(blockIdx.x), apart = static_cast<int>(gridDim.x);
  if (first < t.count) t.find(first, K::columns);
  if (!by_depth) rows.read(t.row, t.end_row);
  for (int index = first; index < t.count; index += apart) {
    const Tiles here = t;
    if (index + apart < t.count) t.find(index + apart, K::columns);
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
      asm volatile("cp.async.commit_group;" ::: "memory");
      if (++in_flight == 3) {
        wait_pieces<2>();
        land();
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

__device__ inline void store_matrices(uint32_t to, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x[0]),
               "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

// One warpgroup's rows of a tile on their way out, some columns at a time: through tiles of 64 rows in shared
// memory, which the copy engine writes while the next products run.
template <class K>
struct Output {
  const HopperProduct& p;
  const CUtensorMap* map;
  char* out;
  int group, thread, lane = thread % warp_size, q = lane % 4;
  int warp_row = thread / warp_size * 16;  // of the warpgroup's 64

  // Columns first .. first + 16 of the warp's rows to a tile: as bfloat16. plain: without bias, and nothing
  // to add to.
  template <bool plain>
  __device__ void narrow(const Tiles& t, const float* sum, int first, char* tile, int at) const {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // rows 0-7 and 8-15, then the next eight columns
      const int column = t.column + first + i / 2 * 8 + q * 2;
      float two[2] = {sum[i * 2], sum[i * 2 + 1]};
      if (!plain && p.bias && column < p.columns) {
        two[0] += bias_of(p, column), two[1] += bias_of(p, column + 1);
      }
      const int row = t.row + group * 64 + warp_row + i % 2 * 8 + lane / 4;
      if (!plain && p.accumulate && row < t.end_row && column < p.columns) {
        float before[2];
        load<2>(static_cast<const bf16*>(p.c) + t.result() + row * p.c_row + column, before);
        two[0] += before[0], two[1] += before[1];
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

  template <int tile_width, bool plain, int count>
  __device__ void put(const Tiles& t, const float (&sum)[count]) const {
    const bool grouped_rows = p.offsets && !p.by_depth;
    const int rows = min(64, t.end_row - t.row - group * 64), outer = static_cast<int>(t.batch);
#pragma unroll
    for (int first = 0; first < K::columns; first += K::out_tiles * tile_width) {
      if (thread < warp_size) stores_wait();
      sync_threads(2 + group, 128);
#pragma unroll
      for (int i = 0; i < K::out_tiles * tile_width && first + i < K::columns; i += 16) {
        char* tile = out + i / tile_width * square_bytes;
        if (tile_width == 64) {
          narrow<plain>(t, sum + (first + i) / 2, first + i, tile, i % tile_width);
        } else {
          wide<plain>(t, sum + (first + i) / 2, first + i, tile, i % tile_width);
        }
      }
      fence_shared_writes();
      sync_threads(2 + group, 128);
      // Of an expert's last rows whole eights are copied.
      const int boxes = grouped_rows ? rows / 8 : 1;
      for (int i = lane; thread < warp_size && i < K::out_tiles * boxes; i += warp_size) {
        const int tile = i / boxes, box = i % boxes, column = first + tile * tile_width;
        if (column >= K::columns || t.column + column >= p.columns || rows <= 0) continue;
        const char* from = out + tile * square_bytes + box * 1024;
        const int row = t.row + group * 64 + box * 8;
        if (p.accumulate && tile_width == 32) {
          add_tile(map, from, t.column + column, row, grouped_rows ? 0 : outer);
        } else {
          store_tile(map, from, t.column + column, row, grouped_rows ? 0 : outer);
        }
      }
      stores_commit();
      if (grouped_rows && rows > 0) {
        for (int i = thread; i < rows % 8 * 8 * K::out_tiles; i += 128) {
          const int tile = i / (rows % 8 * 8), row = rows / 8 * 8 + i / 8 % (rows % 8), piece = i % 8;
          const int column = first + tile * tile_width + piece * tile_width / 8;
          if (column >= K::columns || t.column + column >= p.columns) continue;
          const int4 x = *reinterpret_cast<const int4*>(out + tile * square_bytes + row * 128 +
                                                        ((piece ^ row % 8) << 4));
          const int64_t to = (t.row + group * 64 + row) * p.c_row + t.column + column;
          if (tile_width == 64) {
            *reinterpret_cast<int4*>(static_cast<bf16*>(p.c) + to) = x;
          } else {
            float four[4] = {__int_as_float(x.x), __int_as_float(x.y), __int_as_float(x.z),
                             __int_as_float(x.w)};
            latente::cuda::put<4>(p.accumulate, four, static_cast<float*>(p.c) + to);
          }
        }
      }
    }
  }
};

template <class K>
__device__ void add_products(const HopperProduct& p, const Tiles& t, float (&sum)[K::columns / 2],
                             char* memory, Shared& s, Stage<K::stages>& stage) {
  const int group = static_cast<int>(threadIdx.x) / 128, thread = static_cast<int>(threadIdx.x) % 128;
  const int lane = thread % warp_size;
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
}

// The same in FP8: both warpgroups scale their sums over 128 of the depth in turn, so that one of them
// multiplies.
template <int stages>
__device__ void add_scaled(const HopperProduct& p, const Tiles& t, float (&sum)[64], char* memory, Shared& s,
                           Stage<stages>& stage) {
  using K = Config<128, true, true, true>;
  const int group = static_cast<int>(threadIdx.x) / 128, thread = static_cast<int>(threadIdx.x) % 128;
  const int lane = thread % warp_size, row = t.row + group * 64 + thread / warp_size * 16 + lane / 4;
  const int column = t.column + lane % 4 * 2;
  float part[64];
  for (int depth = t.first_depth; depth < t.end_depth; depth += step) {
    const char* a = memory + stage.index * K::stage_bytes;
    s.full[stage.index].wait(stage.phase);
    const uint64_t a_operand = rows_operand(a + group * square_bytes),
                   b_operand = rows_operand(a + K::a_bytes);
    products_begin();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma_e4m3(part, a_operand + k * rows_step, b_operand + k * rows_step, k > 0);
    products_commit();
    const int64_t block = depth / step;
    const float* a_scales = p.a_scales + block * p.a_scale_line;
    float scale[2] = {row < t.end_row ? a_scales[row] : 0, row + 8 < t.end_row ? a_scales[row + 8] : 0};
    if (p.squares) {
      const float b =
          p.b_scales[(p.offsets ? t.batch * p.b_scale_batch : 0) + t.column / 128 * p.b_scale_line + block];
      scale[0] *= b, scale[1] *= b;
    }
    float2 b_scales[16];
    if (!p.squares) {
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const int at = column + j * 8;
        b_scales[j] = at < p.columns
                          ? *reinterpret_cast<const float2*>(p.b_scales + block * p.b_scale_line + at)
                          : float2{};
      }
    }
    products_wait<0>();
    if (lane == 0) s.empty[stage.index].arrive();
    stage.next();
    if (p.squares) {
#pragma unroll
      for (int i = 0; i < 64; ++i) sum[i] = fmaf(part[i], scale[i / 2 % 2], sum[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        const float2 b = b_scales[i / 4];
        sum[i] = fmaf(part[i], scale[i / 2 % 2] * (i % 2 ? b.y : b.x), sum[i]);
      }
    }
  }
}

template <class K>
__device__ void compute(const HopperProduct& p, const Maps& maps, char* memory, Shared& s) {
  const int group = static_cast<int>(threadIdx.x) / 128, thread = static_cast<int>(threadIdx.x) % 128;
  const Output<K> output{p, &maps.c, memory + K::out + group * K::out_tiles * square_bytes, group, thread};
  Tiles t(p, s, K::columns);
  Stage<K::stages> stage;
  for (int index = static_cast<int>(blockIdx.x); index < t.count; index += static_cast<int>(gridDim.x)) {
    t.find(index, K::columns);
    float sum[K::columns / 2];
    if (K::fp8 || t.first_depth >= t.end_depth) {
#pragma unroll
      for (float& x : sum) x = 0;
    }
    if constexpr (K::fp8) {
      add_scaled(p, t, sum, memory, s, stage);
    } else {
      add_products<K>(p, t, sum, memory, s, stage);
    }
    if (p.narrow && !p.bias && !p.accumulate) {
      output.template put<64, true>(t, sum);
    } else if (p.narrow) {
      output.template put<64, false>(t, sum);
    } else if (!p.bias) {
      output.template put<32, true>(t, sum);
    } else {
      output.template put<32, false>(t, sum);
    }
  }
  if (thread < warp_size) stores_wait();
}

template <class K>
__global__ __launch_bounds__(threads, 1) void product_sm90_kernel(const __grid_constant__ HopperProduct p,
                                                                  const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory + K::shared);
  if (threadIdx.x == 0) {
    if (shared_address(memory) % 1024) __trap();
    prefetch_map(maps.a), prefetch_map(maps.b), prefetch_map(maps.c);
    for (int i = 0; i < K::stages; ++i) s.full[i].init(p.gather ? 129 : 1), s.empty[i].init(8);
    barriers_ready();
  }
  if (p.offsets && !p.by_depth && threadIdx.x / warp_size == 1) count_tiles(p, s.tiles_before);
  __syncthreads();
  if (threadIdx.x >= 256) {
    fewer_registers<56>();
    if (p.gather) {
      copy_gathered_tiles<K>(p, maps, s, memory);
    } else if (threadIdx.x == 256) {
      copy_tiles<K>(p, maps, s, memory);
    }
  } else {
    more_registers<224>();
    compute<K>(p, maps, memory, s);
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
  const bool grouped_rows = p.offsets && !p.by_depth;
  const int64_t outer = p.offsets      ? (p.by_depth ? p.experts : 1)
                        : p.part_depth ? quotient(p.depth, p.part_depth)
                                       : p.batches;
  maps.c = tile_map(p.c, p.columns, p.rows, p.c_row, outer, outer > 1 ? p.c_batch : p.c_row * p.rows,
                    grouped_rows ? 8 : 64, p.narrow);
  auto kernel = product_sm90_kernel<K>;
  constexpr int shared = K::shared + static_cast<int>(sizeof(Shared));
  static_assert(shared <= 227 * 1024);
  static const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  check(allowed, name);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, context.multiprocessors));
  kernel<<<blocks, threads, shared, context.stream>>>(p, maps);
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

// The clocks that a tile of so much depth takes, about: a step is multiplied in 4 clocks a column, while the
// next one arrives at some 60 bytes a clock; results are written.
int64_t tile_clocks(int64_t rows, int64_t depth, int width) {
  const int64_t arrive = (std::min<int64_t>(rows, tile_rows) + width) * 128 / 60;
  return quotient(depth, step) * (std::max<int64_t>(4 * width, arrive) + 40) + 2 * width + 800;
}

int best_width(const HopperProduct& p, const Context& context) {
  const bool experts_depth = p.offsets && p.by_depth;
  const int64_t depth = experts_depth ? p.depth / p.experts : p.part_depth ? p.part_depth : p.depth;
  int best = 256;
  int64_t least = INT64_MAX;
  for (const int width : {256, 192, 128, 64}) {
    if (width == 64 && !p.b_by_depth) break;
    const int64_t clocks = tile_clocks(p.rows, depth, width), tiles = tiles_of(p, width);
    const int64_t machine = context.multiprocessors;
    // Depths of experts differ: the last tile may be one of the deepest.
    const int64_t all =
        experts_depth ? tiles * clocks / machine + 3 * clocks : quotient(tiles, machine) * clocks;
    if (all < least) least = all, best = width;
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
      const int64_t clocks = quotient(tiles_of(p, width) * parts, context.multiprocessors) *
                                 tile_clocks(p.rows, quotient(p.depth, parts), width) +
                             adding;
      if (clocks < least) least = clocks, best = parts;
    }
  }
  return best;
}

void hopper_product(const HopperProduct& p, const char* name, const Context& context) {
  if (p.a_scales) return launch<Config<128, true, true, true>>(p, tiles_of(p, 128), name, context);
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
