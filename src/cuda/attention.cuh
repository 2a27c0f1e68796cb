// What the kernels of attention share: element types, rows of tensors, and attention of a tile of rows with
// plain float32 arithmetic, for any sizes and types. Scores are kept in base 2: multiplied by log2(e) with
// the scale.
#pragma once

#include <cuda_bf16.h>

#include <type_traits>

#include "cuda/context.h"
#include "cuda/elements.cuh"
#include "cuda/runtime.h"
#include "tensor/backend.h"

namespace latente::cuda {

inline constexpr double log2_e = 1.4426950408889634, ln_2 = 0.6931471805599453;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void narrow(float x, float* to) { *to = x; }
__device__ inline void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }

// The device's type for an element type of views.
template <class T>
struct DeviceType {
  using type = T;
};
template <>
struct DeviceType<bf16> {
  using type = __nv_bfloat16;
};

template <class T>
T* device_data(const View& v) {
  using Element = std::remove_const_t<T>;
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return reinterpret_cast<T*>(v.as_or_null<bf16>());
  } else {
    return v.as_or_null<Element>();
  }
}

// [T, H, D] with unit stride on D.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t token = 0, head = 0;  // strides in elements
  __host__ __device__ T* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

template <class T>
Rows<T> rows_of(const View& v) {
  if (!v) return {};
  return {device_data<std::remove_const_t<T>>(v), v.stride(0), v.shape.rank() == 3 ? v.stride(1) : 0};
}

// A gradient in the operands' type or in float32.
struct GradRows {
  void* data = nullptr;
  int64_t token = 0, head = 0;
  bool is_bf16 = false, accumulate = false;

  __host__ __device__ explicit operator bool() const { return data != nullptr; }
  // Elements i and i + 1 of a row whose pairs are aligned.
  __device__ void store_pair(int64_t t, int64_t h, int64_t i, float x, float y) const {
    const int64_t at = t * token + h * head + i;
    if (is_bf16) {
      __nv_bfloat162* to = reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(data) + at);
      if (accumulate) x += __low2float(*to), y += __high2float(*to);
      *to = __floats2bfloat162_rn(x, y);
    } else {
      float2* to = reinterpret_cast<float2*>(static_cast<float*>(data) + at);
      *to = accumulate ? float2{to->x + x, to->y + y} : float2{x, y};
    }
  }
  bool has_pairs() const {
    return reinterpret_cast<uintptr_t>(data) % (is_bf16 ? 4 : 8) == 0 && token % 2 == 0 && head % 2 == 0;
  }
  __device__ void store(int64_t t, int64_t h, int64_t i, float x) const {
    const int64_t at = t * token + h * head + i;
    if (is_bf16) {
      __nv_bfloat16* to = static_cast<__nv_bfloat16*>(data) + at;
      *to = __float2bfloat16_rn(accumulate ? x + __bfloat162float(*to) : x);
    } else {
      float* to = static_cast<float*>(data) + at;
      *to = accumulate ? x + *to : x;
    }
  }
};

inline GradRows grad_rows(const Grad& g) {
  if (!g) return {};
  LATENTE_ASSERT(g.view.dtype == DType::f32 || g.view.dtype == DType::bf16);
  return {g.view.data, g.view.stride(0), g.view.shape.rank() == 3 ? g.view.stride(1) : 0,
          g.view.dtype == DType::bf16, g.accumulate};
}

template <class T>
struct Expanded {
  int tokens = 0, heads = 0, groups = 0, nope = 0, rope = 0, value = 0;  // value: dv
  float scale = 1;                                                       // with log2(e)
  Rows<const T> q, k, k_rope, v;
  const int32_t* starts = nullptr;
  Rows<T> out;
  float* lse = nullptr;
  int64_t lse_token = 0, lse_head = 0;
  int64_t longest = 0;  // as far as the host knows no token attends to more; 0: it knows nothing
};

template <class T>
Expanded<T> expanded(const View& q, const View& k, const View& k_rope, const View& v, const View& starts,
                     double scale, const View& out, const View& lse) {
  LATENTE_ASSERT(q.shape.rank() == 3 && k.shape.rank() == 3 && v.shape.rank() == 3 && out.shape.rank() == 3);
  Expanded<T> a;
  a.tokens = static_cast<int>(q[0]);
  a.heads = static_cast<int>(q[1]);
  a.groups = static_cast<int>(k[1]);
  a.nope = static_cast<int>(k[2]);
  a.rope = k_rope ? static_cast<int>(k_rope[-1]) : 0;
  a.value = static_cast<int>(v[2]);
  LATENTE_ASSERT(q[2] == a.nope + a.rope && a.heads % a.groups == 0 && v[1] == a.groups);
  LATENTE_ASSERT(k[0] == q[0] && v[0] == q[0] && starts.count() == q[0] && starts.contiguous());
  LATENTE_ASSERT(out[0] == q[0] && out[1] == a.heads && out[2] == a.value && lse[0] == q[0] &&
                 lse[1] == a.heads);
  a.scale = static_cast<float>(scale * log2_e);
  a.q = rows_of<const T>(q);
  a.k = rows_of<const T>(k);
  a.k_rope = rows_of<const T>(k_rope);
  a.v = rows_of<const T>(v);
  a.starts = starts.as<int32_t>();
  a.out = rows_of<T>(out);
  a.lse = lse.as<float>();
  a.lse_token = lse.stride(0), a.lse_head = lse.stride(1);
  return a;
}

// Raises a kernel's limit of shared memory.
template <class Kernel>
void allow_shared_memory(Kernel kernel, int64_t bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "attention: shared memory");
}

// Sizes of the plain kernels' tiles: a thread computes Rows · Keys / Threads scores. Small ones where rows
// are wide, so that a tile fits into 96 KiB of shared memory.
template <int R, int K, int N>
struct PlainTile {
  static constexpr int rows = R, keys = K, threads = N, each = R * K / N;
  static_assert(R * K % N == 0 && N % K == 0 && K <= 32);
  static int64_t shared_bytes(int64_t key, int64_t value) {
    return 4 * (R * key + K * std::max(key + 1, value) + R * (K + 1) + R * value + R);
  }
};
using SmallTile = PlainTile<8, 16, 128>;
using LargeTile = PlainTile<32, 32, 256>;
inline bool is_wide(int64_t key, int64_t value) { return LargeTile::shared_bytes(key, value) > 96 * 1024; }

// A tile's rows while it walks the keys. All threads of a block hold it together.
template <class Tile>
struct PlainRows {
  int key, value;
  float *q, *kv, *p, *out, *factor;
  // Of the rows whose scores this thread computes, the same in all lanes of such a row.
  float maximum[Tile::each], sum[Tile::each];

  __device__ PlainRows(float* shared, int key_, int value_) : key(key_), value(value_) {
    q = shared;
    kv = q + Tile::rows * key;
    p = kv + Tile::keys * max(key + 1, value);
    out = p + Tile::rows * (Tile::keys + 1);
    factor = out + Tile::rows * value;
    for (int i = 0; i < Tile::each; ++i) maximum[i] = -INFINITY, sum[i] = 0;
    for (int i = threadIdx.x; i < Tile::rows * value; i += Tile::threads) out[i] = 0;
  }
  static __device__ int row_of(int i) { return threadIdx.x / Tile::keys + i * (Tile::threads / Tile::keys); }
  static __device__ int key_of() { return threadIdx.x % Tile::keys; }

  // load(row, i): a query's element, scaled.
  template <class Load>
  __device__ void load_queries(const Load& load) {
    for (int i = threadIdx.x; i < Tile::rows * key; i += Tile::threads) q[i] = load(i / key, i % key);
  }
  // Takes `count` keys into account; load_key(k, i) and load_value(k, i) give their elements, sees(row, k)
  // says whether a row attends to one.
  template <class LoadKey, class LoadValue, class Sees>
  __device__ void add_keys(int count, const LoadKey& load_key, const LoadValue& load_value,
                           const Sees& sees) {
    __syncthreads();
    for (int i = threadIdx.x; i < Tile::keys * key; i += Tile::threads) {
      const int k = i / key, d = i % key;
      kv[k * (key + 1) + d] = k < count ? load_key(k, d) : 0;
    }
    __syncthreads();
    const int k = key_of();
    for (int i = 0; i < Tile::each; ++i) {
      const int row = row_of(i);
      float dot = 0;
      for (int d = 0; d < key; ++d) dot = fmaf(q[row * key + d], kv[k * (key + 1) + d], dot);
      const float score = k < count && sees(row, k) ? dot : -INFINITY;
      float top = score;
      for (int step = Tile::keys / 2; step > 0; step /= 2) {
        top = fmaxf(top, __shfl_xor_sync(whole_warp, top, step));
      }
      top = fmaxf(top, maximum[i]);
      const float base = top == -INFINITY ? 0 : top;
      const float weight = exp2f(score - base), keep = exp2f(maximum[i] - base);
      float total = weight;
      for (int step = Tile::keys / 2; step > 0; step /= 2) {
        total += __shfl_xor_sync(whole_warp, total, step);
      }
      sum[i] = sum[i] * keep + total;
      maximum[i] = top;
      p[row * (Tile::keys + 1) + k] = weight;
      if (k == 0) factor[row] = keep;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < Tile::keys * value; i += Tile::threads) {
      kv[i] = i / value < count ? load_value(i / value, i % value) : 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < Tile::rows * value; i += Tile::threads) {
      const int row = i / value, d = i % value;
      float x = out[i] * factor[row];
      for (int j = 0; j < Tile::keys; ++j) x = fmaf(p[row * (Tile::keys + 1) + j], kv[j * value + d], x);
      out[i] = x;
    }
  }
  // store(row, i, x) of the quotients; store_lse(row, x) of the logarithms (base 2) of the sums, -inf of rows
  // that saw no key.
  template <class Store, class StoreLse>
  __device__ void finish(const Store& store, const StoreLse& store_lse) {
    __syncthreads();
    if (key_of() == 0) {
      for (int i = 0; i < Tile::each; ++i) {
        factor[row_of(i)] = sum[i] > 0 ? 1 / sum[i] : 0;
        store_lse(row_of(i), maximum[i] + log2f(sum[i]));
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < Tile::rows * value; i += Tile::threads) {
      store(i / value, i % value, out[i] * factor[i / value]);
    }
  }
};

}  // namespace latente::cuda
