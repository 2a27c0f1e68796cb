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

using Eight = Pack<bf16, 8>;

__device__ inline Eight eight_at(const bf16* x) { return *reinterpret_cast<const Eight*>(x); }

// Which row is read, and what it is multiplied by; tabled: found once for all threads of a block.
struct From {
  int row;
  float weight;
};

// Rows of x, or those that `rows` names; or of matrices of a stack.
struct RowsOf {
  static constexpr int results = 1;
  static constexpr bool tabled = false;
  const bf16* x;
  int64_t line, matrix;
  const int32_t* rows;

  __device__ From find(int row) const { return {rows ? rows[row] : row, 1}; }
  __device__ void read(const From& from, int64_t column, Eight (&to)[1]) const {
    to[0] = eight_at(x + blockIdx.z * matrix + from.row * line + column);
  }
};

// combine_backward's d_y: each sorted row is its token's row of d_out times the weight of its choice.
struct CombinedRows {
  static constexpr int results = 1;
  static constexpr bool tabled = true;  // a search
  const bf16* d_out;
  int64_t line;
  const float* weights;
  const int32_t* slots;
  const int32_t* rows;
  int top_k;

  __device__ From find(int row) const {
    const int token = rows[row];
    const int64_t first = int64_t{token} * top_k;
    int choice = 0;
#pragma unroll 8
    for (int i = 1; i < top_k; ++i) choice = slots[first + i] == row ? i : choice;
    return {token, weights[first + choice]};
  }
  __device__ void read(const From& from, int64_t column, Eight (&to)[1]) const {
    float x[8];
    load<8>(d_out + from.row * line + column, x);
#pragma unroll
    for (float& value : x) value *= from.weight;
    store<8>(x, to[0].at);
  }
};

// swiglu_backward's two results.
struct GatedRows {
  static constexpr int results = 2;
  static constexpr bool tabled = false;
  const bf16* d_out;
  const bf16* gated;
  const bf16* risen;
  int64_t d_out_line, gated_line, risen_line;

  __device__ From find(int row) const { return {row, 1}; }
  __device__ void read(const From& from, int64_t column, Eight (&to)[2]) const {
    float d[8], g[8], u[8];
    load<8>(d_out + from.row * d_out_line + column, d);
    load<8>(gated + from.row * gated_line + column, g);
    load<8>(risen + from.row * risen_line + column, u);
#pragma unroll
    for (int i = 0; i < 8; ++i) swiglu_backward_of(d[i], g[i], u[i]);
    store<8>(g, to[0].at);
    store<8>(u, to[1].at);
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
  int64_t rows, columns, across_line;  // of codes: lines are `columns`
  const int32_t* offsets;              // or null
  int experts;
  // Rows are read by several experts: of some columns they all fit in the L2 cache, so tiles of the same
  // columns follow one another.
  bool columns_together;
};

struct TileMemory {
  float mosts[warps][block];
  float inverses[block];
  uint32_t across[block][block / 4];  // words of four rows; word w of column c stands at w ^ c / 8 · 2
};

// A thread has eight columns of 2 × 4 neighbouring rows.
struct Place {
  int lane = static_cast<int>(threadIdx.x) % warp_size, warp = static_cast<int>(threadIdx.x) / warp_size;
  int column = lane % 16 * 8, four = warp * 2 + lane / 16;
  __device__ int row(int i) const { return i / 4 * 64 + four * 4 + i % 4; }
};

template <bool squares>
__device__ void quantise_tile(const Eight (&values)[8], const Target& to, int64_t tile, int64_t first_row,
                              int64_t end_row, int64_t column_block, int64_t rows, int64_t columns,
                              int64_t across_line, TileMemory& memory) {
  const Place at;
  const int64_t first_column = column_block * block;
  const bool inside = first_column + at.column < columns;
  const auto value = [&](int i, int j) { return widen(values[i].at[j]); };

  // Largest magnitudes: of rows, of columns, or of the tile.
  float column_most[8] = {};
  float row_most[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    row_most[i] = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float x = fabsf(value(i, j));
      row_most[i] = fmaxf(row_most[i], x);
      column_most[j] = fmaxf(column_most[j], x);
    }
  }
  if (squares) {
    float most = 0;
#pragma unroll
    for (const float x : row_most) most = fmaxf(most, x);
    most = warp_max(most);
    if (at.lane == 0) memory.mosts[at.warp][0] = most;
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float most = fmaxf(column_most[j], __shfl_xor_sync(whole_warp, column_most[j], 16));
      if (at.lane < 16) memory.mosts[at.warp][at.column + j] = most;
    }
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
      const int64_t row_blocks = (rows + block - 1) / block, column_blocks = (columns + block - 1) / block;
      to.scales[tile * column_blocks + column_block] = scale.scale;
      to.across_scales[column_block * row_blocks + tile] = scale.scale;
    }
    if (!squares && first_column + thread < columns)
      to.across_scales[tile * columns + first_column + thread] = scale.scale;
  }

  // Sixteen lanes have a row: they trade halves of their eight rows until lanes 2i and 2i + 1 have row i's
  // largest magnitude, and its scale is computed once.
  float row_inverses[8];
  if (!squares) {
#pragma unroll
    for (int half = 4; half > 0; half /= 2) {
      const bool high = at.lane & half * 2;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float other = __shfl_xor_sync(whole_warp, high ? row_most[i] : row_most[i + half], half * 2);
        row_most[i] = fmaxf(high ? row_most[i + half] : row_most[i], other);
      }
    }
    const Scale scale(fmaxf(row_most[0], __shfl_xor_sync(whole_warp, row_most[0], 1)));
    const int64_t row = first_row + at.row(at.lane % 16 / 2);
    if (at.lane % 2 == 0 && row < end_row) to.scales[column_block * rows + row] = scale.scale;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      row_inverses[i] = __shfl_sync(whole_warp, scale.inverse, (at.lane & 16) | i * 2);
  } else {
    __syncthreads();
#pragma unroll
    for (float& inverse : row_inverses) inverse = memory.inverses[0];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t row = first_row + at.row(i);
    const float inverse = row_inverses[i];
    if (row >= end_row) continue;
    if (!inside) continue;
    const uint2 codes{
        codes_of(value(i, 0) * inverse, value(i, 1) * inverse, value(i, 2) * inverse, value(i, 3) * inverse),
        codes_of(value(i, 4) * inverse, value(i, 5) * inverse, value(i, 6) * inverse, value(i, 7) * inverse)};
    *reinterpret_cast<uint2*>(to.codes + row * columns + first_column + at.column) = codes;
  }

  if (!squares) __syncthreads();
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float inverse = memory.inverses[at.column + j];
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const int word = i * 4 + at.four;
      memory.across[at.column + j][word ^ at.column / 4] =
          codes_of(value(i, j) * inverse, value(i + 1, j) * inverse, value(i + 2, j) * inverse,
                   value(i + 3, j) * inverse);
    }
  }
  __syncthreads();
  for (int i = thread; i < block * 8; i += threads) {
    const int column = i / 8, piece = i % 8, turn = column / 8;
    const int64_t first = tile * block + piece * 16;
    if (first_column + column >= columns || first >= across_line) continue;
    const uint4 words = *reinterpret_cast<const uint4*>(&memory.across[column][(piece ^ turn / 2) * 4]);
    *reinterpret_cast<uint4*>(to.across + (first_column + column) * across_line + first) =
        turn % 2 ? uint4{words.z, words.w, words.x, words.y} : words;
  }
}

// grid: blocks of columns and tiles of rows, or the other way round, and matrices of a stack.
template <class Source, bool squares>
__global__ __launch_bounds__(threads, 2) void quantise_kernel(Tiles<Source> p) {
  __shared__ __align__(16) TileMemory memory;
  __shared__ From from[Source::tabled ? block : 1];
  const int64_t tile = p.columns_together ? blockIdx.x : blockIdx.y;
  const int64_t column_block = p.columns_together ? blockIdx.y : blockIdx.x;
  int64_t first_row = tile * block, end_row = min(first_row + block, p.rows);
  if (p.offsets) {
    const ExpertTile found = find_tile(p.offsets, p.experts, block, static_cast<int>(tile));
    first_row = found.begin, end_row = found.end;
    if (first_row == end_row) return;
  }
  const int rows = static_cast<int>(end_row - first_row), thread = static_cast<int>(threadIdx.x);
  const int first = static_cast<int>(first_row);
  if constexpr (Source::tabled) {
    if (thread < rows) from[thread] = p.source.find(first + thread);
    __syncthreads();
  }
  const Place at;
  const int64_t column = column_block * block + at.column;
  Eight values[Source::results][8] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (at.row(i) >= rows || column >= p.columns) continue;
    Eight read[Source::results];
    if constexpr (Source::tabled) {
      p.source.read(from[at.row(i)], column, read);
    } else {
      p.source.read(p.source.find(first + at.row(i)), column, read);
    }
#pragma unroll
    for (int r = 0; r < Source::results; ++r) values[r][i] = read[r];
  }
  const int64_t matrix = blockIdx.z;
#pragma unroll
  for (int r = 0; r < Source::results; ++r) {
    if (r > 0) __syncthreads();
    Target to = p.to[r];
    if (squares) {
      const int64_t scales = static_cast<int64_t>(gridDim.x) * gridDim.y;
      to.codes += matrix * p.rows * p.columns, to.across += matrix * p.rows * p.columns;
      to.scales += matrix * scales, to.across_scales += matrix * scales;
    }
    quantise_tile<squares>(values[r], to, tile, first_row, end_row, column_block, p.rows, p.columns,
                           p.across_line, memory);
  }
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
  p.rows = shape.along.codes[-2], p.columns = shape.along.codes[-1];
  p.across_line = shape.across.codes[-1];
  p.offsets = offsets.as_or_null<int32_t>();
  p.experts = offsets ? static_cast<int>(offsets.count() - 1) : 0;
  LATENTE_ASSERT(p.columns % 16 == 0 && p.across_line % 16 == 0 && shape.across.codes[-2] == p.columns);
  LATENTE_ASSERT(p.across_line == (squares ? p.rows : fp8_depth(p.rows, p.experts)));
  if (p.rows == 0 || p.columns == 0 || matrices == 0) return;
  const unsigned tiles = blocks_for(p.across_line, block), blocks = blocks_for(p.columns, block);
  const dim3 grid(p.columns_together ? tiles : blocks, p.columns_together ? blocks : tiles,
                  static_cast<unsigned>(matrices));
  quantise_kernel<Source, squares><<<grid, threads, 0, context.stream>>>(p);
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
  const RowsOf source{x.as<bf16>(), x.stride(0), 0, rows.as_or_null<int32_t>()};
  launch<false>(Tiles<RowsOf>{source, {target_of(out)}, 0, 0, 0, nullptr, 0, static_cast<bool>(rows)},
                offsets, 1, out, "quantise_fp8", context);
}

void quantise_fp8_weight(View w, const Fp8Operand& out, const Context& context) {
  LATENTE_ASSERT(in_packs(8, {w}) && w.shape == out.along.codes.shape);
  const bool stack = w.shape.rank() == 3;
  const RowsOf source{w.as<bf16>(), w.stride(-2), stack ? w.stride(0) : 0, nullptr};
  launch<true>(Tiles<RowsOf>{source, {target_of(out)}, 0, 0, 0, nullptr, 0, false}, {}, stack ? w[0] : 1, out,
               "quantise_fp8_weight", context);
}

void swiglu_backward_fp8(View d_out, View gated, View risen, View offsets, const Fp8Operand& d_gated,
                         const Fp8Operand& d_risen, const Context& context) {
  LATENTE_ASSERT(in_packs(8, {d_out, gated, risen}) && d_out.shape == d_gated.along.codes.shape);
  const GatedRows source{d_out.as<bf16>(), gated.as<bf16>(), risen.as<bf16>(),
                         d_out.stride(0),  gated.stride(0),  risen.stride(0)};
  launch<false>(
      Tiles<GatedRows>{source, {target_of(d_gated), target_of(d_risen)}, 0, 0, 0, nullptr, 0, false}, offsets,
      1, d_gated, "swiglu_backward_fp8", context);
}

void combine_backward_fp8(View d_out, View weights, View slots, View rows, View offsets,
                          const Fp8Operand& d_y, const Context& context) {
  LATENTE_ASSERT(in_packs(8, {d_out}) && weights.contiguous() && slots.contiguous());
  LATENTE_ASSERT(rows.count() == d_y.along.codes[0] && slots.count() == rows.count());
  const CombinedRows source{d_out.as<bf16>(),    d_out.stride(0),    weights.as<float>(),
                            slots.as<int32_t>(), rows.as<int32_t>(), static_cast<int>(slots[1])};
  launch<false>(Tiles<CombinedRows>{source, {target_of(d_y)}, 0, 0, 0, nullptr, 0, true}, offsets, 1, d_y,
                "combine_backward_fp8", context);
}

void linear_fp8(const Fp8Matrix& x, const Fp8Matrix& w, View offsets, View bias, Grad out,
                const Context& context) {
  if (!out) return;
  HopperProduct p = rows_product(x, w, offsets, out);
  p.bias = bias.data, p.exact_bias = bias.dtype == DType::f32;
  launch(p, "linear", context);
}

void gated_linear_fp8(const Fp8Matrix& x, const Fp8Matrix& gate, const Fp8Matrix& up, View offsets,
                      View gated, View risen, View out, const Context& context) {
  LATENTE_ASSERT(gate.codes.shape == up.codes.shape && gated.strides == risen.strides &&
                 gated.strides == out.strides);
  HopperProduct p = rows_product(x, gate, offsets, {gated, false});
  p.pair = Pair::gated;
  p.other_b = up.codes.data, p.other_b_scales = up.scales.as<float>();
  p.other_c = risen.data, p.inner = out.data;
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

void linear_fp8_backward_weight(const Fp8Matrix& d_out_across, const Fp8Matrix& x_across, View offsets,
                                Grad d_w, const Context& context) {
  if (!d_w) return;
  const char* name = "linear_backward_weight";
  HopperProduct p = product_of(d_out_across, x_across, d_w.view, d_w.accumulate);
  LATENTE_ASSERT(d_w.view[-2] == p.rows && d_w.view[-1] == p.columns);
  if (offsets) {
    LATENTE_ASSERT(offsets.count() == d_w.view[0] + 1);
    p.c_batch = d_w.view.stride(0), p.by_depth = true;
    p.offsets = offsets.as<int32_t>(), p.experts = static_cast<int>(d_w.view[0]);
    return launch(p, name, context);
  }
  constexpr int64_t least_depth = 512, step = 64;
  const int64_t size = p.rows * p.columns;
  const int64_t most = std::min(p.depth / least_depth, context.workspace_bytes / (4 * size));
  const int64_t parts = best_parts(p, most, context);
  if (parts <= 1) return launch(p, name, context);
  HopperProduct cut = p;
  cut.part_depth = (p.depth / parts + step - 1) / step * step;
  const auto count = static_cast<int>((p.depth + cut.part_depth - 1) / cut.part_depth);
  auto* sums = static_cast<float*>(context.workspace);
  cut.c = sums, cut.c_row = p.columns, cut.c_batch = size;
  cut.accumulate = false;
  launch(cut, name, context);
  sum_parts(sums, count, p.rows, p.columns, d_w.view.as<float>(), p.c_row, p.accumulate, name, context);
}

}  // namespace latente::cuda
