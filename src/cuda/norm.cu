#include "cuda/elements.cuh"
#include "cuda/kernels.h"

namespace latente::cuda {
namespace {

// A row is shared by `lanes` threads, a power of two from a warp to a block, each with 16 elements in P packs
// of N; how many follows from the row's width alone, and so does the order of its sums.
constexpr int most_lanes = 512, block_threads = 128, elements_a_thread = 16;
constexpr int64_t widest = most_lanes * elements_a_thread;

int lanes_for(int64_t width) {
  if (width > widest) fail("rms_norm on CUDA: expected rows of at most {} elements, found {}", widest, width);
  int lanes = warp_size;
  while (lanes * elements_a_thread < width) lanes *= 2;
  return lanes;
}

// The sum over the threads of a row, in all of them. `partial` has a place for each warp of the block.
__device__ float row_sum(float x, int lanes, float* partial) {
  x = warp_sum(x);
  if (lanes == warp_size) return x;
  const int warp = static_cast<int>(threadIdx.x) / warp_size, warps = lanes / warp_size;
  __syncthreads();
  if (threadIdx.x % warp_size == 0) partial[warp] = x;
  __syncthreads();
  const int first = warp / warps * warps;
  float sum = 0;
  for (int w = first; w < first + warps; ++w) sum += partial[w];
  return sum;
}

template <class T, class W>
struct Norm {
  const T* h;  // or null
  int64_t h_stride;
  const T* x;
  int64_t x_stride;
  const W* weight;  // or null
  float eps;
  T* sum;
  int64_t sum_stride;
  T* out;
  int64_t out_stride;
  float* rstd;  // or null
  int64_t rstd_stride;
  int64_t rows;
  int width, lanes;
};

template <int N, class T, class W>
__global__ __launch_bounds__(most_lanes) void norm_kernel(Norm<T, W> p) {
  constexpr int packs = elements_a_thread / N;
  __shared__ float partial[most_lanes / warp_size];
  const int lane = static_cast<int>(threadIdx.x) % p.lanes;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (blockDim.x / p.lanes) + static_cast<int>(threadIdx.x) / p.lanes;
  const bool inside = row < p.rows;
  float x[packs][N] = {};
  float squares = 0;
#pragma unroll
  for (int k = 0; k < packs; ++k) {
    const int column = (k * p.lanes + lane) * N;
    if (!inside || column >= p.width) continue;
    load<N>(p.x + row * p.x_stride + column, x[k]);
    if (p.h) {
      float h[N];
      load<N>(p.h + row * p.h_stride + column, h);
#pragma unroll
      for (int j = 0; j < N; ++j)
        x[k][j] = widen(narrow<T>(x[k][j] + h[j]));  // the norm is the rounded sum's
      store<N>(x[k], p.sum + row * p.sum_stride + column);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) squares = fmaf(x[k][j], x[k][j], squares);
  }
  const float mean = row_sum(squares, p.lanes, partial) / static_cast<float>(p.width);
  const float r = 1 / sqrtf(mean + p.eps);
  if (!inside) return;
  if (p.rstd && lane == 0) p.rstd[row * p.rstd_stride] = r;
#pragma unroll
  for (int k = 0; k < packs; ++k) {
    const int column = (k * p.lanes + lane) * N;
    if (column >= p.width) continue;
    float w[N];
    if (p.weight) load<N>(p.weight + column, w);
#pragma unroll
    for (int j = 0; j < N; ++j) x[k][j] *= p.weight ? r * w[j] : r;
    store<N>(x[k], p.out + row * p.out_stride + column);
  }
}

void norm(const View& h, const View& x, const View& weight, double eps, const View& sum, const View& out,
          const View& rstd, const Context& context) {
  LATENTE_ASSERT(x.shape.rank() == 2 && out.shape == x.shape && (!weight || weight.count() == x[1]));
  if (x.count() == 0) return;
  const int lanes = lanes_for(x[1]), threads = std::max(lanes, block_threads);
  with_type(x.dtype, "rms_norm", [&]<class T>(T) {
    with_type(weight ? weight.dtype : x.dtype, "rms_norm", [&]<class W>(W) {
      const Norm<T, W> p{h.as_or_null<T>(),
                         h ? h.stride(0) : 0,
                         x.as<T>(),
                         x.stride(0),
                         weight.as_or_null<W>(),
                         static_cast<float>(eps),
                         sum.as_or_null<T>(),
                         sum ? sum.stride(0) : 0,
                         out.as<T>(),
                         out.stride(0),
                         rstd.as_or_null<float>(),
                         rstd ? rstd.stride(0) : 0,
                         x[0],
                         static_cast<int>(x[1]),
                         lanes};
      auto kernel = in_packs(wide, {h, x, weight, sum, out}) ? norm_kernel<wide, T, W> : norm_kernel<1, T, W>;
      kernel<<<blocks_for(x[0], threads / lanes), threads, 0, context.stream>>>(p);
      check_launch("rms_norm");
    });
  });
}

// -- gradient --

constexpr int most_parts = 1056;  // of d_weight: what 132 multiprocessors hold of blocks of 256 threads

template <class T, class W>
struct NormBackward {
  const T* d_out;
  int64_t d_out_stride;
  const T* x;
  int64_t x_stride;
  const W* weight;  // or null
  const float* rstd;
  int64_t rstd_stride;
  T* d_x;  // or null
  int64_t d_x_stride;
  bool accumulate;
  float* parts;  // [parts, D] sums of d_weight, or null
  int64_t rows, rows_a_part;
  int width, lanes;
};

// d_x = rstd (w d_out - x rstd² mean(w d_out x)); d_w sums rstd d_out x over rows. A part is a run of rows,
// which one group of `lanes` threads walks.
template <int N, class T, class W>
__global__ __launch_bounds__(most_lanes) void norm_backward_kernel(NormBackward<T, W> p) {
  constexpr int packs = elements_a_thread / N;
  __shared__ float partial[most_lanes / warp_size];
  const int lane = static_cast<int>(threadIdx.x) % p.lanes;
  const int64_t part =
      static_cast<int64_t>(blockIdx.x) * (blockDim.x / p.lanes) + static_cast<int>(threadIdx.x) / p.lanes;
  float d_w[packs][N] = {};
  for (int64_t i = 0; i < p.rows_a_part; ++i) {  // as often in every thread of the block: rows meet in sums
    const int64_t row = part * p.rows_a_part + i;
    const bool inside = row < p.rows;
    const float r = inside ? p.rstd[row * p.rstd_stride] : 0;
    float x[packs][N] = {}, g[packs][N] = {};
    float product = 0;
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      const int column = (k * p.lanes + lane) * N;
      if (!inside || column >= p.width) continue;
      load<N>(p.x + row * p.x_stride + column, x[k]);
      load<N>(p.d_out + row * p.d_out_stride + column, g[k]);
#pragma unroll
      for (int j = 0; j < N; ++j) d_w[k][j] = fmaf(g[k][j] * r, x[k][j], d_w[k][j]);
      if (!p.weight) continue;
      float w[N];
      load<N>(p.weight + column, w);
#pragma unroll
      for (int j = 0; j < N; ++j) g[k][j] *= w[j];
    }
    if (!p.d_x) continue;
#pragma unroll
    for (int k = 0; k < packs; ++k) {
#pragma unroll
      for (int j = 0; j < N; ++j) product = fmaf(g[k][j], x[k][j], product);
    }
    const float along = -r * r * row_sum(product, p.lanes, partial) / static_cast<float>(p.width);
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      const int column = (k * p.lanes + lane) * N;
      if (!inside || column >= p.width) continue;
#pragma unroll
      for (int j = 0; j < N; ++j) x[k][j] = r * fmaf(x[k][j], along, g[k][j]);
      put<N>(p.accumulate, x[k], p.d_x + row * p.d_x_stride + column);
    }
  }
  if (!p.parts) return;
#pragma unroll
  for (int k = 0; k < packs; ++k) {
    const int column = (k * p.lanes + lane) * N;
    if (column < p.width) store<N>(d_w[k], p.parts + part * p.width + column);
  }
}

// out (+)= the sum of the rows of parts [count, width]: 32 threads a column, each every 32nd row in order,
// then their sums in order.
__global__ __launch_bounds__(1024) void sum_parts_kernel(const float* parts, int count, int width, float* out,
                                                         bool accumulate) {
  __shared__ float sums[warp_size][warp_size + 1];
  const int column = static_cast<int>(blockIdx.x) * warp_size + static_cast<int>(threadIdx.x);
  float sum = 0;
  if (column < width) {
#pragma unroll 8
    for (int i = static_cast<int>(threadIdx.y); i < count; i += warp_size)
      sum += parts[static_cast<int64_t>(i) * width + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= width) return;
  sum = accumulate ? out[column] : 0;
  for (int i = 0; i < warp_size; ++i) sum += sums[i][threadIdx.x];
  out[column] = sum;
}

}  // namespace

void rms_norm(View x, View weight, double eps, View out, View rstd, const Context& context) {
  norm({}, x, weight, eps, {}, out, rstd, context);
}

void rms_norm_add(View h, View x, View weight, double eps, View sum, View out, View rstd,
                  const Context& context) {
  LATENTE_ASSERT(h.shape == x.shape && sum.shape == x.shape);
  norm(h, x, weight, eps, sum, out, rstd, context);
}

void rms_norm_backward(View d_out, View x, View weight, View rstd, Grad d_x, Grad d_weight,
                       const Context& context) {
  if (!d_x && !d_weight) return;
  LATENTE_ASSERT(x.shape.rank() == 2 && d_out.shape == x.shape);
  if (x.count() == 0) return;
  const int64_t rows = x[0], width = x[1];
  const bool packed = in_packs(wide, {d_out, x, weight, d_x.view});
  const int lanes = lanes_for(width), threads = std::max(lanes, block_threads);
  const int64_t rows_a_part = (rows + most_parts - 1) / most_parts;
  const int groups = threads / lanes;
  const unsigned blocks = blocks_for((rows + rows_a_part - 1) / rows_a_part, groups);
  const int parts = static_cast<int>(blocks) * groups;
  LATENTE_ASSERT(parts * width * int64_t{sizeof(float)} <= context.workspace_bytes);
  float* workspace = d_weight ? static_cast<float*>(context.workspace) : nullptr;
  with_type(x.dtype, "rms_norm_backward", [&]<class T>(T) {
    with_type(weight ? weight.dtype : x.dtype, "rms_norm_backward", [&]<class W>(W) {
      const NormBackward<T, W> p{d_out.as<T>(),
                                 d_out.stride(0),
                                 x.as<T>(),
                                 x.stride(0),
                                 weight.as_or_null<W>(),
                                 rstd.as<float>(),
                                 rstd.stride(0),
                                 d_x.view.as_or_null<T>(),
                                 d_x ? d_x.view.stride(0) : 0,
                                 d_x.accumulate,
                                 workspace,
                                 rows,
                                 rows_a_part,
                                 static_cast<int>(width),
                                 lanes};
      auto kernel = packed ? norm_backward_kernel<wide, T, W> : norm_backward_kernel<1, T, W>;
      kernel<<<blocks, threads, 0, context.stream>>>(p);
      check_launch("rms_norm_backward");
    });
  });
  if (!d_weight) return;
  LATENTE_ASSERT(d_weight.view.count() == width && d_weight.view.contiguous());
  sum_parts_kernel<<<blocks_for(width, warp_size), dim3(warp_size, warp_size), 0, context.stream>>>(
      workspace, parts, static_cast<int>(width), d_weight.view.as<float>(), d_weight.accumulate);
  check_launch("rms_norm_backward");
}

}  // namespace latente::cuda
