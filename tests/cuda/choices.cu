#include "cuda/choices.h"

#include "cuda/runtime.h"

namespace latente {
namespace {

constexpr int threads = 128;

unsigned blocks(int64_t count) { return static_cast<unsigned>((count + threads - 1) / threads); }

// A warp a token; lane l looks at the experts l, l + 32, ... (at most 1024 in all).
__global__ void choose_kernel(const int32_t* step, const float* logits, int64_t tokens, int experts,
                              int top_k, float* weights, int32_t* chosen) {
  const int64_t token = (static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (token >= tokens) return;
  const float* row = logits + (*step * tokens + token) * experts;
  unsigned taken = 0;  // bit i: this lane's ith expert
  float sum = 0;
  for (int k = 0; k < top_k; ++k) {
    int best = experts;
    float highest = 0;
    for (int i = 0; lane + 32 * i < experts; ++i) {
      const float value = row[lane + 32 * i];
      if (!(taken >> i & 1) && (best == experts || value > highest)) {
        best = lane + 32 * i;
        highest = value;
      }
    }
    for (int step_over = 16; step_over > 0; step_over /= 2) {
      const int other = __shfl_xor_sync(0xffffffffu, best, step_over);
      const float value = __shfl_xor_sync(0xffffffffu, highest, step_over);
      if (other < experts && (best == experts || value > highest || (value == highest && other < best))) {
        best = other;
        highest = value;
      }
    }
    if (best % 32 == lane) taken |= 1u << best / 32;
    const float weight = 1 / (1 + expf(-highest));
    sum += weight;
    if (lane == 0) {
      chosen[token * top_k + k] = best;
      weights[token * top_k + k] = weight;
    }
  }
  __syncwarp();
  for (int k = lane; k < top_k; k += 32) weights[token * top_k + k] /= sum;
}

template <class T>
__global__ void keep_kernel(const int32_t* step, const T* out, int64_t count, T* results) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (i < count) results[*step * count + i] = out[i];
}

__global__ void advance_kernel(int32_t* step) { ++*step; }

template <class T>
void launch_keep(View step, View out, View results, cuda::StreamHandle stream) {
  keep_kernel<<<blocks(out.count()), threads, 0, stream>>>(step.as<int32_t>(), out.as<T>(), out.count(),
                                                           results.as<T>());
}

}  // namespace

void choose(View step, View logits, View weights, View experts, cuda::StreamHandle stream) {
  choose_kernel<<<blocks(logits[1] * 32), threads, 0, stream>>>(
      step.as<int32_t>(), logits.as<float>(), logits[1], static_cast<int>(logits[2]),
      static_cast<int>(experts[1]), weights.as<float>(), experts.as<int32_t>());
  cuda::check_launch("choose");
}

void keep_result(View step, View out, View results, cuda::StreamHandle stream) {
  if (out.dtype == DType::bf16) {
    launch_keep<bf16>(step, out, results, stream);
  } else {
    launch_keep<float>(step, out, results, stream);
  }
  cuda::check_launch("keep_result");
}

void advance(View step, cuda::StreamHandle stream) {
  advance_kernel<<<1, 1, 0, stream>>>(step.as<int32_t>());
  cuda::check_launch("advance");
}

}  // namespace latente
