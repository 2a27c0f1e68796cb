// Attention of a few tokens over contexts of one piece in a cache of latents: what takes time is one latency
// after another, so a block has 16 heads of a token and 64 columns of its results, makes all scores itself,
// and has the entries of earlier passes in shared memory before the queries are there. An element has the
// bits that the kernel for any contexts (attention_paged_sm90.cu) gives it: the same chains of products, and
// sums in the same order.
#include "cuda/attention_paged.cuh"
#include "cuda/attention_sm90.h"
#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"

namespace latente::cuda {
namespace {

constexpr int rows = 16, most_keys = 128, block_keys = 64, warps = 8, warp_keys = most_keys / warps;
constexpr int tiles = most_keys / 8;  // of keys
constexpr int columns = warps * 8;    // of values, of a block
constexpr int weights_pitch = most_keys * 2 + 16;
constexpr int pairs_pitch = tiles * 4 + 4;  // rows begin in different banks
constexpr float slack = 8;                  // as of the kernel for any contexts

struct Short {
  Paged<__nv_bfloat16> a;
  const __nv_bfloat16* cache = nullptr;
  int64_t page_stride = 0, entry_stride = 0;
};

template <int key>
struct ShortShared {
  static constexpr int pitch = key * 2 + 16;  // rows of a matrix begin in different banks
  char keys[most_keys][pitch], q[rows][pitch];
  char weights[rows][weights_pitch];
  float pairs[rows][pairs_pitch];  // sums of two neighbouring weights, four a tile
  float tops[warps][rows];
  int64_t entries[most_keys];  // where keys lie
};

template <int key>
__global__ void __launch_bounds__(warps * 32, 1) short_kernel(const __grid_constant__ Short p) {
  constexpr int steps = key / 16, chunks = key / 8, threads = warps * 32;
  extern __shared__ __align__(128) char memory[];
  auto& s = *reinterpret_cast<ShortShared<key>*>(memory);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int token = static_cast<int>(blockIdx.y), head = static_cast<int>(blockIdx.z) * rows,
            column = static_cast<int>(blockIdx.x) * columns;
  // What is known before the kernel in front has ended: where entries lie, and all of them but those of this
  // pass, whose tokens follow one another.
  const int end = p.a.position[token] + 1, early = max(end - p.a.tokens, 0);
  if (thread < end) {
    const int64_t page = p.a.page_of(p.a.sequence[token], thread);
    s.entries[thread] = page * p.page_stride + thread % p.a.page * p.entry_stride;
  }
  __syncthreads();
  auto copy_keys = [&](int first, int last) {
    for (int i = first * chunks + thread; i < last * chunks; i += threads) {
      const int at = i / chunks, chunk = i % chunks;
      mma::copy_async(mma::shared_address(s.keys[at] + chunk * 16), p.cache + s.entries[at] + chunk * 8,
                      true);
    }
  };
  const int padded = (end + block_keys - 1) / block_keys * block_keys;
  copy_keys(0, early);
  mma::commit();
  // Beyond the context's end, values must not be NaN.
  for (int i = end * 8 + thread; i < padded * 8; i += threads)
    *reinterpret_cast<uint4*>(s.keys[i / 8] + column * 2 + i % 8 * 16) = uint4{};

  wait_for_earlier_kernels();
  const int heads = min(rows, p.a.heads - head);
  for (int i = thread; i < heads * chunks; i += threads) {
    mma::copy_async(mma::shared_address(s.q[i / chunks] + i % chunks * 16),
                    p.a.q.at(token, head + i / chunks) + i % chunks * 8, true);
  }
  copy_keys(early, end);
  mma::commit();

  const int first_key = warp * warp_keys;
  unsigned k[steps][4];  // two tiles of keys
  auto read_keys = [&] {
    const unsigned from =
        mma::shared_address(s.keys[first_key + lane / 16 * 8 + lane % 8] + lane / 8 % 2 * 16);
#pragma unroll
    for (int i = 0; i < steps; ++i) mma::load_matrices<false>(k[i], from + static_cast<unsigned>(i * 32));
  };
  const bool late = min(first_key + warp_keys, end) > early;
  mma::wait<1>();
  __syncthreads();
  if (!late) read_keys();
  mma::wait<0>();
  __syncthreads();
  if (late) read_keys();
  unsigned v[tiles / 4][4];
#pragma unroll
  for (int i = 0; i < tiles / 4; ++i) {
    if (i * 32 < padded)
      mma::load_matrices<true>(v[i], mma::shared_address(s.keys[i * 32 + lane] + (column + warp * 8) * 2));
  }

  // Of rows lane / 4 and 8 more.
  float score[2][4] = {};
  if (first_key < end) {
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
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first_key + t * 8 + lane % 4 * 2 + i % 2 >= end) score[t][i] = -INFINITY;
    }
  }
  const int row = lane / 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float top =
        fmaxf(fmaxf(score[0][2 * i], score[0][2 * i + 1]), fmaxf(score[1][2 * i], score[1][2 * i + 1]));
    top = fmaxf(top, __shfl_xor_sync(whole_warp, top, 1));
    top = fmaxf(top, __shfl_xor_sync(whole_warp, top, 2));
    if (lane % 4 == 0) s.tops[warp][row + 8 * i] = top;
  }
  __syncthreads();
  float keep[2][2];  // of a row, with a block of keys
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = row + 8 * i;
    float maximum = -INFINITY, base = 0;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      float top = s.tops[4 * b][r];
#pragma unroll
      for (int w = 1; w < 4; ++w) top = fmaxf(top, s.tops[4 * b + w][r]);
      top *= p.a.scale;
      keep[i][b] = 1;
      if (top > maximum + slack) {
        keep[i][b] = fast_exp2(maximum - top);
        maximum = top;
      }
      if (b == warp / 4) base = maximum == -INFINITY ? 0 : maximum;
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const float low = fast_exp2(fmaf(score[t][2 * i], p.a.scale, -base));
      const float high = fast_exp2(fmaf(score[t][2 * i + 1], p.a.scale, -base));
      s.pairs[r][(warp * 2 + t) * 4 + lane % 4] = low + high;
      *reinterpret_cast<uint32_t*>(s.weights[r] + (first_key + t * 8 + lane % 4 * 2) * 2) =
          pack_bf16(low, high);
    }
  }
  __syncthreads();

  float out[4] = {};
  const unsigned weights = mma::shared_address(s.weights[lane % 16] + lane / 16 * 16);
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    if (b * block_keys >= end) break;
    unsigned w[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      mma::load_matrices<false>(w[i], weights + static_cast<unsigned>((b * 4 + i) * 32));
    if (b > 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] *= keep[i / 2][b];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      mma::multiply(out, w[i], v[b * 2 + i / 2][i % 2 * 2], v[b * 2 + i / 2][i % 2 * 2 + 1]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = row + 8 * i;
    float sum = 0;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      float total = 0;
#pragma unroll
      for (int c = 0; c < 8; ++c) total += s.pairs[r][(b * 8 + c) * 4 + lane % 4];
      sum = sum * keep[i][b] + total;
    }
    sum += __shfl_xor_sync(whole_warp, sum, 1);
    sum += __shfl_xor_sync(whole_warp, sum, 2);
    const float inverse = sum != 0 ? 1 / sum : 0;
    if (r >= heads) continue;
    *reinterpret_cast<uint32_t*>(p.a.out.at(token, head + r) + column + warp * 8 + lane % 4 * 2) =
        inverse != 0 ? pack_bf16(out[2 * i] * inverse, out[2 * i + 1] * inverse) : 0;
  }
}

template <int key>
void launch(const Short& p, dim3 grid, const Context& context) {
  launch_early(short_kernel<key>, grid, warps * 32, sizeof(ShortShared<key>), "attention_paged", context, p);
}

}  // namespace

bool attention_paged_short_sm90(const Paged<__nv_bfloat16>& a, const View& keys, const Pages& pages,
                                const Context& context) {
  const dim3 grid(static_cast<unsigned>(a.value / columns), static_cast<unsigned>(a.tokens),
                  static_cast<unsigned>(ceil_div(a.heads, rows)));
  if (capacity(keys, pages) > most_keys ||
      int64_t{grid.x} * grid.y * grid.z > int64_t{context.multiprocessors}) {
    return false;
  }
  const Short p{a, device_data<__nv_bfloat16>(keys), keys.stride(0), keys.stride(1)};
  (a.key == 576 ? launch<576> : launch<224>)(p, grid, context);
  return true;
}

}  // namespace latente::cuda
