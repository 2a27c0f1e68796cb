#include "cpu/cpu_backend.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/rope.cpp"
#include "hwy/foreach_target.h"  // must precede highway.h

#include "cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latente::HWY_NAMESPACE {

// Neighbours (x[2i], x[2i + 1]) as two vectors.
template <class T>
HWY_INLINE void load_pairs(const T* from, Whole, Vec<T>& even, Vec<T>& odd) {
  hn::LoadInterleaved2(Tag<T>(), from, even, odd);
}
template <class T>
HWY_INLINE void load_pairs(const T* from, Part part, Vec<T>& even, Vec<T>& odd) {
  T whole[2 * hn::MaxLanes(Tag<T>())] = {};
  std::memcpy(whole, from, static_cast<size_t>(2 * part.count) * sizeof(T));
  load_pairs(whole, Whole(), even, odd);
}
template <class T>
HWY_INLINE void store_pairs(Vec<T> even, Vec<T> odd, T* to, Whole) {
  hn::StoreInterleaved2(even, odd, Tag<T>(), to);
}
template <class T>
HWY_INLINE void store_pairs(Vec<T> even, Vec<T> odd, T* to, Part part) {
  T whole[2 * hn::MaxLanes(Tag<T>())];
  store_pairs(even, odd, whole, Whole());
  std::memcpy(to, whole, static_cast<size_t>(2 * part.count) * sizeof(T));
}

template <class T, bool interleaved>
HWY_INLINE void rotate_row(T* x, const T* cosine, const T* sine, int64_t half) {
  for_vectors<T>(half, [&](int64_t i, auto width) LATENTE_VECTOR {
    const Vec<T> c = load(cosine + i, width), s = load(sine + i, width);
    Vec<T> a, b;
    if constexpr (interleaved) {
      load_pairs(x + 2 * i, width, a, b);
    } else {
      a = load(x + i, width), b = load(x + half + i, width);
    }
    const Vec<T> to_a = hn::NegMulAdd(b, s, hn::Mul(a, c)), to_b = hn::MulAdd(a, s, hn::Mul(b, c));
    if constexpr (interleaved) {
      store_pairs(to_a, to_b, x + 2 * i, width);
    } else {
      store(to_a, x + i, width), store(to_b, x + half + i, width);
    }
  });
}

template <class T>
HWY_INLINE void rope_rows(const View& x, const View& positions, const View& table, bool interleaved,
                          bool inverse, int64_t begin, int64_t end) {
  const int64_t half = x[2] / 2;
  struct Angles;
  T* angles = reused_memory<Angles, T>(2 * half);  // the table's row as T with the sines' sign
  for (int64_t t = begin; t < end; ++t) {
    const float* row = table.as<float>() + positions.as<int32_t>()[t] * table.stride(0);
    for (int64_t i = 0; i < half; ++i) angles[i] = static_cast<T>(row[i]);
    const T sign = inverse ? T{-1} : T{1};
    for (int64_t i = half; i < 2 * half; ++i) angles[i] = sign * static_cast<T>(row[i]);
    T* at = x.as<T>() + t * x.stride(0);
    for (int64_t h = 0; h < x[1]; ++h, at += x.stride(1)) {
      if (interleaved) {
        rotate_row<T, true>(at, angles, angles + half, half);
      } else {
        rotate_row<T, false>(at, angles, angles + half, half);
      }
    }
  }
}

void rotate_rows(const View& x, const View& positions, const View& table, bool interleaved, bool inverse,
                 int64_t begin, int64_t end) {
  with_type(x.dtype, [&]<class T>(T) LATENTE_VECTOR {
    rope_rows<T>(x, positions, table, interleaved, inverse, begin, end);
  });
}

}  // namespace latente::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latente {

HWY_EXPORT(rotate_rows);

void CpuBackend::rope(View x, View positions, View table, bool interleaved, bool inverse) {
  LATENTE_ASSERT(x.shape.rank() == 3 && x[2] == table[1] && x[2] % 2 == 0 && positions.count() == x[0] &&
                 positions.contiguous());
  const int32_t* position = positions.as<int32_t>();
  bool inside = true;
  for (int64_t t = 0; t < x[0]; ++t) inside = inside & (position[t] >= 0) & (position[t] < table[0]);
  LATENTE_ASSERT(inside);
  for_rows(pool_, x[0], x[1] * x[2], [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(rotate_rows)(x, positions, table, interleaved, inverse, begin, end);
  });
}

}  // namespace latente
#endif
