// Causal attention over keys and values of each head: the gradient. Scores are computed anew from the saved
// log-sum-exp; with p the probabilities, d_s = p · (d_p - delta) · scale, where d_p = d_out · vᵀ.
#include <cmath>
#include <limits>

#include "cpu/attention_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attention_backward.cpp"
#include "hwy/foreach_target.h"  // must precede highway.h

#include "cpu/attention_tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latente::attention::HWY_NAMESPACE {

// Scratch of one (query block, key block) pair. Rows of queries, keys and their gradients are [nope, rope].
template <class T>
struct Pair {
  static constexpr int64_t block = expanded_block;

  Pair(const Expanded<T>& a, void* memory)
      : width(a.nope + a.rope), key_row(padded<T>(width)), value_row(padded<T>(a.value)), carver(memory) {
    queries = carver.take(block * key_row);
    d_outs = carver.take(block * value_row);
    keys = carver.take(block * key_row);
    keys_t = carver.take(width * block);
    values = carver.take(block * value_row);
    values_t = carver.take(a.value * block);
    scores = carver.take(block * block);
    d_scores = carver.take(block * block);
  }
  static int64_t elements(const Expanded<T>& a) {
    const int64_t key = padded<T>(a.nope + a.rope), value = padded<T>(a.value);
    return block * (3 * key + 3 * value + 2 * block);
  }

  int64_t width, key_row, value_row;
  Carver<T> carver;
  T *queries, *d_outs, *keys, *values;  // rows
  T *keys_t, *values_t;                 // [width, key], by scale · log2 e, and [value, key]
  T *scores, *d_scores;                 // [query, key]
  int64_t key_begin = 0, key_count = 0, query_begin = 0, query_count = 0;
};

template <class T>
void load_keys(const Expanded<T>& a, int64_t begin, int64_t count, int64_t group, Pair<T>& p) {
  p.key_begin = begin;
  p.key_count = count;
  for (int64_t k = 0; k < count; ++k) {
    T* key = p.keys + k * p.key_row;
    copy_row(a.k.at(begin + k, group), a.nope, key);
    if (a.rope) copy_row(a.k_rope.at(begin + k, 0), a.rope, key + a.nope);
    std::fill(key + p.width, key + p.key_row, T{0});
    copy_row(a.v.at(begin + k, group), a.value, p.values + k * p.value_row);
  }
  const int64_t padded_count = round_up(count, lanes<T>());
  transpose(p.keys, p.key_row, count, p.width, static_cast<T>(a.scale * 1.4426950408889634), p.keys_t,
            p.block, padded_count);
  transpose(p.values, p.value_row, count, a.value, T{1}, p.values_t, p.block, padded_count);
}

template <class T>
void load_queries(const ExpandedBackward<T>& b, int64_t begin, int64_t count, int64_t head, Pair<T>& p) {
  const Expanded<T>& a = b.forward;
  p.query_begin = begin;
  p.query_count = count;
  for (int64_t i = 0; i < count; ++i) {
    load_row(a.q.at(begin + i, head), p.width, p.queries + i * p.key_row, p.key_row);
    load_row(b.d_out.at(begin + i, head), a.value, p.d_outs + i * p.value_row, p.value_row);
  }
}

// A row of p.scores and p.d_scores: probabilities and d_s of one query against the keys [first, last] of
// [0, count), zeros against the others. count is a multiple of the vector length; lse is in base 2.
template <bool masked, class T>
void probabilities_row(T* s, T* d_s, int64_t count, T lse, T delta, T scale, int64_t first, int64_t last) {
  const Tag<T> d;
  constexpr int64_t L = lanes<T>();
  const auto norm = hn::Set(d, lse), shift = hn::Set(d, delta), factor = hn::Set(d, scale);
  const auto low = hn::Set(d, static_cast<T>(first)), high = hn::Set(d, static_cast<T>(last));
  const int64_t live = masked ? std::clamp<int64_t>(round_up(last + 1, L), 0, count) : count;
  for (int64_t k = 0; k < live; k += L) {
    auto probability = exp2(d, hn::Sub(hn::Load(d, s + k), norm));
    auto gradient = hn::Mul(probability, hn::Mul(hn::Sub(hn::Load(d, d_s + k), shift), factor));
    if constexpr (masked) {
      const auto key = hn::Iota(d, static_cast<T>(k));
      const auto admitted = hn::And(hn::Ge(key, low), hn::Le(key, high));
      probability = hn::IfThenElseZero(admitted, probability);
      gradient = hn::IfThenElseZero(admitted, gradient);
    }
    hn::Store(probability, d, s + k);
    hn::Store(gradient, d, d_s + k);
  }
  std::fill(s + live, s + count, T{0});
  std::fill(d_s + live, d_s + count, T{0});
}

template <class T>
void pair_scores(const ExpandedBackward<T>& b, int64_t head, Pair<T>& p) {
  const Expanded<T>& a = b.forward;
  const int64_t padded_count = round_up(p.key_count, lanes<T>());
  const int64_t ahead = p.key_begin - p.query_begin;  // keys from index i - ahead on come after query i
  auto range = [&](int64_t depth) HWY_ATTR {
    return [=](int64_t, int64_t q1, int64_t k0, int64_t) HWY_ATTR {
      return Range{0, k0 + ahead < q1 ? depth : 0};
    };
  };
  multiply<Start::zero, false, T>(
      {p.query_count, padded_count, p.queries, p.key_row, 1, p.keys_t, p.block, p.scores, p.block},
      range(p.width));
  multiply<Start::zero, false, T>(
      {p.query_count, padded_count, p.d_outs, p.value_row, 1, p.values_t, p.block, p.d_scores, p.block},
      range(a.value));
  for (int64_t i = 0; i < p.query_count; ++i) {
    const int64_t query = p.query_begin + i;
    const int64_t first = a.starts[query] - p.key_begin, last = i - ahead;
    auto row =
        first > 0 || last < padded_count - 1 ? probabilities_row<true, T> : probabilities_row<false, T>;
    row(p.scores + i * p.block, p.d_scores + i * p.block, padded_count,
        *a.lse.at(query, head) * static_cast<T>(1.4426950408889634), *b.delta.at(query, head),
        static_cast<T>(a.scale), first, last);
  }
}

// d_k[key] += sum over queries of d_s[query, key] · q[query], and d_v likewise.
template <class T>
void add_key_gradients(const Expanded<T>& a, const Pair<T>& p, T* d_keys, T* d_values) {
  constexpr int64_t L = lanes<T>();
  const int64_t ahead = p.key_begin - p.query_begin;
  auto range = [&](int64_t k0, int64_t, int64_t, int64_t) HWY_ATTR {
    return Range{std::clamp<int64_t>(k0 + ahead, 0, p.query_count), p.query_count};
  };
  multiply<Start::load, true, T>(
      {p.key_count, round_up(p.width, L), p.d_scores, 1, p.block, p.queries, p.key_row, d_keys, p.key_row},
      range);
  multiply<Start::load, true, T>(
      {p.key_count, round_up(a.value, L), p.scores, 1, p.block, p.d_outs, p.value_row, d_values, p.value_row},
      range);
}

// d_q[query] += sum over keys of d_s[query, key] · k[key]
template <class T>
void add_query_gradients(const Pair<T>& p, T* d_queries) {
  const int64_t ahead = p.key_begin - p.query_begin;
  multiply<Start::load, false, T>({p.query_count, round_up(p.width, lanes<T>()), p.d_scores, p.block, 1,
                                   p.keys, p.key_row, d_queries, p.key_row},
                                  [&](int64_t, int64_t q1, int64_t, int64_t) HWY_ATTR {
                                    return Range{0, std::clamp<int64_t>(q1 - ahead, 0, p.key_count)};
                                  });
}

template <class T>
void store_gradient(const T* from, int64_t count, T* to, bool accumulate) {
  if (accumulate) {
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
  } else {
    copy_row(from, count, to);
  }
}

template <class T>
void backward_keys(const ExpandedBackward<T>& b, Segment segment, int64_t begin, int64_t end, int64_t group,
                   bool queries) {
  constexpr int64_t block = expanded_block;
  const Expanded<T>& a = b.forward;
  const int64_t share = a.heads / a.groups, length = segment.end - segment.begin;
  const int64_t key_row = padded<T>(a.nope + a.rope), value_row = padded<T>(a.value);
  const int64_t elements =
      Pair<T>::elements(a) + block * (key_row + value_row) + (queries ? share * length * key_row : 0);
  Pair<T> p(a, scratch(0, elements * static_cast<int64_t>(sizeof(T))));
  T* d_keys = p.carver.take(block * key_row);
  T* d_values = p.carver.take(block * value_row);
  T* d_queries = p.carver.take(queries ? share * length * key_row : 0);
  if (queries) std::fill(d_queries, d_queries + share * length * key_row, T{0});

  for (int64_t at = begin; at < end; at += block) {
    load_keys(a, at, std::min(block, end - at), group, p);
    std::fill(d_keys, d_keys + block * key_row, T{0});
    std::fill(d_values, d_values + block * value_row, T{0});
    for (int64_t i = 0; i < share; ++i) {
      const int64_t head = group * share + i;
      for (int64_t query = at; query < segment.end; query += block) {
        const int64_t count = std::min(block, segment.end - query);
        if (*std::min_element(a.starts + query, a.starts + query + count) >= at + p.key_count) continue;
        load_queries(b, query, count, head, p);
        pair_scores(b, head, p);
        add_key_gradients(a, p, d_keys, d_values);
        if (queries) add_query_gradients(p, d_queries + (i * length + query - segment.begin) * key_row);
      }
    }
    for (int64_t k = 0; k < p.key_count; ++k) {
      const T* d_key = d_keys + k * key_row;
      if (b.d_k) store_gradient(d_key, a.nope, b.d_k.rows.at(at + k, group), b.d_k.accumulate);
      if (b.d_k_rope) {
        copy_row(d_key + a.nope, a.rope, b.d_k_rope + ((group - b.first_head) * b.tokens + at + k) * a.rope);
      }
      if (b.d_v) {
        store_gradient(d_values + k * value_row, a.value, b.d_v.rows.at(at + k, group), b.d_v.accumulate);
      }
    }
  }
  if (!queries) return;
  for (int64_t i = 0; i < share; ++i) {
    for (int64_t t = 0; t < length; ++t) {
      store_gradient(d_queries + (i * length + t) * key_row, a.nope + a.rope,
                     b.d_q.rows.at(segment.begin + t, group * share + i), b.d_q.accumulate);
    }
  }
}

template <class T>
void backward_queries(const ExpandedBackward<T>& b, Segment segment, int64_t begin, int64_t head) {
  constexpr int64_t block = expanded_block;
  const Expanded<T>& a = b.forward;
  const int64_t key_row = padded<T>(a.nope + a.rope), end = std::min(begin + block, segment.end);
  Pair<T> p(a, scratch(0, (Pair<T>::elements(a) + block * key_row) * static_cast<int64_t>(sizeof(T))));
  T* d_queries = p.carver.take(block * key_row);
  std::fill(d_queries, d_queries + block * key_row, T{0});
  load_queries(b, begin, end - begin, head, p);
  int64_t at =
      segment.begin + (*std::min_element(a.starts + begin, a.starts + end) - segment.begin) / block * block;
  for (; at < end; at += block) {
    load_keys(a, at, std::min(block, segment.end - at), head / (a.heads / a.groups), p);
    pair_scores(b, head, p);
    add_query_gradients(p, d_queries);
  }
  for (int64_t t = begin; t < end; ++t) {
    store_gradient(d_queries + (t - begin) * key_row, a.nope + a.rope, b.d_q.rows.at(t, head),
                   b.d_q.accumulate);
  }
}

template <class T>
void delta_rows(const ExpandedBackward<T>& b, int64_t begin, int64_t end) {
  const Tag<T> d;
  constexpr int64_t L = lanes<T>();
  const Expanded<T>& a = b.forward;
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t h = 0; h < a.heads; ++h) {
      const T *x = b.d_out.at(t, h), *y = a.out.at(t, h);
      auto sum = hn::Zero(d);
      int64_t i = 0;
      for (; i + L <= a.value; i += L) sum = hn::MulAdd(hn::LoadU(d, x + i), hn::LoadU(d, y + i), sum);
      T total = hn::GetLane(hn::SumOfLanes(d, sum));
      for (; i < a.value; ++i) total += x[i] * y[i];
      *b.delta.at(t, h) = total;
    }
  }
}

void keys_f32(const ExpandedBackward<float>& b, Segment segment, int64_t begin, int64_t end, int64_t group,
              bool queries) {
  backward_keys(b, segment, begin, end, group, queries);
}
void keys_f64(const ExpandedBackward<double>& b, Segment segment, int64_t begin, int64_t end, int64_t group,
              bool queries) {
  backward_keys(b, segment, begin, end, group, queries);
}
void queries_f32(const ExpandedBackward<float>& b, Segment segment, int64_t begin, int64_t head) {
  backward_queries(b, segment, begin, head);
}
void queries_f64(const ExpandedBackward<double>& b, Segment segment, int64_t begin, int64_t head) {
  backward_queries(b, segment, begin, head);
}
void delta_f32(const ExpandedBackward<float>& b, int64_t begin, int64_t end) { delta_rows(b, begin, end); }
void delta_f64(const ExpandedBackward<double>& b, int64_t begin, int64_t end) { delta_rows(b, begin, end); }

}  // namespace latente::attention::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latente::attention {

HWY_EXPORT(keys_f32);
HWY_EXPORT(keys_f64);
HWY_EXPORT(queries_f32);
HWY_EXPORT(queries_f64);
HWY_EXPORT(delta_f32);
HWY_EXPORT(delta_f64);

void delta_task(const ExpandedBackward<float>& a, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(delta_f32)(a, begin, end);
}
void delta_task(const ExpandedBackward<double>& a, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(delta_f64)(a, begin, end);
}
void backward_task(const ExpandedBackward<float>& a, Segment segment, int64_t begin, int64_t end,
                   int64_t group, bool queries) {
  HWY_DYNAMIC_DISPATCH(keys_f32)(a, segment, begin, end, group, queries);
}
void backward_task(const ExpandedBackward<double>& a, Segment segment, int64_t begin, int64_t end,
                   int64_t group, bool queries) {
  HWY_DYNAMIC_DISPATCH(keys_f64)(a, segment, begin, end, group, queries);
}
void backward_query_task(const ExpandedBackward<float>& a, Segment segment, int64_t begin, int64_t head) {
  HWY_DYNAMIC_DISPATCH(queries_f32)(a, segment, begin, head);
}
void backward_query_task(const ExpandedBackward<double>& a, Segment segment, int64_t begin, int64_t head) {
  HWY_DYNAMIC_DISPATCH(queries_f64)(a, segment, begin, head);
}

}  // namespace latente::attention
#endif
