// Products on Hopper: blocks stay and take tile after tile; a warpgroup copies the next stages while two
// others multiply 64 rows each. In bfloat16 an element is one chain of steps of 16 in rising depth, as in
// product_mma.cuh. In FP8, whose products the tensor cores add in fewer bits, sums over 128 of the depth are
// scaled and added in float32 (DeepSeek-V3 report, section 3.3.2).
#include "cuda/product_sm90.h"

#include "cuda/product_sm90_copies.cuh"
#include "cuda/product_sm90_output.cuh"

namespace latente::cuda {
namespace {

using namespace sm90;

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

// The gate's half of the sums, the other half, and what comes of both as they were rounded.
template <class K>
__device__ void put_gated(const Output<K>& output, const Tiles& t, const HopperProduct& p, const Maps& maps,
                          float (&sum)[K::columns / 2]) {
  constexpr int half = K::own_columns, count = half / 2;
  output.template put<64, true, 0, half>(t, {&maps.c, p.c}, sum);
  output.template put<64, true, half, half>(t, {&maps.other_c, p.other_c}, sum);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    sum[i] = swiglu_of(widen(narrow<bf16>(sum[i])), widen(narrow<bf16>(sum[count + i])));
  }
  output.template put<64, true, 0, half>(t, {&maps.inner, p.inner}, sum);
}

template <class K>
__device__ void compute(const HopperProduct& p, const Maps& maps, char* memory, Shared& s) {
  const int group = static_cast<int>(threadIdx.x) / 128, thread = static_cast<int>(threadIdx.x) % 128;
  const Output<K> output{p, memory + K::out + group * K::out_tiles * square_bytes, group, thread};
  Tiles t(p, s, K::own_columns);
  Stage<K::stages> stage;
  for (int index = static_cast<int>(blockIdx.x); index < t.count; index += static_cast<int>(gridDim.x)) {
    t.find(index, K::own_columns);
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
    if constexpr (K::gated) {
      put_gated(output, t, p, maps, sum);
      continue;
    }
    const Target to = t.other ? Target{&maps.other_c, p.other_c} : Target{&maps.c, p.c};
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
    const auto map_of = [&](const void* a) {
      return tile_map(a, K::a_by_depth ? depth : p.rows, lines, p.a_line, p.batches, apart,
                      K::a_by_depth ? tile_rows : step);
    };
    maps.a = map_of(p.a);
    if (p.other_a) maps.other_a = map_of(p.other_a);
  }
  if (!(p.gather && p.by_depth)) {
    const int64_t lines = K::b_by_depth ? p.columns : depth;
    const int64_t outer = p.offsets && !p.by_depth ? p.experts : p.batches;
    const int64_t apart = outer > 1 ? p.b_batch : p.b_line * lines;
    const auto map_of = [&](const void* b) {
      return tile_map(b, K::b_by_depth ? depth : p.columns, lines, p.b_line, outer, apart,
                      K::b_by_depth ? K::own_columns : step);
    };
    maps.b = map_of(p.b);
    if (p.other_b) maps.other_b = map_of(p.other_b);
  }
  const bool grouped_rows = p.offsets && !p.by_depth;
  const int64_t outer = p.offsets      ? (p.by_depth ? p.experts : 1)
                        : p.part_depth ? quotient(p.depth, p.part_depth)
                                       : p.batches;
  const auto map_of = [&](const void* c) {
    return tile_map(c, p.columns, p.rows, p.c_row, outer, outer > 1 ? p.c_batch : p.c_row * p.rows,
                    grouped_rows ? 8 : 64, p.narrow);
  };
  maps.c = map_of(p.c);
  if (p.other_c) maps.other_c = map_of(p.other_c);
  if (p.inner) maps.inner = map_of(p.inner);
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
  if (p.pair == Pair::gated) {
    if constexpr (columns != 192) launch<Config<columns, true, true, false, true>>(p, tiles, name, context);
    return;
  }
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
  return row_tiles * quotient(p.columns, p.pair == Pair::gated ? width / 2 : width) * batches *
         (p.pair == Pair::rows ? 2 : 1);
}

// The clocks that a tile of so much depth takes, about: a step is multiplied in 4 clocks a column, while the
// next one arrives at some 60 bytes a clock; results are written.
int64_t tile_clocks(int64_t rows, int64_t depth, int width) {
  const int64_t arrive = (std::min<int64_t>(rows, tile_rows) + width) * 128 / 60;
  return quotient(depth, step) * (std::max<int64_t>(4 * width, arrive) + 40) + 2 * width + 800;
}

int best_width(const HopperProduct& p, const Context& context) {
  const bool experts_depth = p.offsets && p.by_depth;
  const int64_t depth = (experts_depth  ? p.depth / p.experts
                         : p.part_depth ? p.part_depth
                                        : p.depth) *
                        (p.pair == Pair::depths ? 2 : 1);
  int best = 256;
  int64_t least = INT64_MAX;
  for (const int width : {256, 192, 128, 64}) {
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
