// How codes widen to bfloat16, in registers.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "cuda/coded.h"
#include "cuda/elements.cuh"

namespace latente::cuda {

constexpr int scale_depth = 32;  // at least so much of a row has one scale

__device__ inline unsigned pair_of(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}

// A lane's 16 bytes of a piece hold, for each step of 16 of the depth, four elements of its row lane / 4, at
// 2t, 2t + 1, 2t + 8 and 2t + 9 with t = lane % 4. four(words, i, low, high) widens those of step i.
template <Code code>
struct Widener;

// A byte is the code + 128. With 0x47 in front it is a float32: 32768 + byte.
template <>
struct Widener<Code::q8> {
  float scale, offset;
  __device__ explicit Widener(float group_scale) : scale(group_scale), offset(-32896.0f * group_scale) {}
  template <int i>
  __device__ float at(unsigned word) const {
    return fmaf(__uint_as_float(__byte_perm(word, 0x47000000u, 0x7404 | i << 4)), scale, offset);
  }
  __device__ void four(const unsigned (&words)[4], int i, unsigned& low, unsigned& high) const {
    low = pair_of(at<0>(words[i]), at<1>(words[i]));
    high = pair_of(at<2>(words[i]), at<3>(words[i]));
  }
};

// Half bytes are the code + 8; elements 2p and 2p + 1 of a word stand at bits 4p and 16 + 4p. With 0x43 in
// front a pair is bfloat16: 128 + code + 8. A float16 scale is two bfloat16 numbers, of which the lower one
// times a code is exact, so the sum of both products is rounded once.
template <>
struct Widener<Code::q4> {
  __nv_bfloat162 upper, lower;
  __device__ explicit Widener(float group_scale) {
    upper = __float2bfloat162_rn(group_scale);
    lower = __float2bfloat162_rn(group_scale - __low2float(upper));
  }
  __device__ unsigned pair(unsigned word, int p) const {
    const unsigned bits = ((word >> (4 * p)) & 0x000f000fu) | 0x43004300u;
    const __nv_bfloat162 codes =
        __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&bits), __float2bfloat162_rn(136.0f));
    const __nv_bfloat162 result = __hfma2(codes, upper, __hmul2(codes, lower));
    return *reinterpret_cast<const unsigned*>(&result);
  }
  __device__ void four(const unsigned (&words)[4], int i, unsigned& low, unsigned& high) const {
    low = pair(words[i / 2], i % 2 * 2), high = pair(words[i / 2], i % 2 * 2 + 1);
  }
};

template <>
struct Widener<Code::f8> {
  float scale;
  __device__ explicit Widener(float square_scale) : scale(square_scale) {}
  __device__ unsigned pair(unsigned two) const {
    const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two), __NV_E4M3);
    const float2 codes = __half22float2(__half2(halves));
    return pair_of(codes.x * scale, codes.y * scale);
  }
  __device__ void four(const unsigned (&words)[4], int i, unsigned& low, unsigned& high) const {
    low = pair(words[i] & 0xffffu), high = pair(words[i] >> 16);
  }
};

}  // namespace latente::cuda
