#include "cpu/quantised.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/block_kernels.h"
#include "cpu/gemm_tasks.h"
#include "cpu/pending.h"
#include "cpu/quantise_kernels.h"
#include "cpu/quantised_kernels.h"
#include "cpu/scratch.h"
#include "tensor/dtype.h"
#include "tensor/quantise.h"

namespace latente::quantised {
namespace {

using gemm::divide_up, gemm::Task, gemm::Tasks;

constexpr int64_t panels_at_once = 24;  // of rows
constexpr int64_t usual_depth = 512;  // of a block of k: two panels of columns stay in the first-level cache

// One row that the calling thread has packed, while the call is the same: its next piece of the product, or
// another product of the same row, needs it again.
struct PackedRow {
  uint64_t call = 0;
  const float* row = nullptr;
  int64_t k = 0, group = 0;
  int bits = 0;
  bool operator==(const PackedRow&) const = default;
};

// Null for a product that has none, and for a matrix that is not laid out.
const std::byte* panels_of(std::span<const Problem> problems, const Task& task) {
  if (task.n == 0) return nullptr;
  const Problem& p = problems[task.problem];
  return p.pending ? nullptr : p.panels + task.n0 / panel_rows * panel_bytes(p.form, p.k);
}

// panels: of the task's columns. `then`: what the thread will read after them, or null.
void compute(const Problem& p, const Task& task, const std::byte* panels, const std::byte* then,
             uint64_t call) {
  const Form form = p.form;
  const int64_t groups = groups_of(p.k, form.group);
  const Unit unit = unit_for(p.m);
  // One panel of rows reads the columns once, from end to end.
  const int64_t depth = task.last - task.first == 1 ? groups : std::max<int64_t>(usual_depth / form.group, 1);
  thread_local PackedRow packed;
  const PackedRow wanted = p.m == 1 ? PackedRow{call, p.a.line(0), p.k, form.group, form.bits} : PackedRow();
  const bool there = p.m == 1 && packed == wanted;
  packed = wanted;
  thread_local Scratch<std::byte> of_rows;
  const int64_t most_panels = std::min(panels_at_once, task.last - task.first);
  std::byte* rows =
      of_rows.reserve(unit == Unit::amx ? packed_amx_bytes(most_panels, form.group, std::min(depth, groups))
                                        : packed_bytes(most_panels * rows_of_tile(unit), form.group,
                                                       std::min(depth, groups)));
  Block block;
  block.panels = task.panels;
  block.n = task.n;
  block.then = then;
  block.form = form;
  block.a = rows;
  block.panel = panel_bytes(form, p.k);
  block.c = p.c + task.n0;
  block.c_row = p.c_row;
  for (int64_t g = 0; g == 0 || g < groups; g += depth) {
    block.groups = std::min(depth, groups - g);
    block.scales = panels + g * panel_rows * static_cast<int64_t>(sizeof(f16));
    if (form.offsets) block.offsets = panels + (groups + g) * panel_rows * static_cast<int64_t>(sizeof(f16));
    block.codes = panels + scale_bytes(form, p.k) + g * form.group * panel_rows * form.bits / 8;
    if (g > 0 || p.accumulate) {
      block.init = block.c;
      block.init_row = p.c_row;
    } else {
      block.init = p.bias ? p.bias + task.n0 : nullptr;
      block.init_row = 0;
    }
    for (int64_t i = task.first; i < task.last; i += panels_at_once) {
      block.first = i;
      block.last = std::min(i + panels_at_once, task.last);
      if (!there)
        pack_rows(unit, p.a, block.panels, block.first, block.last, g * form.group, p.k, form, block.groups,
                  rows);
      multiply_block(unit, block);
    }
  }
  if (p.bias && p.accumulate) {
    for (int64_t r = task.panels.start(task.first); r < task.panels.start(task.last); ++r) {
      for (int64_t j = task.n0; j < task.n0 + task.n; ++j) p.c[r * p.c_row + j] += p.bias[j];
    }
  }
}

}  // namespace

void pack(ThreadPool& pool, Form form, const int8_t* codes, const float* scales, int64_t n, int64_t k,
          std::byte* panels) {
  const int64_t groups = groups_of(k, form.group);
  pool.parallel_for(divide_up(n, panel_rows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i * panel_rows;
      pack_panel(form, codes + row * k, scales + row * groups, scales + (n + row) * groups,
                 std::min(panel_rows, n - row), k, panels + i * panel_bytes(form, k));
    }
  });
}

bool quantise(ThreadPool& pool, Form form, const float* values, const float* importance, int64_t n, int64_t k,
              std::byte* panels) {
  LATENTE_ASSERT(!form.offsets);
  std::atomic<bool> finite{true};
  pool.parallel_for(divide_up(n, panel_rows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i * panel_rows;
      if (!quantise_panel(form, values + row * k, std::min(panel_rows, n - row), k, importance,
                          panels + i * panel_bytes(form, k)))
        finite.store(false, std::memory_order_relaxed);
    }
  });
  return finite.load();
}

bool pack_blocks(ThreadPool& pool, Form form, const std::byte* blocks, int64_t n, int64_t k,
                 std::byte* panels) {
  const int64_t row = row_of_blocks(form, k);
  std::atomic<bool> fits{true};
  pool.parallel_for(divide_up(n, panel_rows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!panel_of_blocks(form, blocks + i * panel_rows * row, std::min(panel_rows, n - i * panel_rows), k,
                           panels + i * panel_bytes(form, k)))
        fits.store(false, std::memory_order_relaxed);
    }
  });
  return fits.load();
}

void multiply(ThreadPool& pool, std::span<const Problem> problems) {
  // Two panels of columns share the activations; one row reads four.
  Tasks tasks(pool, problems,
              {[](int64_t rows) { return rows_of_tile(unit_for(rows)); }, 2 * panel_rows, 4 * panel_rows});
  static std::atomic<uint64_t> calls{0};
  const uint64_t call = calls.fetch_add(1, std::memory_order_relaxed) + 1;
  tasks.run([&](const Task& task, const Task& next) {
    const Problem& p = problems[task.problem];
    if (!p.pending) return compute(p, task, panels_of(problems, task), panels_of(problems, next), call);
    for_pending(
        p.pending, task, panel_rows, panel_bytes(p.form, p.k),
        [&](const Task& piece, const std::byte* panels) { compute(p, piece, panels, nullptr, call); });
  });
}

}  // namespace latente::quantised
