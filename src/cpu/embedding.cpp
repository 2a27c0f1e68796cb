#include "cpu/cpu_backend.h"
#include "cpu/quantised.h"
#include "cpu/scratch.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/embedding.cpp"
#include "hwy/foreach_target.h"  // must precede highway.h

#include "cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latente::HWY_NAMESPACE {

// out = the table's rows of the tokens [begin, end)
void gather(const View& ids, const View& table, const View& out, int64_t begin, int64_t end) {
  with_types(out.dtype, table.dtype, [&]<class T, class S>(T, S) LATENTE_VECTOR {
    for (int64_t t = begin; t < end; ++t) {
      const S* from = row_of<S>(table, ids.as<int32_t>()[t]);
      put_row(row_of<T>(out, t), false, table[1],
              [&](int64_t i, auto part) LATENTE_VECTOR { return load(from + i, part); });
    }
  });
}

// The columns [begin, end) for every token in order, so that a sum never depends on how the columns were cut.
void scatter_add(const View& ids, const View& from, const View& table, int64_t begin, int64_t end) {
  with_type(from.dtype, [&]<class T>(T) LATENTE_VECTOR {
    const int32_t* id = ids.as<int32_t>();
    const int64_t count = ids.count(), stride = table.stride(0), from_stride = from.stride(0);
    const T* row = from.as<T>() + begin;
    T* to = table.as<T>() + begin;
    for (int64_t t = 0; t < count; ++t, row += from_stride) {
      put_row(to + id[t] * stride, true, end - begin,
              [&](int64_t i, auto part) LATENTE_VECTOR { return load(row + i, part); });
    }
  });
}

}  // namespace latente::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latente {
namespace {

HWY_EXPORT(gather);
HWY_EXPORT(scatter_add);

void check_ids(const View& ids, int64_t rows) {
  LATENTE_ASSERT(ids.contiguous());
  const int32_t* id = ids.as<int32_t>();
  bool inside = true;
  for (int64_t t = 0; t < ids.count(); ++t) inside = inside & (id[t] >= 0) & (id[t] < rows);
  LATENTE_ASSERT(inside);
}

void gather_quantised(const View& ids, const View& table, const View& out, int64_t begin, int64_t end) {
  const quantised::Form form = quantised::form_of(table);
  const auto* panels = table.pending ? table.pending->at(0) : static_cast<const std::byte*>(table.data);
  thread_local Scratch<std::byte> memory;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t row = ids.as<int32_t>()[t];
    float* to = out.as<float>() + t * out.stride(0);
    if (panels) {
      quantised::unpack(form, panels, table[1], row, 1, to);
    } else {
      std::byte* panel = memory.reserve(quantised::panel_bytes(form, table[1]));
      table.pending->make(0, row / quantised::panel_rows, 1, panel);
      quantised::unpack(form, panel, table[1], row % quantised::panel_rows, 1, to);
    }
  }
}

}  // namespace

void CpuBackend::embedding(View ids, View table, View out) {
  LATENTE_ASSERT(table.shape.rank() == 2 && out.shape == Shape({ids.count(), table[1]}));
  check_ids(ids, table[0]);
  for_rows(pool_, ids.count(), table[1], [&](int64_t begin, int64_t end) {
    if (is_quantised(table.dtype)) return gather_quantised(ids, table, out, begin, end);
    HWY_DYNAMIC_DISPATCH(gather)(ids, table, out, begin, end);
  });
}

void CpuBackend::embedding_backward(View ids, View d_out, Grad d_table) {
  if (!d_table) return;
  const View& table = d_table.view;
  LATENTE_ASSERT(d_out.shape == Shape({ids.count(), table[1]}));
  check_ids(ids, table[0]);
  if (!d_table.accumulate) fill(table, 0.0);
  constexpr int64_t block = 64;  // columns: whole cache lines
  int64_t blocks = (table[1] + block - 1) / block;
  int64_t grain =
      std::max((blocks + pool_.size() - 1) / pool_.size(), piece_elements / (block * ids.count() + 1));
  pool_.parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(scatter_add)(ids, d_out, table, begin * block, std::min(end * block, table[1]));
  });
}

}  // namespace latente
#endif
