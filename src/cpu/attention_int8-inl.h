// Products of attention with int8 latents in whole numbers: queries and the weights of the softmax are
// rounded to 16 bits with a scale a row (and block), so that a product of 16 by 8 bits replaces one of
// floats, of which a vector holds half as many. Sums are exact whatever their order.
#if defined(LATENTE_ATTENTION_INT8_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef LATENTE_ATTENTION_INT8_INL_H
#undef LATENTE_ATTENTION_INT8_INL_H
#else
#define LATENTE_ATTENTION_INT8_INL_H
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <utility>

#include "cpu/attention_tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latente::attention::HWY_NAMESPACE {

// The largest code of a query such that no sum of `rank` products with codes of 8 bits overflows.
inline int32_t largest_query_code(int64_t rank) {
  return static_cast<int32_t>(std::min<int64_t>(32767, ((int64_t{1} << 31) - 1) / (127 * rank)));
}
inline constexpr float largest_weight_code = 32767;  // of a block of keys

#if HWY_TARGET != HWY_SCALAR
using Shorts = hn::Repartition<int16_t, Tag<float>>;
using Wides = hn::Repartition<int32_t, Tag<float>>;
inline constexpr int64_t shorts = 2 * lanes<float>();  // in a vector

// Sums of neighbours' products; targets may keep them in two parts until the end.
struct PairSums {
  hn::Vec<Wides> first, second;

  HWY_INLINE PairSums() : first(hn::Zero(Wides())), second(hn::Zero(Wides())) {}
  HWY_INLINE void add(hn::Vec<Shorts> a, hn::Vec<Shorts> b) {
    first = hn::ReorderWidenMulAccumulate(Wides(), a, b, first, second);
  }
  // Lane i: of the products 2i and 2i + 1.
  HWY_INLINE hn::Vec<Wides> totals() const { return hn::RearrangeToOddPlusEven(first, second); }
};

// Rows of codes lie with the vectors' quarters of 4 codes in such an order that interleaving two rows gives
// pairs in rising columns: place j of a vector's quarters holds quarter (j % 2) · half + j / 2.
HWY_INLINE hn::Vec<Shorts> load_ordered(const int8_t* codes) {
  const hn::Rebind<int8_t, Shorts> narrow;
  const auto bytes = hn::LoadU(narrow, codes);
  if constexpr (shorts <= 8) {
    return hn::PromoteTo(Shorts(), bytes);
  } else {
    const hn::Repartition<int32_t, decltype(narrow)> quarters;
    constexpr int64_t half = shorts / 8;
    HWY_ALIGN int32_t order[2 * half];
    for (int32_t j = 0; j < 2 * half; ++j) order[j] = j % 2 * static_cast<int32_t>(half) + j / 2;
    const auto moved =
        hn::TableLookupLanes(hn::BitCast(quarters, bytes), hn::SetTableIndices(quarters, order));
    return hn::PromoteTo(Shorts(), hn::BitCast(narrow, moved));
  }
}

// to = codes of a latent, in order, zeros up to whole vectors.
HWY_INLINE void widen_codes(const int8_t* from, int64_t rank, int16_t* to) {
  int64_t i = 0;
  for (; i + shorts <= rank; i += shorts) hn::Store(load_ordered(from + i), Shorts(), to + i);
  if (i < rank) {
    HWY_ALIGN int8_t rest[shorts] = {};
    std::memcpy(rest, from + i, static_cast<size_t>(rank - i));
    hn::Store(load_ordered(rest), Shorts(), to + i);
  }
}

// Codes of factor · from[0..rank), in order, zeros up to whole vectors. Returns their scale; NaN where a
// value is not finite.
HWY_INLINE float round_query(const float* from, int64_t rank, float factor, int16_t* to) {
  const Tag<float> d;
  constexpr int64_t L = lanes<float>();
  HWY_ALIGN float rest[shorts] = {};
  const int64_t whole = rank / shorts * shorts;
  std::copy_n(from + whole, rank - whole, rest);
  const auto scaled = [&](int64_t i) HWY_ATTR {
    return hn::Mul(hn::Set(d, factor), hn::LoadU(d, i < whole ? from + i : rest + (i - whole)));
  };
  auto extent = hn::Zero(d), nothing = hn::Zero(d);
  for (int64_t i = 0; i < round_up(rank, shorts); i += L) {
    extent = hn::Max(extent, hn::Abs(scaled(i)));
    nothing = hn::MulAdd(scaled(i), hn::Zero(d), nothing);  // NaN for NaN and infinities
  }
  const float largest = hn::GetLane(hn::MaxOfLanes(d, extent));
  const float poison = hn::GetLane(hn::SumOfLanes(d, nothing));
  const auto top = static_cast<float>(largest_query_code(rank));
  const auto inverse = hn::Set(d, largest > 1e-30f && !std::isnan(poison) ? top / largest : 0.0f);
  // Narrowing two vectors leaves their quarters in the order of load_ordered.
  for (int64_t i = 0; i < rank; i += shorts) {
    const auto low = hn::NearestInt(hn::Mul(scaled(i), inverse));
    const auto high = hn::NearestInt(hn::Mul(scaled(i + L), inverse));
    hn::Store(hn::ReorderDemote2To(Shorts(), low, high), Shorts(), to + i);
  }
  return largest / top + poison;
}

// scores[key, row] += query · key · their scales, for 4 rows and C keys.
template <int C>
void score_codes(int64_t width, const int16_t* HWY_RESTRICT queries, int64_t query_row,
                 const float* query_scale, const int16_t* HWY_RESTRICT keys, int64_t key_row,
                 const float* key_scale, float* scores, int64_t score_row) {
  const Shorts d;
  const Wides wide;
  PairSums sum[C][4];
  for (int64_t i = 0; i < width; i += shorts) {
    hn::Vec<Shorts> query[4];
    LATENTE_UNROLL
    for (int r = 0; r < 4; ++r) query[r] = hn::Load(d, queries + r * query_row + i);
    LATENTE_UNROLL
    for (int c = 0; c < C; ++c) {
      const auto key = hn::Load(d, keys + c * key_row + i);
      LATENTE_UNROLL
      for (int r = 0; r < 4; ++r) sum[c][r].add(key, query[r]);
    }
  }
  LATENTE_UNROLL
  for (int c = 0; c < C; ++c) {
    int32_t total[4];
    store_sums(wide, sum[c][0].totals(), sum[c][1].totals(), sum[c][2].totals(), sum[c][3].totals(), total);
    float* to = scores + c * score_row;
    LATENTE_UNROLL
    for (int r = 0; r < 4; ++r)
      to[r] = std::fma(static_cast<float>(total[r]), query_scale[r] * key_scale[c], to[r]);
  }
}

// The weights of `keys` (p[key, row], times the scale of each key's codes) as pairs of 16 bits: codes[key /
// 2, row], the second of an odd number's last pair zero. scale[row]: of the codes; NaN where a weight or the
// query's scale is.
HWY_INLINE void round_weights(const float* p, int64_t rows, int64_t keys, const float* key_scale,
                              const float* query_scale, int32_t* codes, float* scale) {
  const Tag<float> d;
  const Wides wide;
  for (int64_t i = 0; i < rows; i += lanes<float>()) {
    auto top = hn::Zero(d), poison = hn::Mul(hn::Load(d, query_scale + i), hn::Zero(d));
    const auto weight = [&](int64_t k) HWY_ATTR {
      return hn::Mul(hn::Load(d, p + k * rows + i), hn::Set(d, key_scale[k]));
    };
    for (int64_t k = 0; k < keys; ++k) {
      const auto w = weight(k);
      top = hn::Max(top, w);
      poison = hn::MulAdd(w, hn::Zero(d), poison);
    }
    const auto some = hn::Gt(top, hn::Set(d, 1e-30f));
    const auto inverse = hn::IfThenElseZero(some, hn::Div(hn::Set(d, largest_weight_code), top));
    hn::Store(hn::MulAdd(top, hn::Set(d, 1 / largest_weight_code), poison), d, scale + i);
    const auto code = [&](int64_t k) HWY_ATTR { return hn::NearestInt(hn::Mul(weight(k), inverse)); };
    for (int64_t k = 0; k < keys; k += 2) {
      const auto low = hn::And(code(k), hn::Set(wide, 0xffff));
      const auto high = k + 1 < keys ? hn::ShiftLeft<16>(code(k + 1)) : hn::Zero(wide);
      hn::Store(hn::Or(low, high), wide, codes + k / 2 * rows + i);
    }
  }
}

// out[M rows, a vector of codes' columns] = start + scale · weights · codes.
template <int M, Start start>
void value_codes(int64_t pairs, const int32_t* HWY_RESTRICT weights, int64_t weight_row,
                 const int16_t* HWY_RESTRICT codes, int64_t code_row, float* out, int64_t out_row,
                 bool both_halves, const float* scale, const float* factor) {
  const Tag<float> d;
  const Shorts narrow;
  const Wides wide;
  constexpr int64_t L = lanes<float>();
  PairSums sum[M][2];
  for (; pairs > 0; --pairs, codes += 2 * code_row, weights += weight_row) {
    const auto even = hn::Load(narrow, codes), odd = hn::Load(narrow, codes + code_row);
    const auto low = hn::InterleaveLower(narrow, even, odd), high = hn::InterleaveUpper(narrow, even, odd);
    LATENTE_UNROLL
    for (int i = 0; i < M; ++i) {
      const auto pair = hn::BitCast(narrow, hn::Set(wide, weights[i]));
      sum[i][0].add(low, pair);
      sum[i][1].add(high, pair);
    }
  }
  LATENTE_UNROLL
  for (int i = 0; i < M; ++i) {
    float* to = out + i * out_row;
    const auto of_row = hn::Set(d, scale[i]);
    const auto put = [&](hn::Vec<Wides> total, float* at) HWY_ATTR {
      const auto value = hn::ConvertTo(d, total);
      if constexpr (start == Start::zero) {
        hn::Store(hn::Mul(value, of_row), d, at);
      } else {
        hn::Store(hn::MulAdd(value, of_row, hn::Mul(hn::Load(d, at), hn::Set(d, factor[i]))), d, at);
      }
    };
    put(sum[i][0].totals(), to);
    if (both_halves) put(sum[i][1].totals(), to + L);
  }
}

#else
// The same in plain loops.
inline constexpr int64_t shorts = 1;

inline void widen_codes(const int8_t* from, int64_t rank, int16_t* to) { std::copy_n(from, rank, to); }

inline float round_query(const float* from, int64_t rank, float factor, int16_t* to) {
  float largest = 0, poison = 0;
  for (int64_t i = 0; i < rank; ++i) {
    largest = std::max(largest, std::abs(factor * from[i]));
    poison += 0 * from[i];
  }
  const auto top = static_cast<float>(largest_query_code(rank));
  const float inverse = largest > 1e-30f && !std::isnan(poison) ? top / largest : 0.0f;
  for (int64_t i = 0; i < rank; ++i)
    to[i] = inverse > 0 ? static_cast<int16_t>(std::lrint(factor * from[i] * inverse)) : int16_t{0};
  return largest / top + poison;
}

template <int C>
void score_codes(int64_t width, const int16_t* queries, int64_t query_row, const float* query_scale,
                 const int16_t* keys, int64_t key_row, const float* key_scale, float* scores,
                 int64_t score_row) {
  for (int c = 0; c < C; ++c) {
    for (int r = 0; r < 4; ++r) {
      int32_t sum = 0;
      for (int64_t i = 0; i < width; ++i) sum += queries[r * query_row + i] * keys[c * key_row + i];
      scores[c * score_row + r] += static_cast<float>(sum) * (query_scale[r] * key_scale[c]);
    }
  }
}

inline void round_weights(const float* p, int64_t rows, int64_t keys, const float* key_scale,
                          const float* query_scale, int32_t* codes, float* scale) {
  for (int64_t i = 0; i < rows; ++i) {
    const auto weight = [&](int64_t k) { return k < keys ? p[k * rows + i] * key_scale[k] : 0.0f; };
    float top = 0, poison = 0 * query_scale[i];
    for (int64_t k = 0; k < keys; ++k) top = std::max(top, weight(k)), poison += 0 * weight(k);
    const float inverse = top > 1e-30f && !std::isnan(poison) ? largest_weight_code / top : 0.0f;
    const auto code = [&](int64_t k) {
      return inverse > 0 ? static_cast<int32_t>(std::lrint(weight(k) * inverse)) : 0;
    };
    for (int64_t k = 0; k < keys; k += 2)
      codes[k / 2 * rows + i] = code(k) | static_cast<int32_t>(static_cast<uint32_t>(code(k + 1)) << 16);
    scale[i] = top / largest_weight_code + poison;
  }
}

template <int M, Start start>
void value_codes(int64_t pairs, const int32_t* weights, int64_t weight_row, const int16_t* codes,
                 int64_t code_row, float* out, int64_t out_row, bool, const float* scale,
                 const float* factor) {
  for (int i = 0; i < M; ++i) {
    int32_t sum = 0;
    for (int64_t p = 0; p < pairs; ++p) {
      const int32_t pair = weights[p * weight_row + i];
      sum += codes[2 * p * code_row] * (pair & 0xffff) + codes[(2 * p + 1) * code_row] * (pair >> 16);
    }
    float& to = out[i * out_row];
    to = static_cast<float>(sum) * scale[i] + (start == Start::zero ? 0.0f : to * factor[i]);
  }
}
#endif

template <Start start, int... M>
constexpr auto value_table(std::integer_sequence<int, M...>) {
  return std::array{&value_codes<M + 1, start>...};
}

}  // namespace latente::attention::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
