#include "cuda/elements.cuh"
#include "cuda/kernels.h"

namespace latente::cuda {
namespace {

constexpr int threads = 256;

template <class T>
struct Rotation {
  T* x;
  int64_t token_stride, head_stride;
  const int32_t* positions;
  const float* table;
  int64_t table_stride;
  unsigned heads, half;
  bool inverse;
};

// A thread a pair of elements of a head. Neighbouring threads have neighbouring pairs.
template <bool interleaved, class T>
__global__ __launch_bounds__(threads) void rope_kernel(Rotation<T> p, unsigned pairs) {
  const unsigned index = blockIdx.x * threads + threadIdx.x;
  if (index >= pairs) return;
  const unsigned row = index / p.half, i = index - row * p.half;
  const unsigned token = row / p.heads, head = row - token * p.heads;
  const float* angles = p.table + p.positions[token] * p.table_stride;
  const float c = angles[i], s = p.inverse ? -angles[p.half + i] : angles[p.half + i];
  T* x = p.x + token * p.token_stride + head * p.head_stride;
  T& first = interleaved ? x[2 * i] : x[i];
  T& second = interleaved ? x[2 * i + 1] : x[p.half + i];
  const float a = widen(first), b = widen(second);
  first = narrow<T>(a * c - b * s);
  second = narrow<T>(b * c + a * s);
}

}  // namespace

void rope(View x, View positions, View table, bool interleaved, bool inverse, const Context& context) {
  LATENTE_ASSERT(x.shape.rank() == 3 && x[2] == table[1] && x[2] % 2 == 0 && positions.count() == x[0] &&
                 positions.contiguous());
  if (x.count() == 0) return;
  const int64_t pairs = x.count() / 2;
  LATENTE_ASSERT(pairs < (int64_t{1} << 31));
  with_type(x.dtype, "rope", [&]<class T>(T) {
    const Rotation<T> rotation{x.as<T>(),
                               x.stride(0),
                               x.stride(1),
                               positions.as<int32_t>(),
                               table.as<float>(),
                               table.stride(0),
                               static_cast<unsigned>(x[1]),
                               static_cast<unsigned>(x[2] / 2),
                               inverse};
    auto kernel = interleaved ? rope_kernel<true, T> : rope_kernel<false, T>;
    kernel<<<blocks_for(pairs, threads), threads, 0, context.stream>>>(rotation,
                                                                       static_cast<unsigned>(pairs));
    check_launch("rope");
  });
}

}  // namespace latente::cuda
