// How kernels walk over views: rows are the last axis, numbered over the leading ones, and work is cut into
// pieces of rows whose bounds never change a result.
#pragma once

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <vector>

#include "base/threads.h"
#include "tensor/view.h"

namespace latente {

// Elements below which a loop over memory is not worth a second thread.
inline constexpr int64_t piece_elements = 16384;

// Elements from the view's first to the first of row `row`.
inline int64_t row_offset(const View& view, int64_t row) {
  int64_t offset = 0;
  for (int axis = view.shape.rank() - 2; axis >= 0; --axis) {
    offset += row % view.shape[axis] * view.stride(axis);
    row /= view.shape[axis];
  }
  return offset;
}

template <class T>
T* row_of(const View& view, int64_t row) {
  return view.as<T>() + row_offset(view, row);
}

// The view as rows [rows, width]; [1, count] when nothing lies between the elements of any of `views`.
struct RowSplit {
  int64_t rows = 0, width = 0;
};
inline RowSplit split_rows(std::initializer_list<View> views) {
  const View& first = *views.begin();
  bool flat = true;
  for (const View& view : views) {
    LATENTE_ASSERT(view.shape == first.shape);
    flat = flat && view.contiguous();
  }
  if (flat) return {1, first.count()};
  return {first.count() / std::max<int64_t>(first[-1], 1), first[-1]};
}

// body(row, begin, end) for the elements [begin, end) of each row, about `piece` elements at a time.
template <class Body>
void for_pieces(ThreadPool& pool, RowSplit split, int64_t piece, const Body& body) {
  if (split.width <= 0) return;
  if (split.width > piece) {
    int64_t per_row = (split.width + piece - 1) / piece;
    pool.parallel_for(split.rows * per_row, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t from = i % per_row * piece;
        body(i / per_row, from, std::min(from + piece, split.width));
      }
    });
  } else {
    pool.parallel_for(split.rows, piece / split.width, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) body(row, int64_t{0}, split.width);
    });
  }
}

// body(begin, end) over rows that cost about `width` elements each.
template <class Body>
void for_rows(ThreadPool& pool, int64_t rows, int64_t width, const Body& body) {
  pool.parallel_for(rows, piece_elements / std::max<int64_t>(width, 1), body);
}

// Memory of the calling thread that only grows; the next call for the same `Use` gives it out again.
template <class Use, class T>
T* reused_memory(int64_t count) {
  thread_local std::vector<T> memory;
  if (static_cast<int64_t>(memory.size()) < count) memory.resize(static_cast<size_t>(count));
  return memory.data();
}

}  // namespace latente
