// The router: which experts a token goes to, what they weigh, and the balance losses. All in float32 (sums
// over sequences in float64).
#include "cuda/elements.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/norm.cuh"

namespace latente::cuda {
namespace {

constexpr int threads = 256, warps = threads / warp_size;
constexpr size_t most_shared = 48 * 1024;  // bytes a block has without asking for more

// What the kernels need of a Routing.
struct How {
  int experts, top_k, groups, top_groups;
  bool softmax, pairs, normalise;  // pairs: a group is as good as its two best
  float scale;
  int devices, devices_per_token;
  float alpha, device_alpha, communication_alpha;
};

How how_of(const Routing& routing, int64_t experts) {
  const Balance& balance = routing.balance;
  return {static_cast<int>(experts),
          routing.top_k,
          routing.group_score == GroupScore::none ? 1 : routing.groups,
          routing.top_groups,
          routing.score == GateScore::softmax,
          routing.group_score == GroupScore::top2_sum,
          routing.normalise,
          static_cast<float>(routing.scale),
          static_cast<int>(balance.devices),
          static_cast<int>(balance.devices_per_token),
          static_cast<float>(balance.alpha),
          static_cast<float>(balance.device_alpha),
          static_cast<float>(balance.communication_alpha)};
}

// Orders floats as unsigned numbers; NaN stands below everything, 0 below NaN (what is not there).
__device__ unsigned key_of(float x) {
  if (isnan(x)) return 1;
  const unsigned bits = __float_as_uint(x + 0.0f);  // -0 and 0 are equal
  return (bits & 0x80000000u ? ~bits : bits | 0x80000000u) + 1;
}

// The index of the highest key that the warp's lanes offer, the lowest index among equals; in all lanes.
__device__ int highest(unsigned key, int index) {
  const unsigned top = __reduce_max_sync(whole_warp, key);
  return static_cast<int>(
      __reduce_min_sync(whole_warp, key == top ? static_cast<unsigned>(index) : 0xffffffffu));
}

// Sets to 0 the keys of experts in groups that are not among the best.
__device__ void drop_groups(unsigned* keys, float* values, unsigned* group_keys, const How& how, int lane) {
  const int size = how.experts / how.groups;
  for (int g = lane; g < how.groups; g += warp_size) {
    float first = values[g * size], second = -INFINITY;
    for (int i = 1; i < size; ++i) {
      const float value = values[g * size + i];
      second = fmaxf(second, fminf(first, value));
      first = fmaxf(first, value);
    }
    group_keys[g] = key_of(how.pairs && size > 1 ? first + second : first);
  }
  __syncwarp();
  for (int n = 0; n < how.top_groups; ++n) {
    unsigned key = 0;
    int best = 0;
    for (int g = lane; g < how.groups; g += warp_size) {
      if (group_keys[g] > key) key = group_keys[g], best = g;
    }
    best = highest(key, best);
    __syncwarp();
    if (lane == 0) group_keys[best] = 0;  // 0: chosen
    __syncwarp();
  }
  for (int e = lane; e < how.experts; e += warp_size) {
    if (group_keys[e / size] != 0) keys[e] = 0;
  }
  __syncwarp();
}

// A warp's token: scores, weights and experts of its own from logits `from`; score has places for 3 · E and
// the groups.
__device__ void route_token(const float* from, const float* bias, float* scores, float* weights,
                            int32_t* experts, const How& how, float* score) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  float* selection = score + how.experts;
  auto* keys = reinterpret_cast<unsigned*>(selection + how.experts);
  unsigned* group_keys = keys + how.experts;

  // Few turns a loop: unrolled, they would only be more code to fetch.
  if (how.softmax) {
    float top = -INFINITY, sum = 0;
#pragma unroll 1
    for (int e = lane; e < how.experts; e += warp_size) top = fmaxf(top, from[e]);
    top = warp_max(top);
#pragma unroll 1
    for (int e = lane; e < how.experts; e += warp_size) sum += score[e] = expf(from[e] - top);
    sum = warp_sum(sum);
#pragma unroll 1
    for (int e = lane; e < how.experts; e += warp_size) score[e] *= 1 / sum;
  } else {
#pragma unroll 1
    for (int e = lane; e < how.experts; e += warp_size) score[e] = 1 / (1 + expf(-from[e]));
  }
#pragma unroll 1
  for (int e = lane; e < how.experts; e += warp_size) {
    scores[e] = score[e];
    selection[e] = bias ? score[e] + bias[e] : score[e];
    keys[e] = key_of(selection[e]);
  }
  __syncwarp();
  if (how.groups > 1 && how.top_groups < how.groups) drop_groups(keys, selection, group_keys, how, lane);

  // A lane looks after its own keys. What was chosen takes the place of selection scores.
  __syncwarp();
  int* chosen = reinterpret_cast<int*>(selection);
  for (int k = 0; k < how.top_k; ++k) {
    unsigned key = 0;
    int best = 0;
#pragma unroll 1
    for (int e = lane; e < how.experts; e += warp_size) {
      if (keys[e] > key) key = keys[e], best = e;
    }
    best = highest(key, best);
    if (best % warp_size == lane) keys[best] = 0, chosen[k] = best;
  }
  __syncwarp();
  float divisor = 1;
  if (how.normalise) {
    float sum = 0;
    for (int k = 0; k < how.top_k; ++k) sum += score[chosen[k]];
    divisor = sum + 1e-20f;
  }
  for (int k = lane; k < how.top_k; k += warp_size) {
    experts[k] = chosen[k];
    weights[k] = score[chosen[k]] / divisor * how.scale;
  }
}

// The same for up to two experts a lane in one group: everything in registers. (Only Hopper's kernel asks.)
constexpr int few_experts = 2 * warp_size;
[[maybe_unused]] __device__ void route_token_in_registers(const float* from, const float* bias, float* scores,
                                                          float* weights, int32_t* experts, const How& how) {
  constexpr int each = few_experts / warp_size;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  float score[each];
  bool inside[each];
#pragma unroll
  for (int i = 0; i < each; ++i) {
    inside[i] = lane + i * warp_size < how.experts;
    score[i] = inside[i] ? from[lane + i * warp_size] : -INFINITY;
  }
  if (how.softmax) {
    float top = -INFINITY, sum = 0;
#pragma unroll
    for (int i = 0; i < each; ++i) top = fmaxf(top, score[i]);
    top = warp_max(top);
#pragma unroll
    for (int i = 0; i < each; ++i) {
      if (inside[i]) sum += score[i] = expf(score[i] - top);
    }
    const float inverse = 1 / warp_sum(sum);
#pragma unroll
    for (int i = 0; i < each; ++i) score[i] *= inverse;
  } else {
#pragma unroll
    for (int i = 0; i < each; ++i) score[i] = 1 / (1 + expf(-score[i]));
  }
  unsigned keys[each];
#pragma unroll
  for (int i = 0; i < each; ++i) {
    const int e = lane + i * warp_size;
    keys[i] = !inside[i] ? 0 : key_of(bias ? score[i] + bias[e] : score[i]);
    if (inside[i]) scores[e] = score[i];
  }
  float sum = 0, own = 0;
  int chosen = 0;
#pragma unroll 1
  for (int k = 0; k < how.top_k; ++k) {
    const bool second = keys[1] > keys[0];
    const int best = highest(second ? keys[1] : keys[0], second ? lane + warp_size : lane);
    if (best == lane) keys[0] = 0;
    if (best == lane + warp_size) keys[1] = 0;
    const float its = __shfl_sync(whole_warp, best < warp_size ? score[0] : score[1], best % warp_size);
    sum += its;
    if (lane == k) own = its, chosen = best;
  }
  if (lane >= how.top_k) return;
  experts[lane] = chosen;
  weights[lane] = own / (how.normalise ? sum + 1e-20f : 1.0f) * how.scale;
}

[[maybe_unused]] __device__ inline bool routes_in_registers(const How& how) {
  return how.experts <= few_experts && how.top_k <= warp_size &&
         !(how.groups > 1 && how.top_groups < how.groups);
}

// A warp a token.
__global__ __launch_bounds__(threads) void route_kernel(const float* logits, int64_t logits_stride,
                                                        const float* bias, float* scores,
                                                        int64_t scores_stride, float* weights,
                                                        int32_t* experts, int64_t tokens, How how) {
  extern __shared__ float shared[];
  wait_for_earlier_kernels();
  const int warp = static_cast<int>(threadIdx.x) / warp_size,
            block_warps = static_cast<int>(blockDim.x) / warp_size;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * block_warps + warp;
  if (token >= tokens) return;
  route_token(logits + token * logits_stride, bias, scores + token * scores_stride,
              weights + token * how.top_k, experts + token * how.top_k, how,
              shared + warp * (3 * how.experts + how.groups));
}

// -- few tokens: norm, logits and choice in one launch --

struct NormedRouter {
  FewNorms norm;
  const float* gate = nullptr;
  int64_t gate_row = 0;
  const float* bias = nullptr;
  float* scores = nullptr;
  int64_t scores_row = 0;
  float* weights = nullptr;
  int32_t* experts = nullptr;
  How how{};
  int depth = 0, columns = 0;  // columns: of a block
};

// A cluster a token: its blocks share the experts, whose weights they keep in shared memory from before the
// token's row is there; each takes the row's norm, and the first one collects the logits and chooses. Sums
// are those of row_kernel (product_float.cuh).
__global__ __launch_bounds__(threads) void normed_route_kernel(const __grid_constant__ NormedRouter p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) char memory[];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % warp_size, warp = thread / warp_size;
  unsigned rank, blocks;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
  asm volatile("barrier.cluster.arrive.relaxed.aligned;");  // that I have begun
  const int token = static_cast<int>(blockIdx.x / blocks), pitch = p.depth * 2 + 16;
  const int first = static_cast<int>(rank) * p.columns, count = min(p.columns, p.how.experts - first);
  float* const gate = reinterpret_cast<float*>(memory);
  char* const x = memory + static_cast<size_t>(p.columns) * p.depth * sizeof(float);
  float* const logits = reinterpret_cast<float*>(x + pitch);
  for (int i = thread * 4; i < count * p.depth; i += threads * 4) {
    const int column = i / p.depth;
    mma::copy_async(mma::shared_address(gate + i), p.gate + (first + column) * p.gate_row + i % p.depth,
                    true);
  }
  mma::commit();
  FewNorms norm = p.norm;
  const FewNorms::Weights norm_weights = norm.weights(norm.own_part(), p.depth);
  wait_for_earlier_kernels();
  norm.h += token * norm.h_row, norm.pending += token * norm.pending_row;
  norm.sum += token * norm.sum_row, norm.out += token * norm.out_row;
  if (!p.norm.pending) norm.pending = nullptr, norm.sum = nullptr;
  norm.take(x, pitch, 1, p.depth, norm_weights, rank == 0);
  mma::wait<0>();
  __syncthreads();
  asm volatile("barrier.cluster.wait.aligned;");  // that the first one has begun
  for (int column = warp; column < count; column += warps) {
    float sum = 0;
#pragma unroll 8
    for (int k = lane * 4; k < p.depth; k += warp_size * 4) {
      float a[4], w[4];
      load<4>(reinterpret_cast<const bf16*>(x) + k, a);
      load<4>(gate + column * p.depth + k, w);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum = fmaf(a[j], w[j], sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      unsigned to;
      asm("mapa.shared::cluster.u32 %0, %1, 0;"
          : "=r"(to)
          : "r"(mma::shared_address(logits + first + column)));
      asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(to), "f"(sum) : "memory");
    }
  }
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  if (rank != 0) return;
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (warp != 0) return;
  if (routes_in_registers(p.how)) {
    route_token_in_registers(logits, p.bias, p.scores + token * p.scores_row, p.weights + token * p.how.top_k,
                             p.experts + token * p.how.top_k, p.how);
    return;
  }
  route_token(logits, p.bias, p.scores + token * p.scores_row, p.weights + token * p.how.top_k,
              p.experts + token * p.how.top_k, p.how, logits + p.how.experts);
#endif
}

// -- counting --

// Tokens in blocks that lie within one sequence each.
constexpr int block_tokens = 128;
struct TokenBlocks {
  int64_t sequence, sequences, per_sequence;

  TokenBlocks(int64_t tokens, const Routing& routing) : sequence(tokens) {
    if (routing.balance.any() && routing.balance.per_sequence) {
      LATENTE_ASSERT(routing.balance.sequence_length > 0 && tokens % routing.balance.sequence_length == 0);
      sequence = routing.balance.sequence_length;
    }
    sequences = sequence > 0 ? tokens / sequence : 0;
    per_sequence = (sequence + block_tokens - 1) / block_tokens;
  }
  int64_t count() const { return sequences * per_sequence; }
};

// What a block of tokens, or a sequence, came to; unmasked tokens alone.
struct Sums {
  int* counts;    // [blocks, E + devices]: choices of each expert, tokens with a choice on each device
  float* shares;  // [blocks, E]: the sum of s_i / sum_j s_j; or null
};

__global__ __launch_bounds__(threads) void count_kernel(const float* scores, int64_t scores_stride,
                                                        const int32_t* experts, const float* mask,
                                                        int64_t sequence, int64_t per_sequence, How how,
                                                        Sums sums) {
  extern __shared__ int counts[];
  __shared__ float inverse[block_tokens];  // 1 / sum of a token's scores, 0 for padding
  const int width = how.experts + how.devices, thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < width; i += threads) counts[i] = 0;
  const int64_t in_sequence = blockIdx.x % per_sequence * block_tokens;
  const int64_t begin = blockIdx.x / per_sequence * sequence + in_sequence;
  const int count = static_cast<int>(min(static_cast<int64_t>(block_tokens), sequence - in_sequence));
  __syncthreads();
  if (thread < count && !(mask && mask[begin + thread] == 0)) {
    const int32_t* chosen = experts + (begin + thread) * how.top_k;
    for (int k = 0; k < how.top_k; ++k) {
      atomicAdd(counts + chosen[k], 1);  // whole numbers: in any order
      const int size = how.experts / how.devices, device = chosen[k] / size;
      bool again = false;
      for (int before = 0; before < k; ++before) again = again || chosen[before] / size == device;
      if (!again) atomicAdd(counts + how.experts + device, 1);
    }
  }
  if (sums.shares) {
    for (int t = thread / warp_size; t < count; t += warps) {
      float sum = 0;
      for (int e = thread % warp_size; e < how.experts; e += warp_size)
        sum += scores[(begin + t) * scores_stride + e];
      sum = warp_sum(sum);
      if (thread % warp_size == 0) inverse[t] = mask && mask[begin + t] == 0 ? 0 : 1 / sum;
    }
  }
  __syncthreads();
  for (int i = thread; i < width; i += threads) sums.counts[blockIdx.x * width + i] = counts[i];
  if (!sums.shares) return;
  const auto share_of = [&](int e, int first, int last) {
    float share = 0;
#pragma unroll 4
    for (int t = first; t < last; ++t) {
      if (inverse[t] != 0) share = fmaf(scores[(begin + t) * scores_stride + e], inverse[t], share);
    }
    return share;
  };
  float* shares = sums.shares + static_cast<int64_t>(blockIdx.x) * how.experts;
  const int runs = threads / how.experts;
  if (runs <= 1) {
    for (int e = thread; e < how.experts; e += threads) shares[e] = share_of(e, 0, count);
    return;
  }
  // Of few experts each has several threads, with a run of the tokens each.
  __shared__ float parts[threads];
  const int e = thread % how.experts, run = thread / how.experts, length = (count + runs - 1) / runs;
  if (run < runs) parts[thread] = share_of(e, run * length, min((run + 1) * length, count));
  __syncthreads();
  if (run > 0) return;
  float share = 0;
  for (int other = 0; other < runs; ++other) share += parts[other * how.experts + e];
  shares[e] = share;
}

// c_i of the balance losses (backend.h) of a sequence with some tokens.
__device__ double coefficient_of(const int* counts, int expert, int tokens, const How& how) {
  const int size = how.experts / how.devices, device = expert / size;
  const double unit = static_cast<double>(how.experts) / (static_cast<double>(tokens) * how.top_k);
  double sum = how.alpha * unit * counts[expert];
  if (how.device_alpha > 0) {
    double served = 0;
    for (int e = device * size; e < (device + 1) * size; ++e) served += counts[e];
    sum += how.device_alpha * unit * served / size;
  }
  if (how.communication_alpha > 0) {
    sum += static_cast<double>(how.communication_alpha) * how.devices /
           (static_cast<double>(how.devices_per_token) * tokens) * counts[how.experts + device];
  }
  return sum;
}

// What a sequence comes to.
struct OfSequence {
  double loss;
  int tokens;  // unmasked
};

// A block a sequence: its total counts, in the place of its first block's; of_sequence; with `gradient`
// [sequences, E] the balance losses' gradient with respect to a token's shares, but for the mean over
// sequences.
__global__ __launch_bounds__(threads) void sequence_kernel(int64_t per_sequence, How how, Sums sums,
                                                           OfSequence* of_sequence, float* gradient) {
  const int thread = static_cast<int>(threadIdx.x), width = how.experts + how.devices;
  const int64_t first = blockIdx.x * per_sequence;
  int* counts = sums.counts + first * width;
  int choices = 0;
  for (int i = thread; i < width; i += threads) {
    int count = 0;
#pragma unroll 8
    for (int64_t b = 0; b < per_sequence; ++b) count += counts[b * width + i];
    counts[i] = count;
    if (i < how.experts) choices += count;
  }
  const int tokens =
      block_sum<threads>(choices) / how.top_k;  // every token has top_k; counts are there for all
  double loss = 0;
  for (int e = thread; e < how.experts; e += threads) {
    const double coefficient = tokens > 0 ? coefficient_of(counts, e, tokens, how) / tokens : 0.0;
    if (gradient)
      gradient[static_cast<int64_t>(blockIdx.x) * how.experts + e] = static_cast<float>(coefficient);
    if (!sums.shares) continue;
    float share = 0;
#pragma unroll 8
    for (int64_t b = first; b < first + per_sequence; ++b) share += sums.shares[b * how.experts + e];
    loss += coefficient * static_cast<double>(share);
  }
  loss = block_sum<threads>(loss);
  if (thread == 0) of_sequence[blockIdx.x] = {loss, tokens};
}

// How many sequences are not all padding; at least 1.
__device__ int counted_sequences(const OfSequence* of_sequence, int64_t sequences) {
  int counted = 0;
  for (int64_t s = threadIdx.x; s < sequences; s += threads) counted += of_sequence[s].tokens > 0 ? 1 : 0;
  return max(block_sum<threads>(counted), 1);
}

// One block: loads, and the loss over all sequences, in order.
__global__ __launch_bounds__(threads) void finish_kernel(int64_t sequences, int64_t per_sequence, How how,
                                                         Sums sums, const OfSequence* of_sequence,
                                                         float* load, float* loss) {
  const int thread = static_cast<int>(threadIdx.x), width = how.experts + how.devices;
  for (int e = thread; load && e < how.experts; e += threads) {
    int count = 0;
#pragma unroll 8
    for (int64_t s = 0; s < sequences; ++s) count += sums.counts[s * per_sequence * width + e];
    load[e] += static_cast<float>(count);
  }
  if (!loss) return;
  double sum = 0;
  for (int64_t s = thread; s < sequences; s += threads) sum += of_sequence[s].loss;
  sum = block_sum<threads>(sum);
  const int counted = counted_sequences(of_sequence, sequences);
  if (thread == 0) *loss = static_cast<float>(sum / counted);
}

// gradient becomes that of the mean over the sequences that are not all padding.
__global__ __launch_bounds__(threads) void mean_kernel(const OfSequence* of_sequence, int64_t sequences,
                                                       int experts, float* gradient) {
  const int counted = counted_sequences(of_sequence, sequences);
  for (int e = static_cast<int>(threadIdx.x); e < experts; e += threads)
    gradient[static_cast<int64_t>(blockIdx.x) * experts + e] /= static_cast<float>(counted);
}

// A warp a token. `gradient` [sequences, E] or null.
__global__ __launch_bounds__(threads) void route_backward_kernel(const float* d_weights, const float* scores,
                                                                 int64_t scores_stride, const float* weights,
                                                                 const int32_t* experts, const float* mask,
                                                                 const float* gradient, int64_t sequence,
                                                                 float* d_logits, int64_t d_logits_stride,
                                                                 bool accumulate, int64_t tokens, How how) {
  extern __shared__ float shared[];
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int warp = static_cast<int>(threadIdx.x) / warp_size,
            block_warps = static_cast<int>(blockDim.x) / warp_size;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * block_warps + warp;
  if (token >= tokens) return;
  float* d_score = shared + warp * how.experts;
  const float* score = scores + token * scores_stride;
  if (gradient && !(mask && mask[token] == 0)) {
    // d/ds_i of sum_j c_j s_j / S = (c_i - sum_j c_j s_j / S) / S
    const float* c = gradient + token / sequence * how.experts;
    float sum = 0, mean = 0;
    for (int e = lane; e < how.experts; e += warp_size) {
      sum += score[e];
      mean = fmaf(c[e], score[e], mean);
    }
    const float inverse = 1 / warp_sum(sum);
    mean = warp_sum(mean) * inverse;
    for (int e = lane; e < how.experts; e += warp_size) d_score[e] = (c[e] - mean) * inverse;
  } else {
    for (int e = lane; e < how.experts; e += warp_size) d_score[e] = 0;
  }
  __syncwarp();
  if (d_weights) {
    const int64_t first = token * how.top_k;
    float sum = 0, product = 0;
    for (int k = 0; k < how.top_k; ++k) {  // in all lanes
      sum += score[experts[first + k]];
      product += d_weights[first + k] * weights[first + k];
    }
    for (int k = lane; k < how.top_k; k += warp_size) {
      const float g = how.scale * d_weights[first + k];
      d_score[experts[first + k]] += how.normalise ? (g - product) / (sum + 1e-20f) : g;
    }
    __syncwarp();
  }
  float mean = 0;
  if (how.softmax) {
    for (int e = lane; e < how.experts; e += warp_size) mean = fmaf(d_score[e], score[e], mean);
    mean = warp_sum(mean);
  }
  float* to = d_logits + token * d_logits_stride;
  for (int e = lane; e < how.experts; e += warp_size) {
    const float s = score[e];
    const float d = how.softmax ? s * (d_score[e] - mean) : d_score[e] * (s - s * s);
    to[e] = accumulate ? to[e] + d : d;
  }
}

// What is counted lies in the workspace.
struct Counting {
  Sums sums{};
  OfSequence* of_sequence;
  float* gradient = nullptr;

  Counting(const TokenBlocks& blocks, const How& how, bool with_shares, bool with_gradient,
           const Context& context) {
    char* at = static_cast<char*>(context.workspace);
    auto take = [&]<class T>(T*& pointer, int64_t count) {
      pointer = reinterpret_cast<T*>(at);
      at += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    };
    take(of_sequence, blocks.sequences);
    take(sums.counts, blocks.count() * (how.experts + how.devices));
    if (with_shares) take(sums.shares, blocks.count() * how.experts);
    if (with_gradient) take(gradient, blocks.sequences * how.experts);
    LATENTE_ASSERT(at - static_cast<char*>(context.workspace) <= context.workspace_bytes);
  }

  void run(const TokenBlocks& blocks, const View& scores, const View& experts, const View& mask,
           const How& how, const Context& context) const {
    const size_t bytes = static_cast<size_t>(how.experts + how.devices) * sizeof(int);
    count_kernel<<<static_cast<unsigned>(blocks.count()), threads, bytes, context.stream>>>(
        scores.as<float>(), scores.stride(0), experts.as<int32_t>(), mask.as_or_null<float>(),
        blocks.sequence, blocks.per_sequence, how, sums);
    sequence_kernel<<<static_cast<unsigned>(blocks.sequences), threads, 0, context.stream>>>(
        blocks.per_sequence, how, sums, of_sequence, gradient);
  }
};

// Warps a block whose shared memory suffices, at `floats` a warp.
int warps_for(int64_t floats, int64_t experts) {
  const int fit = static_cast<int>(most_shared / (static_cast<size_t>(floats) * sizeof(float)));
  if (fit < 1) fail("route on CUDA: {} experts are too many", experts);
  return std::min(fit, warps);
}

}  // namespace

void route(View logits, View bias, View token_mask, const Routing& routing, View scores, View weights,
           View experts, View load, View balance_loss, const Context& context) {
  const int64_t tokens = logits[0];
  const How how = how_of(routing, logits[1]);
  LATENTE_ASSERT(scores.shape == logits.shape && how.experts % how.groups == 0);
  LATENTE_ASSERT(1 <= how.top_k &&
                 how.top_k <=
                     how.experts / how.groups * std::min(how.groups, how.groups > 1 ? how.top_groups : 1));
  LATENTE_ASSERT(weights.contiguous() && experts.contiguous() && weights[1] == how.top_k);
  LATENTE_ASSERT(how.experts % how.devices == 0);
  if (tokens > 0) {
    const int64_t floats = 3 * how.experts + how.groups;
    const int block_warps = warps_for(floats, how.experts);
    const size_t bytes = static_cast<size_t>(block_warps * floats) * sizeof(float);
    launch_early(route_kernel, blocks_for(tokens, block_warps), block_warps * warp_size, bytes, "route",
                 context, logits.as<float>(), logits.stride(0), bias.as_or_null<float>(), scores.as<float>(),
                 scores.stride(0), weights.as<float>(), experts.as<int32_t>(), tokens, how);
  }
  if (!load && !balance_loss) return;
  const TokenBlocks blocks(tokens, routing);
  const Counting counting(blocks, how, static_cast<bool>(balance_loss), false, context);
  counting.run(blocks, scores, experts, token_mask, how, context);
  finish_kernel<<<1, threads, 0, context.stream>>>(blocks.sequences, blocks.per_sequence, how, counting.sums,
                                                   counting.of_sequence, load.as_or_null<float>(),
                                                   balance_loss.as_or_null<float>());
  check_launch("route");
}

bool normed_route(const NormedRows& x, View gate, View bias, const Routing& routing, View scores,
                  View weights, View experts, const Context& context) {
  const auto norm = few_norms(x);
  if (!norm || context.compute_capability < 90 || gate.dtype != DType::f32 || !in_packs(4, {gate}))
    return false;
  constexpr int most_blocks = 8;  // of a cluster, on any device that has them
  NormedRouter p;
  p.norm = *norm;
  p.how = how_of(routing, gate[0]);
  p.depth = static_cast<int>(gate[1]);
  const int blocks = std::min(most_blocks, (p.how.experts + warps - 1) / warps);
  p.columns = (p.how.experts + blocks - 1) / blocks;
  const int64_t floats = int64_t{p.columns} * p.depth + p.depth / 2 + 4 + 4 * p.how.experts + p.how.groups;
  const size_t bytes = static_cast<size_t>(floats) * sizeof(float);
  if (bytes + 1024 > static_cast<size_t>(context.shared_bytes)) return false;
  p.gate = gate.as<float>(), p.gate_row = gate.stride(0);
  p.bias = bias.as_or_null<float>();
  p.scores = scores.as<float>(), p.scores_row = scores.stride(0);
  p.weights = weights.as<float>(), p.experts = experts.as<int32_t>();
  launch_early_in_clusters(normed_route_kernel, dim3(static_cast<unsigned>(x.h[0] * blocks)),
                           static_cast<unsigned>(blocks), threads, bytes, "normed_route", context, p);
  return true;
}

void route_backward(View d_weights, View scores, View weights, View experts, View token_mask,
                    const Routing& routing, Grad d_logits, const Context& context) {
  if (!d_logits) return;
  LATENTE_ASSERT(weights.contiguous() && experts.contiguous() && (!d_weights || d_weights.contiguous()));
  LATENTE_ASSERT(d_logits.view.shape == scores.shape);
  const int64_t tokens = scores[0];
  if (tokens == 0) return;
  const How how = how_of(routing, scores[1]);
  const TokenBlocks blocks(tokens, routing);
  float* gradient = nullptr;
  if (routing.balance.any()) {
    const Counting counting(blocks, how, false, true, context);
    counting.run(blocks, scores, experts, token_mask, how, context);
    gradient = counting.gradient;
    mean_kernel<<<static_cast<unsigned>(blocks.sequences), threads, 0, context.stream>>>(
        counting.of_sequence, blocks.sequences, how.experts, gradient);
    check_launch("route_backward");
  }
  const int block_warps = warps_for(how.experts, how.experts);
  const size_t bytes = static_cast<size_t>(block_warps * how.experts) * sizeof(float);
  route_backward_kernel<<<blocks_for(tokens, block_warps), block_warps * warp_size, bytes, context.stream>>>(
      d_weights.as_or_null<float>(), scores.as<float>(), scores.stride(0), weights.as<float>(),
      experts.as<int32_t>(), token_mask.as_or_null<float>(), gradient, blocks.sequence,
      d_logits.view.as<float>(), d_logits.view.stride(0), d_logits.accumulate, tokens, how);
  check_launch("route_backward");
}

}  // namespace latente::cuda
