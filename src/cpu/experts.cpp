// The tokens' rows in the order of their experts, and back.
#include "cpu/cpu_backend.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/experts.cpp"
#include "hwy/foreach_target.h"  // must precede highway.h

#include "cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latente::HWY_NAMESPACE {

// weights: [T, K], or null for ones; slots [T, K]: the rows of y that belong to a token.
template <class T>
HWY_INLINE void combine_tokens(const View& y, const View& weights, const View& slots, const Grad& out,
                               int64_t begin, int64_t end) {
  const int64_t n = y[1], stride = y.stride(0), top_k = slots[1];
  const T* from = y.as<T>();
  for (int64_t t = begin; t < end; ++t) {
    T* to = row_of<T>(out.view, t);
    const int32_t* slot = slots.as<int32_t>() + t * top_k;
    const T* weight = weights ? weights.as<T>() + t * top_k : nullptr;
    for_vectors<T>(n, [&](int64_t i, auto width) LATENTE_VECTOR {
      Vec<T> sum = out.accumulate ? load(to + i, width) : hn::Zero(Tag<T>());
      for (int64_t k = 0; k < top_k; ++k) {
        const Vec<T> row = load(from + slot[k] * stride + i, width);
        sum = weight ? hn::MulAdd(hn::Set(Tag<T>(), weight[k]), row, sum) : hn::Add(sum, row);
      }
      store(sum, to + i, width);
    });
  }
}

template <class T>
HWY_INLINE void combine_backward_tokens(const View& d_out, const View& y, const View& weights,
                                        const View& slots, const Grad& d_y, const Grad& d_weights,
                                        int64_t begin, int64_t end) {
  const int64_t n = y[1], top_k = slots[1];
  for (int64_t t = begin; t < end; ++t) {
    const T* g = row_of<T>(d_out, t);
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t slot = slots.as<int32_t>()[t * top_k + k];
      if (d_weights) {
        const T product = dot(g, row_of<T>(y, slot), n);
        T& to = row_of<T>(d_weights.view, t)[k];
        to = d_weights.accumulate ? to + product : product;
      }
      if (!d_y) continue;
      const Vec<T> weight = hn::Set(Tag<T>(), weights ? weights.as<T>()[t * top_k + k] : T{1});
      put_row(row_of<T>(d_y.view, slot), d_y.accumulate, n,
              [&](int64_t i, auto width) LATENTE_VECTOR { return hn::Mul(load(g + i, width), weight); });
    }
  }
}

void combine_any(const View& y, const View& weights, const View& slots, const Grad& out, int64_t begin,
                 int64_t end) {
  with_type(y.dtype,
            [&]<class T>(T) LATENTE_VECTOR { combine_tokens<T>(y, weights, slots, out, begin, end); });
}

void combine_backward_any(const View& d_out, const View& y, const View& weights, const View& slots,
                          const Grad& d_y, const Grad& d_weights, int64_t begin, int64_t end) {
  with_type(y.dtype, [&]<class T>(T) LATENTE_VECTOR {
    combine_backward_tokens<T>(d_out, y, weights, slots, d_y, d_weights, begin, end);
  });
}

}  // namespace latente::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latente {
namespace {

HWY_EXPORT(combine_any);
HWY_EXPORT(combine_backward_any);

void check_choices(const View& weights, const View& slots) {
  LATENTE_ASSERT(slots.contiguous() && (!weights || (weights.contiguous() && weights.shape == slots.shape)));
}

}  // namespace

void CpuBackend::expert_order(View experts, View offsets, View rows, View slots) {
  LATENTE_ASSERT(experts.contiguous() && offsets.contiguous() && rows.contiguous() && slots.contiguous());
  const int32_t* expert = experts.as<int32_t>();
  int32_t* offset = offsets.as<int32_t>();
  int32_t* row = rows.as<int32_t>();
  int32_t* slot = slots.as<int32_t>();
  int64_t choices = experts.count(), top_k = experts[1], count = offsets.count() - 1;
  // offset[e + 1] counts, then offset[e] is where expert e's next row goes, and in the end where it ends.
  std::fill(offset, offset + count + 1, 0);
  for (int64_t i = 0; i < choices; ++i) {
    LATENTE_ASSERT(0 <= expert[i] && expert[i] < count);
    ++offset[expert[i] + 1];
  }
  for (int64_t e = 0; e < count; ++e) offset[e + 1] += offset[e];
  for (int64_t i = 0; i < choices; ++i) {
    int32_t at = offset[expert[i]]++;
    slot[i] = at;
    row[at] = static_cast<int32_t>(i / top_k);
  }
  for (int64_t e = count; e > 0; --e) offset[e] = offset[e - 1];
  offset[0] = 0;
}

void CpuBackend::combine(View y, View weights, View slots, Grad out) {
  if (!out) return;
  check_choices(weights, slots);
  LATENTE_ASSERT(out.view.shape == Shape({slots[0], y[1]}));
  for_rows(pool_, slots[0], slots[1] * y[1], [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(combine_any)(y, weights, slots, out, begin, end);
  });
}

void CpuBackend::combine_backward(View d_out, View y, View weights, View slots, Grad d_y, Grad d_weights) {
  if (!d_y && !d_weights) return;
  check_choices(weights, slots);
  LATENTE_ASSERT(d_out.shape == Shape({slots[0], y[1]}) && (!d_y || d_y.view.shape == y.shape));
  for_rows(pool_, slots[0], 2 * slots[1] * y[1], [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(combine_backward_any)(d_out, y, weights, slots, d_y, d_weights, begin, end);
  });
}

}  // namespace latente
#endif
