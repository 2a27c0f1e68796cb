#include <cstring>

#include "cpu/cpu_backend.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/elementwise.cpp"
#include "hwy/foreach_target.h"  // must precede highway.h

#include "cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latente::HWY_NAMESPACE {

// The elements [begin, end) of a row, in each of these.
void add_elements(const View& a, const View& b, const View& out, int64_t row, int64_t begin, int64_t end) {
  with_type(out.dtype, [&]<class T>(T) LATENTE_VECTOR {
    const T *x = row_of<T>(a, row) + begin, *y = row_of<T>(b, row) + begin;
    T* to = row_of<T>(out, row) + begin;
    for_vectors<T>(end - begin, [&](int64_t i, auto width) LATENTE_VECTOR {
      store(hn::Add(load(x + i, width), load(y + i, width)), to + i, width);
    });
  });
}

void swiglu_elements(const View& gate, const View& up, const View& out, int64_t row, int64_t begin,
                     int64_t end) {
  with_type(out.dtype, [&]<class T>(T) LATENTE_VECTOR {
    const T *gates = row_of<T>(gate, row) + begin, *ups = row_of<T>(up, row) + begin;
    T* to = row_of<T>(out, row) + begin;
    for_vectors<T>(end - begin, [&](int64_t i, auto width) LATENTE_VECTOR {
      const Vec<T> g = load(gates + i, width);
      store(hn::Mul(hn::Mul(g, sigmoid<T>(g)), load(ups + i, width)), to + i, width);
    });
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

void swiglu_backward_elements(const View& d_out, const View& gate, const View& up, const Grad& d_gate,
                              const Grad& d_up, int64_t row, int64_t begin, int64_t end) {
  with_type(d_out.dtype, [&]<class T>(T) LATENTE_VECTOR {
    T* to_gate = d_gate ? row_of<T>(d_gate.view, row) + begin : nullptr;
    T* to_up = d_up ? row_of<T>(d_up.view, row) + begin : nullptr;
    const bool add_gate = d_gate.accumulate, add_up = d_up.accumulate;
    auto body = add_gate
                    ? (add_up ? swiglu_backward_row<T, true, true> : swiglu_backward_row<T, true, false>)
                    : (add_up ? swiglu_backward_row<T, false, true> : swiglu_backward_row<T, false, false>);
    body(row_of<T>(d_out, row) + begin, row_of<T>(gate, row) + begin, row_of<T>(up, row) + begin, to_gate,
         to_up, end - begin);
  });
}

}  // namespace latente::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latente {
namespace {

HWY_EXPORT(add_elements);
HWY_EXPORT(swiglu_elements);
HWY_EXPORT(swiglu_backward_elements);

template <class Bits>
void fill_with(ThreadPool& pool, const View& x, Bits bits) {
  for_pieces(pool, split_rows({x}), 2 * piece_elements, [&](int64_t row, int64_t begin, int64_t end) {
    Bits* to = static_cast<Bits*>(x.data) + row_offset(x, row);
    std::fill(to + begin, to + end, bits);
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
    case DType::q8:
    case DType::q4:
    case DType::q4m:
      LATENTE_ASSERT(false);
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
  for_pieces(pool_, split_rows({a, b, out}), piece_elements, [&](int64_t row, int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(add_elements)(a, b, out, row, begin, end);
  });
}

void CpuBackend::swiglu(View gate, View up, View out) {
  for_pieces(pool_, split_rows({gate, up, out}), piece_elements / 2,
             [&](int64_t row, int64_t begin, int64_t end) {
               HWY_DYNAMIC_DISPATCH(swiglu_elements)(gate, up, out, row, begin, end);
             });
}

void CpuBackend::swiglu_backward(View d_out, View gate, View up, Grad d_gate, Grad d_up) {
  if (!d_gate && !d_up) return;
  const View& as_gate = d_gate ? d_gate.view : gate;
  const View& as_up = d_up ? d_up.view : up;
  for_pieces(pool_, split_rows({d_out, gate, up, as_gate, as_up}), piece_elements / 2,
             [&](int64_t row, int64_t begin, int64_t end) {
               HWY_DYNAMIC_DISPATCH(swiglu_backward_elements)(d_out, gate, up, d_gate, d_up, row, begin, end);
             });
}

}  // namespace latente
#endif
