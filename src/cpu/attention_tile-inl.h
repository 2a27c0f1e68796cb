// Vector building blocks of attention, compiled once for each instruction set.
#if defined(LATENTE_ATTENTION_TILE_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef LATENTE_ATTENTION_TILE_INL_H
#undef LATENTE_ATTENTION_TILE_INL_H
#else
#define LATENTE_ATTENTION_TILE_INL_H
#endif

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/attention_kernels.h"
#include "cpu/unroll.h"
#include "hwy/cache_control.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace latente::attention::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

template <class T>
using Tag = hn::ScalableTag<T>;
template <class T>
constexpr int64_t lanes() {
  return static_cast<int64_t>(hn::MaxLanes(Tag<T>()));
}

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// What a product starts from: nothing, what stands in c, or that times a factor of its row.
enum class Start { zero, load, scale };

// c[m, n] = start + sum over k of a(m, k) · b[k, n]. Element (m, k) of a stands at a[m * a_row + k * a_step],
// one of which is 1. n is a multiple of the vector length; c is aligned to it. Each element of c is one chain
// of fused multiply-adds in rising k, whatever the tile it falls into. a and b may be bfloat16.
template <class T, class A = T, class B = T>
struct Product {
  int64_t m, n;
  const A* a;
  int64_t a_row, a_step;
  const B* b;
  int64_t b_step;
  T* c;
  int64_t c_row;
  const T* factor = nullptr;
};

struct Range {
  int64_t begin, end;
};

// Nothing to bring into the caches while a tile is computed.
struct NoFetch {
  HWY_INLINE void step() {}
};

template <class D>
HWY_INLINE hn::Vec<D> load_wide(D d, const hn::TFromD<D>* from) {
  return hn::LoadU(d, from);
}
template <class D>
HWY_INLINE hn::Vec<D> load_wide(D d, const bf16* from) {
  const hn::Rebind<uint16_t, D> narrow;
  const hn::RebindToUnsigned<D> wide;
  const auto bits = hn::LoadU(narrow, reinterpret_cast<const uint16_t*>(from));
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(wide, bits)));
}

template <int M, int N, Start start, bool unit_rows, class T, class A, class B, class Ahead>
void tile(int64_t k, const A* HWY_RESTRICT a, int64_t a_stride, const B* HWY_RESTRICT b, int64_t b_step,
          T* HWY_RESTRICT c, int64_t c_row, const T* HWY_RESTRICT factor, Ahead& ahead) {
  const Tag<T> d;
  using V = hn::Vec<Tag<T>>;
  constexpr int64_t L = lanes<T>();
  V sum[M][N];
  LATENTE_UNROLL
  for (int i = 0; i < M; ++i) {
    LATENTE_UNROLL
    for (int j = 0; j < N; ++j) {
      if constexpr (start == Start::zero) {
        sum[i][j] = hn::Zero(d);
      } else {
        sum[i][j] = hn::Load(d, c + i * c_row + j * L);
        if constexpr (start == Start::scale) sum[i][j] = hn::Mul(sum[i][j], hn::Set(d, factor[i]));
      }
    }
  }
  // Every third row has a pointer of its own, the others are at one or two strides from it.
  const auto row_of = [&](int i) HWY_ATTR {
    return unit_rows ? a + i : a + i / 3 * 3 * a_stride + i % 3 * a_stride;
  };
  const auto advance = [&](int64_t steps)
                           HWY_ATTR { a += steps * (unit_rows ? a_stride : 1), b += steps * b_step; };
  const auto step = [&]() HWY_ATTR {
    V column[N];
    LATENTE_UNROLL
    for (int j = 0; j < N; ++j) column[j] = load_wide(d, b + j * L);
    LATENTE_UNROLL
    for (int i = 0; i < M; ++i) {
      const V element = hn::Set(d, static_cast<T>(*row_of(i)));
      LATENTE_UNROLL
      for (int j = 0; j < N; ++j) sum[i][j] = hn::MulAdd(element, column[j], sum[i][j]);
    }
    advance(1);
  };
  // Of bfloat16 two steps' elements are in one word, which is spread once.
  const auto two_steps = [&]() HWY_ATTR {
    if constexpr (std::is_same_v<A, bf16> && !unit_rows) {
      const hn::RebindToUnsigned<Tag<T>> du;
      V column[2][N];
      LATENTE_UNROLL
      for (int j = 0; j < N; ++j) {
        column[0][j] = load_wide(d, b + j * L);
        column[1][j] = load_wide(d, b + b_step + j * L);
      }
      const auto upper = hn::Set(du, 0xffff0000u);
      LATENTE_UNROLL
      for (int i = 0; i < M; ++i) {
        uint32_t word;
        std::memcpy(&word, row_of(i), sizeof word);
        const auto both = hn::Set(du, word);
        const V first = hn::BitCast(d, hn::ShiftLeft<16>(both)),
                second = hn::BitCast(d, hn::And(both, upper));
        LATENTE_UNROLL
        for (int j = 0; j < N; ++j) sum[i][j] = hn::MulAdd(first, column[0][j], sum[i][j]);
        LATENTE_UNROLL
        for (int j = 0; j < N; ++j) sum[i][j] = hn::MulAdd(second, column[1][j], sum[i][j]);
      }
      advance(2);
    } else {
      step(), step();
    }
  };
  Ahead next = ahead;  // in registers
  if constexpr (!std::is_same_v<Ahead, NoFetch>) {
    for (; k >= 4; k -= 4) {
      next.step();
      two_steps(), two_steps();
    }
  }
  for (; k > 0; --k) step();
  ahead = next;
  LATENTE_UNROLL
  for (int i = 0; i < M; ++i) {
    LATENTE_UNROLL
    for (int j = 0; j < N; ++j) hn::Store(sum[i][j], d, c + i * c_row + j * L);
  }
}

// Rows of a tile: as many sums as the registers hold, or fill the pipeline.
#if HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM
inline constexpr int wide_rows = 12, narrow_rows = 12;
#else
inline constexpr int wide_rows = 6, narrow_rows = 12;
#endif

template <class T, class A, class B, class Ahead>
using TileFunction = void (*)(int64_t, const A*, int64_t, const B*, int64_t, T*, int64_t, const T*, Ahead&);

template <int N, Start start, bool unit_rows, class T, class A, class B, class Ahead, int... M>
constexpr std::array<TileFunction<T, A, B, Ahead>, sizeof...(M)> tile_table(
    std::integer_sequence<int, M...>) {
  return {&tile<M + 1, N, start, unit_rows, T, A, B, Ahead>...};
}

// range(m0, m1, n0, n1) gives the k for which rows [m0, m1) of a and columns [n0, n1) of b need to meet; an
// empty one leaves that part of c as it is. Elements of a outside the range must be zeros, or the part of c
// unused. ahead.step() is called every four k.
template <Start start, bool unit_rows, class T, class A, class B, class RangeOf, class Ahead>
HWY_INLINE void multiply(const Product<T, A, B>& p, const RangeOf& range, Ahead& ahead) {
  constexpr int64_t L = lanes<T>();
  static constexpr auto wide =
      tile_table<2, start, unit_rows, T, A, B, Ahead>(std::make_integer_sequence<int, wide_rows>());
  static constexpr auto narrow =
      tile_table<1, start, unit_rows, T, A, B, Ahead>(std::make_integer_sequence<int, narrow_rows>());
  const int64_t a_k = unit_rows ? p.a_step : 1, a_m = unit_rows ? 1 : p.a_row;
  for (int64_t n = 0; n < p.n;) {
    const bool pair = p.n - n >= 2 * L;
    const int64_t width = pair ? 2 * L : L, rows = pair ? wide_rows : narrow_rows;
    const int64_t tiles = (p.m + rows - 1) / rows;
    for (int64_t i = 0, m = 0; i < tiles; ++i) {
      const int64_t height = (p.m - m + tiles - i - 1) / (tiles - i);
      const Range k = range(m, m + height, n, n + width);
      if (k.begin < k.end) {
        (pair ? wide[static_cast<size_t>(height - 1)] : narrow[static_cast<size_t>(height - 1)])(
            k.end - k.begin, p.a + m * a_m + k.begin * a_k, unit_rows ? p.a_step : p.a_row,
            p.b + k.begin * p.b_step + n, p.b_step, p.c + m * p.c_row + n, p.c_row,
            start == Start::scale ? p.factor + m : nullptr, ahead);
      }
      m += height;
    }
    n += width;
  }
}

template <Start start, bool unit_rows, class T, class RangeOf>
HWY_INLINE void multiply(const Product<T>& p, const RangeOf& range) {
  NoFetch nothing;
  multiply<start, unit_rows>(p, range, nothing);
}

// 2^x; exactly 1 at 0, and 0 below the smallest normal number.
template <class V>
HWY_INLINE V exp2(Tag<float> d, V x) {
  const hn::RebindToUnsigned<Tag<float>> du;
  const auto magic = hn::Set(d, 12582912.0f);  // 1.5·2^23: adding it rounds to an integer
  const auto clamped = hn::Max(x, hn::Set(d, -127.0f));
  const auto shifted = hn::Add(clamped, magic);
  const auto f = hn::Sub(clamped, hn::Sub(shifted, magic));
  // Chebyshev-like fit of (2^f - 1) / f on [-1/2, 1/2]; relative error of 2^f 2e-9.
  auto y = hn::Set(d, 1.5353362e-4f);
  y = hn::MulAdd(y, f, hn::Set(d, 1.3398875e-3f));
  y = hn::MulAdd(y, f, hn::Set(d, 9.6184369e-3f));
  y = hn::MulAdd(y, f, hn::Set(d, 5.5503324e-2f));
  y = hn::MulAdd(y, f, hn::Set(d, 2.4022648e-1f));
  y = hn::MulAdd(y, f, hn::Set(d, 6.9314718e-1f));
  y = hn::MulAdd(y, f, hn::Set(d, 1.0f));
  const auto bits = hn::Add(hn::BitCast(du, y), hn::ShiftLeft<23>(hn::BitCast(du, shifted)));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -126.0f)), hn::BitCast(d, bits));
}

template <class V>
HWY_INLINE V exp2(Tag<double> d, V x) {
  return hn::Exp(d, hn::Mul(hn::Max(x, hn::Set(d, -1e6)), hn::Set(d, 0.69314718055994530942)));
}

#if HWY_TARGET != HWY_SCALAR
// A vector of 128-bit pieces, `stride` elements apart.
template <class D>
HWY_INLINE hn::Vec<D> load_pieces(D d, const float* from, int64_t stride) {
  if constexpr (hn::MaxLanes(d) <= 4) {
    return hn::LoadU(d, from);
  } else {
    const hn::Half<D> half;
    constexpr int64_t pieces = hn::MaxLanes(half) / 4;
    return hn::Combine(d, load_pieces(half, from + pieces * stride, stride), load_pieces(half, from, stride));
  }
}

// to[0..3] = the sum of v's 128-bit pieces.
template <class D, class V>
HWY_INLINE void add_pieces(D d, V v, hn::TFromD<D>* to) {
  if constexpr (hn::MaxLanes(d) <= 4) {
    hn::StoreU(v, d, to);
  } else {
    const hn::Half<D> half;
    add_pieces(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)), to);
  }
}

// Sums of the lanes of four vectors of 32-bit numbers, to[0..3].
template <class D, class V>
HWY_INLINE void store_sums(D d, V a, V b, V c, V e, hn::TFromD<D>* to) {
  // Each 128-bit piece: partial sums of a, b, c, e.
  const auto ac = hn::Add(hn::InterleaveLower(d, a, c), hn::InterleaveUpper(d, a, c));
  const auto be = hn::Add(hn::InterleaveLower(d, b, e), hn::InterleaveUpper(d, b, e));
  add_pieces(d, hn::Add(hn::InterleaveLower(d, ac, be), hn::InterleaveUpper(d, ac, be)), to);
}

// to[c * to_row + r] = factor · from[r * from_row + c] for r < rows and c < columns, both multiples: of the
// vector length, and of 4.
HWY_INLINE void transpose_whole(const float* from, int64_t from_row, int64_t rows, int64_t columns,
                                float factor, float* to, int64_t to_row) {
  const Tag<float> d;
  const auto scale = hn::Set(d, factor);
  for (int64_t r = 0; r < rows; r += lanes<float>()) {
    for (int64_t c = 0; c < columns; c += 4) {
      // Piece b of row i holds row r + 4b + i: each 128-bit lane transposes four rows of its own.
      const float* corner = from + r * from_row + c;
      const auto row0 = load_pieces(d, corner, 4 * from_row);
      const auto row1 = load_pieces(d, corner + from_row, 4 * from_row);
      const auto row2 = load_pieces(d, corner + 2 * from_row, 4 * from_row);
      const auto row3 = load_pieces(d, corner + 3 * from_row, 4 * from_row);
      const auto even_low = hn::InterleaveLower(d, row0, row2), odd_low = hn::InterleaveLower(d, row1, row3);
      const auto even_high = hn::InterleaveUpper(d, row0, row2),
                 odd_high = hn::InterleaveUpper(d, row1, row3);
      float* out = to + c * to_row + r;
      hn::StoreU(hn::Mul(scale, hn::InterleaveLower(d, even_low, odd_low)), d, out);
      hn::StoreU(hn::Mul(scale, hn::InterleaveUpper(d, even_low, odd_low)), d, out + to_row);
      hn::StoreU(hn::Mul(scale, hn::InterleaveLower(d, even_high, odd_high)), d, out + 2 * to_row);
      hn::StoreU(hn::Mul(scale, hn::InterleaveUpper(d, even_high, odd_high)), d, out + 3 * to_row);
    }
  }
}
#endif

// to[c * to_row + r] = factor · from[r * from_row + c]; r from rows up to `padded_rows` is set to zero.
template <class T>
HWY_INLINE void transpose(const T* from, int64_t from_row, int64_t rows, int64_t columns, T factor, T* to,
                          int64_t to_row, int64_t padded_rows) {
  int64_t whole_rows = 0, whole_columns = 0;
#if HWY_TARGET != HWY_SCALAR
  if constexpr (sizeof(T) == sizeof(float)) {
    whole_rows = rows / lanes<T>() * lanes<T>();
    whole_columns = columns / 4 * 4;
    transpose_whole(from, from_row, whole_rows, whole_columns, factor, to, to_row);
  }
#endif
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t first = r < whole_rows ? whole_columns : 0;
    for (int64_t c = first; c < columns; ++c) to[c * to_row + r] = factor * from[r * from_row + c];
  }
  for (int64_t c = 0; c < columns; ++c)
    std::fill(to + c * to_row + rows, to + c * to_row + padded_rows, T{0});
}

template <class S>
HWY_INLINE void prefetch_row(const S* row, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(S))) hwy::Prefetch(row + i);
}

// Rows that will be read soon, brought into the cache bit by bit while something else is computed.
template <class T>
class Prefetch {
 public:
  void add(const Rows<const T>& rows, int64_t token, int64_t head, int64_t width, int64_t count) {
    if (count > 0) streams_[count_++] = {rows.at(token, head), rows.token, width, count};
  }
  void clear() { next_ = count_ = 0; }
  // Fetches one row; false if there is none left.
  bool step() {
    if (next_ == count_) return false;
    Stream& s = streams_[next_];
    prefetch_row(s.row, s.width);
    s.row += s.stride;
    if (--s.rows == 0) ++next_;
    return true;
  }

 private:
  struct Stream {
    const T* row;
    int64_t stride, width, rows;
  };
  std::array<Stream, 4> streams_;
  size_t next_ = 0, count_ = 0;
};

template <class T>
HWY_INLINE void copy_row(const T* from, int64_t count, T* to) {
  const Tag<T> d;
  constexpr int64_t L = lanes<T>();
  int64_t i = 0;
  for (; i + L <= count; i += L) hn::StoreU(hn::LoadU(d, from + i), d, to + i);
  for (; i < count; ++i) to[i] = from[i];
}

HWY_INLINE void copy_row(const bf16* from, int64_t count, float* to) {
  const Tag<float> d;
  constexpr int64_t L = lanes<float>();
  int64_t i = 0;
  for (; i + L <= count; i += L) hn::StoreU(load_wide(d, from + i), d, to + i);
  for (; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

// The same, followed by zeros up to `row` elements.
template <class S, class T>
HWY_INLINE void load_row(const S* from, int64_t count, T* to, int64_t row) {
  copy_row(from, count, to);
  for (int64_t i = count; i < row; ++i) to[i] = T{0};
}

// Lowest maximum: finite, so that differences of maxima are never NaN.
template <class T>
constexpr T lowest() {
  return static_cast<T>(-3e38);
}

// Online softmax of a block of scores [key, query] in base 2, a vector of queries: takes maximum and sum so
// far, leaves the new ones, the factor that brings older results to the new maximum, and in s the
// probabilities relative to it. A query admits the keys [first, last] (indices within the block; masked
// only). Keys from `live` up to `keys` are beyond every query of the vector.
template <bool masked, class T>
HWY_INLINE void softmax_column(T* s, int64_t s_row, int64_t live, int64_t keys, const T* first, const T* last,
                               T* maximum, T* sum, T* factor) {
  const Tag<T> d;
  const auto before = hn::Load(d, maximum);
  auto top = before;
  if constexpr (masked) {
    const auto low = hn::Load(d, first), high = hn::Load(d, last);
    const auto never = hn::Set(d, -std::numeric_limits<T>::infinity());
    for (int64_t k = 0; k < live; ++k) {
      const auto key = hn::Set(d, static_cast<T>(k));
      const auto admitted = hn::And(hn::Ge(key, low), hn::Le(key, high));
      const auto score = hn::IfThenElse(admitted, hn::Load(d, s + k * s_row), never);
      hn::Store(score, d, s + k * s_row);
      top = hn::Max(top, score);
    }
  } else {
    for (int64_t k = 0; k < live; ++k) top = hn::Max(top, hn::Load(d, s + k * s_row));
  }
  auto total = hn::Zero(d);
  for (int64_t k = 0; k < live; ++k) {
    const auto p = exp2(d, hn::Sub(hn::Load(d, s + k * s_row), top));
    hn::Store(p, d, s + k * s_row);
    total = hn::Add(total, p);
  }
  for (int64_t k = live; k < keys; ++k) hn::Store(hn::Zero(d), d, s + k * s_row);
  const auto correction = exp2(d, hn::Sub(before, top));
  hn::Store(top, d, maximum);
  hn::Store(correction, d, factor);
  hn::Store(hn::MulAdd(hn::Load(d, sum), correction, total), d, sum);
}

}  // namespace latente::attention::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
