// Vector loops over rows, compiled once for each instruction set. What becomes of an element depends neither
// on its place in the row nor on whether a vector is whole.
#if defined(LATENTE_ROWS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef LATENTE_ROWS_INL_H
#undef LATENTE_ROWS_INL_H
#else
#define LATENTE_ROWS_INL_H
#endif

#include <cstring>

#include "cpu/rows.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "tensor/dtype.h"

// For lambdas that handle vectors.
#ifndef LATENTE_VECTOR
#define LATENTE_VECTOR HWY_ATTR __attribute__((always_inline))
#endif

HWY_BEFORE_NAMESPACE();
namespace latente::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

template <class T>
using Tag = hn::ScalableTag<T>;
template <class T>
using Vec = hn::Vec<Tag<T>>;

// How much of a vector a step covers: all of it, or `count` elements.
struct Whole {};
struct Part {
  int64_t count;
};

template <class T>
HWY_INLINE Vec<T> load(const T* from, Whole) {
  return hn::LoadU(Tag<T>(), from);
}

HWY_INLINE Vec<float> load(const bf16* from, Whole) {
  const hn::Rebind<uint16_t, Tag<float>> narrow;
  const hn::RebindToUnsigned<Tag<float>> wide;
  const auto bits = hn::LoadU(narrow, reinterpret_cast<const uint16_t*>(from));
  return hn::BitCast(Tag<float>(), hn::ShiftLeft<16>(hn::PromoteTo(wide, bits)));
}

// What lies beyond is zero.
template <class T>
HWY_INLINE auto load(const T* from, Part part) {
  T whole[hn::MaxLanes(Tag<T>())] = {};
  std::memcpy(whole, from, static_cast<size_t>(part.count) * sizeof(T));
  return load(whole, Whole());
}

template <class T>
HWY_INLINE void store(Vec<T> v, T* to, Whole) {
  hn::StoreU(v, Tag<T>(), to);
}

template <class T>
HWY_INLINE void store(Vec<T> v, T* to, Part part) {
  T whole[hn::MaxLanes(Tag<T>())];
  hn::StoreU(v, Tag<T>(), whole);
  std::memcpy(to, whole, static_cast<size_t>(part.count) * sizeof(T));
}

// to (+)= v
template <bool accumulate, class T, class Width>
HWY_INLINE void put(Vec<T> v, T* to, Width width) {
  if constexpr (accumulate) v = hn::Add(load(to, width), v);
  store(v, to, width);
}

// body(T{}): rows of float64 are computed in double, all others in float.
template <class Body>
HWY_INLINE void with_type(DType type, const Body& body) {
  if (type == DType::f64) {
    body(double{});
  } else {
    body(float{});
  }
}

// body(T{}, W{}): the same, with weights as they are stored.
template <class Body>
HWY_INLINE void with_types(DType type, DType weight, const Body& body) {
  if (type == DType::f64) {
    body(double{}, double{});
  } else if (weight == DType::bf16) {
    body(float{}, bf16{});
  } else {
    body(float{}, float{});
  }
}

// body(i, width) for vectors that begin at element i.
template <class T, class Body>
HWY_INLINE void for_vectors(int64_t n, const Body& body) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(Tag<T>()));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) body(i, Whole());
  if (i < n) body(i, Part{n - i});
}

// to (+)= value(i, width)
template <class T, class Value>
HWY_INLINE void put_row(T* to, bool accumulate, int64_t n, const Value& value) {
  if (accumulate) {
    for_vectors<T>(n,
                   [&](int64_t i, auto width) LATENTE_VECTOR { put<true>(value(i, width), to + i, width); });
  } else {
    for_vectors<T>(n,
                   [&](int64_t i, auto width) LATENTE_VECTOR { put<false>(value(i, width), to + i, width); });
  }
}

// The sum that add(sum, i, width) builds, in four chains whose order depends on n alone. Elements beyond a
// part are zero and must add nothing.
template <class T, class Add>
HWY_INLINE T sum_vectors(int64_t n, const Add& add) {
  const Tag<T> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  Vec<T> a = hn::Zero(d), b = a, c = a, e = a;
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    a = add(a, i, Whole());
    b = add(b, i + lanes, Whole());
    c = add(c, i + 2 * lanes, Whole());
    e = add(e, i + 3 * lanes, Whole());
  }
  for (; i + lanes <= n; i += lanes) a = add(a, i, Whole());
  if (i < n) b = add(b, i, Part{n - i});
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(a, b), hn::Add(c, e))));
}

template <class T>
HWY_INLINE T dot(const T* x, const T* y, int64_t n) {
  return sum_vectors<T>(n, [&](Vec<T> sum, int64_t i, auto width) LATENTE_VECTOR {
    return hn::MulAdd(load(x + i, width), load(y + i, width), sum);
  });
}

// e^x for x up to 80; NaN stays NaN.
template <class T>
HWY_INLINE Vec<T> exp(Vec<T> x) {
  const Tag<T> d;
  return hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(d, hn::Min(x, hn::Set(d, T{80}))));
}

template <class T>
HWY_INLINE Vec<T> sigmoid(Vec<T> x) {
  const auto one = hn::Set(Tag<T>(), T{1});
  return hn::Div(one, hn::Add(one, exp<T>(hn::Neg(x))));
}

}  // namespace latente::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
