#include "cuda/elements.cuh"
#include "cuda/kernels.h"

namespace latente::cuda {
namespace {

constexpr int threads = 256;
constexpr int most_blocks = 1056;  // 8 on each of 132 multiprocessors

template <int N>
__global__ __launch_bounds__(threads) void squares_kernel(const float* x, int64_t packs, double* parts) {
  double sum = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; i < packs;
       i += static_cast<int64_t>(gridDim.x) * threads) {
    float v[N];
    load<N>(x + i * N, v);
#pragma unroll
    for (int j = 0; j < N; ++j) sum = fma(static_cast<double>(v[j]), static_cast<double>(v[j]), sum);
  }
  sum = block_sum<threads>(sum);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

__global__ __launch_bounds__(threads) void add_parts_kernel(const double* parts, int count, double* result) {
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += threads) sum += parts[i];
  sum = block_sum<threads>(sum);
  if (threadIdx.x == 0) *result += sum;
}

template <int N, class P, class M>
__global__ __launch_bounds__(threads) void adamw_kernel(P* parameter, float* master, const float* gradient,
                                                        M* m, M* v, const double* scalars, AdamW options,
                                                        int64_t packs) {
  const float clip = static_cast<float>(scalars[1]);
  const float keep = static_cast<float>(1 - scalars[0] * options.weight_decay);
  const float rate = static_cast<float>(scalars[0] / scalars[2]);
  const float unbias = static_cast<float>(1 / sqrt(scalars[3]));
  const float beta1 = static_cast<float>(options.beta1), rest1 = static_cast<float>(1 - options.beta1);
  const float beta2 = static_cast<float>(options.beta2), rest2 = static_cast<float>(1 - options.beta2);
  const float epsilon = static_cast<float>(options.epsilon);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; i < packs;
       i += static_cast<int64_t>(gridDim.x) * threads) {
    float g[N], first[N], second[N], value[N];
    load<N>(gradient + i * N, g);
    load<N>(m + i * N, first);
    load<N>(v + i * N, second);
    if (master) {
      load<N>(master + i * N, value);
    } else {
      load<N>(parameter + i * N, value);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float clipped = g[j] * clip;
      first[j] = fmaf(first[j], beta1, clipped * rest1);
      second[j] = fmaf(second[j], beta2, clipped * clipped * rest2);
      const float direction = first[j] / fmaf(sqrtf(second[j]), unbias, epsilon);
      value[j] = fmaf(-rate, direction, value[j] * keep);
    }
    store<N>(first, m + i * N);
    store<N>(second, v + i * N);
    if (master) store<N>(value, master + i * N);
    store<N>(value, parameter + i * N);
  }
}

// One block.
__global__ __launch_bounds__(threads) void routing_bias_kernel(float* load, float* bias, int experts,
                                                               double rate) {
  __shared__ double mean;
  const int thread = static_cast<int>(threadIdx.x);
  double sum = 0;
  for (int e = thread; e < experts; e += threads) sum += static_cast<double>(load[e]);
  sum = block_sum<threads>(sum);
  if (thread == 0) mean = sum / experts;
  __syncthreads();
  for (int e = thread; e < experts; e += threads) {
    const double error = mean - static_cast<double>(load[e]);
    bias[e] = static_cast<float>(static_cast<double>(bias[e]) + rate * ((error > 0) - (error < 0)));
    load[e] = 0;
  }
}

unsigned grid_for(int64_t packs) {
  return std::min(blocks_for(packs, threads), static_cast<unsigned>(most_blocks));
}

}  // namespace

void add_sum_of_squares(View x, View result, const Context& context) {
  LATENTE_ASSERT(x.contiguous());
  if (x.count() == 0) return;
  const bool packed = x.count() % 4 == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  const int64_t packs = packed ? x.count() / 4 : x.count();
  const unsigned blocks = grid_for(packs);
  double* parts = static_cast<double*>(context.workspace);
  auto kernel = packed ? squares_kernel<4> : squares_kernel<1>;
  kernel<<<blocks, threads, 0, context.stream>>>(x.as<float>(), packs, parts);
  add_parts_kernel<<<1, threads, 0, context.stream>>>(parts, static_cast<int>(blocks), result.as<double>());
  check_launch("add_sum_of_squares");
}

void adamw(View parameter, View master, View gradient, View m, View v, View scalars, const AdamW& options,
           const Context& context) {
  LATENTE_ASSERT(parameter.contiguous() && gradient.contiguous() && m.contiguous() && v.contiguous());
  LATENTE_ASSERT(gradient.count() == parameter.count() && m.count() == parameter.count() &&
                 v.count() == parameter.count());
  LATENTE_ASSERT((parameter.dtype == DType::bf16) == static_cast<bool>(master) && m.dtype == v.dtype);
  const int64_t count = parameter.count();
  if (count == 0) return;
  bool packed = count % 4 == 0;
  for (const View& view : {parameter, master, gradient, m, v})
    packed = packed && reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  with_type(parameter.dtype, "adamw", [&]<class P>(P) {
    with_type(m.dtype, "adamw", [&]<class M>(M) {
      const int64_t packs = packed ? count / 4 : count;
      auto kernel = packed ? adamw_kernel<4, P, M> : adamw_kernel<1, P, M>;
      kernel<<<grid_for(packs), threads, 0, context.stream>>>(parameter.as<P>(), master.as_or_null<float>(),
                                                              gradient.as<float>(), m.as<M>(), v.as<M>(),
                                                              scalars.as<double>(), options, packs);
      check_launch("adamw");
    });
  });
}

void update_routing_bias(View load, View bias, double rate, const Context& context) {
  LATENTE_ASSERT(load.contiguous() && bias.contiguous() && load.count() == bias.count());
  routing_bias_kernel<<<1, threads, 0, context.stream>>>(load.as<float>(), bias.as<float>(),
                                                         static_cast<int>(load.count()), rate);
  check_launch("update_routing_bias");
}

}  // namespace latente::cuda
