#include <cmath>

#include "cpu/cpu_backend.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/norm.cpp"
#include "hwy/foreach_target.h"  // must precede highway.h

#include "cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latente::HWY_NAMESPACE {

template <class T, class W>
HWY_INLINE T norm_row(const T* x, const W* weight, double eps, T* out, int64_t n) {
  const Tag<T> d;
  const double mean = static_cast<double>(dot(x, x, n)) / static_cast<double>(n);
  const T rstd = static_cast<T>(1.0 / std::sqrt(mean + eps));
  const Vec<T> factor = hn::Set(d, rstd);
  if (weight) {
    for_vectors<T>(n, [&](int64_t i, auto width) LATENTE_VECTOR {
      store(hn::Mul(hn::Mul(load(x + i, width), factor), load(weight + i, width)), out + i, width);
    });
  } else {
    for_vectors<T>(n, [&](int64_t i, auto width)
                          LATENTE_VECTOR { store(hn::Mul(load(x + i, width), factor), out + i, width); });
  }
  return rstd;
}

// With h: sum = h + x first, and the norm is the sum's.
template <class T, class W>
HWY_INLINE void norm_rows(const View& h, const View& x, const View& weight, double eps, const View& sum,
                          const View& out, const View& rstd, int64_t begin, int64_t end) {
  const int64_t n = x[-1];
  const W* w = weight.as_or_null<W>();
  for (int64_t t = begin; t < end; ++t) {
    const T* from = row_of<T>(x, t);
    if (h) {
      const T* a = row_of<T>(h, t);
      T* to = row_of<T>(sum, t);
      for_vectors<T>(n, [&](int64_t i, auto width) LATENTE_VECTOR {
        store(hn::Add(load(a + i, width), load(from + i, width)), to + i, width);
      });
      from = to;
    }
    const T r = norm_row(from, w, eps, row_of<T>(out, t), n);
    if (rstd) rstd.as<T>()[t * rstd.stride(0)] = r;
  }
}

// d_x = rstd (w d_out - x rstd² mean(w d_out x)); d_w adds rstd d_out x of these rows.
// d_x may be the memory of d_out: an element is read before it is written.
template <class T, class W>
HWY_INLINE void norm_backward_rows(const View& d_out, const View& x, const View& weight, const View& rstd,
                                   const Grad& d_x, T* d_w, int64_t begin, int64_t end) {
  const Tag<T> d;
  const int64_t n = x[-1];
  const W* w = weight.as_or_null<W>();
  for (int64_t t = begin; t < end; ++t) {
    const T* g = row_of<T>(d_out, t);
    const T* from = row_of<T>(x, t);
    const T r = rstd.as<T>()[t * rstd.stride(0)];
    const Vec<T> factor = hn::Set(d, r);
    if (d_w) {
      for_vectors<T>(n, [&](int64_t i, auto width) LATENTE_VECTOR {
        put<true>(hn::Mul(hn::Mul(load(g + i, width), factor), load(from + i, width)), d_w + i, width);
      });
    }
    if (!d_x) continue;
    auto weighted = [&](int64_t i, auto width) LATENTE_VECTOR {
      return w ? hn::Mul(load(g + i, width), load(w + i, width)) : load(g + i, width);
    };
    const T product = sum_vectors<T>(n, [&](Vec<T> sum, int64_t i, auto width) LATENTE_VECTOR {
      return hn::MulAdd(weighted(i, width), load(from + i, width), sum);
    });
    const Vec<T> along = hn::Set(d, -r * r * product / static_cast<T>(n));
    T* to = row_of<T>(d_x.view, t);
    auto gradient = [&](int64_t i, auto width) LATENTE_VECTOR {
      return hn::Mul(factor, hn::MulAdd(load(from + i, width), along, weighted(i, width)));
    };
    if (d_x.accumulate) {
      for_vectors<T>(
          n, [&](int64_t i, auto width) LATENTE_VECTOR { put<true>(gradient(i, width), to + i, width); });
    } else {
      for_vectors<T>(
          n, [&](int64_t i, auto width) LATENTE_VECTOR { put<false>(gradient(i, width), to + i, width); });
    }
  }
}

// out (+)= the sum of `count` rows of `parts`, in order, for the columns [begin, end).
template <class T>
HWY_INLINE void sum_rows(const T* parts, int64_t count, int64_t row, T* out, bool accumulate, int64_t begin,
                         int64_t end) {
  for_vectors<T>(end - begin, [&](int64_t i, auto width) LATENTE_VECTOR {
    Vec<T> sum = accumulate ? load(out + begin + i, width) : hn::Zero(Tag<T>());
    for (int64_t p = 0; p < count; ++p) sum = hn::Add(sum, load(parts + p * row + begin + i, width));
    store(sum, out + begin + i, width);
  });
}

#define LATENTE_NORM(SUFFIX, T, W)                                                                    \
  void norm_##SUFFIX(const View& h, const View& x, const View& weight, double eps, const View& sum,   \
                     const View& out, const View& rstd, int64_t begin, int64_t end) {                 \
    norm_rows<T, W>(h, x, weight, eps, sum, out, rstd, begin, end);                                   \
  }                                                                                                   \
  void norm_backward_##SUFFIX(const View& d_out, const View& x, const View& weight, const View& rstd, \
                              const Grad& d_x, T* d_w, int64_t begin, int64_t end) {                  \
    norm_backward_rows<T, W>(d_out, x, weight, rstd, d_x, d_w, begin, end);                           \
  }
LATENTE_NORM(f32, float, float)
LATENTE_NORM(bf16, float, bf16)
LATENTE_NORM(f64, double, double)
#undef LATENTE_NORM

void sum_rows_f32(const float* parts, int64_t count, int64_t row, float* out, bool accumulate, int64_t begin,
                  int64_t end) {
  sum_rows(parts, count, row, out, accumulate, begin, end);
}
void sum_rows_f64(const double* parts, int64_t count, int64_t row, double* out, bool accumulate,
                  int64_t begin, int64_t end) {
  sum_rows(parts, count, row, out, accumulate, begin, end);
}

}  // namespace latente::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latente {
namespace {

HWY_EXPORT(norm_f32);
HWY_EXPORT(norm_bf16);
HWY_EXPORT(norm_f64);
HWY_EXPORT(norm_backward_f32);
HWY_EXPORT(norm_backward_bf16);
HWY_EXPORT(norm_backward_f64);
HWY_EXPORT(sum_rows_f32);
HWY_EXPORT(sum_rows_f64);

void norm(ThreadPool& pool, const View& h, const View& x, const View& weight, double eps, const View& sum,
          const View& out, const View& rstd) {
  LATENTE_ASSERT(x.shape.rank() == 2 && out.shape == x.shape && (!weight || weight.count() == x[1]));
  auto kernel = x.dtype == DType::f64                   ? &HWY_DYNAMIC_DISPATCH(norm_f64)
                : weight && weight.dtype == DType::bf16 ? &HWY_DYNAMIC_DISPATCH(norm_bf16)
                                                        : &HWY_DYNAMIC_DISPATCH(norm_f32);
  for_rows(pool, x[0], x[1],
           [&](int64_t begin, int64_t end) { kernel(h, x, weight, eps, sum, out, rstd, begin, end); });
}

// Rows are cut into blocks by their number alone; each block sums its part of d_weight, and the parts are
// added in order.
template <class T, class Kernel, class Sum>
void norm_backward(ThreadPool& pool, Kernel kernel, Sum sum, const View& d_out, const View& x,
                   const View& weight, const View& rstd, const Grad& d_x, const Grad& d_weight) {
  int64_t rows = x[0], n = x[1];
  int64_t block = std::max<int64_t>(16, (rows + 63) / 64), blocks = (rows + block - 1) / block;
  T* parts = d_weight ? reused_memory<Grad, T>(blocks * n) : nullptr;
  pool.parallel_for(blocks, std::max<int64_t>(1, piece_elements / (2 * block * n)),
                    [&](int64_t first, int64_t last) {
                      for (int64_t b = first; b < last; ++b) {
                        T* part = parts ? parts + b * n : nullptr;
                        if (part) std::fill(part, part + n, T{0});
                        kernel(d_out, x, weight, rstd, d_x, part, b * block, std::min((b + 1) * block, rows));
                      }
                    });
  if (!parts) return;
  LATENTE_ASSERT(d_weight.view.count() == n && d_weight.view.contiguous());
  for_pieces(pool, {1, n}, std::max<int64_t>(64, piece_elements / std::max<int64_t>(blocks, 1)),
             [&](int64_t, int64_t begin, int64_t end) {
               sum(parts, blocks, n, d_weight.view.as<T>(), d_weight.accumulate, begin, end);
             });
}

}  // namespace

void CpuBackend::rms_norm(View x, View weight, double eps, View out, View rstd) {
  norm(pool_, {}, x, weight, eps, {}, out, rstd);
}

void CpuBackend::rms_norm_add(View h, View x, View weight, double eps, View sum, View out, View rstd) {
  LATENTE_ASSERT(h.shape == x.shape && sum.shape == x.shape);
  norm(pool_, h, x, weight, eps, sum, out, rstd);
}

void CpuBackend::rms_norm_backward(View d_out, View x, View weight, View rstd, Grad d_x, Grad d_weight) {
  LATENTE_ASSERT(x.shape.rank() == 2 && d_out.shape == x.shape);
  if (x.dtype == DType::f64) {
    norm_backward<double>(pool_, &HWY_DYNAMIC_DISPATCH(norm_backward_f64),
                          &HWY_DYNAMIC_DISPATCH(sum_rows_f64), d_out, x, weight, rstd, d_x, d_weight);
  } else {
    auto kernel = weight && weight.dtype == DType::bf16 ? &HWY_DYNAMIC_DISPATCH(norm_backward_bf16)
                                                        : &HWY_DYNAMIC_DISPATCH(norm_backward_f32);
    norm_backward<float>(pool_, kernel, &HWY_DYNAMIC_DISPATCH(sum_rows_f32), d_out, x, weight, rstd, d_x,
                         d_weight);
  }
}

}  // namespace latente
#endif
