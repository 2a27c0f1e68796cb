// Products in FP8 on Hopper (DeepSeek-V3 report, section 3.3.2). The tensor cores add FP8 in fewer bits than
// float32 has, so sums over 128 of the depth are scaled and added in float32 registers; the other warpgroup's
// products may run meanwhile. Sums of 64 rows and 256 columns and those over 128 do not fit in registers
// together, so the latter are of 128 columns at a time. As in product_sm90.cu blocks stay and take tile after
// tile, and a warpgroup of its own copies.
#include "cuda/product_sm90.h"

#include "cuda/product_sm90_output.cuh"
#include "cuda/product_sm90_widths.h"

namespace latente::cuda {
namespace {

using namespace sm90;

// Squares: b has one scale for 128 columns, which threads read ahead; else one a column, which arrives beside
// the stage's tiles, and results are gradients of weights in float32. Gated: the first half of the columns is
// the gate's. Of squares a tile's second half of results need not wait for its first to leave; gates' results
// do, beside one stage more.
template <int Columns, bool Squares, bool Gated = false>
struct Fp8Config {
  static constexpr int columns = Columns, own_columns = Gated ? Columns / 2 : Columns;
  static constexpr int halves = Columns == 128 ? 1 : 2, half_columns = Columns / halves;
  static constexpr bool squares = Squares, gated = Gated;
  static constexpr int out_turns = Squares && Columns == 256 && !Gated ? 2 : 1;
  static constexpr int stages = Columns == 128 ? (Squares ? 5 : 4) : Squares && out_turns == 1 ? 4 : 3;
  static constexpr int out_tiles = Squares ? 2 : Columns == 256 ? 4 : Columns / 32;
  static constexpr int a_bytes = tile_rows * 128, half_bytes = half_columns * 128;
  static constexpr int stage_bytes = a_bytes + halves * half_bytes;
  static constexpr int scale_bytes = Squares ? 0 : Columns * 4;
  static constexpr int scales = stages * stage_bytes + 2 * out_turns * out_tiles * square_bytes;
  static constexpr int out = stages * stage_bytes, shared = scales + stages * scale_bytes;
  static_assert(!Squares || half_columns == 128);
};

// How many halves of a tile's columns there are.
template <class K>
__device__ int halves_of(const HopperProduct& p, const Tiles& t) {
  return K::halves == 2 && (K::gated || t.column + K::half_columns < p.columns) ? 2 : 1;
}

template <class K>
__device__ void copy_fp8_tiles(const HopperProduct& p, const Maps& maps, Shared& s, char* memory) {
  Tiles t(p, s, K::own_columns);
  Stage<K::stages> stage;
  Turn turn(p, s);
  for (; turn.tile < t.count; turn.advance()) {
    turn.ask();
    t.find(turn.tile, K::own_columns);
    const int halves = halves_of<K>(p, t);
    const int scale_bytes = min(K::scale_bytes, static_cast<int>(p.columns - t.column) * 4);
    for (int depth = t.first_depth; depth < t.end_depth; depth += step) {
      s.empty[stage.index].wait(stage.phase ^ 1);
      Barrier& full = s.full[stage.index];
      char* a = memory + stage.index * K::stage_bytes;
      full.expect(K::a_bytes + halves * K::half_bytes + scale_bytes);
      const bool other = depth >= t.other_depth;
      const int from = other ? depth - t.other_depth : depth;
      copy_tile(a, other ? &maps.other_a : &maps.a, full, from, t.row, 0);
      for (int half = 0; half < halves; ++half) {
        copy_tile(a + K::a_bytes + half * K::half_bytes,
                  other || (K::gated && half == 1) ? &maps.other_b : &maps.b, full, from,
                  t.column + (K::gated ? 0 : half * K::half_columns), t.outer());
      }
      if (!K::squares) {
        copy_row(memory + K::scales + stage.index * K::scale_bytes,
                 p.b_scales + depth / step * p.b_scale_line + t.column, scale_bytes, full);
      }
      stage.next();
    }
    turn.tell();
  }
  turn.end();
}

// A thread's scales: of its two rows, and of squares. They are read a step ahead.
template <class K>
struct Scales {
  const float* a;  // of its first row, at the next step
  const float* b[K::halves];
  int64_t a_line;
  int second;  // where the other row's stands after the first one's

  __device__ Scales(const HopperProduct& p, const Tiles& t, int row) {
    const int last = t.end_row - 1;  // beyond it results are not stored
    a_line = p.a_scale_line, second = row + 8 <= last ? 8 : 0;
    begin(p, t, min(row, last), false);
  }
  __device__ void begin(const HopperProduct& p, const Tiles& t, int row, bool other) {
    const int64_t block = other ? 0 : t.first_depth / step;
    a = (other ? p.other_a_scales : p.a_scales) + block * a_line + row;
#pragma unroll
    for (int half = 0; half < (K::squares ? K::halves : 0); ++half) {
      const float* from = other || (K::gated && half == 1) ? p.other_b_scales : p.b_scales;
      const int square = t.column / K::half_columns + (K::gated ? 0 : half);
      // row >> 31 is 0, which the compiler does not know: what is the same for all threads it moves to
      // uniform registers as soon as it is read, which is to wait for it.
      b[half] = from + (p.offsets ? t.batch * p.b_scale_batch : 0) + block + (row >> 31) +
                (square * K::half_columns < p.columns ? square * p.b_scale_line : 0);
    }
  }
  __device__ void next(float (&of_a)[2], float (&of_b)[K::halves]) {
    of_a[0] = __ldg(a), of_a[1] = __ldg(a + second);
    a += a_line;
#pragma unroll
    for (int half = 0; half < (K::squares ? K::halves : 0); ++half) of_b[half] = __ldg(b[half]++);
  }
};

template <class K>
__device__ void add_scaled(const HopperProduct& p, const Tiles& t, float (&sum)[K::columns / 2], char* memory,
                           Shared& s, Stage<K::stages>& stage) {
  const int group = static_cast<int>(threadIdx.x) / 128, thread = static_cast<int>(threadIdx.x) % 128;
  const int lane = thread % warp_size, row = t.row + group * 64 + thread / warp_size * 16 + lane / 4;
  const int halves = halves_of<K>(p, t);
  if (t.first_depth >= t.end_depth) return;
  Scales<K> scales(p, t, row);
  float next_a[2], next_b[K::halves];
  scales.next(next_a, next_b);
  for (int depth = t.first_depth; depth < t.end_depth; depth += step) {
    const char* a = memory + stage.index * K::stage_bytes;
    float of_a[2], of_b[K::halves];
#pragma unroll
    for (int i = 0; i < 2; ++i) of_a[i] = next_a[i];
#pragma unroll
    for (int half = 0; half < K::halves; ++half) of_b[half] = next_b[half];
    if (depth + step < t.end_depth) {
      if (depth + step == t.other_depth) scales.begin(p, t, min(row, t.end_row - 1), true);
      scales.next(next_a, next_b);
    }
    s.full[stage.index].wait(stage.phase);
    const uint64_t a_operand = rows_operand(a + group * square_bytes);
#pragma unroll
    for (int half = 0; half < K::halves; ++half) {
      if (half >= halves) break;
      constexpr int count = K::half_columns / 2;
      float part[count];
      const uint64_t b_operand = rows_operand(a + K::a_bytes + half * K::half_bytes);
      products_begin();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        wgmma_e4m3(part, a_operand + k * rows_step, b_operand + k * rows_step, k > 0);
      products_commit();
      const auto release = [&] {
        if (half + 1 == halves && lane == 0) s.empty[stage.index].arrive();
      };
      if constexpr (K::squares) {
        products_wait<0>();
        release();
        const float scale[2] = {of_a[0] * of_b[half], of_a[1] * of_b[half]};
#pragma unroll
        for (int i = 0; i < count; ++i)
          sum[half * count + i] = fmaf(part[i], scale[i / 2 % 2], sum[half * count + i]);
        continue;
      }
      const float* b = reinterpret_cast<const float*>(memory + K::scales + stage.index * K::scale_bytes) +
                       half * K::half_columns + lane % 4 * 2;
      const auto add = [&](int i, const float(&scale)[4]) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          sum[half * count + i + j] = fmaf(part[i + j], scale[j], sum[half * count + i + j]);
      };
      // Of two columns in either row.
      const auto read = [&](int i, float(&scale)[4]) {
        const float2 two = *reinterpret_cast<const float2*>(b + i * 2);
        scale[0] = of_a[0] * two.x, scale[1] = of_a[0] * two.y;
        scale[2] = of_a[1] * two.x, scale[3] = of_a[1] * two.y;
      };
      if constexpr (K::columns == 256) {  // no registers are left to read ahead
        products_wait<0>();
#pragma unroll
        for (int i = 0; i < count; i += 4) {
          float scale[4];
          read(i, scale);
          add(i, scale);
        }
        __syncwarp();
        release();
      } else {
        float scale[count / 4][4];
#pragma unroll
        for (int i = 0; i < count; i += 4) read(i, scale[i / 4]);
        __syncwarp();
        products_wait<0>();
        release();
#pragma unroll
        for (int i = 0; i < count; i += 4) add(i, scale[i / 4]);
      }
    }
    stage.next();
  }
}

template <class K>
__device__ void compute_fp8(const HopperProduct& p, const Maps& maps, char* memory, Shared& s) {
  const int group = static_cast<int>(threadIdx.x) / 128, thread = static_cast<int>(threadIdx.x) % 128;
  const Output<K> output{p, memory + K::out + group * K::out_turns * K::out_tiles * square_bytes, group,
                         thread};
  Tiles t(p, s, K::own_columns);
  Stage<K::stages> stage;
  for (Turn turn(p, s); turn.tile < t.count; turn.hear()) {
    t.find(turn.tile, K::own_columns);
    float sum[K::columns / 2];
#pragma unroll
    for (float& x : sum) x = 0;
    add_scaled<K>(p, t, sum, memory, s, stage);
    if constexpr (K::gated) {
      put_gated(output, t, p, maps, sum);
    } else if constexpr (K::squares) {
      put_sums(output, t, p, maps, sum);
    } else {
      output.template put<32, true>(t, {&maps.c, p.c}, sum);
    }
  }
  if (thread < warp_size) stores_wait();
}

template <class K>
__global__ __launch_bounds__(threads, 1) void product_fp8_kernel(const __grid_constant__ HopperProduct p,
                                                                 const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory + K::shared);
  if (threadIdx.x == 0) {
    if (shared_address(memory) % 1024) __trap();
    prefetch_map(maps.a), prefetch_map(maps.b), prefetch_map(maps.c);
    for (int i = 0; i < K::stages; ++i) s.full[i].init(1), s.empty[i].init(8);
    Turn::init(s, 8);
    barriers_ready();
  }
  if (p.offsets && threadIdx.x / warp_size == 1) count_tiles(p, s.tiles_before);
  if (p.offsets && p.by_depth) sort_experts(p, s.tiles_before);
  __syncthreads();
  if (threadIdx.x >= 256) {
    fewer_registers<24>();
    if (threadIdx.x == 256) copy_fp8_tiles<K>(p, maps, s, memory);
  } else {
    more_registers<240>();
    compute_fp8<K>(p, maps, memory, s);
  }
}

template <class K>
void launch(const HopperProduct& p, int64_t tiles, const char* name, const Context& context) {
  Maps maps{};
  const auto map_of = [&](const void* x, int64_t lines, int64_t line, int64_t outer, int64_t apart,
                          int box_rows) {
    return tile_map(x, p.depth, lines, line, outer, outer > 1 ? apart : line * lines, box_rows);
  };
  const int64_t outer = p.offsets && !p.by_depth ? p.experts : 1;
  maps.a = map_of(p.a, p.rows, p.a_line, 1, 0, tile_rows);
  maps.b = map_of(p.b, p.columns, p.b_line, outer, p.b_batch, K::half_columns);
  if (p.other_a) maps.other_a = map_of(p.other_a, p.rows, p.a_line, 1, 0, tile_rows);
  if (p.other_b) maps.other_b = map_of(p.other_b, p.columns, p.b_line, outer, p.b_batch, K::half_columns);
  map_results(p, maps);
  auto kernel = product_fp8_kernel<K>;
  constexpr int shared = K::shared + static_cast<int>(sizeof(Shared));
  static_assert(shared <= 227 * 1024);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, context.multiprocessors));
  static const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  check(allowed, name);
  kernel<<<blocks, threads, shared, context.stream>>>(p, maps);
  check_launch(name);
}

}  // namespace

void hopper_product_fp8(const HopperProduct& product, const char* name, const Context& context) {
  HopperProduct p = product;
  if (p.offsets && p.by_depth) p.taken = context.taken;
  if (p.pair == Pair::gated) return launch<Fp8Config<256, true, true>>(p, tiles_of(p, 256), name, context);
  if (p.squares) {
    const int width = best_width(p, {256, 128}, context);
    const int64_t tiles = tiles_of(p, width);
    width == 256 ? launch<Fp8Config<256, true>>(p, tiles, name, context)
                 : launch<Fp8Config<128, true>>(p, tiles, name, context);
  } else {
    LATENTE_ASSERT(!p.narrow && !p.bias);
    const int width = best_width(p, {256, 192, 128}, context);
    const int64_t tiles = tiles_of(p, width);
    switch (width) {
      case 256:
        return launch<Fp8Config<256, false>>(p, tiles, name, context);
      case 192:
        return launch<Fp8Config<192, false>>(p, tiles, name, context);
      default:
        launch<Fp8Config<128, false>>(p, tiles, name, context);
    }
  }
}

}  // namespace latente::cuda
