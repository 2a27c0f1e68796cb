// Attention of few tokens over few entries of a cache of latents: 16 heads of a token against a piece of 128
// keys that lies in shared memory. An element has the bits that the kernel for any contexts
// (attention_paged_sm90.cu) gives it: the same chains of products, and sums in the same order.
#pragma once

#include "cuda/attention_paged.cuh"
#include "cuda/hopper.cuh"
#include "cuda/mma.cuh"

namespace latente::cuda::few_entries {

constexpr int rows = 16, piece_keys = 128, block_keys = 64, warps = 8, warp_keys = piece_keys / warps;
constexpr int threads = warps * 32;
constexpr int tiles = piece_keys / 8;  // of keys
constexpr int weights_pitch = piece_keys * 2 + 16;
constexpr float slack = 8;  // as of the kernel for any contexts

struct Work {
  Paged<__nv_bfloat16> a;
  const __nv_bfloat16* cache = nullptr;
  int64_t page_stride = 0, entry_stride = 0;

  __device__ const __nv_bfloat16* entry(int sequence, int at) const {
    return cache + a.page_of(sequence, at) * page_stride + at % a.page * entry_stride;
  }
};

// From scores to weights.
struct Weighing {
  char weights[rows][weights_pitch];
  float pairs[rows][tiles + 1][4];  // sums of two neighbouring weights; rows begin in different banks
  float tops[warps][rows];
};

template <int key>
struct Piece : Weighing {
  static constexpr int pitch = key * 2 + 16;  // rows of a matrix begin in different banks
  alignas(128) char keys[piece_keys][pitch], q[rows][pitch];
};

// A warp's keys as operands: two tiles of eight.
template <int key>
struct Keys {
  static constexpr int steps = key / 16;
  unsigned k[steps][4];

  __device__ void read(const Piece<key>& s) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const unsigned from =
        mma::shared_address(s.keys[warp * warp_keys + lane / 16 * 8 + lane % 8] + lane / 8 % 2 * 16);
#pragma unroll
    for (int i = 0; i < steps; ++i) mma::load_matrices<false>(k[i], from + static_cast<unsigned>(i * 32));
  }

  // Scores of rows lane / 4 and 8 more.
  __device__ void multiply(const Piece<key>& s, float (&score)[2][4]) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const unsigned from = mma::shared_address(s.q[lane % 16] + lane / 16 * 16);
    constexpr int ahead = 4;
    unsigned q[ahead][4];
#pragma unroll
    for (int i = 0; i < ahead; ++i) mma::load_matrices<false>(q[i], from + static_cast<unsigned>(i * 32));
#pragma unroll
    for (int i = 0; i < steps; ++i) {
#pragma unroll
      for (int t = 0; t < 2; ++t) mma::multiply(score[t], q[i % ahead], k[i][2 * t], k[i][2 * t + 1]);
      if (i + ahead < steps)
        mma::load_matrices<false>(q[i % ahead], from + static_cast<unsigned>((i + ahead) * 32));
    }
  }
};

// What a thread knows of its rows, lane / 4 and 8 more.
struct Statistics {
  float keep[2][2];  // of the results so far, with a block of keys
  float maximum[2];

  // Of the weights.
  __device__ float sum(const Weighing& s, int i) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, r = lane / 4 + 8 * i;
    float sum = 0;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      float total = 0;
#pragma unroll
      for (int c = 0; c < 8; ++c) total += s.pairs[r][b * 8 + c][lane % 4];
      sum = sum * keep[i][b] + total;
    }
    sum += __shfl_xor_sync(whole_warp, sum, 1);
    return sum + __shfl_xor_sync(whole_warp, sum, 2);
  }
};

// Weights of all keys, from each warp's scores of its own; there are `end` of them. All warps; when it
// returns, the weights are there.
__device__ inline Statistics make_weights(Weighing& s, float (&score)[2][4], int end, float scale) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int first_key = warp * warp_keys, row = lane / 4;
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first_key + t * 8 + lane % 4 * 2 + i % 2 >= end) score[t][i] = -INFINITY;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float top =
        fmaxf(fmaxf(score[0][2 * i], score[0][2 * i + 1]), fmaxf(score[1][2 * i], score[1][2 * i + 1]));
    top = fmaxf(top, __shfl_xor_sync(whole_warp, top, 1));
    top = fmaxf(top, __shfl_xor_sync(whole_warp, top, 2));
    if (lane % 4 == 0) s.tops[warp][row + 8 * i] = top;
  }
  __syncthreads();
  Statistics known;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = row + 8 * i;
    float maximum = -INFINITY, base = 0;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      float top = s.tops[4 * b][r];
#pragma unroll
      for (int w = 1; w < 4; ++w) top = fmaxf(top, s.tops[4 * b + w][r]);
      top *= scale;
      known.keep[i][b] = 1;
      if (top > maximum + slack) {
        known.keep[i][b] = fast_exp2(maximum - top);
        maximum = top;
      }
      if (b == warp / 4) base = maximum == -INFINITY ? 0 : maximum;
    }
    known.maximum[i] = maximum;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const float low = fast_exp2(fmaf(score[t][2 * i], scale, -base));
      const float high = fast_exp2(fmaf(score[t][2 * i + 1], scale, -base));
      s.pairs[r][warp * 2 + t][lane % 4] = low + high;
      *reinterpret_cast<uint32_t*>(s.weights[r] + (first_key + t * 8 + lane % 4 * 2) * 2) =
          pack_bf16(low, high);
    }
  }
  __syncthreads();
  return known;
}

// out += weights · values of eight columns, whose tiles of 16 keys stand transposed in v; `weights`: the
// shared address from which the lane loads.
template <int tiles>
__device__ inline void add_values(unsigned weights, const Statistics& known, const unsigned (&v)[tiles][4],
                                  int end, float (&out)[4]) {
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    if (b * block_keys >= end) break;
    unsigned w[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      mma::load_matrices<false>(w[i], weights + static_cast<unsigned>((b * 4 + i) * 32));
    if (b > 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] *= known.keep[i / 2][b];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      mma::multiply(out, w[i], v[b * 2 + i / 2][i % 2 * 2], v[b * 2 + i / 2][i % 2 * 2 + 1]);
  }
}

}  // namespace latente::cuda::few_entries
