// FP8 (e4m3) with a float32 scale for 128 elements along a sum, or for squares of 128 × 128 (DeepSeek-V3
// report, section 3.3.2): quantisation, and products.
#include <cuda_fp8.h>

#include "cuda/elements.cuh"
#include "cuda/kernels.h"
#include "cuda/product_sm90.h"

namespace latente::cuda {
namespace {

constexpr int block = 128, threads = 256, warps = threads / warp_size;
constexpr float largest = 448;

// The scale of values up to `most` in magnitude.
__device__ inline float scale_of(float most) { return most > 0 ? most / largest : 1.0f; }

__device__ inline uint32_t codes_of(const float (&x)[4], float scale) {
  const float2 low{x[0] / scale, x[1] / scale}, high{x[2] / scale, x[3] / scale};
  const uint32_t first = __nv_cvt_float2_to_fp8x2(low, __NV_SATFINITE, __NV_E4M3);
  return first | static_cast<uint32_t>(__nv_cvt_float2_to_fp8x2(high, __NV_SATFINITE, __NV_E4M3)) << 16;
}

// A warp 128 columns of a row.
template <class T>
__global__ __launch_bounds__(threads) void rows_kernel(const T* x, int64_t x_row, int64_t rows,
                                                       int64_t columns, uint8_t* codes, int64_t codes_row,
                                                       float* scales, int64_t scales_row) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / warp_size;
  if (row >= rows) return;
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * block; first < columns;
       first += static_cast<int64_t>(gridDim.y) * block) {
    const int64_t column = first + lane * 4;
    float values[4] = {};
    if (column < columns) load<4>(x + row * x_row + column, values);
    const float most =
        fmaxf(fmaxf(fabsf(values[0]), fabsf(values[1])), fmaxf(fabsf(values[2]), fabsf(values[3])));
    const float scale = scale_of(warp_max(most));
    if (column < columns)
      *reinterpret_cast<uint32_t*>(codes + row * codes_row + column) = codes_of(values, scale);
    if (lane == 0) scales[first / block * scales_row + row] = scale;
  }
}

// A block 128 rows of 64 columns, or with `squares` of 128: what it writes transposed comes from shared
// memory.
template <class T, bool squares>
__global__ __launch_bounds__(threads) void columns_kernel(const T* x, int64_t x_row, int64_t rows,
                                                          int64_t columns, uint8_t* codes, int64_t codes_row,
                                                          float* scales, int64_t scales_row,
                                                          uint8_t* transposed, int64_t transposed_row,
                                                          float* transposed_scales,
                                                          int64_t transposed_scales_row) {
  constexpr int width = squares ? block : 64;
  extern __shared__ float tile[];  // [width, 128 + 1]
  const int thread = static_cast<int>(threadIdx.x), lane = thread % warp_size, warp = thread / warp_size;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * block;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * width;
  float most = 0;
  for (int i = thread; i < block * width / 4; i += threads) {
    const int r = i / (width / 4), c = i % (width / 4) * 4;
    float values[4] = {};
    if (first_row + r < rows && first_column + c < columns) {
      load<4>(x + (first_row + r) * x_row + first_column + c, values);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      tile[(c + j) * (block + 1) + r] = values[j];
      most = fmaxf(most, fabsf(values[j]));
    }
  }
  __shared__ float mosts[warps];
  if (squares) {
    most = warp_max(most);
    if (lane == 0) mosts[warp] = most;
  }
  __syncthreads();
  if (squares) {
    for (int w = 0; w < warps; ++w) most = fmaxf(most, mosts[w]);
    const float scale = scale_of(most);
    if (thread == 0) {
      scales[blockIdx.y * scales_row + blockIdx.x] = scale;
      transposed_scales[blockIdx.x * transposed_scales_row + blockIdx.y] = scale;
    }
    const int c = lane * 4;
    for (int r = warp; r < block && first_row + r < rows && first_column + c < columns; r += warps) {
      const float values[4] = {tile[c * (block + 1) + r], tile[(c + 1) * (block + 1) + r],
                               tile[(c + 2) * (block + 1) + r], tile[(c + 3) * (block + 1) + r]};
      *reinterpret_cast<uint32_t*>(codes + (first_row + r) * codes_row + first_column + c) =
          codes_of(values, scale);
    }
  }
  for (int c = warp; c < width && first_column + c < columns; c += warps) {
    float values[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] = tile[c * (block + 1) + lane * 4 + j];
    float scale = scale_of(most);
    if (!squares) {
      scale = scale_of(warp_max(
          fmaxf(fmaxf(fabsf(values[0]), fabsf(values[1])), fmaxf(fabsf(values[2]), fabsf(values[3])))));
      if (lane == 0) transposed_scales[blockIdx.y * transposed_scales_row + first_column + c] = scale;
    }
    if (first_row + lane * 4 < rows) {
      *reinterpret_cast<uint32_t*>(transposed + (first_column + c) * transposed_row + first_row + lane * 4) =
          codes_of(values, scale);
    }
  }
}

uint8_t* bytes_of(const View& codes) {
  LATENTE_ASSERT(codes.dtype == DType::f8e4m3);
  return static_cast<uint8_t*>(codes.data);
}

int64_t blocks_of(int64_t count) { return (count + block - 1) / block; }

HopperProduct product_of(const Codes& a, const Codes& b, const View& out, bool accumulate) {
  HopperProduct p;
  const int b_axis = b.codes.shape.rank() - 2;
  p.a = a.codes.data, p.b = b.codes.data, p.c = out.data;
  p.rows = a.codes[0], p.columns = b.codes[b_axis], p.depth = a.codes[1] / 2;
  p.a_line = a.codes.stride(0) / 2, p.b_line = b.codes.stride(b_axis) / 2, p.c_row = out.stride(0);
  p.narrow = out.dtype == DType::bf16;
  p.accumulate = accumulate;
  p.a_scales = a.scales.as<float>(), p.a_scale_line = a.scales.stride(0);
  p.b_scales = b.scales.as<float>(), p.b_scale_line = b.scales.stride(b.scales.shape.rank() - 2);
  p.squares = b.squares;
  return p;
}

void launch(const HopperProduct& p, const View& a, const View& b, const View& out, const char* name,
            const Context& context) {
  LATENTE_ASSERT(a.dtype == DType::f8e4m3 && b.dtype == DType::f8e4m3 && a[-1] == b[-1] && a[-1] % 16 == 0);
  LATENTE_ASSERT(out[0] == a[0] && out[1] == p.columns);
  if (out.count() == 0) return;
  if (!fits_hopper(p, context)) {
    fail(
        "{} in FP8 on CUDA: expected compute capability 9.0, columns in eights and rows that begin at "
        "multiples of 16 bytes, found {}.{} and [{}, {}] x [{}, {}]",
        name, context.compute_capability / 10, context.compute_capability % 10, a[0], a[1], p.columns, b[-1]);
  }
  hopper_product(p, name, context);
}

}  // namespace

void quantise_rows(View x, View codes, View scales, const Context& context) {
  LATENTE_ASSERT(codes.shape == x.shape && scales[0] == blocks_of(x[1]) && scales[1] == x[0]);
  LATENTE_ASSERT(in_packs(4, {x, codes}));
  if (x.count() == 0) return;
  with_type(x.dtype, "quantise_rows", [&]<class T>(T) {
    const dim3 grid(blocks_for(x[0], warps), static_cast<unsigned>(blocks_of(x[1])));
    rows_kernel<<<grid, threads, 0, context.stream>>>(x.as<T>(), x.stride(0), x[0], x[1], bytes_of(codes),
                                                      codes.stride(0), scales.as<float>(), scales.stride(0));
    check_launch("quantise_rows");
  });
}

void quantise_columns(View x, View codes, View scales, const Context& context) {
  LATENTE_ASSERT(codes.shape == Shape({x[1], x[0]}) && scales[0] == blocks_of(x[0]) && scales[1] == x[1]);
  LATENTE_ASSERT(in_packs(4, {x, codes}));
  if (x.count() == 0) return;
  with_type(x.dtype, "quantise_columns", [&]<class T>(T) {
    const dim3 grid(blocks_for(x[1], 64), static_cast<unsigned>(blocks_of(x[0])));
    columns_kernel<T, false><<<grid, threads, 64 * (block + 1) * sizeof(float), context.stream>>>(
        x.as<T>(), x.stride(0), x[0], x[1], nullptr, 0, nullptr, 0, bytes_of(codes), codes.stride(0),
        scales.as<float>(), scales.stride(0));
    check_launch("quantise_columns");
  });
}

void quantise_squares(View w, View codes, View scales, View transposed, View transposed_scales,
                      const Context& context) {
  LATENTE_ASSERT(codes.shape == w.shape && transposed.shape == Shape({w[1], w[0]}));
  LATENTE_ASSERT(scales.shape == Shape({blocks_of(w[0]), blocks_of(w[1])}));
  LATENTE_ASSERT(transposed_scales.shape == Shape({scales[1], scales[0]}));
  LATENTE_ASSERT(in_packs(4, {w, codes, transposed}));
  if (w.count() == 0) return;
  with_type(w.dtype, "quantise_squares", [&]<class T>(T) {
    constexpr int bytes = block * (block + 1) * sizeof(float);
    static const cudaError_t allowed =
        cudaFuncSetAttribute(columns_kernel<T, true>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    check(allowed, "quantise_squares");
    const dim3 grid(blocks_for(w[1], block), static_cast<unsigned>(blocks_of(w[0])));
    columns_kernel<T, true><<<grid, threads, bytes, context.stream>>>(
        w.as<T>(), w.stride(0), w[0], w[1], bytes_of(codes), codes.stride(0), scales.as<float>(),
        scales.stride(0), bytes_of(transposed), transposed.stride(0), transposed_scales.as<float>(),
        transposed_scales.stride(0));
    check_launch("quantise_squares");
  });
}

void product_fp8(const Codes& a, const Codes& b, Grad out, const Context& context) {
  launch(product_of(a, b, out.view, out.accumulate), a.codes, b.codes, out.view, "product", context);
}

void grouped_product_fp8(const Codes& a, View offsets, const Codes& b, View out, const Context& context) {
  LATENTE_ASSERT(offsets.count() == b.codes[0] + 1 && b.squares && b.scales.shape.rank() == 3);
  HopperProduct p = product_of(a, b, out, false);
  p.b_batch = b.codes.stride(0) / 2, p.b_scale_batch = b.scales.stride(0);
  p.offsets = offsets.as<int32_t>(), p.experts = static_cast<int>(b.codes[0]);
  launch(p, a.codes, b.codes, out, "grouped product", context);
}

}  // namespace latente::cuda
