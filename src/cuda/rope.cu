#include "cuda/elements.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

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

// A thread has P neighbouring pairs of a head.
template <bool interleaved, int P, class T>
__global__ __launch_bounds__(threads) void rope_kernel(Rotation<T> p, unsigned count) {
  wait_for_earlier_kernels();
  const unsigned index = blockIdx.x * threads + threadIdx.x;
  if (index >= count) return;
  const unsigned a_head = p.half / P, row = index / a_head, i = (index - row * a_head) * P;
  const unsigned token = row / p.heads, head = row - token * p.heads;
  const float* angles = p.table + p.positions[token] * p.table_stride;
  float c[P], s[P], a[P], b[P], both[2 * P];
  load<P>(angles + i, c);
  load<P>(angles + p.half + i, s);
  T* x = p.x + token * p.token_stride + head * p.head_stride;
  if constexpr (P == 1) {
    load<1>(x + (interleaved ? 2 * i : i), a);
    load<1>(x + (interleaved ? 2 * i + 1 : p.half + i), b);
  } else if constexpr (interleaved) {
    load<2 * P>(x + 2 * i, both);
  } else {
    load<P>(x + i, a);
    load<P>(x + p.half + i, b);
  }
#pragma unroll
  for (int j = 0; j < P; ++j) {
    if constexpr (P > 1 && interleaved) a[j] = both[2 * j], b[j] = both[2 * j + 1];
    rotate(a[j], b[j], c[j], p.inverse ? -s[j] : s[j]);
    both[2 * j] = a[j], both[2 * j + 1] = b[j];
  }
  if constexpr (P == 1) {
    store<1>(a, x + (interleaved ? 2 * i : i));
    store<1>(b, x + (interleaved ? 2 * i + 1 : p.half + i));
  } else if constexpr (interleaved) {
    store<2 * P>(both, x + 2 * i);
  } else {
    store<P>(a, x + i);
    store<P>(b, x + p.half + i);
  }
}

}  // namespace

void rope(View x, View positions, View table, bool interleaved, bool inverse, const Context& context) {
  LATENTE_ASSERT(x.shape.rank() == 3 && x[2] == table[1] && x[2] % 2 == 0 && positions.count() == x[0] &&
                 positions.contiguous());
  if (x.count() == 0) return;
  // Eight elements at a time: halves of a head must be such packs too.
  const int64_t half = x[2] / 2, pack = interleaved ? 4 : 8;
  const bool packed = half % pack == 0 && in_packs(8, {x}) && in_packs(4, {table});
  const int64_t count = x.count() / 2 / (packed ? pack : 1);
  LATENTE_ASSERT(count < (int64_t{1} << 31));
  with_type(x.dtype, "rope", [&]<class T>(T) {
    const Rotation<T> rotation{x.as<T>(),
                               x.stride(0),
                               x.stride(1),
                               positions.as<int32_t>(),
                               table.as<float>(),
                               table.stride(0),
                               static_cast<unsigned>(x[1]),
                               static_cast<unsigned>(half),
                               inverse};
    auto kernel = interleaved ? (packed ? rope_kernel<true, 4, T> : rope_kernel<true, 1, T>)
                              : (packed ? rope_kernel<false, 8, T> : rope_kernel<false, 1, T>);
    launch_early(kernel, blocks_for(count, threads), threads, 0, "rope", context, rotation,
                 static_cast<unsigned>(count));
  });
}

}  // namespace latente::cuda
