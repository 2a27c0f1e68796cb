#include <cuda_fp8.h>

#include "cuda/attention.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace latente::cuda {
namespace {

// A block a token.
template <class From, class To>
__global__ void store_kernel(const From* x, int64_t x_stride, int width, const int32_t* slots,
                             int64_t slot_stride, To* cache, int64_t page, int64_t page_stride,
                             int64_t entry_stride) {
  wait_for_earlier_kernels();
  const int64_t slot = slots[blockIdx.x * slot_stride];
  if (slot < 0) return;
  const From* from = x + blockIdx.x * x_stride;
  To* to = cache + slot / page * page_stride + slot % page * entry_stride;
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
    narrow(widen(from[i]), to + i);
  }
}

template <bool fp8>
__device__ unsigned char code_of(float x) {
  if constexpr (fp8) {
    return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
  } else {
    return static_cast<unsigned char>(static_cast<signed char>(__float2int_rn(x)));
  }
}

// A warp a token.
template <class T, bool fp8>
__global__ void store_narrow_kernel(const T* latent, int64_t latent_stride, int rank, const T* rotary,
                                    int64_t rotary_stride, int rope, const int32_t* slots,
                                    int64_t slot_stride, unsigned char* cache, int64_t page,
                                    int64_t page_stride, int64_t entry_stride) {
  wait_for_earlier_kernels();
  const int64_t slot = slots[blockIdx.x * slot_stride];
  if (slot < 0) return;
  const int lane = static_cast<int>(threadIdx.x);
  unsigned char* entry = cache + slot / page * page_stride + slot % page * entry_stride;
  const T* from = latent + blockIdx.x * latent_stride;
  float largest = 0;
  bool finite = true;
  for (int i = lane; i < rank; i += 32) {
    largest = fmaxf(largest, fabsf(widen(from[i])));
    finite = finite && isfinite(widen(from[i]));
  }
  finite = __all_sync(whole_warp, finite);
  for (int step = 16; step > 0; step /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(whole_warp, largest, step));
  const float top = fp8 ? 448.0f : 127.0f;
  const float inverse = largest > 0 ? __fdiv_rn(top, largest) : 0;
  const float scale = finite ? __fdiv_rn(largest, top) : __int_as_float(0x7fc00000);
  for (int i = lane; i < rank; i += 32) {
    entry[i] = finite ? code_of<fp8>(widen(from[i]) * inverse) : static_cast<unsigned char>(1);
  }
  // An entry may begin at any address.
  auto put = [&](int at, unsigned bits, int bytes) {
    for (int i = 0; i < bytes; ++i) entry[at + i] = static_cast<unsigned char>(bits >> (8 * i));
  };
  for (int i = lane; i < rope; i += 32) {
    const float x = __bfloat162float(__float2bfloat16_rn(widen(rotary[blockIdx.x * rotary_stride + i])));
    // By way of float: ptxas 13.0 makes a conversion to an integer of storing one byte of a bfloat16.
    put(rank + 2 * i, __float_as_uint(x) >> 16, 2);
  }
  if (lane == 0) put(rank + 2 * rope, static_cast<unsigned>(__float_as_int(scale)), 4);
}

template <class From, class To>
void store_rows(const View& x, const View& slots, const View& cache, const Context& context) {
  launch_early(store_kernel<From, To>, static_cast<unsigned>(x[0]), 128, 0, "cache_store", context,
               device_data<From>(x), x.stride(0), static_cast<int>(x[1]), slots.as<int32_t>(),
               slots.stride(0), device_data<To>(cache), cache[1], cache.stride(0), cache.stride(1));
}

template <class T>
void store_narrow(const View& latent, const View& rotary, const View& slots, const View& cache,
                  const Context& context) {
  auto kernel = cache.dtype == DType::u8 ? store_narrow_kernel<T, false> : store_narrow_kernel<T, true>;
  launch_early(kernel, static_cast<unsigned>(latent[0]), 32, 0, "cache_store_narrow", context,
               device_data<T>(latent), latent.stride(0), static_cast<int>(latent[1]), device_data<T>(rotary),
               rotary.stride(0), static_cast<int>(rotary[1]), slots.as<int32_t>(), slots.stride(0),
               static_cast<unsigned char*>(cache.data), cache[1], cache.stride(0), cache.stride(1));
}

}  // namespace

void cache_store_narrow(View latent, View rotary, View slots, View cache, const Context& context) {
  LATENTE_ASSERT(cache.shape.rank() == 3 && Backend::is_narrow_cache(cache.dtype) &&
                 latent.dtype == rotary.dtype && latent[0] == rotary[0] && latent[0] == slots[0] &&
                 cache[2] == Backend::narrow_entry_bytes(latent[1], rotary[1]));
  if (latent[0] == 0) return;
  if (latent.dtype == DType::bf16) {
    store_narrow<__nv_bfloat16>(latent, rotary, slots, cache, context);
  } else {
    store_narrow<float>(latent, rotary, slots, cache, context);
  }
}

void cache_store(View x, View slots, View cache, const Context& context) {
  LATENTE_ASSERT(x.shape.rank() == 2 && cache.shape.rank() == 3 && x[1] <= cache[2] && slots[0] == x[0]);
  if (x.count() == 0) return;
  const bool to_bf16 = cache.dtype == DType::bf16;
  if (x.dtype == DType::bf16) {
    (to_bf16 ? store_rows<__nv_bfloat16, __nv_bfloat16> : store_rows<__nv_bfloat16, float>)(x, slots, cache,
                                                                                            context);
  } else {
    (to_bf16 ? store_rows<float, __nv_bfloat16> : store_rows<float, float>)(x, slots, cache, context);
  }
}

}  // namespace latente::cuda
