#include "cuda/elements.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/norm.cuh"

namespace latente::cuda {
namespace {

template <int N, class T, class W>
__global__ __launch_bounds__(most_lanes) void norm_kernel(Norm<T, W> p) {
  wait_for_earlier_kernels();
  norm_rows<N>(p, static_cast<int>(blockIdx.x), [](int64_t, int, const float(&)[N]) {});
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

__global__ __launch_bounds__(most_lanes) void latents_kernel(LatentRows p) {
  wait_for_earlier_kernels();
  p.store(static_cast<int>(blockIdx.x));
}

// -- gradient --

constexpr int few_elements = 8;              // a thread, where more rows are held at a time
constexpr int few_registers = 80;            // so that a multiprocessor holds 768 threads
constexpr int64_t most_threads = 132 * 768;  // what one wave holds of them on a large device

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
__global__ __maxnreg__(N > 1 && E == few_elements ? few_registers
                                                  : 128) void norm_backward_kernel(NormBackward<T, W> p) {
  constexpr int packs = E / N;
  constexpr bool ahead = E == few_elements;  // there is room for what is added to
  __shared__ float partial[most_lanes / warp_size];
  const int lane = static_cast<int>(threadIdx.x) % p.lanes;
  const int64_t part =
      static_cast<int64_t>(blockIdx.x) * (blockDim.x / p.lanes) + static_cast<int>(threadIdx.x) / p.lanes;
  const int64_t first = part * p.rows_a_part, last = min(first + p.rows_a_part, p.rows);
  Pack<T, N> next_x[packs], next_g[packs], next_d[packs];
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
      if (ahead && p.accumulate)
        next_d[k] = *reinterpret_cast<const Pack<T, N>*>(p.d_x + row * p.d_x_stride + column);
    }
  };
  float d_w[packs][N] = {};
  fetch(first);
  for (int64_t i = 0; i < p.rows_a_part; ++i) {  // as often in every thread of the block: rows meet in sums
    const int64_t row = first + i;
    const bool inside = row < last;
    const float r = next_r;
    float x[packs][N] = {}, g[packs][N] = {};
    Pack<T, N> before[packs];
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      if (!inside || (k * p.lanes + lane) * N >= p.width) continue;
      if (ahead) before[k] = next_d[k];
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
      for (int j = 0; j < N; ++j) {
        x[k][j] = r * fmaf(x[k][j], along, g[k][j]);
        if (ahead && p.accumulate) x[k][j] += widen(before[k].at[j]);
      }
      put<N>(!ahead && p.accumulate, x[k], p.d_x + row * p.d_x_stride + column);
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

std::optional<FewNorms> few_norms(const NormedRows& x) {
  const auto other = [](const View& view) { return view && view.dtype != DType::bf16; };
  if (x.h[0] > most_norm_rows || x.h[1] > widest || other(x.h) || other(x.pending) || other(x.weight) ||
      !in_packs(wide, {x.h, x.pending, x.weight, x.sum, x.out})) {
    return {};
  }
  FewNorms n;
  n.h = x.h.as<bf16>(), n.h_row = x.h.stride(0);
  if (x.pending) {
    n.pending = x.pending.as<bf16>(), n.pending_row = x.pending.stride(0);
    n.sum = x.sum.as<bf16>(), n.sum_row = x.sum.stride(0);
  }
  n.weight = x.weight.as<bf16>();
  n.out = x.out.as<bf16>(), n.out_row = x.out.stride(0);
  n.eps = static_cast<float>(x.eps);
  n.lanes = lanes_for(x.h[1], elements_a_thread);
  return n;
}

std::optional<LatentRows> latent_rows(const LatentEntries& e) {
  const int64_t rank = e.latent[1], rope = e.table[1];
  auto other = [](const View& view) { return view.dtype != DType::bf16; };
  if (other(e.cache) || other(e.latent) || other(e.latent_norm) || !e.slots.contiguous() ||
      !e.positions.contiguous() ||
      !in_packs(wide, {e.latent, e.latent_norm, e.latent_out, columns_of(e.cache, 0, rank)})) {
    return {};
  }
  LatentRows p;
  p.latent = norm_of<bf16, bf16>({}, e.latent, e.latent_norm, e.latent_eps, {}, e.latent_out, {},
                                 lanes_for(rank, elements_a_thread));
  p.rotary = e.rotary.as<bf16>(), p.rotary_row = e.rotary.stride(0);
  p.positions = e.positions.as<int32_t>(), p.slots = e.slots.as<int32_t>();
  p.table = e.table.as<float>(), p.table_row = e.table.stride(0);
  p.cache = e.cache.as<bf16>();
  p.page = e.cache[1], p.page_stride = e.cache.stride(0), p.entry_stride = e.cache.stride(1);
  p.half = static_cast<int>(rope / 2), p.interleaved = e.interleaved;
  return p;
}

bool latent_entries(const LatentEntries& e, const Context& context) {
  const auto p = latent_rows(e);
  if (!p) return false;
  const int threads = std::max(p->latent.lanes, block_threads);
  launch_early(latents_kernel, blocks_for(e.latent[0], threads / p->latent.lanes), threads, 0,
               "latent_entries", context, *p);
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
