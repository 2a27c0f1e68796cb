#include <cstring>

#include "cpu/cpu_backend.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/elementwise.cpp"
#include "hwy/foreach_target.h"  // must precede highway.h

#include "cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latente::HWY_NAMESPACE {

template <class T>
HWY_INLINE void add_row(const T* a, const T* b, T* out, int64_t n) {
  for_vectors<T>(n, [&](int64_t i, auto width) LATENTE_VECTOR {
    store(hn::Add(load(a + i, width), load(b + i, width)), out + i, width);
  });
}

template <class T>
HWY_INLINE void swiglu_row(const T* gate, const T* up, T* out, int64_t n) {
  for_vectors<T>(n, [&](int64_t i, auto width) LATENTE_VECTOR {
    const Vec<T> g = load(gate + i, width);
    store(hn::Mul(hn::Mul(g, sigmoid<T>(g)), load(up + i, width)), out + i, width);
  });
}

// silu'(g) = s + g s (1 - s) with s = sigmoid(g)
template <class T, bool add_gate, bool add_up>
HWY_INLINE void swiglu_backward_row(const T* d_out, const T* gate, const T* up, T* d_gate, T* d_up,
                                    int64_t n) {
  for_vectors<T>(n, [&](int64_t i, auto width) LATENTE_VECTOR {
    const Vec<T> d = load(d_out + i, width), g = load(gate + i, width), u = load(up + i, width);
    const Vec<T> s = sigmoid<T>(g), silu = hn::Mul(g, s);
    const Vec<T> slope = hn::MulAdd(silu, hn::Sub(hn::Set(Tag<T>(), T{1}), s), s);
    if (d_gate) put<add_gate>(hn::Mul(hn::Mul(d, u), slope), d_gate + i, width);
    if (d_up) put<add_up>(hn::Mul(d, silu), d_up + i, width);
  });
}

template <class T>
HWY_INLINE void swiglu_backward_any(const T* d_out, const T* gate, const T* up, T* d_gate, bool add_gate,
                                    T* d_up, bool add_up, int64_t n) {
  auto row = add_gate ? (add_up ? swiglu_backward_row<T, true, true> : swiglu_backward_row<T, true, false>)
                      : (add_up ? swiglu_backward_row<T, false, true> : swiglu_backward_row<T, false, false>);
  row(d_out, gate, up, d_gate, d_up, n);
}

void add_f32(const float* a, const float* b, float* out, int64_t n) { add_row(a, b, out, n); }
void add_f64(const double* a, const double* b, double* out, int64_t n) { add_row(a, b, out, n); }
void swiglu_f32(const float* gate, const float* up, float* out, int64_t n) { swiglu_row(gate, up, out, n); }
void swiglu_f64(const double* gate, const double* up, double* out, int64_t n) {
  swiglu_row(gate, up, out, n);
}
void swiglu_backward_f32(const float* d_out, const float* gate, const float* up, float* d_gate, bool add_gate,
                         float* d_up, bool add_up, int64_t n) {
  swiglu_backward_any(d_out, gate, up, d_gate, add_gate, d_up, add_up, n);
}
void swiglu_backward_f64(const double* d_out, const double* gate, const double* up, double* d_gate,
                         bool add_gate, double* d_up, bool add_up, int64_t n) {
  swiglu_backward_any(d_out, gate, up, d_gate, add_gate, d_up, add_up, n);
}

}  // namespace latente::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latente {
namespace {

HWY_EXPORT(add_f32);
HWY_EXPORT(add_f64);
HWY_EXPORT(swiglu_f32);
HWY_EXPORT(swiglu_f64);
HWY_EXPORT(swiglu_backward_f32);
HWY_EXPORT(swiglu_backward_f64);

void add_elements(const float* a, const float* b, float* out, int64_t n) {
  HWY_DYNAMIC_DISPATCH(add_f32)(a, b, out, n);
}
void add_elements(const double* a, const double* b, double* out, int64_t n) {
  HWY_DYNAMIC_DISPATCH(add_f64)(a, b, out, n);
}

template <class Bits>
void fill_with(ThreadPool& pool, const View& x, Bits bits) {
  for_pieces(pool, split_rows({x}), 2 * piece_elements, [&](int64_t row, int64_t begin, int64_t end) {
    Bits* to = static_cast<Bits*>(x.data) + row_offset(x, row);
    std::fill(to + begin, to + end, bits);
  });
}

template <class T>
void add_views(ThreadPool& pool, const View& a, const View& b, const View& out) {
  for_pieces(pool, split_rows({a, b, out}), piece_elements, [&](int64_t row, int64_t begin, int64_t end) {
    add_elements(row_of<T>(a, row) + begin, row_of<T>(b, row) + begin, row_of<T>(out, row) + begin,
                 end - begin);
  });
}

template <class T, class Kernel>
void swiglu_views(ThreadPool& pool, Kernel kernel, const View& gate, const View& up, const View& out) {
  for_pieces(pool, split_rows({gate, up, out}), piece_elements / 2,
             [&](int64_t row, int64_t begin, int64_t end) {
               kernel(row_of<T>(gate, row) + begin, row_of<T>(up, row) + begin, row_of<T>(out, row) + begin,
                      end - begin);
             });
}

template <class T, class Kernel>
void swiglu_backward_views(ThreadPool& pool, Kernel kernel, const View& d_out, const View& gate,
                           const View& up, const Grad& d_gate, const Grad& d_up) {
  const View& as_gate = d_gate ? d_gate.view : gate;
  const View& as_up = d_up ? d_up.view : up;
  for_pieces(pool, split_rows({d_out, gate, up, as_gate, as_up}), piece_elements / 2,
             [&](int64_t row, int64_t begin, int64_t end) {
               T* to_gate = d_gate ? row_of<T>(d_gate.view, row) + begin : nullptr;
               T* to_up = d_up ? row_of<T>(d_up.view, row) + begin : nullptr;
               kernel(row_of<T>(d_out, row) + begin, row_of<T>(gate, row) + begin, row_of<T>(up, row) + begin,
                      to_gate, d_gate.accumulate, to_up, d_up.accumulate, end - begin);
             });
}

}  // namespace

void CpuBackend::fill(View x, double value) {
  float narrow = static_cast<float>(value);
  switch (x.dtype) {
    case DType::f64:
      return fill_with(pool_, x, value);
    case DType::f32:
      return fill_with(pool_, x, narrow);
    case DType::bf16:
      return fill_with(pool_, x, bf16(narrow).bits);
    case DType::f16:
      return fill_with(pool_, x, f16(narrow).bits);
    case DType::f8e4m3:
      return fill_with(pool_, x, f8e4m3(narrow).bits);
    case DType::i64:
      return fill_with(pool_, x, static_cast<int64_t>(value));
    case DType::i32:
      return fill_with(pool_, x, static_cast<int32_t>(value));
    case DType::u8:
      return fill_with(pool_, x, static_cast<uint8_t>(value));
  }
}

void CpuBackend::copy(View from, Grad to) {
  LATENTE_ASSERT(from.dtype == to.view.dtype);
  if (to.accumulate) return add(to.view, from, to.view);
  int64_t size = size_of(from.dtype);
  for_pieces(pool_, split_rows({from, to.view}), 2 * piece_elements,
             [&](int64_t row, int64_t begin, int64_t end) {
               const char* source = static_cast<const char*>(from.data);
               char* target = static_cast<char*>(to.view.data);
               std::memcpy(target + (row_offset(to.view, row) + begin) * size,
                           source + (row_offset(from, row) + begin) * size,
                           static_cast<size_t>((end - begin) * size));
             });
}

void CpuBackend::add(View a, View b, View out) {
  out.dtype == DType::f64 ? add_views<double>(pool_, a, b, out) : add_views<float>(pool_, a, b, out);
}

void CpuBackend::swiglu(View gate, View up, View out) {
  if (out.dtype == DType::f64) {
    swiglu_views<double>(pool_, &HWY_DYNAMIC_DISPATCH(swiglu_f64), gate, up, out);
  } else {
    swiglu_views<float>(pool_, &HWY_DYNAMIC_DISPATCH(swiglu_f32), gate, up, out);
  }
}

void CpuBackend::swiglu_backward(View d_out, View gate, View up, Grad d_gate, Grad d_up) {
  if (!d_gate && !d_up) return;
  if (d_out.dtype == DType::f64) {
    swiglu_backward_views<double>(pool_, &HWY_DYNAMIC_DISPATCH(swiglu_backward_f64), d_out, gate, up, d_gate,
                                  d_up);
  } else {
    swiglu_backward_views<float>(pool_, &HWY_DYNAMIC_DISPATCH(swiglu_backward_f32), d_out, gate, up, d_gate,
                                 d_up);
  }
}

}  // namespace latente
#endif
