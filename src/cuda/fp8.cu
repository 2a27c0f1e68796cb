// Training in FP8 (DeepSeek-V3 report, section 3.3): e4m3 with a float32 scale for 128 elements along a sum,
// or of weights for squares of 128 × 128. Quantisation here, products in product_fp8_sm90.cu.
#include <cuda_fp8.h>

#include "cuda/kernels.h"
#include "cuda/product.cuh"
#include "cuda/product_sm90.h"

namespace latente::cuda {
namespace {

constexpr int block = fp8_block, threads = 256, warps = threads / warp_size;
constexpr float largest = 448;

struct Scale {
  float scale, inverse;
  // Of values up to `most` in magnitude.
  __device__ explicit Scale(float most) {
    most = fmaxf(most, 1e-30f);
    scale = most / largest, inverse = largest / most;
  }
};

__device__ inline uint32_t codes_of(float a, float b, float c, float d) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2({a, b}, __NV_SATFINITE, __NV_E4M3);
  return low | static_cast<uint32_t>(__nv_cvt_float2_to_fp8x2({c, d}, __NV_SATFINITE, __NV_E4M3)) << 16;
}

// -- where a tile's values come from: eight columns of a row, as bfloat16 --

// In words of two: the lower half is the first.
struct alignas(16) Eight {
  uint32_t at[4];
  __device__ float operator[](int i) const {
    return __uint_as_float(i % 2 ? at[i / 2] & 0xffff0000 : at[i / 2] << 16);
  }
};

__device__ inline Eight eight_at(const bf16* x) { return *reinterpret_cast<const Eight*>(x); }
__device__ inline Eight eight_of(const float (&x)[8]) {
  Eight to;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(to.at[i]) : "f"(x[i * 2 + 1]), "f"(x[i * 2]));
  return to;
}
// Of either half.
__device__ inline uint32_t larger(uint32_t a, uint32_t b) {
  uint32_t most;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  return most;
}

// Rows of x, or those that `rows` names; or of matrices of a stack.
template <bool Gathered>
struct RowsOf {
  static constexpr int results = 1, staged = 0, blocks = Gathered ? 4 : 3;  // on a multiprocessor
  static constexpr bool weighted = false;
  const bf16* x;
  int line;
  int64_t matrix;
  const int32_t* rows;

  __device__ void read(int row, int column, Eight (&to)[1]) const {
    to[0] = eight_at(x + blockIdx.z * matrix + column + int64_t{Gathered ? rows[row] : row} * line);
  }
};

__device__ inline void copy_eight(uint4& to, const bf16* from) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(&to))),
      "l"(from)
      : "memory");
}

// swiglu_backward's two results, of rows times factors where those are. Then read() returns what its columns
// add to the gradient of the row's factor. A thread has three times as much to read as registers to wait for
// it in, so it reads by way of shared memory.
template <bool Weighted>
struct GatedRows {
  static constexpr int results = 2, staged = 3, blocks = 2;
  static constexpr bool weighted = Weighted;
  const bf16* d_out;
  const bf16* gated;
  const bf16* risen;
  int d_out_line, gated_line, risen_line;
  const float* factors;

  // As the thread's i-th.
  __device__ void stage(int i, int row, int column, uint4 (*to)[threads]) const {
    copy_eight(to[i * 3][threadIdx.x], d_out + column + int64_t{row} * d_out_line);
    copy_eight(to[i * 3 + 1][threadIdx.x], gated + column + int64_t{row} * gated_line);
    copy_eight(to[i * 3 + 2][threadIdx.x], risen + column + int64_t{row} * risen_line);
  }
  __device__ float read(int i, float factor, const uint4 (*from)[threads], Eight (&to)[2]) const {
    const auto eight = [&](int k) { return *reinterpret_cast<const Eight*>(&from[i * 3 + k][threadIdx.x]); };
    const Eight d = eight(0), gate = eight(1), up = eight(2);
    float g[8], u[8], product = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      g[j] = gate[j], u[j] = up[j];
      if (Weighted) product = fmaf(d[j], swiglu_of(g[j], u[j]), product);
      swiglu_backward_of(Weighted ? d[j] * factor : d[j], g[j], u[j]);
    }
    to[0] = eight_of(g), to[1] = eight_of(u);
    return product;
  }
};

// -- a block quantises 128 rows and columns, in both directions --

struct Target {
  uint8_t* codes;
  float* scales;
  uint8_t* across;
  float* across_scales;
};

template <class Source>
struct Tiles {
  Source source;
  Target to[Source::results];
  int rows, columns, across_line;  // of codes: lines are `columns`
  const int32_t* offsets;          // or null
  int experts;
  // Blocks of columns whose tiles follow one another before the next ones: all, or where rows are read by
  // several experts one, of which they all fit in the L2 cache.
  int together;
  float* products;  // [blocks of columns, rows]: sums of what read() returned
};

template <class Source>
struct TileMemory {
  union {
    uint32_t across[block][block / 4];  // words of four rows; word w of column c stands at w ^ c / 8 · 2
    uint4 staged[Source::staged > 0 ? Source::staged * 8 : 1][threads];  // what threads read, before that
  };
  float mosts[warps][block];
  float inverses[block];
};

// A thread has eight columns of 2 × 4 neighbouring rows.
struct Place {
  int lane = static_cast<int>(threadIdx.x) % warp_size, warp = static_cast<int>(threadIdx.x) / warp_size;
  int column = lane % 16 * 8, four = warp * 2 + lane / 16;
  __device__ int row(int i) const { return i / 4 * 64 + four * 4 + i % 4; }
};

// Sixteen lanes have eight columns each of eight rows: they trade halves of their rows' values until lanes 2i
// and 2i + 1 have row i's, of all columns.
template <class Join>
__device__ float of_own_row(float (&of_rows)[8], const Place& at, const Join& join) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool high = at.lane & half * 2;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float other = __shfl_xor_sync(whole_warp, high ? of_rows[i] : of_rows[i + half], half * 2);
      of_rows[i] = join(high ? of_rows[i + half] : of_rows[i], other);
    }
  }
  return join(of_rows[0], __shfl_xor_sync(whole_warp, of_rows[0], 1));
}

// Of a tile's rows and columns, first_row .. and first_column .., those below `rows` and `columns` exist;
// `whole`: all of them.
template <class Source, bool squares, bool whole>
__device__ void quantise_tile(const Tiles<Source>& p, const Eight (&values)[8], const Target& to, int tile,
                              int first_row, int rows, int column_block, TileMemory<Source>& memory) {
  const Place at;
  const int first_column = column_block * block, columns = p.columns - first_column;
  const bool inside = whole || at.column < columns;
  // Largest magnitudes: of rows, of columns, or of the tile. Bfloat16 compares as what it widens to.
  constexpr uint32_t magnitude = 0x7fff7fff;
  uint32_t column_mosts[4] = {};
  float row_most[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    uint32_t most = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t x = values[i].at[j] & magnitude;
      most = larger(most, x);
      column_mosts[j] = larger(column_mosts[j], x);
    }
    row_most[i] = fmaxf(__uint_as_float(most << 16), __uint_as_float(most & 0xffff0000));
  }
  float row_inverses[8];
  if (squares) {
    float most = 0;
#pragma unroll
    for (const float x : row_most) most = fmaxf(most, x);
    most = warp_max(most);
    if (at.lane == 0) memory.mosts[at.warp][0] = most;
  } else {
    Eight most;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      most.at[j] = larger(column_mosts[j], __shfl_xor_sync(whole_warp, column_mosts[j], 16));
    float eight[2][4];
#pragma unroll
    for (int j = 0; j < 8; ++j) eight[j / 4][j % 4] = most[j];
    if (at.lane < 16) {
      store<4>(eight[0], memory.mosts[at.warp] + at.column);
      store<4>(eight[1], memory.mosts[at.warp] + at.column + 4);
    }
    // A row's scale is computed once.
    const Scale scale(of_own_row(row_most, at, [](float a, float b) { return fmaxf(a, b); }));
    const int row = at.row(at.lane % 16 / 2);
    if (at.lane % 2 == 0 && (whole || row < rows))
      to.scales[int64_t{column_block} * p.rows + first_row + row] = scale.scale;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      row_inverses[i] = __shfl_sync(whole_warp, scale.inverse, (at.lane & 16) | i * 2);
  }
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < block) {
    float most = 0;
#pragma unroll
    for (int w = 0; w < warps; ++w) most = fmaxf(most, memory.mosts[w][squares ? 0 : thread]);
    const Scale scale(most);
    memory.inverses[thread] = scale.inverse;
    if (squares && thread == 0) {
      const int row_blocks = (p.rows + block - 1) / block, column_blocks = (p.columns + block - 1) / block;
      to.scales[tile * column_blocks + column_block] = scale.scale;
      to.across_scales[column_block * row_blocks + tile] = scale.scale;
    }
    if (!squares && (whole || thread < columns))
      to.across_scales[int64_t{tile} * p.columns + first_column + thread] = scale.scale;
  }
  __syncthreads();
  float inverses[2][4];
  if (squares) {
#pragma unroll
    for (float& inverse : row_inverses) inverse = memory.inverses[0];
  } else {
    load<4>(memory.inverses + at.column, inverses[0]);
    load<4>(memory.inverses + at.column + 4, inverses[1]);
  }

  // Four rows at a time, whose codes along and across are made of what was widened once.
  uint8_t* codes_at = to.codes + int64_t{first_row + at.four * 4} * p.columns + first_column + at.column;
  uint32_t* across_at = &memory.across[at.column][at.four ^ at.column / 4];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    float x[4][8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) x[i][j] = values[part * 4 + i][j];
    }
    uint32_t along[4][2], four_rows[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float inverse = row_inverses[part * 4 + i];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float* of = x[i] + h * 4;
        along[i][h] = codes_of(of[0] * inverse, of[1] * inverse, of[2] * inverse, of[3] * inverse);
      }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float inverse = squares ? row_inverses[0] : inverses[j / 4][j % 4];
      four_rows[j] = codes_of(x[0][j] * inverse, x[1][j] * inverse, x[2][j] * inverse, x[3][j] * inverse);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (whole || (inside && at.row(part * 4 + i) < rows))
        *reinterpret_cast<uint2*>(codes_at + i * p.columns) = {along[i][0], along[i][1]};
    }
    // Word four + 16 stands where four's would, but for 16.
    uint32_t* words = part == 0 ? across_at : &memory.across[at.column][(at.four + 16) ^ at.column / 4];
#pragma unroll
    for (int j = 0; j < 8; ++j) words[j * (block / 4)] = four_rows[j];
    codes_at += int64_t{64} * p.columns;
  }
  __syncthreads();
  const int piece = thread % 8, first = tile * block + piece * 16;
  uint8_t* out = to.across + int64_t{first_column} * p.across_line + first;
#pragma unroll
  for (int i = 0; i < block * 8; i += threads) {
    const int column = (i + thread) / 8, turn = column / 8;
    const uint4 words = *reinterpret_cast<const uint4*>(&memory.across[column][(piece ^ turn / 2) * 4]);
    if (whole || (column < columns && first < p.across_line))
      *reinterpret_cast<uint4*>(out + int64_t{column} * p.across_line) =
          turn % 2 ? uint4{words.z, words.w, words.x, words.y} : words;
  }
}

template <class Source, bool squares, bool whole>
__device__ void quantise_rows(const Tiles<Source>& p, int tile, int column_block, int first, int rows,
                              TileMemory<Source>& memory) {
  const Place at;
  const int column = column_block * block + at.column;
  // Read wherever the nearest one is, so that no branch stands between the reads.
  const int nearest = whole ? column : min(column, p.columns - 8);
  const auto row_at = [&](int i) { return first + (whole ? at.row(i) : min(at.row(i), rows - 1)); };
  float factors[8];
  if constexpr (Source::staged > 0) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      p.source.stage(i, row_at(i), nearest, memory.staged);
      factors[i] = Source::weighted ? p.source.factors[row_at(i)] : 1;
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
  }
  Eight values[Source::results][8];
  float products[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    Eight read[Source::results];
    float product = 0;
    if constexpr (Source::staged > 0) {
      product = p.source.read(i, factors[i], memory.staged, read);
    } else {
      p.source.read(row_at(i), nearest, read);
    }
    const bool inside = whole || (at.row(i) < rows && column < p.columns);
    products[i] = inside ? product : 0;
#pragma unroll
    for (int r = 0; r < Source::results; ++r) {
#pragma unroll
      for (int j = 0; j < 4; ++j) values[r][i].at[j] = inside ? read[r].at[j] : 0;
    }
  }
  if constexpr (Source::weighted) {
    const float product = of_own_row(products, at, [](float a, float b) { return a + b; });
    const int row = at.row(at.lane % 16 / 2);
    if (at.lane % 2 == 0 && row < rows) p.products[int64_t{column_block} * p.rows + first + row] = product;
  }
  const int64_t matrix = blockIdx.z;
#pragma unroll
  for (int r = 0; r < Source::results; ++r) {
    if (r > 0) __syncthreads();
    Target to = p.to[r];
    if (squares) {
      const int64_t scales =
          static_cast<int64_t>(gridDim.x) * gridDim.y;  // of squares all columns are together
      const int64_t size = int64_t{p.rows} * p.columns;
      to.codes += matrix * size, to.across += matrix * size;
      to.scales += matrix * scales, to.across_scales += matrix * scales;
    }
    quantise_tile<Source, squares, whole>(p, values[r], to, tile, first, rows, column_block, memory);
  }
}

// grid: tiles of rows, of each `together` blocks of columns; the further columns; matrices of a stack.
template <class Source, bool squares>
__global__ __launch_bounds__(threads, Source::blocks) void quantise_kernel(Tiles<Source> p) {
  extern __shared__ __align__(16) char shared_bytes[];
  TileMemory<Source>& memory = *reinterpret_cast<TileMemory<Source>*>(shared_bytes);
  const int tile = static_cast<int>(blockIdx.x) / p.together;
  const int column_block =
      static_cast<int>(blockIdx.y) * p.together + static_cast<int>(blockIdx.x) % p.together;
  if (column_block * block >= p.columns) return;
  int first = tile * block, end = min(first + block, p.rows);
  if (p.offsets) {
    const ExpertTile found = find_tile(p.offsets, p.experts, block, tile);
    first = found.begin, end = found.end;
    if (first == end) return;
  }
  // Most tiles are, and need not ask for each row and column.
  if (end - first == block && (column_block + 1) * block <= p.columns) {
    quantise_rows<Source, squares, true>(p, tile, column_block, first, block, memory);
  } else {
    quantise_rows<Source, squares, false>(p, tile, column_block, first, end - first, memory);
  }
}

__global__ void sort_weights_kernel(const float* weights, const int32_t* slots, int choices, float* factors) {
  const int choice = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (choice < choices) factors[slots[choice]] = weights[choice];
}

// d_weights [T, K] (+)= the sums of the parts [parts, T·K] of the rows where choices stand.
__global__ void choose_sums_kernel(const float* parts, int count, const int32_t* slots, int choices,
                                   int top_k, float* d_weights, int64_t line, bool accumulate) {
  const int choice = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (choice >= choices) return;
  float& to = d_weights[choice / top_k * line + choice % top_k];
  float sum = accumulate ? to : 0;
  for (int i = 0; i < count; ++i) sum += parts[int64_t{i} * choices + slots[choice]];
  to = sum;
}

int whole(int64_t size) {
  LATENTE_ASSERT(size < int64_t{1} << 31);
  return static_cast<int>(size);
}

uint8_t* bytes_of(const View& codes) {
  LATENTE_ASSERT(codes.dtype == DType::f8e4m3 && codes.contiguous());
  return static_cast<uint8_t*>(codes.data);
}

Target target_of(const Fp8Operand& out) {
  LATENTE_ASSERT(out.along.scales.contiguous() && out.across.scales.contiguous());
  return {bytes_of(out.along.codes), out.along.scales.as<float>(), bytes_of(out.across.codes),
          out.across.scales.as<float>()};
}

template <bool squares, class Source>
void launch(Tiles<Source> p, const View& offsets, int64_t matrices, const Fp8Operand& shape, const char* name,
            const Context& context) {
  p.rows = whole(shape.along.codes[-2]), p.columns = whole(shape.along.codes[-1]);
  p.across_line = whole(shape.across.codes[-1]);
  p.offsets = offsets.as_or_null<int32_t>();
  p.experts = offsets ? static_cast<int>(offsets.count() - 1) : 0;
  LATENTE_ASSERT(p.columns % 16 == 0 && p.across_line % 16 == 0 && shape.across.codes[-2] == p.columns);
  LATENTE_ASSERT(p.across_line == (squares ? p.rows : fp8_depth(p.rows, p.experts)));
  if (p.rows == 0 || p.columns == 0 || matrices == 0) return;
  const unsigned tiles = blocks_for(p.across_line, block), blocks = blocks_for(p.columns, block);
  if (p.together == 0) p.together = static_cast<int>(blocks);
  const auto together = static_cast<unsigned>(p.together);
  const dim3 grid(tiles * together, (blocks + together - 1) / together, static_cast<unsigned>(matrices));
  constexpr int bytes = sizeof(TileMemory<Source>);
  auto kernel = quantise_kernel<Source, squares>;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  check(allowed, name);
  kernel<<<grid, threads, bytes, context.stream>>>(p);
  check_launch(name);
}

HopperProduct product_of(const Fp8Matrix& a, const Fp8Matrix& b, const View& out, bool accumulate) {
  LATENTE_ASSERT(a.codes.dtype == DType::f8e4m3 && b.codes.dtype == DType::f8e4m3);
  LATENTE_ASSERT(a.codes[-1] == b.codes[-1] && a.codes[-1] % 16 == 0);
  HopperProduct p;
  p.a = a.codes.data, p.b = b.codes.data, p.c = out.data;
  p.rows = a.codes[0], p.columns = b.codes[-2], p.depth = a.codes[1] / 2;
  p.a_line = a.codes.stride(0) / 2, p.b_line = b.codes.stride(-2) / 2, p.c_row = out.stride(-2);
  p.narrow = out.dtype == DType::bf16;
  p.accumulate = accumulate;
  p.a_scales = a.scales.as<float>(), p.a_scale_line = a.scales.stride(0);
  p.b_scales = b.scales.as<float>(), p.b_scale_line = b.scales.stride(-2);
  return p;
}

// x · wᵀ
HopperProduct rows_product(const Fp8Matrix& x, const Fp8Matrix& w, const View& offsets, const Grad& out) {
  HopperProduct p = product_of(x, w, out.view, out.accumulate);
  LATENTE_ASSERT(out.view[0] == p.rows && out.view[1] == p.columns);
  p.squares = true;
  if (offsets) {
    LATENTE_ASSERT(offsets.count() == w.codes[0] + 1 && w.codes.shape.rank() == 3);
    p.b_batch = w.codes.stride(0) / 2, p.b_scale_batch = w.scales.stride(0);
    p.offsets = offsets.as<int32_t>(), p.experts = static_cast<int>(w.codes[0]);
  }
  return p;
}

void launch(const HopperProduct& p, const char* name, const Context& context) {
  if (p.rows == 0 || p.columns == 0) return;
  if (!fits_hopper(p, context)) {
    fail(
        "{} in FP8 on CUDA: expected compute capability 9.0 and rows that begin at multiples of 16 bytes, "
        "found {}.{} and [{}, {}] x [{}, {}]",
        name, context.compute_capability / 10, context.compute_capability % 10, p.rows, 2 * p.depth,
        p.columns, 2 * p.depth);
  }
  hopper_product_fp8(p, name, context);
}

}  // namespace

void quantise_fp8(View x, View rows, View offsets, const Fp8Operand& out, const Context& context) {
  LATENTE_ASSERT(in_packs(8, {x}) && x[1] == out.along.codes[1]);
  LATENTE_ASSERT((rows ? rows.count() : x[0]) == out.along.codes[0]);
  const auto launch_rows = [&](auto source) {
    source.x = x.as<bf16>(), source.line = whole(x.stride(0)), source.rows = rows.as_or_null<int32_t>();
    launch<false>(
        Tiles<decltype(source)>{source, {target_of(out)}, 0, 0, 0, nullptr, 0, rows ? 1 : 0, nullptr},
        offsets, 1, out, "quantise_fp8", context);
  };
  rows ? launch_rows(RowsOf<true>{}) : launch_rows(RowsOf<false>{});
}

void quantise_fp8_weight(View w, const Fp8Operand& out, const Context& context) {
  LATENTE_ASSERT(in_packs(8, {w}) && w.shape == out.along.codes.shape);
  const bool stack = w.shape.rank() == 3;
  const RowsOf<false> source{w.as<bf16>(), whole(w.stride(-2)), stack ? w.stride(0) : 0, nullptr};
  launch<true>(Tiles<RowsOf<false>>{source, {target_of(out)}, 0, 0, 0, nullptr, 0, 0, nullptr}, {},
               stack ? w[0] : 1, out, "quantise_fp8_weight", context);
}

void sort_weights(View weights, View slots, View factors, const Context& context) {
  LATENTE_ASSERT(weights.contiguous() && slots.contiguous() && factors.contiguous());
  LATENTE_ASSERT(weights.shape == slots.shape && factors.count() == slots.count());
  if (slots.count() == 0) return;
  sort_weights_kernel<<<blocks_for(slots.count(), threads), threads, 0, context.stream>>>(
      weights.as<float>(), slots.as<int32_t>(), whole(slots.count()), factors.as<float>());
  check_launch("sort_weights");
}

void swiglu_backward_fp8(View d_out, View gated, View risen, View factors, View slots, View offsets,
                         const Fp8Operand& d_gated, const Fp8Operand& d_risen, Grad d_weights,
                         const Context& context) {
  const char* name = "swiglu_backward_fp8";
  LATENTE_ASSERT(in_packs(8, {d_out, gated, risen}) && d_out.shape == d_gated.along.codes.shape);
  const auto launch_rows = [&](auto source, float* products) {
    source.d_out = d_out.as<bf16>(), source.gated = gated.as<bf16>(), source.risen = risen.as<bf16>();
    source.d_out_line = whole(d_out.stride(0)), source.gated_line = whole(gated.stride(0));
    source.risen_line = whole(risen.stride(0)), source.factors = factors.as_or_null<float>();
    launch<false>(
        Tiles<decltype(source)>{
            source, {target_of(d_gated), target_of(d_risen)}, 0, 0, 0, nullptr, 0, 0, products},
        offsets, 1, d_gated, name, context);
  };
  if (!factors) return launch_rows(GatedRows<false>{}, nullptr);
  LATENTE_ASSERT(factors.contiguous() && slots.contiguous() && factors.count() == d_out[0]);
  LATENTE_ASSERT(slots.count() == d_out[0]);
  const int64_t parts = fp8_blocks(d_out[1]);
  LATENTE_ASSERT(parts * d_out[0] * int64_t{sizeof(float)} <= context.workspace_bytes);
  auto* products = static_cast<float*>(context.workspace);
  launch_rows(GatedRows<true>{}, products);
  if (!d_weights || d_out[0] == 0) return;
  choose_sums_kernel<<<blocks_for(slots.count(), threads), threads, 0, context.stream>>>(
      products, static_cast<int>(parts), slots.as<int32_t>(), whole(slots.count()),
      static_cast<int>(slots[1]), d_weights.view.as<float>(), d_weights.view.stride(0), d_weights.accumulate);
  check_launch(name);
}

void linear_fp8(const Fp8Matrix& x, const Fp8Matrix& w, View offsets, View bias, Grad out,
                const Context& context) {
  if (!out) return;
  HopperProduct p = rows_product(x, w, offsets, out);
  p.bias = bias.data, p.exact_bias = bias.dtype == DType::f32;
  launch(p, "linear", context);
}

void gated_linear_fp8(const Fp8Matrix& x, const Fp8Matrix& gate, const Fp8Matrix& up, View offsets,
                      View factors, View gated, View risen, View out, const Context& context) {
  LATENTE_ASSERT(gate.codes.shape == up.codes.shape && gated.strides == risen.strides &&
                 gated.strides == out.strides);
  HopperProduct p = rows_product(x, gate, offsets, {gated, false});
  p.pair = Pair::gated;
  p.other_b = up.codes.data, p.other_b_scales = up.scales.as<float>();
  p.other_c = risen.data, p.inner = out.data, p.factors = factors.as_or_null<float>();
  LATENTE_ASSERT(!factors || (factors.contiguous() && factors.count() == p.rows));
  launch(p, "gated_linear", context);
}

void gated_linear_fp8_backward_input(const Fp8Matrix& d_gated, const Fp8Matrix& d_risen,
                                     const Fp8Matrix& gate_across, const Fp8Matrix& up_across, View offsets,
                                     Grad d_x, const Context& context) {
  if (!d_x) return;
  HopperProduct p = rows_product(d_gated, gate_across, offsets, d_x);
  p.pair = Pair::depths;
  p.other_a = d_risen.codes.data, p.other_a_scales = d_risen.scales.as<float>();
  p.other_b = up_across.codes.data, p.other_b_scales = up_across.scales.as<float>();
  launch(p, "gated_linear_backward_input", context);
}

namespace {

// The gradient of weights that d_out and x are the across forms of; of a second pair with other_d where that
// is.
void backward_weight(const Fp8Matrix& d, const Fp8Matrix* other_d, const Fp8Matrix& x, const View& offsets,
                     const Grad& d_w, const Grad& other_d_w, const char* name, const Context& context) {
  HopperProduct p = product_of(d, x, d_w.view, d_w.accumulate);
  LATENTE_ASSERT(d_w.view[-2] == p.rows && d_w.view[-1] == p.columns);
  if (other_d) {
    p.pair = Pair::rows;
    p.other_a = other_d->codes.data, p.other_a_scales = other_d->scales.as<float>();
    p.other_c = other_d_w.view.data;
  }
  if (offsets) {
    LATENTE_ASSERT(offsets.count() == d_w.view[0] + 1);
    p.c_batch = d_w.view.stride(0), p.by_depth = true;
    p.offsets = offsets.as<int32_t>(), p.experts = static_cast<int>(d_w.view[0]);
    return launch(p, name, context);
  }
  constexpr int64_t least_depth = 512, step = 64;
  const int64_t size = p.rows * p.columns, products = other_d ? 2 : 1;
  const int64_t most = std::min(p.depth / least_depth, context.workspace_bytes / (4 * size * products));
  const int64_t parts = best_parts(p, most, context);
  if (parts <= 1) return launch(p, name, context);
  HopperProduct cut = p;
  cut.part_depth = (p.depth / parts + step - 1) / step * step;
  const auto count = static_cast<int>((p.depth + cut.part_depth - 1) / cut.part_depth);
  auto* sums = static_cast<float*>(context.workspace);
  cut.c = sums, cut.c_row = p.columns, cut.c_batch = size;
  if (other_d) cut.other_c = sums + count * size;
  cut.accumulate = false;
  launch(cut, name, context);
  sum_parts(sums, count, p.rows, p.columns, d_w.view.as<float>(), p.c_row, p.accumulate, name, context);
  if (!other_d) return;
  sum_parts(sums + count * size, count, p.rows, p.columns, other_d_w.view.as<float>(), p.c_row, p.accumulate,
            name, context);
}

}  // namespace

void linear_fp8_backward_weight(const Fp8Matrix& d_out_across, const Fp8Matrix& x_across, View offsets,
                                Grad d_w, const Context& context) {
  if (d_w)
    backward_weight(d_out_across, nullptr, x_across, offsets, d_w, {}, "linear_backward_weight", context);
}

void gated_linear_fp8_backward_weight(const Fp8Matrix& d_gated_across, const Fp8Matrix& d_risen_across,
                                      const Fp8Matrix& x_across, View offsets, Grad d_gate, Grad d_up,
                                      const Context& context) {
  const View &to = d_gate.view, &other = d_up.view;
  const bool together = to && other && to.data != other.data && to.strides == other.strides &&
                        d_gate.accumulate == d_up.accumulate &&
                        d_gated_across.codes.strides == d_risen_across.codes.strides;
  if (together) {
    return backward_weight(d_gated_across, &d_risen_across, x_across, offsets, d_gate, d_up,
                           "gated_linear_backward_weight", context);
  }
  linear_fp8_backward_weight(d_gated_across, x_across, offsets, d_gate, context);
  linear_fp8_backward_weight(d_risen_across, x_across, offsets, d_up, context);
}

}  // namespace latente::cuda
