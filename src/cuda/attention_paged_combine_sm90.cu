// Puts the results of pieces of contexts together (attention_paged_sm90.cu): a row's pieces are added in
// their order, each in units of two to the power of the largest base. One sequence has few rows of many
// pieces, and waits for one latency after another; many sequences have many rows, and wait for memory. So
// there are two kernels, with the same bits.
#include "cuda/attention_paged_latents_sm90.cuh"
#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"

namespace latente::cuda::latents {
namespace {

constexpr int most_pieces = 1024;

// A row's largest base, and the sum of its weights in these units. One warp.
struct Whole {
  float top = -INFINITY, sum = 0;

  __device__ Whole(const RowOfPiece* rows, int splits) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int s = lane; s < splits; s += 32) top = fmaxf(top, rows[s].base);
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(whole_warp, top, step));
    for (int s = lane; s < splits; s += 32) sum = fmaf(exp2f(rows[s].base - top), rows[s].sum, sum);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(whole_warp, sum, step);
  }
};
// What a piece's columns are multiplied by, those of its halves.
__device__ float2 weights_of(const RowOfPiece& row, float top) {
  const float weight = exp2f(row.base - top);
  return {weight * row.unit[0], weight * row.unit[1]};
}

// A block a row. Each group of threads fetches every eighth piece, eight columns a thread; then a thread adds
// two columns of all. The first pieces are on their way while their weights are made.
template <class L>
struct RowKernel {
  static constexpr int groups = 8, most_held = 4 * groups;
  static constexpr int columns = L::values * tile_columns, group_threads = columns / 8;
  static constexpr int threads = groups * group_threads;
};
template <class L>
__global__ void __launch_bounds__(RowKernel<L>::threads)
    combine_kernel(const Paged<__nv_bfloat16> a, const PieceResults results) {
  using K = RowKernel<L>;
  __shared__ float2 weights[most_pieces];
  __shared__ uint4 held[K::most_held][K::group_threads];
  __shared__ float inverse;
  const int token = results.partials.first_token + static_cast<int>(blockIdx.x),
            head = static_cast<int>(blockIdx.y);
  const int splits = piece_count(a.position[token] + 1), thread = static_cast<int>(threadIdx.x);
  wait_for_earlier_kernels();
  if (splits == 1) return;
  const int64_t place = results.partials.row(token, head, 0);
  const int group = thread / K::group_threads, at = thread % K::group_threads;
  const uint4* const from = reinterpret_cast<const uint4*>(results.values + place * K::columns) + at;
  uint4 own[K::most_held / K::groups];
  const auto fetch = [&](int first) {
#pragma unroll
    for (int i = 0; i < K::most_held / K::groups; ++i) {
      const int s = first + group + i * K::groups;
      if (s < splits) own[i] = from[s * K::group_threads];
    }
  };
  fetch(0);
  if (thread < 32) {
    const RowOfPiece* const rows = results.rows + place;
    const Whole whole(rows, splits);
    for (int s = thread; s < splits; s += 32) weights[s] = weights_of(rows[s], whole.top);
    if (thread == 0) inverse = 1 / whole.sum;
  }
  // A pair of columns: where it stands in a piece.
  const int word = thread / 16 * 16 + thread % 4 * 4 + thread % 16 / 4;
  const bool second = word >= L::first * tile_columns / 2;
  float low = 0, high = 0;
  for (int first = 0; first < splits; first += K::most_held) {
    if (first > 0) __syncthreads();
#pragma unroll
    for (int i = 0; i < K::most_held / K::groups; ++i) held[group + i * K::groups][at] = own[i];
    __syncthreads();
    fetch(first + K::most_held);
    if (thread >= K::columns / 2) continue;
    const int count = min(splits - first, K::most_held);
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      const float2 x = __half22float2(reinterpret_cast<const __half2*>(held[i])[word]);
      const float weight = second ? weights[first + i].y : weights[first + i].x;
      low = fmaf(weight, x.x, low), high = fmaf(weight, x.y, high);
    }
  }
  if (thread >= K::columns / 2) return;
  reinterpret_cast<uint32_t*>(a.out.at(token, head))[thread] = pack_bf16(low * inverse, high * inverse);
}

// A warp has up to 256 columns of a row, eight a lane. Deep: the next pieces are on their way while some are
// added, which costs registers, and so warps: where rows are enough to keep memory busy, rather not.
constexpr int rows_threads = 256, rows_ahead = 8;
template <class L, bool deep>
__global__ void __launch_bounds__(rows_threads, deep ? 2 : 4)
    combine_rows_kernel(const Paged<__nv_bfloat16> a, const PieceResults results) {
  constexpr int columns = L::values * tile_columns, row_warps = (columns + 255) / 256;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int task = static_cast<int>(blockIdx.x * rows_threads + threadIdx.x) / 32, row = task / row_warps;
  const int at = task % row_warps * 256 + lane * 8;
  if (row >= results.partials.tokens * a.heads) return;
  const int token = results.partials.first_token + row / a.heads, head = row % a.heads;
  const int splits = piece_count(a.position[token] + 1);
  wait_for_earlier_kernels();
  if (splits == 1) return;
  const int64_t place = results.partials.row(token, head, 0);
  const RowOfPiece* const rows = results.rows + place;
  const __half* const from = results.values + place * columns + at;
  const bool real = at < columns, second = at >= L::first * tile_columns;
  uint4 pieces[deep ? 2 : 1][rows_ahead];
  const auto fetch = [&](int first, uint4(&to)[rows_ahead]) {
#pragma unroll
    for (int i = 0; i < rows_ahead; ++i) {
      if (real && first + i < splits) to[i] = *reinterpret_cast<const uint4*>(from + (first + i) * columns);
    }
  };
  fetch(0, pieces[0]);
  if constexpr (deep) fetch(rows_ahead, pieces[1]);
  const Whole whole(rows, splits);
  float out[8] = {};
  for (int chunk = 0; chunk < splits; chunk += 32) {
    float2 weights{};
    if (chunk + lane < splits) weights = weights_of(rows[chunk + lane], whole.top);
    const int count = min(splits - chunk, 32);
#pragma unroll
    for (int first = 0; first < 32; first += rows_ahead) {
      if (first >= count) break;
      uint4(&own)[rows_ahead] = pieces[deep ? first / rows_ahead % 2 : 0];
      if (!deep && chunk + first > 0) fetch(chunk + first, own);
#pragma unroll
      for (int i = 0; i < rows_ahead; ++i) {
        if (first + i >= count) break;
        const float one = __shfl_sync(whole_warp, weights.x, first + i),
                    two = __shfl_sync(whole_warp, weights.y, first + i), weight = second ? two : one;
        const uint32_t pairs[4] = {own[i].x, own[i].y, own[i].z, own[i].w};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float2 x = __half22float2(*reinterpret_cast<const __half2*>(pairs + c));
          out[2 * c] = fmaf(weight, x.x, out[2 * c]);
          out[2 * c + 1] = fmaf(weight, x.y, out[2 * c + 1]);
        }
      }
      if constexpr (deep) fetch(chunk + first + 2 * rows_ahead, own);
    }
  }
  if (!real) return;
  __nv_bfloat16* const to = a.out.at(token, head) + at / 32 * 32 + at % 32 / 4;
  const float inverse = 1 / whole.sum;
#pragma unroll
  for (int c = 0; c < 4; ++c)
    *reinterpret_cast<uint32_t*>(to + 8 * c) = pack_bf16(out[2 * c] * inverse, out[2 * c + 1] * inverse);
}

template <class L>
void launch(const Paged<__nv_bfloat16>& a, const PieceResults& results, const Context& context) {
  const int64_t rows = int64_t{results.partials.tokens} * a.heads;
  const bool many = rows >= 3 * context.multiprocessors, deep = rows < 60 * context.multiprocessors;
  if (many) {
    const int64_t warps = rows * ceil_div(int64_t{L::values} * tile_columns, 256);
    const auto kernel = deep ? combine_rows_kernel<L, true> : combine_rows_kernel<L, false>;
    launch_early(kernel, dim3(static_cast<unsigned>(ceil_div(warps, rows_threads / 32))), rows_threads, 0,
                 "attention_paged", context, a, results);
  } else {
    launch_early(combine_kernel<L>,
                 dim3(static_cast<unsigned>(results.partials.tokens), static_cast<unsigned>(a.heads)),
                 RowKernel<L>::threads, 0, "attention_paged", context, a, results);
  }
}

}  // namespace

void combine_pieces_sm90(const Paged<__nv_bfloat16>& a, const PieceResults& results, const Context& context) {
  LATENTE_ASSERT(results.partials.splits <= most_pieces);
  (a.value == 512 ? launch<Latent512> : launch<Latent192>)(a, results, context);
}

}  // namespace latente::cuda::latents
