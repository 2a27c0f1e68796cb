#include "cuda/elements.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace latente::cuda {
namespace {

// A row is shared by `lanes` threads, a power of two from a warp to a block, each with some elements in packs
// of N; how many follows from the row's width alone, and so does the order of its sums.
constexpr int most_lanes = 512, block_threads = 128;
constexpr int elements_a_thread = 16, few_elements = 8;  // few: where more rows are held at a time
constexpr int64_t widest = most_lanes * elements_a_thread;

int lanes_for(int64_t width, int elements) {
  if (width > widest) fail("rms_norm on CUDA: expected rows of at most {} elements, found {}", widest, width);
  int lanes = warp_size;
  while (lanes * elements < width) lanes *= 2;
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

// The rows of the `block`th block of p's own. also(row, column, values) is given what is stored.
template <int N, class T, class W, class Also>
__device__ void norm_rows(const Norm<T, W>& p, int block, const Also& also) {
  constexpr int packs = elements_a_thread / N;
  __shared__ float partial[most_lanes / warp_size];
  const int lane = static_cast<int>(threadIdx.x) % p.lanes;
  const int64_t row =
      static_cast<int64_t>(block) * (blockDim.x / p.lanes) + static_cast<int>(threadIdx.x) / p.lanes;
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
    also(row, column, x[k]);
  }
}

template <int N, class T, class W>
__global__ __launch_bounds__(most_lanes) void norm_kernel(Norm<T, W> p) {
  wait_for_earlier_kernels();
  norm_rows<N>(p, static_cast<int>(blockIdx.x), [](int64_t, int, const float(&)[N]) {});
}

template <class T, class W>
Norm<T, W> norm_of(const View& h, const View& x, const View& weight, double eps, const View& sum,
                   const View& out, const View& rstd, int lanes) {
  return {h.as_or_null<T>(),
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
}

void norm(const View& h, const View& x, const View& weight, double eps, const View& sum, const View& out,
          const View& rstd, const Context& context) {
  LATENTE_ASSERT(x.shape.rank() == 2 && out.shape == x.shape && (!weight || weight.count() == x[1]));
  if (x.count() == 0) return;
  const int lanes = lanes_for(x[1], elements_a_thread), threads = std::max(lanes, block_threads);
  with_type(x.dtype, "rms_norm", [&]<class T>(T) {
    with_type(weight ? weight.dtype : x.dtype, "rms_norm", [&]<class W>(W) {
      const Norm<T, W> p = norm_of<T, W>(h, x, weight, eps, sum, out, rstd, lanes);
      auto kernel = in_packs(wide, {h, x, weight, sum, out}) ? norm_kernel<wide, T, W> : norm_kernel<1, T, W>;
      launch_early(kernel, blocks_for(x[0], threads / lanes), threads, 0, "rms_norm", context, p);
    });
  });
}

// -- entries of the cache --

struct Entries {
  const bf16* rotary = nullptr;  // [T, 2 · half]
  int64_t rotary_row = 0;
  const int32_t *positions = nullptr, *slots = nullptr;
  const float* table = nullptr;
  int64_t table_row = 0;
  bf16* cache = nullptr;
  int64_t page = 0, page_stride = 0, entry_stride = 0;
  int half = 0;
  bool interleaved = false;

  __device__ bf16* entry(int64_t row) const {
    const int slot = slots[row];
    return slot < 0 ? nullptr : cache + slot / page * page_stride + slot % page * entry_stride;
  }
};

// Blocks of latents, whose norms go to the cache with the rotated key beside them, then of queries.
__global__ __launch_bounds__(most_lanes) void latents_kernel(Norm<bf16, bf16> latent, Norm<bf16, bf16> query,
                                                             Entries p, int latent_blocks) {
  wait_for_earlier_kernels();
  const int block = static_cast<int>(blockIdx.x);
  if (block >= latent_blocks) {
    return norm_rows<wide>(query, block - latent_blocks, [](int64_t, int, const float(&)[wide]) {});
  }
  norm_rows<wide>(latent, block, [&](int64_t row, int column, const float(&x)[wide]) {
    if (bf16* to = p.entry(row)) store<wide>(x, to + column);
  });
  const int rows = static_cast<int>(blockDim.x) / latent.lanes;
  for (int i = static_cast<int>(threadIdx.x); i < rows * p.half; i += static_cast<int>(blockDim.x)) {
    const int64_t row = static_cast<int64_t>(block) * rows + i / p.half;
    if (row >= latent.rows) break;
    bf16* to = p.entry(row);
    if (!to) continue;
    const int pair = i % p.half;
    const float* angles = p.table + p.positions[row] * p.table_row;
    const int first = p.interleaved ? 2 * pair : pair, second = p.interleaved ? first + 1 : p.half + pair;
    const bf16* from = p.rotary + row * p.rotary_row;
    float a = widen(from[first]), b = widen(from[second]);
    rotate(a, b, angles[pair], angles[p.half + pair]);
    to += latent.width;
    to[first] = narrow<bf16>(a), to[second] = narrow<bf16>(b);
  }
}

// -- gradient --

constexpr int64_t most_threads = 132 * 1024;  // what one wave holds of them on a large device

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
// which one group of `lanes` threads walks, with the next row on its way; a thread has E elements of each.
template <int N, int E, class T, class W>
__global__ __launch_bounds__(most_lanes) void norm_backward_kernel(NormBackward<T, W> p) {
  constexpr int packs = E / N;
  __shared__ float partial[most_lanes / warp_size];
  const int lane = static_cast<int>(threadIdx.x) % p.lanes;
  const int64_t part =
      static_cast<int64_t>(blockIdx.x) * (blockDim.x / p.lanes) + static_cast<int>(threadIdx.x) / p.lanes;
  const int64_t first = part * p.rows_a_part, last = min(first + p.rows_a_part, p.rows);
  Pack<T, N> next_x[packs], next_g[packs];
  float next_r = 0;
  auto fetch = [&](int64_t row) {
    if (row >= last) return;
    next_r = p.rstd[row * p.rstd_stride];
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      const int column = (k * p.lanes + lane) * N;
      if (column >= p.width) continue;
      next_x[k] = *reinterpret_cast<const Pack<T, N>*>(p.x + row * p.x_stride + column);
      next_g[k] = *reinterpret_cast<const Pack<T, N>*>(p.d_out + row * p.d_out_stride + column);
    }
  };
  float d_w[packs][N] = {};
  fetch(first);
  for (int64_t i = 0; i < p.rows_a_part; ++i) {  // as often in every thread of the block: rows meet in sums
    const int64_t row = first + i;
    const bool inside = row < last;
    const float r = next_r;
    float x[packs][N] = {}, g[packs][N] = {};
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      if (!inside || (k * p.lanes + lane) * N >= p.width) continue;
#pragma unroll
      for (int j = 0; j < N; ++j) x[k][j] = widen(next_x[k].at[j]), g[k][j] = widen(next_g[k].at[j]);
    }
    fetch(row + 1);
    float product = 0;
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      const int column = (k * p.lanes + lane) * N;
      if (!inside || column >= p.width) continue;
      float w[N];
      if (p.weight) load<N>(p.weight + column, w);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        d_w[k][j] = fmaf(g[k][j] * r, x[k][j], d_w[k][j]);
        if (p.weight) g[k][j] *= w[j];
        product = fmaf(g[k][j], x[k][j], product);
      }
    }
    if (!p.d_x) continue;
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

bool latent_entries(const LatentEntries& e, const Context& context) {
  const int64_t rank = e.latent[1], rope = e.table[1];
  auto other = [](const View& view) { return view && view.dtype != DType::bf16; };
  if (other(e.cache) || other(e.latent) || other(e.latent_norm) || other(e.q) || other(e.q_norm) ||
      !e.slots.contiguous() || !e.positions.contiguous() ||
      !in_packs(wide, {e.latent, e.latent_norm, e.latent_out, e.q, e.q_norm, e.q_out,
                       columns_of(e.cache, 0, rank)})) {
    return false;
  }
  using P = Norm<bf16, bf16>;
  const int lanes = lanes_for(rank, elements_a_thread),
            q_lanes = e.q ? lanes_for(e.q[1], elements_a_thread) : warp_size;
  const int threads = std::max({lanes, q_lanes, block_threads});
  const P own = norm_of<bf16, bf16>({}, e.latent, e.latent_norm, e.latent_eps, {}, e.latent_out, {}, lanes);
  const P query = e.q ? norm_of<bf16, bf16>({}, e.q, e.q_norm, e.q_eps, {}, e.q_out, {}, q_lanes) : P{};
  Entries p;
  p.rotary = e.rotary.as<bf16>(), p.rotary_row = e.rotary.stride(0);
  p.positions = e.positions.as<int32_t>(), p.slots = e.slots.as<int32_t>();
  p.table = e.table.as<float>(), p.table_row = e.table.stride(0);
  p.cache = e.cache.as<bf16>();
  p.page = e.cache[1], p.page_stride = e.cache.stride(0), p.entry_stride = e.cache.stride(1);
  p.half = static_cast<int>(rope / 2), p.interleaved = e.interleaved;
  const unsigned blocks = blocks_for(e.latent[0], threads / lanes),
                 q_blocks = e.q ? blocks_for(e.q[0], threads / q_lanes) : 0;
  launch_early(latents_kernel, blocks + q_blocks, threads, 0, "latent_entries", context, own, query, p,
               static_cast<int>(blocks));
  return true;
}

void rms_norm_backward(View d_out, View x, View weight, View rstd, Grad d_x, Grad d_weight,
                       const Context& context) {
  if (!d_x && !d_weight) return;
  LATENTE_ASSERT(x.shape.rank() == 2 && d_out.shape == x.shape);
  if (x.count() == 0) return;
  const int64_t rows = x[0], width = x[1];
  const bool packed = in_packs(wide, {d_out, x, weight, d_x.view});
  const bool few = width <= most_lanes * few_elements;
  const int lanes = lanes_for(width, few ? few_elements : elements_a_thread),
            threads = std::max(lanes, block_threads);
  const int64_t most_parts = most_threads / lanes;  // of d_weight
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
      auto kernel = packed ? (few ? norm_backward_kernel<wide, few_elements, T, W>
                                  : norm_backward_kernel<wide, elements_a_thread, T, W>)
                           : (few ? norm_backward_kernel<1, few_elements, T, W>
                                  : norm_backward_kernel<1, elements_a_thread, T, W>);
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
