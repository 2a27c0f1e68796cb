#include "cpu/cpu_backend.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/embedding.cpp"
#include "hwy/foreach_target.h"  // must precede highway.h

#include "cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latente::HWY_NAMESPACE {

template <class T, class S>
HWY_INLINE void gather(const int32_t* ids, int64_t count, const S* table, int64_t stride, int64_t width,
                       T* out, int64_t out_stride) {
  for (int64_t t = 0; t < count; ++t, out += out_stride) {
    const S* from = table + ids[t] * stride;
    for_vectors<T>(width,
                   [&](int64_t i, auto part) LATENTE_VECTOR { store(load(from + i, part), out + i, part); });
  }
}

// One block of columns for every token in order, so that a sum never depends on how the columns were cut.
template <class T>
HWY_INLINE void scatter_add(const int32_t* ids, int64_t count, const T* from, int64_t from_stride,
                            int64_t width, T* table, int64_t stride) {
  for (int64_t t = 0; t < count; ++t, from += from_stride) {
    T* to = table + ids[t] * stride;
    for_vectors<T>(
        width, [&](int64_t i, auto part) LATENTE_VECTOR { put<true>(load(from + i, part), to + i, part); });
  }
}

void gather_f32(const int32_t* ids, int64_t count, const float* table, int64_t stride, int64_t width,
                float* out, int64_t out_stride) {
  gather(ids, count, table, stride, width, out, out_stride);
}
void gather_bf16(const int32_t* ids, int64_t count, const bf16* table, int64_t stride, int64_t width,
                 float* out, int64_t out_stride) {
  gather(ids, count, table, stride, width, out, out_stride);
}
void gather_f64(const int32_t* ids, int64_t count, const double* table, int64_t stride, int64_t width,
                double* out, int64_t out_stride) {
  gather(ids, count, table, stride, width, out, out_stride);
}
void scatter_f32(const int32_t* ids, int64_t count, const float* from, int64_t from_stride, int64_t width,
                 float* table, int64_t stride) {
  scatter_add(ids, count, from, from_stride, width, table, stride);
}
void scatter_f64(const int32_t* ids, int64_t count, const double* from, int64_t from_stride, int64_t width,
                 double* table, int64_t stride) {
  scatter_add(ids, count, from, from_stride, width, table, stride);
}

}  // namespace latente::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latente {
namespace {

HWY_EXPORT(gather_f32);
HWY_EXPORT(gather_bf16);
HWY_EXPORT(gather_f64);
HWY_EXPORT(scatter_f32);
HWY_EXPORT(scatter_f64);

const int32_t* checked_ids(const View& ids, int64_t rows) {
  LATENTE_ASSERT(ids.contiguous());
  const int32_t* id = ids.as<int32_t>();
  bool inside = true;
  for (int64_t t = 0; t < ids.count(); ++t) inside = inside & (id[t] >= 0) & (id[t] < rows);
  LATENTE_ASSERT(inside);
  return id;
}

template <class T, class S, class Kernel>
void gather_rows(ThreadPool& pool, Kernel kernel, const View& ids, const View& table, const View& out) {
  const int32_t* id = checked_ids(ids, table[0]);
  for_rows(pool, ids.count(), table[1], [&](int64_t begin, int64_t end) {
    kernel(id + begin, end - begin, table.as<S>(), table.stride(0), table[1], row_of<T>(out, begin),
           out.stride(0));
  });
}

template <class T, class Kernel>
void scatter_rows(ThreadPool& pool, Kernel kernel, const View& ids, const View& d_out, const View& d_table) {
  const int32_t* id = checked_ids(ids, d_table[0]);
  constexpr int64_t block = 64;  // columns: whole cache lines
  int64_t blocks = (d_table[1] + block - 1) / block;
  int64_t grain =
      std::max((blocks + pool.size() - 1) / pool.size(), piece_elements / (block * ids.count() + 1));
  pool.parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
    int64_t from = begin * block, to = std::min(end * block, d_table[1]);
    kernel(id, ids.count(), d_out.as<T>() + from, d_out.stride(0), to - from, d_table.as<T>() + from,
           d_table.stride(0));
  });
}

}  // namespace

void CpuBackend::embedding(View ids, View table, View out) {
  LATENTE_ASSERT(table.shape.rank() == 2 && out.shape == Shape({ids.count(), table[1]}));
  if (table.dtype == DType::f64) {
    gather_rows<double, double>(pool_, &HWY_DYNAMIC_DISPATCH(gather_f64), ids, table, out);
  } else if (table.dtype == DType::bf16) {
    gather_rows<float, bf16>(pool_, &HWY_DYNAMIC_DISPATCH(gather_bf16), ids, table, out);
  } else {
    gather_rows<float, float>(pool_, &HWY_DYNAMIC_DISPATCH(gather_f32), ids, table, out);
  }
}

void CpuBackend::embedding_backward(View ids, View d_out, Grad d_table) {
  if (!d_table) return;
  LATENTE_ASSERT(d_out.shape == Shape({ids.count(), d_table.view[1]}));
  if (!d_table.accumulate) fill(d_table.view, 0.0);
  if (d_out.dtype == DType::f64) {
    scatter_rows<double>(pool_, &HWY_DYNAMIC_DISPATCH(scatter_f64), ids, d_out, d_table.view);
  } else {
    scatter_rows<float>(pool_, &HWY_DYNAMIC_DISPATCH(scatter_f32), ids, d_out, d_table.view);
  }
}

}  // namespace latente
#endif
