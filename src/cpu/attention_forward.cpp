// Causal attention over keys and values of each head: the forward pass.
#include <cmath>
#include <limits>

#include "cpu/attention_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attention_forward.cpp"
#include "hwy/foreach_target.h"  // must precede highway.h

#include "cpu/attention_tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latente::attention::HWY_NAMESPACE {

template <class T>
void forward_block(const Expanded<T>& a, Segment segment, int64_t begin, int64_t head) {
  const Tag<T> d;
  constexpr int64_t L = lanes<T>(), block = expanded_block;
  const int64_t width = a.nope + a.rope, key_row = padded<T>(width), value_row = padded<T>(a.value);
  Carver<T> memory(scratch(
      0, static_cast<int64_t>(sizeof(T)) * (block * (width + block + key_row + 2 * value_row) + 16 * block)));
  T* queries = memory.take(width * block);
  T* scores = memory.take(block * block);
  T* keys = memory.take(block * key_row);
  T* values = memory.take(block * value_row);
  T* out = memory.take(block * value_row);
  T* maximum = memory.take(block);
  T* sum = memory.take(block);
  T* factor = memory.take(block);
  T* first = memory.take(block);
  T* last = memory.take(block);

  const int64_t count = std::min(block, segment.end - begin), padded_count = round_up(count, L);
  const int64_t group = head / (a.heads / a.groups);
  transpose(a.q.at(begin, head), a.q.token, count, width, static_cast<T>(a.scale * 1.4426950408889634),
            queries, block, padded_count);
  for (int64_t i = 0; i < padded_count; i += L) {
    hn::Store(hn::Set(d, lowest<T>()), d, maximum + i);
    hn::Store(hn::Zero(d), d, sum + i);
  }

  const int64_t final_query = begin + count - 1;
  const auto [earliest, latest] = std::minmax_element(a.starts + begin, a.starts + begin + count);
  int64_t at = segment.begin + (*earliest - segment.begin) / block * block;
  for (bool start = true; at <= final_query; at += block, start = false) {
    const int64_t keys_here = std::min(block, final_query + 1 - at);
    for (int64_t k = 0; k < keys_here; ++k) {
      copy_row(a.k.at(at + k, group), a.nope, keys + k * key_row);
      if (a.rope) copy_row(a.k_rope.at(at + k, 0), a.rope, keys + k * key_row + a.nope);
      copy_row(a.v.at(at + k, group), a.value, values + k * value_row);
      std::fill(values + k * value_row + a.value, values + (k + 1) * value_row, T{0});
    }
    const int64_t ahead = at - begin;  // keys from index q - ahead on come after query q
    multiply<Start::zero, false, T>(
        {keys_here, padded_count, keys, key_row, 1, queries, block, scores, block},
        [&](int64_t k0, int64_t, int64_t, int64_t q1) HWY_ATTR {
          return Range{0, k0 + ahead < q1 ? width : 0};
        });
    const bool masked = at + keys_here - 1 > begin || *latest > at;
    if (masked) {
      for (int64_t i = 0; i < padded_count; ++i) {
        first[i] = static_cast<T>(a.starts[std::min(begin + i, final_query)] - at);
        last[i] = static_cast<T>(i - ahead);
      }
    }
    for (int64_t i = 0; i < padded_count; i += L) {
      const int64_t live = std::clamp<int64_t>(i + L - ahead, 0, keys_here);
      auto softmax = masked ? softmax_column<true, T> : softmax_column<false, T>;
      softmax(scores + i, block, live, keys_here, first + i, last + i, maximum + i, sum + i, factor + i);
    }
    const Product<T> product{count, round_up(a.value, L), scores, 1, block, values, value_row, out, value_row,
                             factor};
    auto range = [&](int64_t, int64_t q1, int64_t, int64_t) HWY_ATTR {
      return Range{0, std::clamp<int64_t>(q1 - ahead, 1, keys_here)};
    };
    if (start) {
      multiply<Start::zero, true>(product, range);
    } else {
      multiply<Start::scale, true>(product, range);
    }
  }

  for (int64_t i = 0; i < count; ++i) {
    const T inverse = 1 / sum[i];
    const T* from = out + i * value_row;
    T* to = a.out.at(begin + i, head);
    for (int64_t j = 0; j < a.value; ++j) to[j] = from[j] * inverse;
    *a.lse.at(begin + i, head) = static_cast<T>(static_cast<double>(maximum[i]) * 0.69314718055994530942 +
                                                std::log(static_cast<double>(sum[i])));
  }
}

void forward_f32(const Expanded<float>& a, Segment segment, int64_t begin, int64_t head) {
  forward_block(a, segment, begin, head);
}
void forward_f64(const Expanded<double>& a, Segment segment, int64_t begin, int64_t head) {
  forward_block(a, segment, begin, head);
}

}  // namespace latente::attention::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latente::attention {

HWY_EXPORT(forward_f32);
HWY_EXPORT(forward_f64);

void forward_task(const Expanded<float>& a, Segment segment, int64_t begin, int64_t head) {
  HWY_DYNAMIC_DISPATCH(forward_f32)(a, segment, begin, head);
}
void forward_task(const Expanded<double>& a, Segment segment, int64_t begin, int64_t head) {
  HWY_DYNAMIC_DISPATCH(forward_f64)(a, segment, begin, head);
}

}  // namespace latente::attention
#endif
