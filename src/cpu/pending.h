// How products read matrices that are not laid out yet (tensor/pending_panels.h).
#pragma once

#include <algorithm>

#include "cpu/gemm_tasks.h"
#include "cpu/scratch.h"
#include "tensor/pending_panels.h"

namespace latente {

// Calls use(piece, panels) for pieces of a task's columns, with their panels of `width` columns and `bytes`
// each: laid out into memory of the thread's, a few at a time, so that they are read from the cache.
template <class Use>
void for_pending(const PendingMatrix& matrix, const gemm::Task& task, int64_t width, int64_t bytes,
                 const Use& use) {
  constexpr int64_t cached = 256 << 10;
  constexpr int64_t side_by_side = 4;  // panels that a product of one row reads
  thread_local Scratch<std::byte> memory;
  const int64_t at_once = std::max(cached / bytes / side_by_side * side_by_side, side_by_side);
  std::byte* panels = memory.reserve(at_once * bytes);
  for (int64_t j = 0; j < task.n; j += at_once * width) {
    gemm::Task piece = task;
    piece.n0 = task.n0 + j;
    piece.n = std::min(at_once * width, task.n - j);
    matrix.panels->make(matrix.index, piece.n0 / width, gemm::divide_up(piece.n, width), panels);
    use(piece, static_cast<const std::byte*>(panels));
  }
}

}  // namespace latente
