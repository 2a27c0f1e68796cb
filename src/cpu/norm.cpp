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
    auto gradient = [&](int64_t i, auto width) LATENTE_VECTOR {
      return hn::Mul(factor, hn::MulAdd(load(from + i, width), along, weighted(i, width)));
    };
    put_row(row_of<T>(d_x.view, t), d_x.accumulate, n, gradient);
  }
}

void norm(const View& h, const View& x, const View& weight, double eps, const View& sum, const View& out,
          const View& rstd, int64_t begin, int64_t end) {
  with_types(x.dtype, weight.dtype, [&]<class T, class W>(T, W) LATENTE_VECTOR {
    norm_rows<T, W>(h, x, weight, eps, sum, out, rstd, begin, end);
  });
}

// parts [blocks, D]: each block of rows sums its part of d_weight in one of them; or null.
void norm_backward(const View& d_out, const View& x, const View& weight, const View& rstd, const Grad& d_x,
                   const View& parts, int64_t block, int64_t begin, int64_t end) {
  with_types(x.dtype, weight.dtype, [&]<class T, class W>(T, W) LATENTE_VECTOR {
    T* d_w = parts ? row_of<T>(parts, block) : nullptr;
    if (d_w) std::fill(d_w, d_w + parts[1], T{0});
    norm_backward_rows<T, W>(d_out, x, weight, rstd, d_x, d_w, begin, end);
  });
}

// out (+)= the sum of the rows of `parts`, in order, for the columns [begin, end).
void sum_rows(const View& parts, const Grad& out, int64_t begin, int64_t end) {
  with_type(parts.dtype, [&]<class T>(T) LATENTE_VECTOR {
    const int64_t count = parts[0], row = parts[1];
    const T* from = parts.as<T>() + begin;
    T* to = out.view.as<T>() + begin;
    for_vectors<T>(end - begin, [&](int64_t i, auto width) LATENTE_VECTOR {
      Vec<T> sum = out.accumulate ? load(to + i, width) : hn::Zero(Tag<T>());
      for (int64_t p = 0; p < count; ++p) sum = hn::Add(sum, load(from + p * row + i, width));
      store(sum, to + i, width);
    });
  });
}

}  // namespace latente::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latente {
namespace {

HWY_EXPORT(norm);
HWY_EXPORT(norm_backward);
HWY_EXPORT(sum_rows);

void norm_all(ThreadPool& pool, const View& h, const View& x, const View& weight, double eps, const View& sum,
              const View& out, const View& rstd) {
  LATENTE_ASSERT(x.shape.rank() == 2 && out.shape == x.shape && (!weight || weight.count() == x[1]));
  for_rows(pool, x[0], x[1], [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(norm)(h, x, weight, eps, sum, out, rstd, begin, end);
  });
}

}  // namespace

void CpuBackend::rms_norm(View x, View weight, double eps, View out, View rstd) {
  norm_all(pool_, {}, x, weight, eps, {}, out, rstd);
}

void CpuBackend::rms_norm_add(View h, View x, View weight, double eps, View sum, View out, View rstd) {
  LATENTE_ASSERT(h.shape == x.shape && sum.shape == x.shape);
  norm_all(pool_, h, x, weight, eps, sum, out, rstd);
}

// Rows are cut into blocks by their number alone; each block sums its part of d_weight, and the parts are
// added in order.
void CpuBackend::rms_norm_backward(View d_out, View x, View weight, View rstd, Grad d_x, Grad d_weight) {
  LATENTE_ASSERT(x.shape.rank() == 2 && d_out.shape == x.shape);
  int64_t rows = x[0], n = x[1];
  int64_t block = std::max<int64_t>(16, (rows + 63) / 64), blocks = (rows + block - 1) / block;
  View parts;
  if (d_weight) {
    int64_t doubles = (blocks * n * size_of(x.dtype) + 7) / 8;
    parts = View(reused_memory<Grad, double>(doubles), {blocks, n}, x.dtype);
  }
  auto kernel = &HWY_DYNAMIC_DISPATCH(norm_backward);
  pool_.parallel_for(
      blocks, std::max<int64_t>(1, piece_elements / (2 * block * n)), [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b) {
          kernel(d_out, x, weight, rstd, d_x, parts, b, b * block, std::min((b + 1) * block, rows));
        }
      });
  if (!d_weight) return;
  LATENTE_ASSERT(d_weight.view.count() == n && d_weight.view.contiguous());
  for_pieces(pool_, {1, n}, std::max<int64_t>(64, piece_elements / std::max<int64_t>(blocks, 1)),
             [&](int64_t, int64_t begin, int64_t end) {
               HWY_DYNAMIC_DISPATCH(sum_rows)(parts, d_weight, begin, end);
             });
}

}  // namespace latente
#endif
