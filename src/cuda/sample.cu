// From logits to tokens.
#include "cuda/elements.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "tensor/choice.h"

namespace latente::cuda {
namespace {

constexpr int threads = 256, pieces = 32;  // of a row: a block each
constexpr int choosers = 1024;             // threads that choose from a row

// Orders (logit, first index) as whole numbers; NaN above everything.
__device__ unsigned long long key_of(float x, int index) {
  const unsigned bits = __float_as_uint(x + 0.0f);  // -0 and 0 are equal
  const unsigned order = isnan(x) ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(order) << 32 | (0xffffffffu - static_cast<unsigned>(index));
}

__device__ unsigned long long warp_highest(unsigned long long key) {
  for (int step = warp_size / 2; step > 0; step /= 2) key = max(key, __shfl_xor_sync(whole_warp, key, step));
  return key;
}

// keys [T, pieces]
__global__ __launch_bounds__(threads) void highest_of_pieces_kernel(const float* logits, int64_t stride,
                                                                    int count, unsigned long long* keys) {
  wait_for_earlier_kernels();
  __shared__ unsigned long long of_warps[threads / warp_size];
  const int thread = static_cast<int>(threadIdx.x);
  const float* row = logits + blockIdx.y * stride;
  unsigned long long key = 0;
#pragma unroll 4
  for (int i = static_cast<int>(blockIdx.x) * threads + thread; i < count; i += pieces * threads)
    key = max(key, key_of(row[i], i));
  key = warp_highest(key);
  if (thread % warp_size == 0) of_warps[thread / warp_size] = key;
  __syncthreads();
  if (thread >= warp_size) return;
  key = warp_highest(thread < threads / warp_size ? of_warps[thread] : 0);
  if (thread == 0) keys[blockIdx.y * pieces + blockIdx.x] = key;
}

// Where a token stands among a row's: lower ranks are more likely.
__device__ unsigned long long rank_of(float x, int index) { return ~key_of(x, index); }

// Tokens by a number that rises with their rank: sums of weights, and where somebody counts, of tokens.
struct Bins {
  static constexpr int count = 2048, each = count / choosers;
  // Shared memory adds 32 bits at a time. Sums do not depend on the order, and neither does how often the
  // lower half runs over.
  unsigned low[count], high[count], tokens[count];

  __device__ void clear() {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += choosers) low[i] = high[i] = tokens[i] = 0;
    __syncthreads();
  }
  __device__ unsigned long long weight(int bin) const {
    return static_cast<unsigned long long>(high[bin]) << 32 | low[bin];
  }
  // All of a warp. Where all of it is for one bin, as where all logits are equal, one of them adds it.
  __device__ void add(bool member, int bin, unsigned long long its_weight, bool counts) {
    const unsigned members = __ballot_sync(whole_warp, member);
    if (members == 0) return;
    const int leader = __ffs(static_cast<int>(members)) - 1;
    const int first = __shfl_sync(whole_warp, bin, leader);
    unsigned its_tokens = 1;
    if (__all_sync(whole_warp, !member || bin == first)) {
      its_tokens = static_cast<unsigned>(__popc(members));
      if (!member) its_weight = 0;
      for (int step = warp_size / 2; step > 0; step /= 2)
        its_weight += __shfl_xor_sync(whole_warp, its_weight, step);
      member = static_cast<int>(threadIdx.x) % warp_size == leader;
    }
    if (!member) return;
    const auto lower = static_cast<unsigned>(its_weight);
    const unsigned carry = atomicAdd(&low[bin], lower) > ~lower ? 1 : 0;
    const unsigned upper = static_cast<unsigned>(its_weight >> 32) + carry;
    if (upper > 0) atomicAdd(&high[bin], upper);
    if (counts) atomicAdd(&tokens[bin], its_tokens);
  }
};

struct Sums {
  unsigned long long weight, tokens;
};

// A row, its threads, and what they share.
struct Chooser {
  struct Shared {
    Bins all, some;
    unsigned long long ranks[choosers], weights[choosers];  // of a bin's tokens, if they are so few
    int listed;
    int chosen;
    unsigned long long through;
    Sums of_warps[choosers / warp_size];
    unsigned long long lowest[choosers / warp_size], highest[choosers / warp_size];
    int bin;
    Sums before;
  };
  const float* logits;
  int count;
  float top;
  Choice choice;
  Shared& shared;

  __device__ unsigned long long weight_of(float x) const {
    const float exponent = (x - top) * choice.inverse_temperature;
    return exponent > Choice::least_exponent ? static_cast<unsigned long long>(expf(exponent) * Choice::one)
                                             : 0;
  }
  __device__ int bin_of(float x) const {
    constexpr float scale = Bins::count / Choice::least_exponent;
    return min(static_cast<int>((x - top) * choice.inverse_temperature * scale), Bins::count - 1);
  }
  // f(valid, index, logit), by all threads the same number of times; some logits are read ahead.
  template <class F>
  __device__ void each(const F& f) const {
    constexpr int ahead = 8;
    for (int base = static_cast<int>(threadIdx.x); base - static_cast<int>(threadIdx.x) < count;
         base += ahead * choosers) {
      float x[ahead];
#pragma unroll
      for (int j = 0; j < ahead; ++j) {
        const int i = base + j * choosers;
        x[j] = i < count ? logits[i] : top;
      }
#pragma unroll
      for (int j = 0; j < ahead; ++j) {
        const int i = base + j * choosers;
        f(i < count, i, x[j]);
      }
    }
  }

  // Sums over the threads before this one, and over all of them.
  __device__ Sums before_this(Sums own, Sums& all) const {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % warp_size, warp = thread / warp_size;
    Sums sum = own;
    for (int step = 1; step < warp_size; step *= 2) {
      const unsigned long long weight = __shfl_up_sync(whole_warp, sum.weight, step);
      const unsigned long long tokens = __shfl_up_sync(whole_warp, sum.tokens, step);
      if (lane >= step) sum.weight += weight, sum.tokens += tokens;
    }
    __syncthreads();
    if (lane == warp_size - 1) shared.of_warps[warp] = sum;
    __syncthreads();
    Sums before{sum.weight - own.weight, sum.tokens - own.tokens};
    all = {};
    for (int w = 0; w < choosers / warp_size; ++w) {
      if (w == warp) before.weight += all.weight, before.tokens += all.tokens;
      all.weight += shared.of_warps[w].weight, all.tokens += shared.of_warps[w].tokens;
    }
    return before;
  }

  // The lowest and the highest over all threads.
  __device__ void spread_of(unsigned long long& lowest, unsigned long long& highest) const {
    const int thread = static_cast<int>(threadIdx.x);
    for (int step = warp_size / 2; step > 0; step /= 2) {
      lowest = min(lowest, __shfl_xor_sync(whole_warp, lowest, step));
      highest = max(highest, __shfl_xor_sync(whole_warp, highest, step));
    }
    __syncthreads();
    if (thread % warp_size == 0)
      shared.lowest[thread / warp_size] = lowest, shared.highest[thread / warp_size] = highest;
    __syncthreads();
    for (int w = 0; w < choosers / warp_size; ++w)
      lowest = min(lowest, shared.lowest[w]), highest = max(highest, shared.highest[w]);
  }

  // The bin in which the sum, of tokens or of weights, exceeds `least`; what stands before it in `before`.
  __device__ int locate(const Bins& bins, bool by_tokens, unsigned long long least, Sums& before) const {
    const int first = static_cast<int>(threadIdx.x) * Bins::each;
    Sums own{}, all;
    for (int i = 0; i < Bins::each; ++i)
      own.weight += bins.weight(first + i), own.tokens += bins.tokens[first + i];
    Sums sum = before_this(own, all);
    sum.weight += before.weight, sum.tokens += before.tokens;
    for (int i = 0; i < Bins::each; ++i) {
      const Sums next{sum.weight + bins.weight(first + i), sum.tokens + bins.tokens[first + i]};
      const bool here =
          by_tokens ? sum.tokens <= least && next.tokens > least : sum.weight <= least && next.weight > least;
      if (here) shared.bin = first + i, shared.before = sum;
      sum = next;
    }
    __syncthreads();
    before = shared.before;
    return shared.bin;
  }

  // Writes down a bin's tokens, and says whether they fit.
  __device__ bool list(int bin) const {
    if (threadIdx.x == 0) shared.listed = 0;
    __syncthreads();
    each([&](bool valid, int i, float x) {
      if (!valid || bin_of(x) != bin) return;
      const unsigned long long weight = weight_of(x);
      if (weight == 0) return;
      const int at = atomicAdd(&shared.listed, 1);
      if (at < choosers) shared.ranks[at] = rank_of(x, i), shared.weights[at] = weight;
    });
    __syncthreads();
    return shared.listed <= choosers;
  }

  // Of the tokens listed: the one with which the sum, which begins with `before`, exceeds `least`.
  __device__ int choose_listed(bool by_tokens, unsigned long long least, Sums before,
                               unsigned long long& through) const {
    const int thread = static_cast<int>(threadIdx.x), count = shared.listed;
    if (thread < count) {
      const unsigned long long rank = shared.ranks[thread], weight = shared.weights[thread];
      for (int j = 0; j < count; ++j) {
        if (shared.ranks[j] < rank) before.weight += shared.weights[j], ++before.tokens;
      }
      const unsigned long long sum = by_tokens ? before.tokens : before.weight;
      if (sum <= least && sum + (by_tokens ? 1 : weight) > least) {
        shared.chosen = static_cast<int>(static_cast<unsigned>(rank));  // its lower half
        shared.through = before.weight + weight;
      }
    }
    __syncthreads();
    through = shared.through;
    const int chosen = shared.chosen;
    __syncthreads();
    return chosen;
  }

  // The token with which the sum exceeds `least`, which is less than the sum of all; `through`: the weight of
  // the tokens up to it.
  __device__ __noinline__ int find(bool by_tokens, unsigned long long least,
                                   unsigned long long& through) const {
    Sums before{};
    const int bin = locate(shared.all, by_tokens, least, before);
    if (list(bin)) return choose_listed(by_tokens, least, before, through);
    unsigned long long low = 0, high = ~0ull;  // ranks of that bin which are left
    const auto is_left = [&](bool valid, int i, float x) {
      return valid && bin_of(x) == bin && weight_of(x) > 0 && rank_of(x, i) >= low && rank_of(x, i) <= high;
    };
    while (true) {
      unsigned long long lowest = ~0ull, highest = 0;
      each([&](bool valid, int i, float x) {
        if (!is_left(valid, i, x)) return;
        lowest = min(lowest, rank_of(x, i)), highest = max(highest, rank_of(x, i));
      });
      spread_of(lowest, highest);
      low = lowest, high = highest;
      if (low == high) break;
      shared.some.clear();
      const unsigned long long width = (high - low) / Bins::count + 1;
      each([&](bool valid, int i, float x) {
        const bool left = is_left(valid, i, x);
        shared.some.add(left, left ? static_cast<int>((rank_of(x, i) - low) / width) : 0, weight_of(x),
                        by_tokens);
      });
      __syncthreads();
      low += static_cast<unsigned long long>(locate(shared.some, by_tokens, least, before)) * width;
      high = low + width - 1;
    }
    const int token = static_cast<int>(static_cast<unsigned>(low));  // the lower half of a rank
    through = before.weight + weight_of(logits[token]);
    __syncthreads();
    return token;
  }

  __device__ int choose() {
    const bool counts = choice.top_k > 0;
    shared.all.clear();
    each([&](bool valid, int i, float x) {
      const unsigned long long weight = valid ? weight_of(x) : 0;
      shared.all.add(weight > 0, bin_of(x), weight, counts);
    });
    __syncthreads();
    Sums own{}, all;
    for (int i = static_cast<int>(threadIdx.x); i < Bins::count; i += choosers)
      own.weight += shared.all.weight(i), own.tokens += shared.all.tokens[i];
    before_this(own, all);
    unsigned long long weight = all.weight;
    unsigned long long last = ~0ull;  // rank of the last one that is kept
    if (counts && static_cast<unsigned>(choice.top_k) < all.tokens) {
      const int token = find(true, static_cast<unsigned>(choice.top_k) - 1, weight);
      last = rank_of(logits[token], token);
    }
    if (choice.top_p < 1) {
      const auto share = static_cast<unsigned long long>(
          ceil(static_cast<double>(choice.top_p) * static_cast<double>(weight)));
      const int token = find(false, min(share, weight) - 1, weight);
      last = rank_of(logits[token], token);
    }
    if (choice.min_p > 0) {
      const float least = choice.min_p * Choice::one;
      Sums kept{};
      each([&](bool valid, int i, float x) {
        const unsigned long long its = weight_of(x);
        if (valid && its > 0 && (static_cast<float>(its) >= least || x == top) && rank_of(x, i) <= last)
          kept.weight += its;
      });
      Sums sum;
      before_this(kept, sum);
      weight = sum.weight;
    }
    const unsigned long long number = static_cast<unsigned long long>(choice.high) << 32 | choice.low;
    unsigned long long through;
    return find(false, __umul64hi(number, weight), through);
  }
};

// A block a row.
__global__ __launch_bounds__(choosers) void choose_kernel(const float* logits, int64_t stride, int count,
                                                          const unsigned long long* keys,
                                                          const Choice* choices, int32_t* out) {
  extern __shared__ __align__(16) unsigned char bytes[];
  wait_for_earlier_kernels();
  const int64_t row = blockIdx.x;
  const unsigned long long key = warp_highest(keys[row * pieces + threadIdx.x % warp_size]);
  const auto index = static_cast<int>(0xffffffffu - static_cast<unsigned>(key));
  const float top = logits[row * stride + index];
  const Choice choice = choices[row];
  int chosen = isnan(top) ? Backend::not_a_number : isinf(top) ? Backend::not_finite : index;
  if (chosen >= 0 && choice.inverse_temperature > 0) {
    chosen = Chooser{logits + row * stride, count, top, choice, *reinterpret_cast<Chooser::Shared*>(bytes)}
                 .choose();
  }
  if (threadIdx.x == 0) out[row] = chosen;
}

__global__ __launch_bounds__(threads) void take_chosen_kernel(const int32_t* ids, const int32_t* from,
                                                              const int32_t* chosen, int32_t* out,
                                                              int count) {
  wait_for_earlier_kernels();
  const int t = static_cast<int>(blockIdx.x) * threads + static_cast<int>(threadIdx.x);
  if (t < count) out[t] = from[t] < 0 ? ids[t] : max(chosen[from[t]], 0);
}

}  // namespace

void choose(View logits, View choices, View out, const Context& context) {
  LATENTE_ASSERT(logits.shape.rank() == 2 && out.count() == logits[0] && out.contiguous());
  LATENTE_ASSERT(choices.count() == logits[0] * Choice::words && choices.contiguous());
  const int64_t rows = logits[0];
  if (rows == 0) return;
  auto* keys = static_cast<unsigned long long*>(context.workspace);
  LATENTE_ASSERT(rows * pieces * int64_t{sizeof(*keys)} <= context.workspace_bytes);
  launch_early(highest_of_pieces_kernel, dim3(pieces, static_cast<unsigned>(rows)), threads, 0, "choose",
               context, logits.as<float>(), logits.stride(0), static_cast<int>(logits[1]), keys);
  launch_early(choose_kernel, static_cast<unsigned>(rows), choosers, sizeof(Chooser::Shared), "choose",
               context, logits.as<float>(), logits.stride(0), static_cast<int>(logits[1]), keys,
               reinterpret_cast<const Choice*>(choices.as<int32_t>()), out.as<int32_t>());
}

void take_chosen(View ids, View from, View chosen, View out, const Context& context) {
  const auto count = static_cast<int>(ids.count());
  LATENTE_ASSERT(from.count() == count && out.count() == count);
  launch_early(take_chosen_kernel, static_cast<unsigned>((count + threads - 1) / threads), threads, 0,
               "take_chosen", context, ids.as<int32_t>(), from.as<int32_t>(), chosen.as<int32_t>(),
               out.as<int32_t>(), count);
}

}  // namespace latente::cuda
