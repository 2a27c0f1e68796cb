#include "cpu/gemm.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "base/error.h"
#include "cpu/gemm_kernels.h"
#include "cpu/gemm_tasks.h"
#include "cpu/pending.h"
#include "cpu/scratch.h"

namespace latente::gemm {
namespace {

constexpr int64_t few_panels = 2;       // of rows: less work than widening the columns
constexpr int64_t panels_at_once = 12;  // of rows
constexpr int64_t streamed_rows = 2;    // wait for their columns from memory

// Blocks of a problem have equal depth, but for the last. A panel of b should leave room beside it in the
// first-level cache, but one block is worth more than two low ones.
int64_t depth_of_blocks(int64_t k) {
  if (k <= most_depth) return std::max<int64_t>(k, 1);
  const int64_t blocks = divide_up(k, usual_depth);
  return divide_up(divide_up(k, blocks), 8) * 8;
}

template <class T, class S>
class Multiplication {
 public:
  Multiplication(ThreadPool& pool, std::span<const Problem<T, S>> problems)
      : pool_(pool), problems_(problems) {}

  void run() {
    const int64_t columns = tile_columns<T>();
    Tasks tasks(pool_, problems_, {[](int64_t) { return tile_rows(); }, columns, panels_of_row * columns});
    tasks.run([this](const Task& task, const Task&) {
      const auto& p = problems_[task.problem];
      p.pending ? compute_pending(p, task) : compute(p, task);
    });
  }

 private:
  void compute_pending(const Problem<T, S>& p, const Task& task) {
    for_pending(p.pending, task, tile_columns<T>(), p.panel * static_cast<int64_t>(sizeof(S)),
                [&](const Task& piece, const std::byte* panels) {
                  Problem<T, S> part = p;
                  part.pending = {};
                  part.panels = reinterpret_cast<const S*>(panels);
                  part.first_panel = piece.n0 / tile_columns<T>();
                  compute(part, piece);
                });
  }

  void compute(const Problem<T, S>& p, const Task& task) {
    if (p.panels && (std::is_same_v<T, S> || task.last - task.first <= few_panels)) {
      if (is_scaled || p.m <= streamed_rows) {
        compute_along(p, task);
      } else {
        compute_packed(p, task);
      }
    } else if (is_direct(p, task)) {
      compute_directly(p, task);
    } else {
      compute_unpacked(p, task);
    }
    if (p.bias && p.accumulate) {
      for (int64_t r = task.panels.start(task.first); r < task.panels.start(task.last); ++r) {
        for (int64_t j = task.n0; j < task.n0 + task.n; ++j) p.c[r * p.c_row + j] += p.bias[j];
      }
    }
  }

  static constexpr bool is_scaled = std::is_same_v<S, f8e4m3>;  // and packed

  static bool is_direct(const Problem<T, S>& p, const Task& task) {
    if constexpr (is_scaled) {
      return false;
    } else {
      return !p.panels && gemm::is_direct(task.panels, p.b);
    }
  }

  void compute_unpacked(const Problem<T, S>& p, const Task& task) {
    const int64_t depth = depth_of_blocks(p.k);
    thread_local Scratch<T> of_rows, of_columns;
    T* rows = of_rows.reserve(panels_at_once * (tile_rows() * most_depth + Panels::spill));
    T* columns = of_columns.reserve(Tasks::largest.columns * most_depth);
    Block<T> block;
    block.panels = task.panels;
    block.a = rows;
    block.b = columns;
    block.n = task.n;
    for (int64_t k = 0; k == 0 || k < p.k; k += depth) {
      place(block, p, k, std::min(depth, p.k - k), task.n0);
      block.b_panel = block.k * tile_columns<T>();
      pack_columns(p, task.n0, task.n, k, block.k, columns);
      for (int64_t i = task.first; i < task.last; i += panels_at_once) {
        block.panels.origin = block.first = i;
        block.last = std::min(i + panels_at_once, task.last);
        pack_rows(p.a, block.panels, block.first, block.last, k, block.k, rows);
        if constexpr (is_scaled) {
          by_scales(p, task, [&](int64_t n0, int64_t n, const float* scales) {
            const int64_t j = n0 - task.n0;
            Block<T> part = block;
            part.n = n;
            part.b += j * part.k;
            part.c += j;
            if (part.init) part.init += j;
            multiply_scaled(part, scales, k);
          });
        } else {
          multiply_block(block);
        }
      }
    }
  }

  // Calls use(n0, n, scales) for those of a task's columns that share their scales: all where there are none.
  template <class Use>
  static void by_scales(const Problem<T, S>& p, const Task& task, const Use& use) {
    if constexpr (!is_scaled) return use(task.n0, task.n, nullptr);
    for (int64_t n0 = task.n0, n = 0; n0 < task.n0 + task.n; n0 += n) {
      n = std::min(task.n0 + task.n, (n0 / fp8_block + 1) * fp8_block) - n0;
      use(n0, n, p.scales + n0 / fp8_block * scales_of(p.k));
    }
  }

  // block.a: rows that are not yet scaled, from k on.
  template <class B>
  static void multiply_scaled(Block<T, B> block, const float* scales, int64_t k) {
    thread_local Scratch<T> of_rows;
    T* rows = of_rows.reserve(panels_at_once * (tile_rows() * most_depth + Panels::spill));
    scale_rows(block.panels, block.first, block.last, k, block.k, scales, block.a, rows);
    block.a = rows;
    multiply_block(block);
  }

  static const S* panels_at(const Problem<T, S>& p, int64_t n0, int64_t k) {
    return p.panels + (n0 / tile_columns<T>() - p.first_panel) * p.panel + k * tile_columns<T>();
  }

  static void pack_columns(const Problem<T, S>& p, int64_t n0, int64_t n, int64_t k, int64_t count, T* to) {
    if constexpr (!std::is_same_v<T, S>) {
      if (p.panels) {
        return widen_panels(panels_at(p, n0, k), p.panel, n, count, to);
      }
    }
    if constexpr (!is_scaled) gemm::pack_columns(p.b, n0, n, k, count, to);
  }

  // Columns were packed long ago.
  void compute_packed(const Problem<T, S>& p, const Task& task) {
    const int64_t depth = depth_of_blocks(p.k);
    thread_local Scratch<T> of_rows;
    T* rows = of_rows.reserve(panels_at_once * (tile_rows() * most_depth + Panels::spill));
    Block<T, S> block;
    block.panels = task.panels;
    block.a = rows;
    block.b_panel = p.panel;
    block.n = task.n;
    for (int64_t k = 0; k == 0 || k < p.k; k += depth) {
      place(block, p, k, std::min(depth, p.k - k), task.n0);
      block.b = panels_at(p, task.n0, k);
      for (int64_t i = task.first; i < task.last; i += panels_at_once) {
        block.panels.origin = block.first = i;
        block.last = std::min(i + panels_at_once, task.last);
        pack_rows(p.a, block.panels, block.first, block.last, k, block.k, rows);
        multiply_block(block);
      }
    }
  }

  // The same with scales, or for one row or two: all of k for some columns, whose panels are then read from
  // end to end.
  void compute_along(const Problem<T, S>& p, const Task& task) {
    const int64_t depth = depth_of_blocks(p.k);
    Block<T, S> block;
    block.panels = task.panels;
    block.panels.origin = block.first = task.first;
    block.last = task.last;
    block.b_panel = p.panel;
    const int64_t block_size = block.panels.offset(task.last, depth),
                  size = divide_up(p.k, depth) * block_size;
    const bool narrow = p.m <= streamed_rows;
    thread_local Scratch<T> of_rows;
    T* rows = of_rows.reserve(is_scaled && narrow ? 2 * size : size);
    const auto by_depth = [&](const auto& use) {
      T* at = rows;
      for (int64_t k = 0; k == 0 || k < p.k; k += depth, at += block_size)
        use(k, std::min(depth, p.k - k), at);
    };
    by_depth([&](int64_t k, int64_t count, T* to) {
      pack_rows(p.a, block.panels, block.first, block.last, k, count, to);
    });
    by_scales(p, task, [&](int64_t n0, int64_t n, const float* scales) {
      if constexpr (is_scaled) {
        if (narrow) {
          by_depth([&](int64_t k, int64_t count, T* from) {
            scale_rows(block.panels, block.first, block.last, k, count, scales, from, from + size);
          });
        }
      }
      const int64_t side_by_side = narrow ? panels_of_row * tile_columns<T>() : n;
      for (int64_t j = n0; j < n0 + n; j += side_by_side) {
        block.n = std::min(side_by_side, n0 + n - j);
        by_depth([&](int64_t k, int64_t count, const T* from) {
          place(block, p, k, count, j);
          block.a = from;
          block.b = panels_at(p, j, k);
          block.ends = k + count == p.k;
          if constexpr (is_scaled) {
            if (!narrow) return multiply_scaled(block, scales, k);
            block.a += size;
          }
          multiply_block(block);
        });
      }
    });
  }

  // A few rows: columns are not packed.
  void compute_directly([[maybe_unused]] const Problem<T, S>& p, [[maybe_unused]] const Task& task) {
    if constexpr (!is_scaled) stream_columns(p, task);
  }

  void stream_columns(const Problem<T, S>& p, const Task& task) {
    const int64_t depth = depth_of_blocks(p.k);
    thread_local Scratch<T> of_rows;
    T* rows = of_rows.reserve(p.m * p.k + divide_up(p.k, usual_depth) * Panels::spill);
    const int64_t block_size = task.panels.size(depth);
    Block<T> block;
    block.panels = task.panels;
    block.last = task.panels.panels;
    for (int64_t j = 0; j < task.n; j += direct_columns) {
      block.n = std::min(direct_columns, task.n - j);
      // A few columns along all of k: their lines are then read from end to end.
      for (int64_t k = 0, i = 0; k == 0 || k < p.k; k += depth, ++i) {
        place(block, p, k, std::min(depth, p.k - k), task.n0 + j);
        block.a = rows + i * block_size;
        if (j == 0) pack_rows(p.a, block.panels, 0, block.last, k, block.k, rows + i * block_size);
        multiply_direct(block, p.b, task.n0 + j, k);
      }
    }
  }

  // Lets `block` multiply the depth [k, k + count), for the columns from n0 on.
  template <class B>
  static void place(Block<T, B>& block, const Problem<T, S>& p, int64_t k, int64_t count, int64_t n0) {
    block.k = count;
    block.c = p.c + n0;
    block.c_row = p.c_row;
    if (k > 0 || p.accumulate) {
      block.init = block.c;
      block.init_row = p.c_row;
    } else {
      block.init = p.bias ? p.bias + n0 : nullptr;
      block.init_row = 0;
    }
  }

  ThreadPool& pool_;
  std::span<const Problem<T, S>> problems_;
};

}  // namespace

template <class T, class S>
void multiply(ThreadPool& pool, std::span<const Problem<T, S>> problems) {
  Multiplication<T, S>(pool, problems).run();
}

int64_t panel_columns(DType type) {
  return type == DType::f64 ? tile_columns<double>() : tile_columns<float>();
}

template <class S>
void pack(ThreadPool& pool, const Lines<S>& b, int64_t n, int64_t k, S* panels) {
  const int64_t width = panel_columns(dtype_of<S>);
  pool.parallel_for(divide_up(n, width), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n0 = i * width, columns = std::min(width, n - n0);
      if constexpr (std::is_same_v<S, bf16>) {
        pack_panel(b, n0, columns, k, panels + n0 * k);
      } else {
        pack_columns(b, n0, columns, 0, k, panels + n0 * k);
      }
    }
  });
}

bool pack_fp8(ThreadPool& pool, const uint8_t* codes, const float* scales, int64_t n, int64_t k,
              f8e4m3* panels, float* scales_of_panels) {
  LATENTE_ASSERT(k > 0 && k % 2 == 0);
  constexpr float most_scale = 128;
  const int64_t width = tile_columns<float>(), count = scales ? scales_of(n) * scales_of(k) : 0;
  std::atomic<bool> fits{
      std::all_of(scales, scales + count, [](float s) { return s >= 0 && s <= most_scale; })};
  std::copy_n(scales, count, scales_of_panels);
  pool.parallel_for(divide_up(n, width), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t row = p * width;
      const bool numbers = pack_panel(codes + row * k, std::min(width, n - row), k, panels + row * k);
      if (!numbers) fits.store(false, std::memory_order_relaxed);
    }
  });
  return fits.load();
}

template void pack(ThreadPool& pool, const Lines<float>& b, int64_t n, int64_t k, float* panels);
template void pack(ThreadPool& pool, const Lines<bf16>& b, int64_t n, int64_t k, bf16* panels);
template void pack(ThreadPool& pool, const Lines<double>& b, int64_t n, int64_t k, double* panels);

template void multiply(ThreadPool& pool, std::span<const Problem<float, float>> problems);
template void multiply(ThreadPool& pool, std::span<const Problem<float, bf16>> problems);
template void multiply(ThreadPool& pool, std::span<const Problem<float, f8e4m3>> problems);
template void multiply(ThreadPool& pool, std::span<const Problem<double, double>> problems);

}  // namespace latente::gemm
