// The router: which experts a token goes to, what they weigh, and the balance losses.
#include <algorithm>
#include <limits>
#include <numeric>

#include "cpu/cpu_backend.h"
#include "cpu/route_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/route.cpp"
#include "hwy/foreach_target.h"  // must precede highway.h

#include "cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latente::HWY_NAMESPACE {

template <class T>
HWY_INLINE void score_row(const T* logits, GateScore score, T* out, int64_t n) {
  const Tag<T> d;
  if (score == GateScore::sigmoid) {
    for_vectors<T>(n, [&](int64_t i, auto width)
                          LATENTE_VECTOR { store(sigmoid<T>(load(logits + i, width)), out + i, width); });
    return;
  }
  T top = logits[0];
  for (int64_t i = 1; i < n; ++i) top = std::max(top, logits[i]);
  const Vec<T> maximum = hn::Set(d, top);
  for_vectors<T>(n, [&](int64_t i, auto width) LATENTE_VECTOR {
    store(exp<T>(hn::Sub(load(logits + i, width), maximum)), out + i, width);
  });
  const T sum = sum_vectors<T>(
      n, [&](Vec<T> s, int64_t i, auto width) LATENTE_VECTOR { return hn::Add(s, load(out + i, width)); });
  const Vec<T> factor = hn::Set(d, 1 / sum);
  for_vectors<T>(n, [&](int64_t i, auto width)
                        LATENTE_VECTOR { store(hn::Mul(load(out + i, width), factor), out + i, width); });
}

template <class T>
HWY_INLINE T sum_row(const T* x, int64_t n) {
  return sum_vectors<T>(
      n, [&](Vec<T> s, int64_t i, auto width) LATENTE_VECTOR { return hn::Add(s, load(x + i, width)); });
}

// to += factor · x
template <class T>
HWY_INLINE void add_scaled(const T* x, T factor, T* to, int64_t n) {
  const Vec<T> f = hn::Set(Tag<T>(), factor);
  for_vectors<T>(n, [&](int64_t i, auto width) LATENTE_VECTOR {
    store(hn::MulAdd(load(x + i, width), f, load(to + i, width)), to + i, width);
  });
}

// The indices of the `top` highest values so far, in falling order; among equals the one offered first
// stands first. Whatever is offered (NaN too), after `top` offers the indices are valid and distinct.
template <class T>
struct Highest {
  int32_t* index;
  T* value;
  int64_t top, count = 0;
  void offer(int32_t i, T v) {
    if (count == top && !(v > value[top - 1])) return;
    int64_t at = count < top ? count++ : top - 1;
    for (; at > 0 && v > value[at - 1]; --at) {
      index[at] = index[at - 1];
      value[at] = value[at - 1];
    }
    index[at] = i;
    value[at] = v;
  }
};

template <class T>
HWY_INLINE void select(const T* selection, const Routing& routing, int64_t experts,
                       const RouteScratch<T>& scratch, int32_t* chosen) {
  const int64_t groups = routing.group_score == GroupScore::none ? 1 : routing.groups;
  const int64_t size = experts / groups;
  std::fill(scratch.in_reach, scratch.in_reach + groups, uint8_t{1});
  if (groups > 1 && routing.top_groups < groups) {
    Highest<T> best{scratch.group, scratch.values, routing.top_groups};
    for (int64_t g = 0; g < groups; ++g) {
      const T* member = selection + g * size;
      T first = member[0], second = -std::numeric_limits<T>::infinity();
      for (int64_t i = 1; i < size; ++i) {
        second = std::max(second, std::min(first, member[i]));
        first = std::max(first, member[i]);
      }
      const bool both = routing.group_score == GroupScore::top2_sum && size > 1;
      best.offer(static_cast<int32_t>(g), both ? first + second : first);
      scratch.in_reach[g] = false;
    }
    for (int64_t i = 0; i < routing.top_groups; ++i) scratch.in_reach[scratch.group[i]] = true;
  }
  Highest<T> best{chosen, scratch.values, routing.top_k};
  for (int64_t g = 0; g < groups; ++g) {
    if (!scratch.in_reach[g]) continue;
    for (int64_t e = g * size; e < (g + 1) * size; ++e) best.offer(static_cast<int32_t>(e), selection[e]);
  }
}

// Routes the tokens [begin, end) of one sequence. With `share` [E], adds there the shares s_i / sum_j s_j of
// unmasked tokens; with `counts` [E], how often unmasked tokens chose each expert.
template <class T>
HWY_INLINE void route_tokens(const Router<T>& router, const RouteScratch<T>& scratch, T* share,
                             int32_t* counts, int64_t begin, int64_t end) {
  const Routing& routing = router.routing;
  const T* bias = router.bias;
  const int64_t n = router.logits[1], top_k = routing.top_k;
  for (int64_t t = begin; t < end; ++t) {
    T* score = row_of<T>(router.scores, t);
    score_row(row_of<T>(router.logits, t), routing.score, score, n);
    const T* selection = score;
    if (bias) {
      for_vectors<T>(n, [&](int64_t i, auto width) LATENTE_VECTOR {
        store(hn::Add(load(score + i, width), load(bias + i, width)), scratch.selection + i, width);
      });
      selection = scratch.selection;
    }
    int32_t* chosen = router.experts + t * top_k;
    select(selection, routing, n, scratch, chosen);

    T* weight = router.weights + t * top_k;
    T sum = 0;
    for (int64_t k = 0; k < top_k; ++k) sum += weight[k] = score[chosen[k]];
    const T scale = static_cast<T>(routing.scale);
    const T divisor = routing.normalise ? sum + static_cast<T>(1e-20) : T{1};
    for (int64_t k = 0; k < top_k; ++k) weight[k] = weight[k] / divisor * scale;

    if (router.mask && router.mask[t] == 0) continue;
    if (counts) {
      for (int64_t k = 0; k < top_k; ++k) ++counts[chosen[k]];
    }
    if (share) add_scaled(score, 1 / sum_row(score, n), share, n);
  }
}

// d_logits of the tokens [begin, end). With `coefficients` [E]: what their shares s_i / sum_j s_j count in
// the balance losses (one sequence's, to which all these tokens belong).
template <class T>
HWY_INLINE void route_backward_tokens(const RouterGradient<T>& router, const T* coefficients, T* d_score,
                                      int64_t begin, int64_t end) {
  const Tag<T> d;
  const Routing& routing = router.routing;
  const Grad& d_logits = router.d_logits;
  const int64_t n = router.scores[1], top_k = routing.top_k;
  const T scale = static_cast<T>(routing.scale);
  for (int64_t t = begin; t < end; ++t) {
    const T* score = row_of<T>(router.scores, t);
    if (coefficients && !(router.mask && router.mask[t] == 0)) {
      // d/ds_i of sum_j c_j s_j / S = (c_i - sum_j c_j s_j / S) / S
      const T inverse = 1 / sum_row(score, n);
      const Vec<T> mean = hn::Set(d, dot(coefficients, score, n) * inverse), factor = hn::Set(d, inverse);
      for_vectors<T>(n, [&](int64_t i, auto width) LATENTE_VECTOR {
        store(hn::Mul(hn::Sub(load(coefficients + i, width), mean), factor), d_score + i, width);
      });
    } else {
      std::fill(d_score, d_score + n, T{0});
    }
    if (router.d_weights) {
      const T* g = router.d_weights + t * top_k;
      const int32_t* chosen = router.experts + t * top_k;
      T sum = 0, product = 0;
      for (int64_t k = 0; k < top_k; ++k) {
        sum += score[chosen[k]];
        product += g[k] * router.weights[t * top_k + k];
      }
      const T divisor = sum + static_cast<T>(1e-20);
      for (int64_t k = 0; k < top_k; ++k) {
        d_score[chosen[k]] += routing.normalise ? (scale * g[k] - product) / divisor : scale * g[k];
      }
    }
    T* to = row_of<T>(d_logits.view, t);
    if (routing.score == GateScore::sigmoid) {
      put_row(to, d_logits.accumulate, n, [&](int64_t i, auto width) LATENTE_VECTOR {
        const Vec<T> s = load(score + i, width);
        return hn::Mul(load(d_score + i, width), hn::NegMulAdd(s, s, s));
      });
    } else {
      const Vec<T> mean = hn::Set(d, dot(d_score, score, n));
      put_row(to, d_logits.accumulate, n, [&](int64_t i, auto width) LATENTE_VECTOR {
        return hn::Mul(load(score + i, width), hn::Sub(load(d_score + i, width), mean));
      });
    }
  }
}

#define LATENTE_ROUTE(SUFFIX, T)                                                                          \
  void route_##SUFFIX(const Router<T>& router, const RouteScratch<T>& scratch, T* share, int32_t* counts, \
                      int64_t begin, int64_t end) {                                                       \
    route_tokens(router, scratch, share, counts, begin, end);                                             \
  }                                                                                                       \
  void route_backward_##SUFFIX(const RouterGradient<T>& router, const T* coefficients, T* d_score,        \
                               int64_t begin, int64_t end) {                                              \
    route_backward_tokens(router, coefficients, d_score, begin, end);                                     \
  }
LATENTE_ROUTE(f32, float)
LATENTE_ROUTE(f64, double)
#undef LATENTE_ROUTE

}  // namespace latente::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latente {
namespace {

HWY_EXPORT(route_f32);
HWY_EXPORT(route_f64);
HWY_EXPORT(route_backward_f32);
HWY_EXPORT(route_backward_f64);

template <class T>
RouteScratch<T> route_scratch(int64_t experts, const Routing& routing) {
  struct Selection;
  struct Values;
  struct Group;
  struct Reach;
  int64_t groups = std::max(routing.groups, 1);
  return {reused_memory<Selection, T>(experts),
          reused_memory<Values, T>(std::max<int64_t>(routing.top_k, groups)),
          reused_memory<Group, int32_t>(groups), reused_memory<Reach, uint8_t>(groups)};
}

// Tokens cut into blocks that lie within one sequence each: where the balance loss counts by sequence, its
// parts must not mix, and sums over blocks in order do not depend on threads.
struct TokenBlocks {
  static constexpr int64_t size = 32;
  int64_t tokens, sequence, sequences, per_sequence;

  TokenBlocks(int64_t token_count, const Routing& routing) : tokens(token_count), sequence(token_count) {
    if (routing.balance.any() && routing.balance.per_sequence) {
      LATENTE_ASSERT(routing.balance.sequence_length > 0 && tokens % routing.balance.sequence_length == 0);
      sequence = routing.balance.sequence_length;
    }
    sequences = sequence > 0 ? tokens / sequence : 0;
    per_sequence = (sequence + size - 1) / size;
  }
  int64_t count() const { return sequences * per_sequence; }
  int64_t begin(int64_t block) const { return block / per_sequence * sequence + block % per_sequence * size; }
  int64_t end(int64_t block) const {
    return std::min(begin(block) + size, (block / per_sequence + 1) * sequence);
  }
};

// What the balance losses count in some tokens: [E] choices of each expert and, for the communication loss,
// [devices] tokens with at least one choice on the device.
int64_t counted_devices(const Routing& routing) {
  return routing.balance.communication_alpha > 0 ? routing.balance.devices : 0;
}

// Adds the tokens [begin, end) that chose each device.
template <class T>
void count_devices(const int32_t* chosen, const T* mask, const Routing& routing, int64_t experts,
                   int64_t begin, int64_t end, int32_t* counts) {
  const int64_t top_k = routing.top_k, size = experts / routing.balance.devices;
  for (int64_t t = begin; t < end; ++t) {
    if (mask && mask[t] == 0) continue;
    const int32_t* choice = chosen + t * top_k;
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t device = choice[k] / size;
      const bool again = std::any_of(choice, choice + k, [&](int32_t e) { return e / size == device; });
      counts[device] += again ? 0 : 1;
    }
  }
}

// c_i of the balance losses (backend.h) of one sequence from its counts, and the number of tokens counted (0:
// the sequence is all padding).
int64_t balance_coefficients(const int32_t* counts, int64_t experts, const Routing& routing,
                             double* coefficients) {
  const Balance& balance = routing.balance;
  const int64_t choices = std::accumulate(counts, counts + experts, int64_t{0});
  const int64_t tokens = choices / routing.top_k, size = experts / balance.devices;
  std::fill(coefficients, coefficients + experts, 0.0);
  if (tokens == 0) return 0;
  const double unit = static_cast<double>(experts) / static_cast<double>(choices);
  const double sent =
      static_cast<double>(balance.devices) / static_cast<double>(balance.devices_per_token * tokens);
  for (int64_t d = 0; d < balance.devices; ++d) {
    const int64_t first = d * size, last = first + size;
    const double served = static_cast<double>(std::accumulate(counts + first, counts + last, int64_t{0}));
    double of_device = balance.device_alpha * unit * served / static_cast<double>(size);
    if (counted_devices(routing) > 0) of_device += balance.communication_alpha * sent * counts[experts + d];
    for (int64_t e = first; e < last; ++e) coefficients[e] = balance.alpha * unit * counts[e] + of_device;
  }
  return tokens;
}

// Adds up `count` blocks of `width` numbers in the first one.
template <class N>
void add_blocks(N* blocks, int64_t count, int64_t width) {
  for (int64_t i = width; i < count * width; ++i) blocks[i % width] += blocks[i];
}

template <class T, class Kernel>
void route_all(ThreadPool& pool, Kernel kernel, const Router<T>& router, const View& load,
               const View& balance_loss) {
  const Routing& routing = router.routing;
  int64_t experts = router.logits[1];
  TokenBlocks blocks(router.logits[0], routing);
  struct Counts;
  struct Shares;
  bool counting = load || balance_loss;
  int64_t devices = balance_loss ? counted_devices(routing) : 0, width = experts + devices;
  int32_t* counts = counting ? reused_memory<Counts, int32_t>(blocks.count() * width) : nullptr;
  T* shares = balance_loss ? reused_memory<Shares, T>(blocks.count() * experts) : nullptr;
  pool.parallel_for(blocks.count(), std::max<int64_t>(1, piece_elements / (2 * TokenBlocks::size * experts)),
                    [&](int64_t first, int64_t last) {
                      RouteScratch<T> scratch = route_scratch<T>(experts, routing);
                      for (int64_t b = first; b < last; ++b) {
                        int32_t* count = counts ? counts + b * width : nullptr;
                        T* share = shares ? shares + b * experts : nullptr;
                        if (count) std::fill(count, count + width, 0);
                        if (share) std::fill(share, share + experts, T{0});
                        int64_t begin = blocks.begin(b), end = blocks.end(b);
                        kernel(router, scratch, share, count, begin, end);
                        if (devices > 0) {
                          count_devices(router.experts, router.mask, routing, experts, begin, end,
                                        count + experts);
                        }
                      }
                    });
  if (!counting) return;

  double loss = 0;
  int64_t counted_sequences = 0;
  struct Fractions;
  double* coefficients = reused_memory<Fractions, double>(experts);
  for (int64_t s = 0; s < blocks.sequences; ++s) {
    int32_t* count = counts + s * blocks.per_sequence * width;
    T* share = shares ? shares + s * blocks.per_sequence * experts : nullptr;
    add_blocks(count, blocks.per_sequence, width);
    if (share) add_blocks(share, blocks.per_sequence, experts);
    if (load) {
      for (int64_t e = 0; e < experts; ++e) load.as<float>()[e] += static_cast<float>(count[e]);
    }
    if (!share) continue;
    int64_t tokens = balance_coefficients(count, experts, routing, coefficients);
    if (tokens == 0) continue;
    ++counted_sequences;
    double sum = 0;
    for (int64_t e = 0; e < experts; ++e) sum += coefficients[e] * static_cast<double>(share[e]);
    loss += sum / static_cast<double>(tokens);
  }
  if (balance_loss) {
    double mean = counted_sequences > 0 ? loss / static_cast<double>(counted_sequences) : 0.0;
    balance_loss.as<T>()[0] = static_cast<T>(mean);
  }
}

// [sequences, E]: the gradient of the balance losses with respect to the shares s_i / sum_j s_j of a token.
template <class T>
T* balance_gradient(const RouterGradient<T>& router, const TokenBlocks& blocks) {
  const Routing& routing = router.routing;
  int64_t experts = router.scores[1], top_k = routing.top_k, counted_sequences = 0;
  int64_t devices = counted_devices(routing);
  struct Counts;
  struct Fractions;
  struct Gradient;
  int32_t* counts = reused_memory<Counts, int32_t>(experts + devices);
  double* coefficients = reused_memory<Fractions, double>(experts);
  T* gradient = reused_memory<Gradient, T>(blocks.sequences * experts);
  for (int64_t s = 0; s < blocks.sequences; ++s) {
    std::fill(counts, counts + experts + devices, 0);
    int64_t begin = s * blocks.sequence, end = begin + blocks.sequence;
    for (int64_t t = begin; t < end; ++t) {
      if (router.mask && router.mask[t] == 0) continue;
      for (int64_t k = t * top_k; k < (t + 1) * top_k; ++k) ++counts[router.experts[k]];
    }
    if (devices > 0)
      count_devices(router.experts, router.mask, routing, experts, begin, end, counts + experts);
    int64_t tokens = balance_coefficients(counts, experts, routing, coefficients);
    counted_sequences += tokens > 0 ? 1 : 0;
    double factor = tokens > 0 ? 1.0 / static_cast<double>(tokens) : 0.0;
    for (int64_t e = 0; e < experts; ++e)
      gradient[s * experts + e] = static_cast<T>(factor * coefficients[e]);
  }
  T share = static_cast<T>(1.0 / static_cast<double>(std::max<int64_t>(counted_sequences, 1)));
  for (int64_t i = 0; i < blocks.sequences * experts; ++i) gradient[i] *= share;
  return gradient;
}

template <class T, class Kernel>
void route_backward_all(ThreadPool& pool, Kernel kernel, const RouterGradient<T>& router) {
  int64_t experts = router.scores[1];
  TokenBlocks blocks(router.scores[0], router.routing);
  T* gradient = router.routing.balance.any() ? balance_gradient(router, blocks) : nullptr;
  pool.parallel_for(blocks.count(), std::max<int64_t>(1, piece_elements / (2 * TokenBlocks::size * experts)),
                    [&](int64_t first, int64_t last) {
                      struct Scores;
                      T* d_score = reused_memory<Scores, T>(experts);
                      for (int64_t b = first; b < last; ++b) {
                        T* coefficients = gradient ? gradient + b / blocks.per_sequence * experts : nullptr;
                        kernel(router, coefficients, d_score, blocks.begin(b), blocks.end(b));
                      }
                    });
}

}  // namespace

void CpuBackend::route(View logits, View bias, View token_mask, const Routing& routing, View scores,
                       View weights, View experts, View load, View balance_loss) {
  int64_t groups = routing.group_score == GroupScore::none ? 1 : routing.groups;
  LATENTE_ASSERT(scores.shape == logits.shape && logits[1] % groups == 0);
  LATENTE_ASSERT(1 <= routing.top_k &&
                 routing.top_k <=
                     logits[1] / groups * std::min<int64_t>(groups, groups > 1 ? routing.top_groups : 1));
  LATENTE_ASSERT(weights.contiguous() && experts.contiguous() && weights[1] == routing.top_k);
  LATENTE_ASSERT(logits[1] % routing.balance.devices == 0);
  auto run = [&]<class T>(T, auto kernel) {
    Router<T> router{logits,
                     scores,
                     bias.as_or_null<T>(),
                     token_mask.as_or_null<T>(),
                     weights.as<T>(),
                     experts.as<int32_t>(),
                     routing};
    route_all(pool_, kernel, router, load, balance_loss);
  };
  if (logits.dtype == DType::f64) {
    run(double{}, &HWY_DYNAMIC_DISPATCH(route_f64));
  } else {
    run(float{}, &HWY_DYNAMIC_DISPATCH(route_f32));
  }
}

void CpuBackend::route_backward(View d_weights, View scores, View weights, View experts, View token_mask,
                                const Routing& routing, Grad d_logits) {
  if (!d_logits) return;
  LATENTE_ASSERT(weights.contiguous() && experts.contiguous() && (!d_weights || d_weights.contiguous()));
  LATENTE_ASSERT(d_logits.view.shape == scores.shape);
  auto run = [&]<class T>(T, auto kernel) {
    RouterGradient<T> router{d_weights.as_or_null<T>(),  scores,  weights.as<T>(), experts.as<int32_t>(),
                             token_mask.as_or_null<T>(), routing, d_logits};
    route_backward_all(pool_, kernel, router);
  };
  if (scores.dtype == DType::f64) {
    run(double{}, &HWY_DYNAMIC_DISPATCH(route_backward_f64));
  } else {
    run(float{}, &HWY_DYNAMIC_DISPATCH(route_backward_f32));
  }
}

}  // namespace latente
#endif
