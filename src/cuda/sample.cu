// From logits to tokens.
#include "cuda/elements.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace latente::cuda {
namespace {

constexpr int threads = 256, pieces = 32;  // of a row: a block each

// Orders (logit, first index) as whole numbers; NaN above everything.
__device__ unsigned long long key_of(float x, int index) {
  const unsigned bits = __float_as_uint(x + 0.0f);  // -0 and 0 are equal
  const unsigned order = isnan(x) ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(order) << 32 | (0xffffffffu - static_cast<unsigned>(index));
}

__device__ unsigned long long warp_highest(unsigned long long key) {
  for (int step = warp_size / 2; step > 0; step /= 2) key = max(key, __shfl_xor_sync(whole_warp, key, step));
  return key;
}

// keys [T, pieces]
__global__ __launch_bounds__(threads) void highest_of_pieces_kernel(const float* logits, int64_t stride,
                                                                    int count, unsigned long long* keys) {
  wait_for_earlier_kernels();
  __shared__ unsigned long long of_warps[threads / warp_size];
  const int thread = static_cast<int>(threadIdx.x);
  const float* row = logits + blockIdx.y * stride;
  unsigned long long key = 0;
#pragma unroll 4
  for (int i = static_cast<int>(blockIdx.x) * threads + thread; i < count; i += pieces * threads)
    key = max(key, key_of(row[i], i));
  key = warp_highest(key);
  if (thread % warp_size == 0) of_warps[thread / warp_size] = key;
  __syncthreads();
  if (thread >= warp_size) return;
  key = warp_highest(thread < threads / warp_size ? of_warps[thread] : 0);
  if (thread == 0) keys[blockIdx.y * pieces + blockIdx.x] = key;
}

// A warp a row.
__global__ __launch_bounds__(pieces) void most_likely_kernel(const float* logits, int64_t stride,
                                                             const unsigned long long* keys, int32_t* out) {
  wait_for_earlier_kernels();
  const unsigned long long key = warp_highest(keys[blockIdx.x * pieces + threadIdx.x]);
  if (threadIdx.x != 0) return;
  const auto index = static_cast<int32_t>(0xffffffffu - static_cast<unsigned>(key));
  const float x = logits[blockIdx.x * stride + index];
  out[blockIdx.x] = isnan(x) ? Backend::not_a_number : isinf(x) ? Backend::not_finite : index;
}

}  // namespace

void most_likely(View logits, View out, const Context& context) {
  LATENTE_ASSERT(logits.shape.rank() == 2 && out.count() == logits[0] && out.contiguous());
  const int64_t rows = logits[0];
  if (rows == 0) return;
  auto* keys = static_cast<unsigned long long*>(context.workspace);
  LATENTE_ASSERT(rows * pieces * int64_t{sizeof(*keys)} <= context.workspace_bytes);
  launch_early(highest_of_pieces_kernel, dim3(pieces, static_cast<unsigned>(rows)), threads, 0, "most_likely",
               context, logits.as<float>(), logits.stride(0), static_cast<int>(logits[1]), keys);
  launch_early(most_likely_kernel, static_cast<unsigned>(rows), pieces, 0, "most_likely", context,
               logits.as<float>(), logits.stride(0), keys, out.as<int32_t>());
}

}  // namespace latente::cuda
