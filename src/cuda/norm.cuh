// Norms of rows, for kernels that take them by themselves or in front of something else.
#pragma once

#include <optional>

#include "cuda/elements.cuh"
#include "tensor/backend.h"

namespace latente::cuda {

// A row is shared by `lanes` threads, a power of two from a warp to a block, each with some elements in packs
// of N; how many follows from the row's width alone, and so does the order of its sums.
constexpr int most_lanes = 512, block_threads = 128;
constexpr int elements_a_thread = 16;
constexpr int64_t widest = most_lanes * elements_a_thread;

inline int lanes_for(int64_t width, int elements) {
  if (width > widest) fail("rms_norm on CUDA: expected rows of at most {} elements, found {}", widest, width);
  int lanes = warp_size;
  while (lanes * elements < width) lanes *= 2;
  return lanes;
}

// The sum over the threads of a row, in all of them. `partial` has a place for each warp of the block.
__device__ inline float row_sum(float x, int lanes, float* partial) {
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

// The latents' norms go to the cache with the rotated keys beside them.
struct LatentRows {
  Norm<bf16, bf16> latent{};
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
  // The rows of a block, the `block`th of those that do this.
  __device__ void store(int block) const {
    norm_rows<wide>(latent, block, [&](int64_t row, int column, const float(&x)[wide]) {
      if (bf16* to = entry(row)) cuda::store<wide>(x, to + column);
    });
    const int rows = static_cast<int>(blockDim.x) / latent.lanes;
    for (int i = static_cast<int>(threadIdx.x); i < rows * half; i += static_cast<int>(blockDim.x)) {
      const int64_t row = static_cast<int64_t>(block) * rows + i / half;
      if (row >= latent.rows) break;
      bf16* to = entry(row);
      if (!to) continue;
      const int pair = i % half;
      const float* angles = table + positions[row] * table_row;
      const int first = interleaved ? 2 * pair : pair, second = interleaved ? first + 1 : half + pair;
      const bf16* from = rotary + row * rotary_row;
      float a = widen(from[first]), b = widen(from[second]);
      rotate(a, b, angles[pair], angles[half + pair]);
      to += latent.width;
      to[first] = narrow<bf16>(a), to[second] = narrow<bf16>(b);
    }
  }
};
// Nothing for what has no kernel.
std::optional<LatentRows> latent_rows(const LatentEntries& entries);

// A few rows' norms, which a block takes on its way to shared memory: the sums are norm_rows()'.
constexpr int most_norm_rows = 8;
struct FewNorms {
  const bf16 *h = nullptr, *pending = nullptr, *weight = nullptr;  // pending: or null
  int64_t h_row = 0, pending_row = 0;
  bf16 *sum = nullptr, *out = nullptr;  // for one block to write; or null
  int64_t sum_row = 0, out_row = 0;
  float eps = 0;
  int lanes = 0;  // 0: there is nothing to do

  // What a lane holds of a row: packs, as the `part`th warp of the lanes.
  static constexpr int packs = elements_a_thread / wide;
  __device__ int column(int part, int k) const {
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    return (k * lanes + part * warp_size + lane) * wide;
  }
  struct Weights {
    uint4 of[packs];
  };
  // May be called before earlier kernels have ended.
  __device__ Weights weights(int part, int width) const {
    Weights w{};
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      if (column(part, k) < width) w.of[k] = *reinterpret_cast<const uint4*>(weight + column(part, k));
    }
    return w;
  }
  __device__ int own_part() const { return static_cast<int>(threadIdx.x) / warp_size % (lanes / warp_size); }

  // Norms of `rows` rows of `width` to rows of `pitch` bytes, with zeros behind them as far as the pitch goes
  // but for its last 16 bytes. `w` are weights(own_part()). By all threads of the block, before they meet.
  __device__ void take(char* to, int pitch, int rows, int width, Weights w, bool writes) const {
    __shared__ float squares[most_norm_rows][most_lanes / warp_size];
    const int lane = static_cast<int>(threadIdx.x) % warp_size,
              warp = static_cast<int>(threadIdx.x) / warp_size,
              warps = static_cast<int>(blockDim.x) / warp_size, parts = lanes / warp_size;
    for (int i = warp; i < rows * parts; i += warps) {
      const int row = i / parts, part = i % parts;
      Pack<bf16, wide> x[packs], more[packs];
#pragma unroll
      for (int k = 0; k < packs; ++k) {
        if (column(part, k) >= width) continue;
        x[k] = *reinterpret_cast<const Pack<bf16, wide>*>(h + row * h_row + column(part, k));
        if (pending)
          more[k] = *reinterpret_cast<const Pack<bf16, wide>*>(pending + row * pending_row + column(part, k));
      }
      float own = 0;
#pragma unroll
      for (int k = 0; k < packs; ++k) {
        const int at = column(part, k);
        if (at >= width) continue;
#pragma unroll
        for (int j = 0; j < wide; ++j) {
          if (pending) x[k].at[j] = narrow<bf16>(widen(more[k].at[j]) + widen(x[k].at[j]));
          own = fmaf(widen(x[k].at[j]), widen(x[k].at[j]), own);
        }
        *reinterpret_cast<Pack<bf16, wide>*>(to + row * pitch + at * 2) = x[k];
        if (writes && sum) *reinterpret_cast<Pack<bf16, wide>*>(sum + row * sum_row + at) = x[k];
      }
      own = warp_sum(own);
      if (lane == 0) squares[row][part] = own;
    }
    const int whole = width / wide, chunks = pitch / 16 - 1;
    for (int i = static_cast<int>(threadIdx.x); i < rows * (chunks - whole);
         i += static_cast<int>(blockDim.x)) {
      *reinterpret_cast<uint4*>(to + i / (chunks - whole) * pitch + (whole + i % (chunks - whole)) * 16) =
          uint4{};
    }
    __syncthreads();
    int held = own_part();
    for (int i = warp; i < rows * parts; i += warps) {
      const int row = i / parts, part = i % parts;
      float total = 0;
      for (int p = 0; p < parts; ++p) total += squares[row][p];
      const float mean = total / static_cast<float>(width), r = 1 / sqrtf(mean + eps);
      if (part != held) w = weights(part, width), held = part;
#pragma unroll
      for (int k = 0; k < packs; ++k) {
        const int at = column(part, k);
        if (at >= width) continue;
        auto* own = reinterpret_cast<Pack<bf16, wide>*>(to + row * pitch + at * 2);
        Pack<bf16, wide> x = *own;
        const auto& scale = reinterpret_cast<const Pack<bf16, wide>&>(w.of[k]);
#pragma unroll
        for (int j = 0; j < wide; ++j) x.at[j] = narrow<bf16>(widen(x.at[j]) * (r * widen(scale.at[j])));
        *own = x;
        if (writes && out) *reinterpret_cast<Pack<bf16, wide>*>(out + row * out_row + at) = x;
      }
    }
  }
};
// Nothing for what take() does not do.
std::optional<FewNorms> few_norms(const NormedRows& x);

}  // namespace latente::cuda
