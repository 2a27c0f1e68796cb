// Elements of rows in registers: always as float, several at a time where alignment allows 16-byte accesses.
#pragma once

#include <cuda_bf16.h>

#include <algorithm>
#include <initializer_list>

#include "cuda/context.h"
#include "cuda/runtime.h"
#include "tensor/view.h"

namespace latente::cuda {

constexpr int warp_size = 32;
constexpr unsigned whole_warp = 0xffffffffu;

// How many elements a thread takes at a time where it can.
constexpr int wide = 8;

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

template <class T>
__device__ T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 narrow<bf16>(float x) {
  bf16 result;
  result.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
  return result;
}

template <int N, class T>
__device__ void load(const T* from, float (&to)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = widen(pack.at[i]);
}

template <int N, class T>
__device__ void store(const float (&from)[N], T* to) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.at[i] = narrow<T>(from[i]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// to = from, or to += from
template <int N, class T>
__device__ void put(bool accumulate, float (&from)[N], T* to) {
  if (accumulate) {
    float before[N];
    load<N>(to, before);
#pragma unroll
    for (int i = 0; i < N; ++i) from[i] += before[i];
  }
  store<N>(from, to);
}

// In four instructions: within 4 ulp from -8 on, a few tens below; what exp2 rounds to infinity or zero
// leaves 0 (below -87) or 1.
__device__ inline float sigmoid(float x) {
  float e, s;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.44269504f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1 + e));
  return s;
}
__device__ inline float swiglu_of(float gate, float up) { return up * (gate * sigmoid(gate)); }

// Puts the gradients of a gate and what it gates in their place; silu'(g) = s + g s (1 - s), s = sigmoid(g).
__device__ inline void swiglu_backward_of(float d, float& gate, float& up) {
  const float s = sigmoid(gate), silu = gate * s;
  gate = d * up * (s + silu * (1 - s));
  up = d * silu;
}

// A pair turned by an angle; one order of operations for every kernel that does it.
__device__ inline void rotate(float& a, float& b, float cosine, float sine) {
  const float before = a;
  a = fmaf(before, cosine, -(b * sine));
  b = fmaf(before, sine, b * cosine);
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = warp_size / 2; step > 0; step /= 2) x += __shfl_xor_sync(whole_warp, x, step);
  return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int step = warp_size / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(whole_warp, x, step));
  return x;
}

// The sum over the block, in all of its threads (a power of two), in an order that only their number decides.
template <int threads, class T>
__device__ T block_sum(T x) {
  __shared__ T sums[threads];
  __syncthreads();
  sums[threadIdx.x] = x;
  __syncthreads();
  for (int step = threads / 2; step > 0; step /= 2) {
    if (static_cast<int>(threadIdx.x) < step) sums[threadIdx.x] += sums[threadIdx.x + step];
    __syncthreads();
  }
  return sums[0];
}

// Calls f(T{}) with float or bf16.
template <class F>
void with_type(DType type, const char* kernel, F&& f) {
  if (type == DType::f32) return f(float{});
  if (type == DType::bf16) return f(bf16{});
  fail("{} on CUDA: expected f32 or bf16, found {}", kernel, name_of(type));
}

// Whether every row of these views (null ones aside) can be read `count` elements at a time.
inline bool in_packs(int count, std::initializer_list<View> views) {
  return std::all_of(views.begin(), views.end(), [count](const View& view) {
    if (!view) return true;
    const int64_t bytes = std::min<int64_t>(16, count * size_of(view.dtype));
    if (reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(bytes) != 0) return false;
    for (int axis = 0; axis + 1 < view.shape.rank(); ++axis) {
      if (view[axis] > 1 && view.stride(axis) % count != 0) return false;
    }
    return view[-1] % count == 0;
  });
}

inline unsigned blocks_for(int64_t count, int64_t each) {
  return static_cast<unsigned>((count + each - 1) / each);
}

}  // namespace latente::cuda
