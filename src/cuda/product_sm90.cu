// Products on Hopper: blocks stay and take tile after tile; a warpgroup copies the next stages while two
// others multiply 64 rows each. An element is one chain of steps of 16 in rising depth, as in
// product_mma.cuh.
#include "cuda/product_sm90.h"

#include "cuda/product_sm90_copies.cuh"
#include "cuda/product_sm90_output.cuh"
#include "cuda/product_sm90_widths.h"

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
    if (p.gather) fence_shared_writes();  // those of the threads that copied
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

template <class K>
__device__ void compute(const HopperProduct& p, const Maps& maps, char* memory, Shared& s) {
  const int group = static_cast<int>(threadIdx.x) / 128, thread = static_cast<int>(threadIdx.x) % 128;
  const Output<K> output{p, memory + K::out + group * K::out_tiles * square_bytes, group, thread};
  Tiles t(p, s, K::own_columns);
  Stage<K::stages> stage;
  for (Turn turn(p, s); turn.tile < t.count; turn.hear()) {
    t.find(turn.tile, K::own_columns);
    float sum[K::columns / 2];
    if (t.first_depth >= t.end_depth) {
#pragma unroll
      for (float& x : sum) x = 0;
    }
    add_products<K>(p, t, sum, memory, s, stage);
    if constexpr (K::gated) {
      put_gated(output, t, p, maps, sum);
    } else {
      put_sums(output, t, p, maps, sum);
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
    Turn::init(s, p.gather ? 12 : 8);
    barriers_ready();
  }
  if (p.offsets && !p.by_depth && threadIdx.x / warp_size == 1) count_tiles(p, s.tiles_before);
  if (p.offsets && p.by_depth) sort_experts(p, s.tiles_before);
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
  map_results(p, maps);
  auto kernel = product_sm90_kernel<K>;
  constexpr int shared = K::shared + static_cast<int>(sizeof(Shared));
  static_assert(shared <= 227 * 1024);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, context.multiprocessors));
  static const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  check(allowed, name);
  kernel<<<blocks, threads, shared, context.stream>>>(p, maps);
  check_launch(name);
}

template <int columns>
void launch_width(const HopperProduct& p, int64_t tiles, const char* name, const Context& context) {
  if (p.pair == Pair::gated) {
    if constexpr (columns != 192) launch<Config<columns, true, true, true>>(p, tiles, name, context);
    return;
  }
  if constexpr (columns == 256) {
    constexpr int64_t shallow = 256;  // of an expert
    if (!p.a_by_depth && p.offsets && !p.gather && p.depth <= shallow * p.experts)
      return launch<Config<256, false, false, false, true>>(p, tiles, name, context);
  }
  if (!p.a_by_depth) return launch<Config<columns, false, false>>(p, tiles, name, context);
  if (!p.b_by_depth) return launch<Config<columns, true, false>>(p, tiles, name, context);
  launch<Config<columns, true, true>>(p, tiles, name, context);
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

void hopper_product(const HopperProduct& product, const char* name, const Context& context) {
  HopperProduct p = product;
  if (p.by_depth) p.taken = context.taken;  // depths of experts differ
  switch (const int width = best_width(p, {256, 192, 128, 64}, context)) {
    case 256:
      return launch_width<256>(p, tiles_of(p, width), name, context);
    case 192:
      return launch_width<192>(p, tiles_of(p, width), name, context);
    default:
      launch_width<128>(p, tiles_of(p, width), name, context);
  }
}

}  // namespace latente::cuda
