// The tokens' rows in the order of their experts, and back.
#include "cuda/elements.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace latente::cuda {
namespace {

constexpr int threads = 256, warps = threads / warp_size;

// -- few choices: one launch --

// A warp an expert. It counts the choices of lower experts and of its own, which gives its offset, then walks
// the choices again in order and places its own: stable, without atomics, and the same whatever the grid.
__global__ void expert_order_kernel(const int32_t* experts, int choices, int top_k, int expert_count,
                                    int32_t* offsets, int32_t* rows, int32_t* slots) {
  wait_for_earlier_kernels();
  const int lane = static_cast<int>(threadIdx.x % warp_size);
  const int expert = static_cast<int>((blockIdx.x * blockDim.x + threadIdx.x) / warp_size);
  if (expert >= expert_count) return;

  int lower = 0, own = 0;
  for (int i = lane; i < choices; i += warp_size) {
    const int chosen = experts[i];
    lower += chosen < expert;
    own += chosen == expert;
  }
  const int first = static_cast<int>(__reduce_add_sync(whole_warp, static_cast<unsigned>(lower)));
  own = static_cast<int>(__reduce_add_sync(whole_warp, static_cast<unsigned>(own)));
  if (lane == 0) {
    offsets[expert] = first;
    if (expert == expert_count - 1) offsets[expert_count] = first + own;
  }

  int next = first;
  for (int base = 0; base < choices && next < first + own; base += warp_size) {
    const int i = base + lane;
    const bool mine = i < choices && experts[i] == expert;
    const unsigned chosen = __ballot_sync(whole_warp, mine);
    if (mine) {
      const int slot = next + __popc(chosen & ((1u << lane) - 1));
      rows[slot] = i / top_k;
      slots[i] = slot;
    }
    next += __popc(chosen);
  }
}

// -- many choices: pieces of `threads` of them are counted, the counts summed, and each piece placed --

// counts [pieces, E]
__global__ __launch_bounds__(threads) void count_kernel(const int32_t* experts, int choices, int expert_count,
                                                        int* counts) {
  extern __shared__ int count[];
  const int thread = static_cast<int>(threadIdx.x), i = static_cast<int>(blockIdx.x) * threads + thread;
  for (int e = thread; e < expert_count; e += threads) count[e] = 0;
  __syncthreads();
  if (i < choices) atomicAdd(count + experts[i], 1);  // whole numbers: in any order
  __syncthreads();
  for (int e = thread; e < expert_count; e += threads)
    counts[static_cast<int64_t>(blockIdx.x) * expert_count + e] = count[e];
}

// One block. A piece's count becomes the sum of those of earlier pieces; the totals become offsets. The
// threads of an expert, `padded` apart, have a run of pieces each.
constexpr int sum_threads = 1024;
__global__ __launch_bounds__(sum_threads) void sum_counts_kernel(int* counts, int pieces, int expert_count,
                                                                 int padded, int32_t* offsets) {
  __shared__ int sums[sum_threads], total[sum_threads];  // [runs, padded], [E]
  const int thread = static_cast<int>(threadIdx.x), e = thread % padded, run = thread / padded;
  const int runs = sum_threads / padded, length = (pieces + runs - 1) / runs;
  const int begin = run * length, end = run < runs && e < expert_count ? min(begin + length, pieces) : 0;
  int sum = 0;
#pragma unroll 8
  for (int p = begin; p < end; ++p) sum += counts[static_cast<int64_t>(p) * expert_count + e];
  sums[thread] = sum;
  __syncthreads();
  if (thread < padded) {
    int before = 0;
    for (int r = 0; r < runs; ++r) {
      const int own = sums[r * padded + thread];
      sums[r * padded + thread] = before;
      before += own;
    }
    total[thread] = before;
  }
  __syncthreads();
  int before = sums[thread];
  constexpr int at_once = 8;
  for (int p = begin; p < end; p += at_once) {
    int own[at_once];
#pragma unroll
    for (int i = 0; i < at_once; ++i)
      own[i] = p + i < end ? counts[static_cast<int64_t>(p + i) * expert_count + e] : 0;
#pragma unroll
    for (int i = 0; i < at_once; ++i) {
      if (p + i < end) counts[static_cast<int64_t>(p + i) * expert_count + e] = before;
      before += own[i];
    }
  }
  if (thread >= warp_size) return;
  before = 0;
  for (int base = 0; base < expert_count; base += warp_size) {
    const int expert = base + thread, own = expert < expert_count ? total[expert] : 0;
    int through = own;
    for (int step = 1; step < warp_size; step *= 2) {
      const int lower = __shfl_up_sync(whole_warp, through, step);
      if (thread >= step) through += lower;
    }
    if (expert < expert_count) offsets[expert] = before + through - own;
    before += __shfl_sync(whole_warp, through, warp_size - 1);
  }
  if (thread == 0) offsets[expert_count] = before;
}

// A thread a choice: its slot follows from its expert's offset and the equal choices before it: in earlier
// pieces, in earlier warps of this one, and in its warp.
__global__ __launch_bounds__(threads) void place_kernel(const int32_t* experts, int choices, int top_k,
                                                        int expert_count, const int* counts,
                                                        const int32_t* offsets, int32_t* rows,
                                                        int32_t* slots) {
  extern __shared__ int count[];  // [warps, E]
  const int thread = static_cast<int>(threadIdx.x), lane = thread % warp_size, warp = thread / warp_size;
  const int i = static_cast<int>(blockIdx.x) * threads + thread;
  for (int e = thread; e < warps * expert_count; e += threads) count[e] = 0;
  const int expert = i < choices ? experts[i] : -1;
  const unsigned equal = __match_any_sync(whole_warp, expert);
  __syncthreads();
  const int rank = __popc(equal & ((1u << lane) - 1));
  if (expert >= 0 && rank == 0) count[warp * expert_count + expert] = __popc(equal);
  __syncthreads();
  if (expert < 0) return;
  int slot = offsets[expert] + counts[static_cast<int64_t>(blockIdx.x) * expert_count + expert] + rank;
  for (int w = 0; w < warp; ++w) slot += count[w * expert_count + expert];
  rows[slot] = i / top_k;
  slots[i] = slot;
}

// -- the rows --

// A thread a pack of out; choices are added in their order.
template <int N, class T>
__global__ __launch_bounds__(threads) void combine_kernel(const T* y, int64_t y_stride, const float* weights,
                                                          const int32_t* slots, int top_k, T* out,
                                                          int64_t out_stride, int64_t tokens, unsigned packs,
                                                          bool accumulate) {
  wait_for_earlier_kernels();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  const int64_t token = index / packs, column = (index - token * packs) * N;
  if (token >= tokens) return;
  T* to = out + token * out_stride + column;
  float sum[N] = {};
  if (accumulate) load<N>(to, sum);
  for (int64_t k = token * top_k; k < (token + 1) * top_k; ++k) {
    float value[N];
    load<N>(y + slots[k] * y_stride + column, value);
    const float weight = weights ? weights[k] : 1.0f;
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] = fmaf(weight, value[j], sum[j]);
  }
  store<N>(sum, to);
}

template <class T>
struct CombineBackward {
  const T* d_out;
  int64_t d_out_stride;
  const T* y;
  int64_t y_stride;
  const float* weights;  // or null
  const int32_t* slots;
  T* d_y;  // or null
  int64_t d_y_stride;
  float* d_weights;  // [T, K], or null
  int64_t d_weights_stride;
  bool add_y, add_weights;
  int64_t choices;
  int top_k, columns;
};

// A warp a choice.
template <int N, class T>
__global__ __launch_bounds__(threads) void combine_backward_kernel(CombineBackward<T> p) {
  const int lane = static_cast<int>(threadIdx.x % warp_size);
  const int64_t choice = (static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x) / warp_size;
  if (choice >= p.choices) return;
  const int64_t token = choice / p.top_k, slot = p.slots[choice];
  const float weight = p.weights ? p.weights[choice] : 1.0f;
  float product = 0;
  for (int column = lane * N; column < p.columns; column += warp_size * N) {
    float g[N];
    load<N>(p.d_out + token * p.d_out_stride + column, g);
    if (p.d_weights) {
      float y[N];
      load<N>(p.y + slot * p.y_stride + column, y);
#pragma unroll
      for (int j = 0; j < N; ++j) product = fmaf(g[j], y[j], product);
    }
    if (!p.d_y) continue;
#pragma unroll
    for (int j = 0; j < N; ++j) g[j] *= weight;
    put<N>(p.add_y, g, p.d_y + slot * p.d_y_stride + column);
  }
  if (!p.d_weights) return;
  product = warp_sum(product);
  float& to = p.d_weights[token * p.d_weights_stride + choice - token * p.top_k];
  if (lane == 0) to = p.add_weights ? to + product : product;
}

}  // namespace

void expert_order(View experts, View offsets, View rows, View slots, const Context& context) {
  LATENTE_ASSERT(experts.contiguous() && slots.contiguous() && rows.count() == experts.count());
  const int expert_count = static_cast<int>(offsets.count() - 1), top_k = static_cast<int>(experts[1]);
  const int choices = static_cast<int>(experts.count());
  const size_t piece_bytes = static_cast<size_t>(warps * expert_count) * sizeof(int);
  constexpr int few = 2048;
  if (choices <= few || piece_bytes > 48 * 1024) {
    const unsigned blocks = blocks_for(int64_t{expert_count} * warp_size, 128);
    return launch_early(expert_order_kernel, blocks, 128, 0, "expert_order", context, experts.as<int32_t>(),
                        choices, top_k, expert_count, offsets.as<int32_t>(), rows.as<int32_t>(),
                        slots.as<int32_t>());
  }
  const unsigned pieces = blocks_for(choices, threads);
  LATENTE_ASSERT(int64_t{pieces} * expert_count * int64_t{sizeof(int)} <= context.workspace_bytes);
  int* counts = static_cast<int*>(context.workspace);
  const size_t bytes = static_cast<size_t>(expert_count) * sizeof(int);
  count_kernel<<<pieces, threads, bytes, context.stream>>>(experts.as<int32_t>(), choices, expert_count,
                                                           counts);
  const int padded = (expert_count + warp_size - 1) / warp_size * warp_size;
  sum_counts_kernel<<<1, sum_threads, 0, context.stream>>>(counts, static_cast<int>(pieces), expert_count,
                                                           padded, offsets.as<int32_t>());
  place_kernel<<<pieces, threads, piece_bytes, context.stream>>>(experts.as<int32_t>(), choices, top_k,
                                                                 expert_count, counts, offsets.as<int32_t>(),
                                                                 rows.as<int32_t>(), slots.as<int32_t>());
  check_launch("expert_order");
}

void combine(View y, View weights, View slots, Grad out, const Context& context) {
  if (!out) return;
  LATENTE_ASSERT(slots.contiguous() && (!weights || weights.contiguous()));
  LATENTE_ASSERT(out.view[0] == slots[0] && out.view[1] == y[1]);
  if (out.view.count() == 0) return;
  with_type(y.dtype, "combine", [&]<class T>(T) {
    auto launch = [&](auto width) {
      constexpr int n = decltype(width)::value;
      const int64_t packs = y[1] / n;
      launch_early(combine_kernel<n, T>, blocks_for(slots[0] * packs, threads), threads, 0, "combine",
                   context, y.as<T>(), y.stride(0), weights.as_or_null<float>(), slots.as<int32_t>(),
                   static_cast<int>(slots[1]), out.view.as<T>(), out.view.stride(0), slots[0],
                   static_cast<unsigned>(packs), out.accumulate);
    };
    if (in_packs(wide, {y, out.view})) {
      launch(std::integral_constant<int, wide>());
    } else {
      launch(std::integral_constant<int, 1>());
    }
  });
}

void combine_backward(View d_out, View y, View weights, View slots, Grad d_y, Grad d_weights,
                      const Context& context) {
  if (!d_y && !d_weights) return;
  LATENTE_ASSERT(slots.contiguous() && (!weights || weights.contiguous()));
  LATENTE_ASSERT(d_out.shape == Shape({slots[0], y[1]}) && (!d_y || d_y.view.shape == y.shape));
  if (slots.count() == 0) return;
  with_type(y.dtype, "combine_backward", [&]<class T>(T) {
    const CombineBackward<T> p{d_out.as<T>(),
                               d_out.stride(0),
                               y.as<T>(),
                               y.stride(0),
                               weights.as_or_null<float>(),
                               slots.as<int32_t>(),
                               d_y.view.as_or_null<T>(),
                               d_y ? d_y.view.stride(0) : 0,
                               d_weights.view.as_or_null<float>(),
                               d_weights ? d_weights.view.stride(0) : 0,
                               d_y.accumulate,
                               d_weights.accumulate,
                               slots.count(),
                               static_cast<int>(slots[1]),
                               static_cast<int>(y[1])};
    auto kernel = in_packs(wide, {d_out, y, d_y.view}) ? combine_backward_kernel<wide, T>
                                                       : combine_backward_kernel<1, T>;
    kernel<<<blocks_for(slots.count(), warps), threads, 0, context.stream>>>(p);
    check_launch("combine_backward");
  });
}

}  // namespace latente::cuda
