#include "cuda/elements.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace latente::cuda {
namespace {

constexpr int threads = 256;

template <int N, class Table, class T>
__global__ __launch_bounds__(threads) void gather_kernel(const int32_t* ids, const Table* table,
                                                         int64_t table_stride, T* out, int64_t out_stride,
                                                         int64_t rows, unsigned packs) {
  wait_for_earlier_kernels();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  const int64_t row = index / packs, column = (index - row * packs) * N;
  if (row >= rows) return;
  float x[N];
  load<N>(table + ids[row] * table_stride + column, x);
  store<N>(x, out + row * out_stride + column);
}

// first[v] = the first place of id v; `unused` where there is none. The lowest wins whatever the order.
constexpr int unused = 0x7f7f7f7f;
__global__ __launch_bounds__(threads) void first_places_kernel(const int32_t* ids, int count, int* first) {
  const int t = static_cast<int>(blockIdx.x * threads + threadIdx.x);
  if (t < count) atomicMin(first + ids[t], t);
}

// The block at the first place of an id adds up that id's rows in their order; other blocks leave. Threads
// look for the places together, in pieces of the ids, and have N columns each.
constexpr int ids_a_thread = 4, piece = threads * ids_a_thread;
template <int N, class T, class Table>
__global__ __launch_bounds__(threads) void scatter_kernel(const int32_t* ids, int count, const int* first,
                                                          const T* d_out, int64_t d_out_stride, Table* table,
                                                          int64_t table_stride, int columns) {
  const int own = static_cast<int>(blockIdx.x), id = ids[own];
  if (first[id] != own) return;
  __shared__ int places[piece];
  __shared__ int found_before[threads / warp_size + 1];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % warp_size, warp = thread / warp_size;
  const int column = (static_cast<int>(blockIdx.y) * threads + thread) * N;
  float sum[N];
  if (column < columns) load<N>(table + id * table_stride + column, sum);
  for (int base = own; base < count; base += piece) {
    bool match[ids_a_thread];
    int matches = 0;
#pragma unroll
    for (int i = 0; i < ids_a_thread; ++i) {
      const int t = base + i * threads + thread;
      match[i] = t < count && ids[t] == id;
      matches += match[i] ? 1 : 0;
    }
    if (!__syncthreads_or(matches)) continue;
    int found = 0;  // in the pieces before
    for (int i = 0; i < ids_a_thread; ++i) {
      const unsigned in_warp = __ballot_sync(whole_warp, match[i]);
      if (lane == 0) found_before[warp + 1] = __popc(in_warp);
      __syncthreads();
      if (thread == 0) {
        found_before[0] = found;
        for (int w = 0; w < threads / warp_size; ++w) found_before[w + 1] += found_before[w];
      }
      __syncthreads();
      if (match[i])
        places[found_before[warp] + __popc(in_warp & ((1u << lane) - 1))] = base + i * threads + thread;
      found = found_before[threads / warp_size];
      __syncthreads();
    }
    if (column < columns) {
#pragma unroll 4
      for (int i = 0; i < found; ++i) {
        float x[N];
        load<N>(d_out + places[i] * d_out_stride + column, x);
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] += x[j];
      }
    }
  }
  if (column < columns) store<N>(sum, table + id * table_stride + column);
}

}  // namespace

void embedding(View ids, View table, View out, const Context& context) {
  LATENTE_ASSERT(table.shape.rank() == 2 && out.shape == Shape({ids.count(), table[1]}) && ids.contiguous());
  if (out.count() == 0) return;
  with_type(table.dtype, "embedding", [&]<class Table>(Table) {
    with_type(out.dtype, "embedding", [&]<class T>(T) {
      auto launch = [&](auto width) {
        constexpr int n = decltype(width)::value;
        const int64_t packs = table[1] / n;
        launch_early(gather_kernel<n, Table, T>, blocks_for(out[0] * packs, threads), threads, 0, "embedding",
                     context, ids.as<int32_t>(), table.as<Table>(), table.stride(0), out.as<T>(),
                     out.stride(0), out[0], static_cast<unsigned>(packs));
      };
      if (in_packs(wide, {table, out})) {
        launch(std::integral_constant<int, wide>());
      } else {
        launch(std::integral_constant<int, 1>());
      }
    });
  });
}

void embedding_backward(View ids, View d_out, Grad d_table, const Context& context) {
  if (!d_table) return;
  const View& table = d_table.view;
  LATENTE_ASSERT(d_out.shape == Shape({ids.count(), table[1]}) && ids.contiguous());
  if (!d_table.accumulate) fill(table, 0.0, context);
  if (d_out.count() == 0) return;
  const int count = static_cast<int>(ids.count());
  const size_t bytes = static_cast<size_t>(table[0]) * sizeof(int);
  LATENTE_ASSERT(static_cast<int64_t>(bytes) <= context.workspace_bytes);
  int* first = static_cast<int*>(context.workspace);
  check(cudaMemsetAsync(first, unused & 0xff, bytes, context.stream), "embedding_backward");
  first_places_kernel<<<blocks_for(count, threads), threads, 0, context.stream>>>(ids.as<int32_t>(), count,
                                                                                  first);
  check_launch("embedding_backward");
  with_type(d_out.dtype, "embedding_backward", [&]<class T>(T) {
    with_type(table.dtype, "embedding_backward", [&]<class Table>(Table) {
      auto launch = [&](auto width) {
        constexpr int n = decltype(width)::value;
        const dim3 grid(static_cast<unsigned>(count), blocks_for(table[1], threads * n));
        scatter_kernel<n><<<grid, threads, 0, context.stream>>>(
            ids.as<int32_t>(), count, first, d_out.as<T>(), d_out.stride(0), table.as<Table>(),
            table.stride(0), static_cast<int>(table[1]));
      };
      if (in_packs(wide, {table, d_out})) {
        launch(std::integral_constant<int, wide>());
      } else {
        launch(std::integral_constant<int, 1>());
      }
      check_launch("embedding_backward");
    });
  });
}

}  // namespace latente::cuda
