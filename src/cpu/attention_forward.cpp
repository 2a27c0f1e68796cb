// Causal attention over keys and values of each head: the forward pass.
#include <limits>

#include "cpu/attention_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attention_forward.cpp"
#include "hwy/foreach_target.h"  // must precede highway.h

#include "cpu/attention_tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latente::attention::HWY_NAMESPACE {

// A block of queries and its result so far.
template <class T>
struct QueryBlock {
  int64_t begin, count, padded_count;
  int64_t earliest, latest;    // of its starts
  T *queries, *maximum, *sum;  // queries: [width, query]
  T* out;                      // [query, value], relative to the maxima
  bool empty = true;
};

// Scratch for one key block, and a query block's scores against it.
template <class T>
struct KeyBlock {
  int64_t key_row, value_row;
  T *keys, *values, *scores, *factor, *first, *last;
  Prefetch<T> soon, later;
  void prefetch() {
    if (!soon.step()) later.step();
  }
};

// The online softmax takes in the `count` keys that begin at token `at`.
template <class T>
void attend(KeyBlock<T>& k, int64_t at, int64_t count, const Expanded<T>& a, QueryBlock<T>& q) {
  constexpr int64_t L = lanes<T>(), block = expanded_block;
  const int64_t width = a.nope + a.rope;
  const int64_t ahead = at - q.begin;  // keys from index i - ahead on come after query i
  multiply<Start::zero, false, T>(
      {count, q.padded_count, k.keys, k.key_row, 1, q.queries, block, k.scores, block},
      [&](int64_t k0, int64_t, int64_t, int64_t q1) HWY_ATTR {
        k.prefetch();
        return Range{0, k0 + ahead < q1 ? width : 0};
      });
  const bool masked = at + count - 1 > q.begin || q.latest > at;
  if (masked) {
    for (int64_t i = 0; i < q.padded_count; ++i) {
      k.first[i] = static_cast<T>(a.starts[q.begin + std::min(i, q.count - 1)] - at);
      k.last[i] = static_cast<T>(i - ahead);
    }
  }
  for (int64_t i = 0; i < q.padded_count; i += L) {
    const int64_t live = std::clamp<int64_t>(i + L - ahead, 0, count);
    auto softmax = masked ? softmax_column<true, T> : softmax_column<false, T>;
    softmax(k.scores + i, block, live, count, k.first + i, k.last + i, q.maximum + i, q.sum + i,
            k.factor + i);
  }
  const Product<T> product{q.count,  round_up(a.value, L), k.scores, 1,           block,
                           k.values, k.value_row,          q.out,    k.value_row, k.factor};
  auto range = [&](int64_t, int64_t q1, int64_t, int64_t) HWY_ATTR {
    return Range{0, std::clamp<int64_t>(q1 - ahead, 1, count)};
  };
  if (q.empty) {
    multiply<Start::zero, true>(product, range);
  } else {
    multiply<Start::scale, true>(product, range);
  }
  q.empty = false;
}

template <class T>
void forward_queries(const Expanded<T>& a, const ForwardTask& task, const ForwardTask* next) {
  const Tag<T> d;
  const auto [segment, begin, end, head] = task;
  constexpr int64_t L = lanes<T>(), block = expanded_block;
  const int64_t width = a.nope + a.rope, key_row = padded<T>(width), value_row = padded<T>(a.value);
  const int64_t blocks = (end - begin + block - 1) / block, group = head / (a.heads / a.groups);
  Carver<T> memory(scratch(0, static_cast<int64_t>(sizeof(T)) * block *
                                  (block + key_row + value_row + 3 + blocks * (width + value_row + 2))));
  KeyBlock<T> k;
  k.key_row = key_row;
  k.value_row = value_row;
  k.keys = memory.take(block * key_row);
  k.values = memory.take(block * value_row);
  k.scores = memory.take(block * block);
  k.factor = memory.take(block);
  k.first = memory.take(block);
  k.last = memory.take(block);

  std::array<QueryBlock<T>, forward_group> queries;
  int64_t at = end;
  for (int64_t b = 0; b < blocks; ++b) {
    QueryBlock<T>& q = queries[static_cast<size_t>(b)];
    q.begin = begin + b * block;
    q.count = std::min(block, end - q.begin);
    q.padded_count = round_up(q.count, L);
    const auto [earliest, latest] = std::minmax_element(a.starts + q.begin, a.starts + q.begin + q.count);
    q.earliest = *earliest;
    q.latest = *latest;
    q.queries = memory.take(width * block);
    q.out = memory.take(block * value_row);
    q.maximum = memory.take(block);
    q.sum = memory.take(block);
    q.empty = true;
    transpose(a.q.at(q.begin, head), a.q.token, q.count, width, static_cast<T>(a.scale * 1.4426950408889634),
              q.queries, block, q.padded_count);
    for (int64_t i = 0; i < q.padded_count; i += L) {
      hn::Store(hn::Set(d, lowest<T>()), d, q.maximum + i);
      hn::Store(hn::Zero(d), d, q.sum + i);
    }
    at = std::min(at, segment.begin + (q.earliest - segment.begin) / block * block);
  }

  k.later.clear();
  if (next) {
    const int64_t count = next->end - next->begin, next_group = next->head / (a.heads / a.groups);
    const Rows<const T> result{a.out.data, a.out.token, a.out.head};
    k.later.add(a.q, next->begin, next->head, width, count);
    k.later.add(result, next->begin, next->head, a.value, count);
    k.later.add(a.k, next->segment.begin, next_group, a.nope, std::min(block, count));
    k.later.add(a.v, next->segment.begin, next_group, a.value, std::min(block, count));
  }
  for (; at < end; at += block) {
    const int64_t keys = std::min(block, end - at), keys_after = std::min(block, end - at - keys);
    k.soon.clear();
    k.soon.add(a.k, at + keys, group, a.nope, keys_after);
    k.soon.add(a.v, at + keys, group, a.value, keys_after);
    for (int64_t i = 0; i < keys; ++i) {
      copy_row(a.k.at(at + i, group), a.nope, k.keys + i * key_row);
      if (a.rope) copy_row(a.k_rope.at(at + i, 0), a.rope, k.keys + i * key_row + a.nope);
      load_row(a.v.at(at + i, group), a.value, k.values + i * value_row, round_up(a.value, L));
    }
    for (int64_t b = 0; b < blocks; ++b) {
      QueryBlock<T>& q = queries[static_cast<size_t>(b)];
      const int64_t count = std::min(block, q.begin + q.count - at);
      if (count > 0 && q.earliest < at + block) attend(k, at, count, a, q);
    }
  }

  for (int64_t b = 0; b < blocks; ++b) {
    const QueryBlock<T>& q = queries[static_cast<size_t>(b)];
    for (int64_t i = 0; i < q.padded_count; i += L) {
      const auto sum = hn::Load(d, q.sum + i);
      const auto lse = hn::MulAdd(hn::Load(d, q.maximum + i),
                                  hn::Set(d, static_cast<T>(0.69314718055994530942)), hn::Log(d, sum));
      hn::Store(lse, d, q.maximum + i);
      hn::Store(hn::Div(hn::Set(d, T{1}), sum), d, q.sum + i);
    }
    for (int64_t i = 0; i < q.count; ++i) {
      const T* from = q.out + i * value_row;
      T* to = a.out.at(q.begin + i, head);
      for (int64_t j = 0; j < a.value; ++j) to[j] = from[j] * q.sum[i];
      *a.lse.at(q.begin + i, head) = q.maximum[i];
    }
  }
}

void forward_f32(const Expanded<float>& a, const ForwardTask& task, const ForwardTask* next) {
  forward_queries(a, task, next);
}
void forward_f64(const Expanded<double>& a, const ForwardTask& task, const ForwardTask* next) {
  forward_queries(a, task, next);
}

}  // namespace latente::attention::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latente::attention {

HWY_EXPORT(forward_f32);
HWY_EXPORT(forward_f64);

void forward_task(const Expanded<float>& a, const ForwardTask& task, const ForwardTask* next) {
  HWY_DYNAMIC_DISPATCH(forward_f32)(a, task, next);
}
void forward_task(const Expanded<double>& a, const ForwardTask& task, const ForwardTask* next) {
  HWY_DYNAMIC_DISPATCH(forward_f64)(a, task, next);
}

}  // namespace latente::attention
#endif
