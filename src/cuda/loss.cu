// Cross entropy over a vocabulary: a chunk of rows of logits at a time.
#include "cuda/elements.cuh"
#include "cuda/kernels.h"

namespace latente::cuda {
namespace {

constexpr int threads = 512, warps = threads / warp_size;

// A row's highest logit and where it stands first; NaN never wins.
struct Best {
  float value;
  int index;
};
__device__ Best better(Best a, Best b) {
  if (b.value > a.value || (b.value == a.value && b.index < a.index)) return b;
  return a;
}

// Over the block, in all threads.
__device__ Best block_best(Best best, Best* partial) {
  for (int step = warp_size / 2; step > 0; step /= 2) {
    best = better(
        best, {__shfl_xor_sync(whole_warp, best.value, step), __shfl_xor_sync(whole_warp, best.index, step)});
  }
  if (threadIdx.x % warp_size == 0) partial[threadIdx.x / warp_size] = best;
  __syncthreads();
  best = partial[0];
  for (int w = 1; w < warps; ++w) best = better(best, partial[w]);
  return best;
}
__device__ float block_sum(float x, float* partial) {
  x = warp_sum(x);
  if (threadIdx.x % warp_size == 0) partial[threadIdx.x / warp_size] = x;
  __syncthreads();
  x = 0;
  for (int w = 0; w < warps; ++w) x += partial[w];
  return x;
}

template <class T>
struct Rows {
  float* logits;  // [rows, V]
  int64_t stride;
  int vocabulary;
  const int32_t* targets;
  const float* weights;
  float* nll;
  int32_t* predicted;  // or null
  bool gradient;       // logits become the gradient of weight · nll, as T from the beginning of their row on
};

// A block a row.
template <int N, class T>
__global__ __launch_bounds__(threads) void loss_kernel(Rows<T> p) {
  __shared__ Best bests[warps];
  __shared__ float sums[warps];
  const int row = static_cast<int>(blockIdx.x), first = static_cast<int>(threadIdx.x) * N;
  const int target = p.targets[row];
  float* logits = p.logits + row * p.stride;
  T* gradients = reinterpret_cast<T*>(logits);
  // One pass: the sum of what came so far is of exp(x - best), and shrinks when a higher logit comes.
  Best best{-INFINITY, 0};
  float sum = 0;
  for (int i = first; i < p.vocabulary; i += threads * N) {
    float x[N];
    load<N>(logits + i, x);
    const float before = best.value;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (x[j] > best.value) best = {x[j], i + j};
    }
    if (best.value > before) sum *= expf(before - best.value);
    const float base = best.value > -INFINITY ? best.value : 0;
#pragma unroll
    for (int j = 0; j < N; ++j) sum += expf(x[j] - base);
  }
  const float own = best.value;
  best = block_best(best, bests);
  if (threadIdx.x == 0 && p.predicted) p.predicted[row] = best.index;
  if (target < 0) {
    if (threadIdx.x == 0) p.nll[row] = 0;
    if (!p.gradient) return;
    const float zero[N] = {};
    for (int i = first; i < p.vocabulary; i += threads * N) store<N>(zero, gradients + i);
    return;
  }
  if (own < best.value) sum *= expf(own - best.value);
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) p.nll[row] = best.value - logits[target] + logf(sum);
  if (!p.gradient) return;
  const float weight = p.weights[row], factor = weight / sum;
  // Narrower than logits, gradients are written behind what is still to be read: a piece is read by all
  // before it is written.
  for (int base = 0; base < p.vocabulary; base += threads * N) {
    const int i = base + first;
    float x[N] = {};
    if (i < p.vocabulary) load<N>(logits + i, x);
    __syncthreads();
    if (i >= p.vocabulary) continue;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      x[j] = factor * expf(x[j] - best.value) - (i + j == target ? weight : 0.0f);
    }
    store<N>(x, gradients + i);
  }
}

// One block: loss = sum of weights · nll.
__global__ __launch_bounds__(threads) void total_kernel(const int32_t* targets, const float* weights,
                                                        const float* nll, int64_t tokens, float* loss) {
  __shared__ double sums[threads];
  double sum = 0;
  for (int64_t t = threadIdx.x; t < tokens; t += threads)
    sum += targets[t] < 0 ? 0.0 : static_cast<double>(weights[t]) * static_cast<double>(nll[t]);
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int step = threads / 2; step > 0; step /= 2) {
    if (static_cast<int>(threadIdx.x) < step) sums[threadIdx.x] += sums[threadIdx.x + step];
    __syncthreads();
  }
  if (threadIdx.x == 0) *loss = static_cast<float>(sums[0]);
}

View rows_of(const View& v, int64_t begin, int64_t count) {
  View part = v;
  part.data = static_cast<char*>(v.data) + begin * v.stride(0) * size_of(v.dtype);
  part.shape = {count, v[1]};
  return part;
}

void cross_entropy(const View& h, const View& w, const View& targets, const View& token_weights,
                   const View& scratch, const View& nll, const View& predicted, const View& loss,
                   const Grad* d_h, const Grad* d_w, const Context& context) {
  const int64_t tokens = h[0], vocabulary = w[0], chunk = scratch[0];
  LATENTE_ASSERT(vocabulary > 0 && chunk > 0 && scratch[1] == vocabulary && scratch.dtype == DType::f32);
  LATENTE_ASSERT(targets.count() == tokens && token_weights.count() == tokens && nll.count() == tokens);
  LATENTE_ASSERT(targets.contiguous() && token_weights.contiguous() && nll.contiguous());
  LATENTE_ASSERT(!predicted || (predicted.count() == tokens && predicted.contiguous()));
  with_type(h.dtype, "linear_cross_entropy", [&]<class T>(T) {
    for (int64_t begin = 0; begin < tokens; begin += chunk) {
      const int64_t count = std::min(chunk, tokens - begin);
      const View rows = rows_of(h, begin, count), logits = rows_of(scratch, 0, count);
      linear(rows, w, {}, {logits}, context);
      const Rows<T> p{logits.as<float>(),
                      logits.stride(0),
                      static_cast<int>(vocabulary),
                      targets.as<int32_t>() + begin,
                      token_weights.as<float>() + begin,
                      nll.as<float>() + begin,
                      predicted ? predicted.as<int32_t>() + begin : nullptr,
                      d_h != nullptr};
      auto kernel = in_packs(wide, {logits}) ? loss_kernel<wide, T> : loss_kernel<1, T>;
      kernel<<<static_cast<unsigned>(count), threads, 0, context.stream>>>(p);
      check_launch("linear_cross_entropy");
      if (!d_h) continue;
      View d_logits(logits.data, logits.shape, h.dtype);
      d_logits.strides[0] = logits.stride(0) * size_of(DType::f32) / size_of(h.dtype);
      if (*d_h) {
        linear_backward_input(d_logits, w, {rows_of(d_h->view, begin, count), d_h->accumulate}, context);
      }
      if (*d_w) {
        linear_backward_weight(d_logits, rows, {d_w->view, d_w->accumulate || begin > 0}, context);
      }
    }
  });
  total_kernel<<<1, threads, 0, context.stream>>>(targets.as<int32_t>(), token_weights.as<float>(),
                                                  nll.as<float>(), tokens, loss.as<float>());
  check_launch("linear_cross_entropy");
}

}  // namespace

void linear_cross_entropy(View h, View w, View targets, View token_weights, View scratch, View nll,
                          View predicted, View loss, const Context& context) {
  cross_entropy(h, w, targets, token_weights, scratch, nll, predicted, loss, nullptr, nullptr, context);
}

void linear_cross_entropy_with_gradient(View h, View w, View targets, View token_weights, View scratch,
                                        View nll, View predicted, View loss, Grad d_h, Grad d_w,
                                        const Context& context) {
  cross_entropy(h, w, targets, token_weights, scratch, nll, predicted, loss, &d_h, &d_w, context);
}

}  // namespace latente::cuda
