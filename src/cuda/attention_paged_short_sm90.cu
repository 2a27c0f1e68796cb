// Attention of a few tokens over contexts of one piece in a cache of latents: what takes time is one latency
// after another, so a block has 16 heads of a token and 64 columns of its results, makes all scores itself,
// and has the entries of earlier passes in shared memory before the queries are there. An element has the
// bits that the kernel for any contexts (attention_paged_sm90.cu) gives it: the same chains of products, and
// sums in the same order.
#include "cuda/attention_paged_short.cuh"
#include "cuda/attention_sm90.h"
#include "cuda/launch.cuh"

namespace latente::cuda {
namespace {

using namespace few_entries;

constexpr int columns = warps * 8;  // of values, of a block

template <int key>
struct ShortShared : Piece<key> {
  int64_t entries[piece_keys];  // where keys lie
};

template <int key>
__global__ void __launch_bounds__(threads, 1) short_kernel(const __grid_constant__ Work p) {
  constexpr int chunks = key / 8;
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
  Keys<key> k;
  const bool late = min(first_key + warp_keys, end) > early;
  mma::wait<1>();
  __syncthreads();
  if (!late) k.read(s);
  mma::wait<0>();
  __syncthreads();
  if (late) k.read(s);
  unsigned v[tiles / 4][4];
#pragma unroll
  for (int i = 0; i < tiles / 4; ++i) {
    if (i * 32 < padded)
      mma::load_matrices<true>(v[i], mma::shared_address(s.keys[i * 32 + lane] + (column + warp * 8) * 2));
  }

  float score[2][4] = {};
  if (first_key < end) k.multiply(s, score);
  const Statistics known = make_weights(s, score, end, p.a.scale);

  float out[4] = {};
  add_values(mma::shared_address(s.weights[lane % 16] + lane / 16 * 16), known, v, end, out);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = lane / 4 + 8 * i;
    const float sum = known.sum(s, i);
    const float inverse = sum != 0 ? 1 / sum : 0;
    if (r >= heads) continue;
    *reinterpret_cast<uint32_t*>(p.a.out.at(token, head + r) + column + warp * 8 + lane % 4 * 2) =
        inverse != 0 ? pack_bf16(out[2 * i] * inverse, out[2 * i + 1] * inverse) : 0;
  }
}

template <int key>
void launch(const Work& p, dim3 grid, const Context& context) {
  launch_early(short_kernel<key>, grid, threads, sizeof(ShortShared<key>), "attention_paged", context, p);
}

}  // namespace

bool attention_paged_short_sm90(const Paged<__nv_bfloat16>& a, const View& keys, const Pages& pages,
                                const Context& context) {
  const dim3 grid(static_cast<unsigned>(a.value / columns), static_cast<unsigned>(a.tokens),
                  static_cast<unsigned>(ceil_div(a.heads, rows)));
  if (capacity(keys, pages) > piece_keys ||
      int64_t{grid.x} * grid.y * grid.z > int64_t{context.multiprocessors}) {
    return false;
  }
  const Work p{a, device_data<__nv_bfloat16>(keys), keys.stride(0), keys.stride(1)};
  (a.key == 576 ? launch<576> : launch<224>)(p, grid, context);
  return true;
}

}  // namespace latente::cuda
