#include "cuda/attention.cuh"
#include "cuda/attention_backward.cuh"
#include "cuda/attention_sm90.h"
#include "cuda/kernels.h"

namespace latente::cuda {
namespace {

constexpr int block = 16;  // of queries and of keys
constexpr int threads = block * block;

template <class T, int N>
struct alignas(N * sizeof(T)) Several {
  T at[N];
};

// `lanes` of a warp a row of a head, `width` elements each at a time.
template <class T, int width>
__global__ void delta_kernel(const Backward<T> b, int lanes) {
  const Expanded<T>& a = b.forward;
  const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x, row = thread / static_cast<unsigned>(lanes);
  const unsigned heads = static_cast<unsigned>(a.heads), t = row / heads, h = row % heads;
  const int lane = static_cast<int>(thread) % lanes;
  float sum = 0;
  if (t < static_cast<unsigned>(a.tokens)) {
    const T *out = a.out.at(t, h), *d_out = b.d_out.at(t, h);
    for (int i = width * lane; i < a.value; i += lanes * width) {
      const auto x = *reinterpret_cast<const Several<T, width>*>(out + i);
      const auto y = *reinterpret_cast<const Several<T, width>*>(d_out + i);
#pragma unroll
      for (int c = 0; c < width; ++c) sum = fmaf(widen(x.at[c]), widen(y.at[c]), sum);
    }
  }
  for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(whole_warp, sum, step);
  if (t < static_cast<unsigned>(a.tokens) && lane == 0) b.delta[t * b.delta_token + h * b.delta_head] = sum;
}

template <class T>
bool has_packs(const Rows<T>& x, int width) {
  return reinterpret_cast<uintptr_t>(x.data) % (width * sizeof(T)) == 0 && x.token % width == 0 &&
         x.head % width == 0;
}

// Rows of queries, or of keys, in shared memory: [block, width + 1].
struct Rows32 {
  float* data;
  int width;
  __device__ float& at(int row, int i) const { return data[row * (width + 1) + i]; }
  __device__ float dot(int row, const Rows32& other, int other_row) const {
    float sum = 0;
    for (int i = 0; i < width; ++i) sum = fmaf(at(row, i), other.at(other_row, i), sum);
    return sum;
  }
  template <class Load>
  __device__ void load(const Load& element) const {
    for (int i = static_cast<int>(threadIdx.x); i < block * width; i += threads) {
      at(i / width, i % width) = element(i / width, i % width);
    }
  }
};

struct Carver {
  float* next;
  __device__ Rows32 rows(int width) {
    const Rows32 r{next, width};
    next += block * (width + 1);
    return r;
  }
};
int64_t shared_bytes(int64_t key, int64_t value) {
  return 4 * block * (3 * (key + 1) + 3 * (value + 1) + 2 * (block + 1));
}

template <class T>
__device__ void load_queries(const Backward<T>& b, int first, int head, const Rows32& q,
                             const Rows32& d_out) {
  const Expanded<T>& a = b.forward;
  q.load([&](int r, int i) { return first + r < a.tokens ? widen(a.q.at(first + r, head)[i]) : 0; });
  d_out.load([&](int r, int i) { return first + r < a.tokens ? widen(b.d_out.at(first + r, head)[i]) : 0; });
}

template <class T>
__device__ void load_keys(const Expanded<T>& a, int first, int group, const Rows32& k, const Rows32& v) {
  k.load([&](int r, int i) {
    if (first + r >= a.tokens) return 0.0f;
    return widen(i < a.nope ? a.k.at(first + r, group)[i] : a.k_rope.at(first + r, 0)[i - a.nope]);
  });
  v.load([&](int r, int i) { return first + r < a.tokens ? widen(a.v.at(first + r, group)[i]) : 0; });
}

// Probabilities and their gradients (times the scale) of a block: a thread a pair.
template <class T>
__device__ void score(const Backward<T>& b, int query, int key, int head, const Rows32& q,
                      const Rows32& d_out, const Rows32& k, const Rows32& v, const Rows32& p,
                      const Rows32& d_s) {
  const Expanded<T>& a = b.forward;
  const int r = static_cast<int>(threadIdx.x) / block, c = static_cast<int>(threadIdx.x) % block;
  const int t = query + r, j = key + c;
  float weight = 0, gradient = 0;
  if (t < a.tokens && j <= t && j >= a.starts[t]) {
    const float lse = a.lse[t * a.lse_token + head * a.lse_head] * static_cast<float>(log2_e);
    weight = exp2f(a.scale * q.dot(r, k, c) - lse);
    const float delta = b.delta[t * b.delta_token + head * b.delta_head];
    gradient = weight * (d_out.dot(r, v, c) - delta) * b.scale;
  }
  p.at(r, c) = weight;
  d_s.at(r, c) = gradient;
}

// A block a block of keys and a kv head.
template <class T>
__global__ void __launch_bounds__(threads) plain_backward_keys(const Backward<T> b, int first_group) {
  extern __shared__ float shared[];
  const Expanded<T>& a = b.forward;
  const int key = static_cast<int>(blockIdx.x) * block, group = first_group + static_cast<int>(blockIdx.y);
  const int width = a.nope + a.rope, share = a.heads / a.groups;
  Carver carver{shared};
  const Rows32 k = carver.rows(width), q = carver.rows(width), d_k = carver.rows(width);
  const Rows32 v = carver.rows(a.value), d_out = carver.rows(a.value), d_v = carver.rows(a.value);
  const Rows32 p = carver.rows(block), d_s = carver.rows(block);
  load_keys(a, key, group, k, v);
  d_k.load([](int, int) { return 0.0f; });
  d_v.load([](int, int) { return 0.0f; });
  for (int query = key; query < a.tokens; query += block) {
    const int t = query + static_cast<int>(threadIdx.x) % block;
    if (!__syncthreads_or(t < a.tokens && a.starts[t] < key + block)) continue;
    for (int head = group * share; head < (group + 1) * share; ++head) {
      __syncthreads();
      load_queries(b, query, head, q, d_out);
      __syncthreads();
      score(b, query, key, head, q, d_out, k, v, p, d_s);
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < block * width; i += threads) {
        float sum = d_k.at(i / width, i % width);
        for (int r = 0; r < block; ++r) sum = fmaf(d_s.at(r, i / width), q.at(r, i % width), sum);
        d_k.at(i / width, i % width) = sum;
      }
      for (int i = static_cast<int>(threadIdx.x); i < block * a.value; i += threads) {
        float sum = d_v.at(i / a.value, i % a.value);
        for (int r = 0; r < block; ++r) sum = fmaf(p.at(r, i / a.value), d_out.at(r, i % a.value), sum);
        d_v.at(i / a.value, i % a.value) = sum;
      }
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < block * width; i += threads) {
    const int t = key + i / width, d = i % width;
    if (t >= a.tokens) break;
    if (d < a.nope) {
      if (b.d_k) b.d_k.store(t, group, d, d_k.at(i / width, d));
    } else if (b.rope_parts) {
      b.rope_part(blockIdx.y, t)[d - a.nope] = d_k.at(i / width, d);
    }
  }
  for (int i = static_cast<int>(threadIdx.x); b.d_v && i < block * a.value; i += threads) {
    const int t = key + i / a.value;
    if (t < a.tokens) b.d_v.store(t, group, i % a.value, d_v.at(i / a.value, i % a.value));
  }
}

// A block a block of queries and a head.
template <class T>
__global__ void __launch_bounds__(threads) plain_backward_queries(const Backward<T> b) {
  extern __shared__ float shared[];
  const Expanded<T>& a = b.forward;
  const int query = static_cast<int>(blockIdx.x) * block, head = static_cast<int>(blockIdx.y);
  const int width = a.nope + a.rope, group = head / (a.heads / a.groups);
  Carver carver{shared};
  const Rows32 k = carver.rows(width), q = carver.rows(width), d_q = carver.rows(width);
  const Rows32 v = carver.rows(a.value), d_out = carver.rows(a.value);
  const Rows32 p = carver.rows(block), d_s = carver.rows(block);
  load_queries(b, query, head, q, d_out);
  d_q.load([](int, int) { return 0.0f; });
  const int last = min(query + block, a.tokens) - 1;
  int start = last;
  for (int t = query; t <= last; ++t) start = min(start, a.starts[t]);
  for (int key = start / block * block; key <= last; key += block) {
    __syncthreads();
    load_keys(a, key, group, k, v);
    __syncthreads();
    score(b, query, key, head, q, d_out, k, v, p, d_s);
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < block * width; i += threads) {
      float sum = d_q.at(i / width, i % width);
      for (int c = 0; c < block; ++c) sum = fmaf(d_s.at(i / width, c), k.at(c, i % width), sum);
      d_q.at(i / width, i % width) = sum;
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < block * width; i += threads) {
    if (query + i / width < a.tokens) {
      b.d_q.store(query + i / width, head, i % width, d_q.at(i / width, i % width));
    }
  }
}

// sums [T, rope] (+)= parts of `groups` kv heads, in their order; after the last of them, the gradient.
__global__ void add_rope_parts(const float* parts, float* sums, int64_t tokens, int rope, int groups,
                               bool first, bool last, GradRows to, Condition when) {
  if (!when.met()) return;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= tokens * rope) return;
  float sum = first ? 0 : sums[i];
  for (int g = 0; g < groups; ++g) sum += parts[g * tokens * rope + i];
  if (last) {
    to.store(i / rope, 0, i % rope, sum);
  } else {
    sums[i] = sum;
  }
}

template <class T>
void backward(Backward<T> b, const GradRows& d_k_rope, const Context& context) {
  const Expanded<T>& a = b.forward;
  const int64_t rows = static_cast<int64_t>(a.tokens) * a.heads;
  constexpr int delta_threads = 256, pack = 16 / static_cast<int>(sizeof(T));
  const bool packs = a.value % pack == 0 && has_packs(a.out, pack) && has_packs(b.d_out, pack);
  const int width = packs ? pack : 1;
  int lanes = 32;
  while (lanes > 1 && lanes / 2 * width >= a.value) lanes /= 2;
  LATENTE_ASSERT(rows * lanes < int64_t{1} << 32);
  auto delta = packs ? delta_kernel<T, pack> : delta_kernel<T, 1>;
  delta<<<static_cast<unsigned>(ceil_div(rows, delta_threads / lanes)), delta_threads, 0, context.stream>>>(
      b, lanes);
  check_launch("attention_expanded_backward");
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if (context.compute_capability == 90 && attention_backward_sm90(b, d_k_rope, context)) return;
  }
  const int64_t bytes = shared_bytes(a.nope + a.rope, a.value);
  const unsigned blocks = static_cast<unsigned>(ceil_div(a.tokens, block));
  if (b.d_k || b.d_v || d_k_rope) {
    allow_shared_memory(plain_backward_keys<T>, bytes);
    for_waves(b, d_k_rope, context, 0, [&](const Backward<T>& part, int first, int groups, void*) {
      const dim3 grid(blocks, static_cast<unsigned>(groups));
      plain_backward_keys<T><<<grid, threads, static_cast<size_t>(bytes), context.stream>>>(part, first);
      check_launch("attention_expanded_backward");
    });
  }
  if (b.d_q) {
    allow_shared_memory(plain_backward_queries<T>, bytes);
    const dim3 grid(blocks, static_cast<unsigned>(a.heads));
    plain_backward_queries<T><<<grid, threads, static_cast<size_t>(bytes), context.stream>>>(b);
    check_launch("attention_expanded_backward");
  }
}

}  // namespace

void add_rope_gradients(const float* parts, float* sums, int64_t tokens, int rope, int groups, bool first,
                        bool last, const GradRows& to, const Condition& when, StreamHandle stream) {
  constexpr int size = 256;
  const unsigned blocks = static_cast<unsigned>(ceil_div(tokens * rope, size));
  add_rope_parts<<<blocks, size, 0, stream>>>(parts, sums, tokens, rope, groups, first, last, to, when);
  check_launch("attention_expanded_backward");
}

int64_t attention_scratch_bytes(const Shape& q, const Shape& k, const Shape& v, int64_t longest,
                                const Context& context) {
  return context.compute_capability == 90 ? attention_kept_bytes(q, k, v, longest, context) : 0;
}

void attention_expanded_backward(View d_out, View q, View k, View k_rope, View v, View starts, double scale,
                                 View out, View lse, const AttentionScratch& scratch, Grad d_q, Grad d_k,
                                 Grad d_k_rope, Grad d_v, const Context& context) {
  if (q.count() == 0) return;
  auto run = [&]<class T>(T) {
    Backward<T> b;
    b.forward = expanded<T>(q, k, k_rope, v, starts, scale, out, lse);
    b.forward.longest = scratch.longest;
    b.scale = static_cast<float>(scale);
    b.d_out = rows_of<const T>(d_out);
    b.delta = scratch.delta.as<float>();
    b.delta_token = scratch.delta.stride(0), b.delta_head = scratch.delta.stride(1);
    b.d_q = grad_rows(d_q);
    b.d_k = grad_rows(d_k);
    b.d_v = grad_rows(d_v);
    Context with = context;
    if (scratch.memory && scratch.memory.bytes() > context.workspace_bytes) {
      with.workspace = scratch.memory.data, with.workspace_bytes = scratch.memory.bytes();
    }
    backward(b, grad_rows(d_k_rope), with);
  };
  q.dtype == DType::bf16 ? run(__nv_bfloat16()) : run(0.0f);
}

}  // namespace latente::cuda
