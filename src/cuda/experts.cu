#include "cuda/kernels.h"
#include "cuda/runtime.h"

namespace latente::cuda {
namespace {

constexpr int warp_size = 32;
constexpr unsigned whole_warp = 0xffffffffu;

// A warp an expert. It counts the choices of lower experts and of its own, which gives its offset, then walks
// the choices again in order and places its own: stable, without atomics, and the same whatever the grid.
__global__ void expert_order_kernel(const int32_t* experts, int choices, int top_k, int expert_count,
                                    int32_t* offsets, int32_t* rows, int32_t* slots) {
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

// A thread an element of out; choices are added in their order.
template <class T>
__global__ void combine_kernel(const T* y, int64_t y_stride, const T* weights, const int32_t* slots,
                               int top_k, T* out, int64_t out_stride, int64_t columns, bool accumulate) {
  const int64_t token = blockIdx.x;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  if (column >= columns) return;
  T* to = out + token * out_stride + column;
  T sum = accumulate ? *to : T{0};
  for (int64_t k = token * top_k; k < (token + 1) * top_k; ++k) {
    const T value = y[slots[k] * y_stride + column];
    sum = weights ? fma(weights[k], value, sum) : sum + value;
  }
  *to = sum;
}

template <class T>
void launch_combine(const View& y, const View& weights, const View& slots, const Grad& out,
                    StreamHandle stream) {
  constexpr int threads = 256;
  const int64_t tokens = slots[0], columns = y[1];
  const dim3 grid(static_cast<unsigned>(tokens), static_cast<unsigned>((columns + threads - 1) / threads));
  combine_kernel<<<grid, threads, 0, stream>>>(y.as<T>(), y.stride(0), weights.as_or_null<T>(),
                                               slots.as<int32_t>(), static_cast<int>(slots[1]),
                                               out.view.as<T>(), out.view.stride(0), columns, out.accumulate);
  check_launch("combine");
}

}  // namespace

void expert_order(View experts, View offsets, View rows, View slots, StreamHandle stream) {
  LATENTE_ASSERT(experts.contiguous() && slots.contiguous() && rows.count() == experts.count());
  constexpr int threads = 128;
  const int expert_count = static_cast<int>(offsets.count() - 1);
  const unsigned blocks = static_cast<unsigned>((expert_count * warp_size + threads - 1) / threads);
  expert_order_kernel<<<blocks, threads, 0, stream>>>(
      experts.as<int32_t>(), static_cast<int>(experts.count()), static_cast<int>(experts[1]), expert_count,
      offsets.as<int32_t>(), rows.as<int32_t>(), slots.as<int32_t>());
  check_launch("expert_order");
}

void combine(View y, View weights, View slots, Grad out, StreamHandle stream) {
  LATENTE_ASSERT(slots.contiguous() && (!weights || weights.contiguous()));
  LATENTE_ASSERT(out.view[0] == slots[0] && out.view[1] == y[1]);
  if (out.view.count() == 0) return;
  if (y.dtype == DType::f64) {
    launch_combine<double>(y, weights, slots, out, stream);
  } else {
    launch_combine<float>(y, weights, slots, out, stream);
  }
}

}  // namespace latente::cuda
