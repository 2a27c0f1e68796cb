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

// Tiles on their way from the thread that copies to those that multiply, some ahead.
struct FoundTiles {
  Shared& s;
  Stage<most_turns> at;

  __device__ void tell(Tiles& t, int tile, int width) {
    s.heard[at.index].wait(at.phase ^ 1);
    Found& to = s.found[at.index];
    if (tile < t.count) {
      t.find(tile, width);
      to = {t.row, t.end_row, t.column, t.batch, t.first_depth, t.end_depth, 0, 0};
    } else {
      to.none = 1;
    }
    s.told[at.index].arrive();
    at.next();
  }
  // By whole warps.
  __device__ bool hear(Tiles& t) {
    s.told[at.index].wait(at.phase);
    const Found found = s.found[at.index];
    __syncwarp();
    if (threadIdx.x % warp_size == 0) s.heard[at.index].arrive();
    at.next();
    t.row = found.row, t.end_row = found.end_row, t.column = found.column, t.batch = found.batch;
    t.first_depth = found.first_depth, t.end_depth = found.end_depth;
    return !found.none;
  }
};

// Where the tile's rows group · 64 .. group · 64 + 64 are; of Pair::rows, of which product.
struct GroupRows {
  int row;
  bool other;
  __device__ GroupRows(const HopperProduct& p, int tile_row, int group)
      : row(tile_row + group * 64), other(false) {
    if (p.pair != Pair::rows) return;
    const int each = static_cast<int>(p.rows + 63) / 64, block = row / 64;
    other = block >= each, row = (other ? block - each : block) * 64;
  }
};

template <class K>
__device__ void copy_fp8_tiles(const HopperProduct& p, const Maps& maps, Shared& s, char* memory) {
  Tiles t(p, s, K::own_columns);
  Stage<K::stages> stage;
  FoundTiles found{s};
  int tile = static_cast<int>(blockIdx.x);
  found.tell(t, tile, K::own_columns);
  while (tile < t.count) {
    tile = p.taken ? atomicAdd(p.taken, 1) + static_cast<int>(gridDim.x) : tile + static_cast<int>(gridDim.x);
    const int halves = halves_of<K>(p, t);
    for (int depth = t.first_depth; depth < t.end_depth; depth += step) {
      s.empty[stage.index].wait(stage.phase ^ 1);
      Barrier& full = s.full[stage.index];
      char* a = memory + stage.index * K::stage_bytes;
      full.expect(K::a_bytes + halves * K::half_bytes);
      const bool other = depth >= t.other_depth;
      const int from = other ? depth - t.other_depth : depth;
      copy_tile(a, other ? &maps.other_a : &maps.a, full, from, t.row, 0);
      for (int half = 0; half < halves; ++half) {
        copy_tile(a + K::a_bytes + half * K::half_bytes,
                  other || (K::gated && half == 1) ? &maps.other_b : &maps.b, full, from,
                  t.column + (K::gated ? 0 : half * K::half_columns), t.outer());
      }
      stage.next();
    }
    found.tell(t, tile, K::own_columns);
  }
  if (p.taken) {  // the last of all blocks leaves zeros
    __threadfence();
    if (atomicAdd(p.taken + 1, 1) == static_cast<int>(gridDim.x) - 1) p.taken[0] = p.taken[1] = 0;
  }
}

// The same where b has a scale a column. Those who multiply find their tiles themselves: of few deep tiles it
// takes no time, and what comes from shared memory the compiler does not keep in uniform registers.
template <class K>
__device__ void copy_column_tiles(const HopperProduct& p, const Maps& maps, Shared& s, char* memory) {
  Tiles t(p, s, K::own_columns);
  Stage<K::stages> stage;
  Turn turn(p, s);
  for (; turn.tile < t.count; turn.advance()) {
    turn.ask();
    t.find(turn.tile, K::own_columns);
    const int halves = halves_of<K>(p, t);
    const int scale_bytes = min(K::scale_bytes, static_cast<int>(p.columns - t.column) * 4);
    const CUtensorMap* map[2];
    int row[2];
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      const GroupRows rows(p, t.row, group);
      map[group] = rows.other ? &maps.other_a : &maps.a, row[group] = rows.row;
    }
    for (int depth = t.first_depth; depth < t.end_depth; depth += step) {
      s.empty[stage.index].wait(stage.phase ^ 1);
      Barrier& full = s.full[stage.index];
      char* a = memory + stage.index * K::stage_bytes;
      full.expect(K::a_bytes + halves * K::half_bytes + scale_bytes);
      copy_tile(a, map[0], full, depth, row[0], 0);
      copy_tile(a + square_bytes, map[1], full, depth, row[1], 0);
      for (int half = 0; half < halves; ++half) {
        copy_tile(a + K::a_bytes + half * K::half_bytes, &maps.b, full, depth,
                  t.column + half * K::half_columns, t.outer());
      }
      copy_row(memory + K::scales + stage.index * K::scale_bytes,
               p.b_scales + depth / step * p.b_scale_line + t.column, scale_bytes, full);
      stage.next();
    }
    turn.tell();
  }
  turn.end();
}

// Addresses in shared memory, known once: what the compiler could make anew it would, each step.
struct Places {
  uint32_t a, b;                                      // of stage 0: operands' descriptors' lower words
  uint32_t full;                                      // its barrier
  static constexpr int empty = sizeof(Shared::full);  // where the other barrier stands after it

  template <class K>
  __device__ static Places of(char* memory, Shared& s, int group) {
    Places places{operand_of(memory + group * square_bytes), operand_of(memory + K::a_bytes),
                  shared_address(s.full)};
    asm volatile("" : "+r"(places.a), "+r"(places.b), "+r"(places.full));
    return places;
  }
  __device__ static uint32_t operand_of(const void* tile) {
    return static_cast<uint32_t>(rows_operand(tile));
  }
};

__device__ inline bool ready_at(uint32_t barrier, int parity) {
  uint32_t ready;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n}\n"
      : "=r"(ready)
      : "r"(barrier), "r"(parity)
      : "memory");
  return ready;
}
// A thread's scales: of its two rows, and of squares. They are read a step ahead.
template <class K>
struct Scales {
  const float* a;  // of its first row, at the next step
  const float* b[K::halves];
  int a_line, second;  // where the next step's and the other row's stand after it

  __device__ Scales(const HopperProduct& p, const Tiles& t, int row) {
    const int last = t.end_row - 1;  // beyond it results are not stored
    a_line = static_cast<int>(p.a_scale_line), second = row + 8 <= last ? 8 : 0;
    begin(p, t, min(row, last), t.other);
  }
  __device__ void begin(const HopperProduct& p, const Tiles& t, int row, bool other) {
    const int64_t block = K::squares && other ? 0 : t.first_depth / step;
    a = (other ? p.other_a_scales : p.a_scales) + block * p.a_scale_line + row;
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

// The sums of a tile's columns: `first` of the first half, `second` of the other; 0: there is none. Whatever
// can be done beside a product in flight is, since all that a warpgroup does between its products is time in
// which the tensor cores have the other one's alone.
template <class K, int first, int second>
struct Steps {
  const HopperProduct& p;
  const Tiles& t;
  const Places& at;
  Stage<K::stages>& stage;
  int row, lane;
  bool both = true;  // whether there is a second half

  template <int columns, int deep>
  __device__ static void multiply(float (&part)[columns / 2], uint32_t a, uint32_t b) {
    constexpr uint64_t rest = uint64_t{64} << 32 | uint64_t{1} << 62;  // of a descriptor (hopper.cuh)
    products_begin();
#pragma unroll
    for (int k = 0; k < deep; ++k)
      wgmma_e4m3(part, rest | (a + k * static_cast<uint32_t>(rows_step)),
                 rest | (b + k * static_cast<uint32_t>(rows_step)), k > 0);
    products_commit();
  }
  // The last half's stage is given back as soon as it has been multiplied.
  template <int columns, int deep, bool last, class Beside>
  __device__ void half(uint32_t a, uint32_t b, uint32_t empty, const float (&of_a)[2], float of_b, float* sum,
                       const Beside& beside) const {
    constexpr int count = columns / 2;
    float part[count];
    multiply<columns, deep>(part, a, b);
    beside();
    const float scale[2] = {of_a[0] * of_b, of_a[1] * of_b};
    products_wait<0>();
    if ((last || empty != 0) && lane == 0) arrive_at(empty);
#pragma unroll
    for (int i = 0; i < count; ++i) sum[i] = fmaf(part[i], scale[i / 2 % 2], sum[i]);
  }

  __device__ void run(float (&sum)[K::columns / 2]) const {
#pragma unroll
    for (float& x : sum) x = 0;
    if (t.first_depth >= t.end_depth) return;
    Scales<K> scales(p, t, row);
    float next_a[2], next_b[K::halves];
    scales.next(next_a, next_b);
    bool ready = false;
    const int whole = static_cast<int>(p.depth);
    int depth = t.first_depth;
    const auto one = [&]<int deep>() {
      const uint32_t offset = stage.index * (K::stage_bytes >> 4);
      const uint32_t a = at.a + offset, b = at.b + offset;
      const uint32_t empty = at.full + stage.index * 8 + Places::empty;
      float of_a[2], of_b[K::halves];
#pragma unroll
      for (int i = 0; i < 2; ++i) of_a[i] = next_a[i];
#pragma unroll
      for (int i = 0; i < K::halves; ++i) of_b[i] = next_b[i];
      if (!ready) wait_at(at.full + stage.index * 8, stage.phase);
      half<first, deep, second == 0>(a, b, second == 0 || (!K::gated && !both) ? empty : 0, of_a, of_b[0],
                                     sum, [&] {
                                       depth += step;
                                       stage.next();
                                       if (depth >= t.end_depth) return;
                                       if (depth == t.other_depth)
                                         scales.begin(p, t, min(row, t.end_row - 1), true);
                                       scales.next(next_a, next_b);
                                       if (second == 0)
                                         ready = ready_at(at.full + stage.index * 8, stage.phase);
                                     });
      if constexpr (second > 0) {
        if (!K::gated && !both) {
          ready = depth < t.end_depth && ready_at(at.full + stage.index * 8, stage.phase);
          return;
        }
        half<second, deep, true>(
            a, b + (K::half_bytes >> 4), empty, of_a, of_b[K::halves - 1], sum + K::half_columns / 2,
            [&] { ready = depth < t.end_depth && ready_at(at.full + stage.index * 8, stage.phase); });
      }
    };
    if constexpr (K::squares && !K::gated) {
      while (depth < t.end_depth) {
        // The last step of a product may be half a one.
        const int begin = depth >= t.other_depth ? t.other_depth : 0;
        const int end = min(t.end_depth, begin == 0 ? t.other_depth : t.end_depth);
        const int last = begin + (end - begin - 1) / step * step;
        const bool half_a_step = whole - (last - begin) <= step / 2;
        const int full_end = half_a_step ? last : end;
        while (depth < full_end) one.template operator()<4>();
        if (half_a_step) one.template operator()<2>();
      }
    } else {
      while (depth < t.end_depth) one.template operator()<4>();
    }
  }
};

template <class K>
__device__ void add_scaled(const HopperProduct& p, const Tiles& t, const Places& at,
                           float (&sum)[K::columns / 2], Stage<K::stages>& stage) {
  const int group = static_cast<int>(threadIdx.x) / 128, thread = static_cast<int>(threadIdx.x) % 128;
  const int lane = thread % warp_size, row = t.row + group * 64 + thread / warp_size * 16 + lane / 4;
  const int left = static_cast<int>(p.columns) - t.column;
  if constexpr (K::gated) {
    if (left > 64) {
      Steps<K, 128, 128>{p, t, at, stage, row, lane}.run(sum);
    } else {
      Steps<K, 64, 64>{p, t, at, stage, row, lane}.run(sum);
    }
  } else {
    Steps<K, 128, K::halves == 2 ? 128 : 0>{p, t, at, stage, row, lane, left > 128}.run(sum);
  }
}

// The same where b has a scale a column, which has come with the stage's tiles.
template <class K>
__device__ void add_scaled_columns(const HopperProduct& p, const Tiles& t, float (&sum)[K::columns / 2],
                                   char* memory, Shared& s, Stage<K::stages>& stage) {
  const int group = static_cast<int>(threadIdx.x) / 128, thread = static_cast<int>(threadIdx.x) % 128;
  const int lane = thread % warp_size, row = t.row + group * 64 + thread / warp_size * 16 + lane / 4;
  const int halves = halves_of<K>(p, t);
#pragma unroll
  for (float& x : sum) x = 0;
  if (t.first_depth >= t.end_depth) return;
  Scales<K> scales(p, t, row);
  float next_a[2], none[K::halves];
  scales.next(next_a, none);
  for (int depth = t.first_depth; depth < t.end_depth; depth += step) {
    const char* a = memory + stage.index * K::stage_bytes;
    const float of_a[2] = {next_a[0], next_a[1]};
    if (depth + step < t.end_depth) scales.next(next_a, none);
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
  const Places places = Places::of<K>(memory, s, group);
  Tiles t(p, s, K::own_columns);
  Stage<K::stages> stage;
  float sum[K::columns / 2];
  if constexpr (K::squares) {
    FoundTiles found{s};
    while (found.hear(t)) {
      add_scaled<K>(p, t, places, sum, stage);
      if constexpr (K::gated) {
        put_gated(output, t, p, maps, sum);
      } else {
        put_sums(output, t, p, maps, sum);
      }
    }
  } else {
    for (Turn turn(p, s); turn.tile < t.count; turn.hear()) {
      t.find(turn.tile, K::own_columns);
      const GroupRows rows(p, t.row, group);
      t.row = rows.row - group * 64, t.other = rows.other;
      add_scaled_columns<K>(p, t, sum, memory, s, stage);
      const Target to = t.other ? Target{&maps.other_c, nullptr, p.other_c} : Target{&maps.c, nullptr, p.c};
      output.template put<32, true>(t, to, sum);
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
    fewer_registers<K::squares ? 24 : 40>();
    if (threadIdx.x != 256) return;
    if constexpr (K::squares) {
      copy_fp8_tiles<K>(p, maps, s, memory);
    } else {
      copy_column_tiles<K>(p, maps, s, memory);
    }
  } else {
    more_registers<K::squares ? 240 : 232>();
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
  const int a_rows = K::squares ? tile_rows : tile_rows / 2;
  maps.a = map_of(p.a, p.rows, p.a_line, 1, 0, a_rows);
  maps.b = map_of(p.b, p.columns, p.b_line, outer, p.b_batch, K::half_columns);
  if (p.other_a) maps.other_a = map_of(p.other_a, p.rows, p.a_line, 1, 0, a_rows);
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
  if (p.offsets) p.taken = context.taken;  // experts' tiles differ
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
