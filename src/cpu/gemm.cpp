#include "cpu/gemm.h"

#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "cpu/gemm_kernels.h"

namespace latente::gemm {
namespace {

// Memory that lives as long as the calling thread and only grows.
template <class T>
class Scratch {
 public:
  T* reserve(int64_t count) {
    if (size_ < count) {
      data_.reset();
      size_ = 0;
      const size_t bytes = static_cast<size_t>(count) * sizeof(T);
      data_.reset(static_cast<T*>(::operator new(bytes, alignment)));
      size_ = count;
      if (bytes >= huge_page) madvise(data_.get(), bytes, MADV_HUGEPAGE);  // a hint: may fail
    }
    return data_.get();
  }

 private:
  static constexpr size_t huge_page = 2 << 20;
  static constexpr std::align_val_t alignment{4096};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, alignment); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

// How a problem is divided into tasks: across its columns and down its panels of rows.
struct Division {
  size_t problem = 0;
  Panels panels;
  int64_t depth = 0;  // of a block of k: the last may be shallower
  int64_t first_task = 0, across = 1, down = 1;
};

struct Extent {
  int64_t rows, columns;
};
constexpr Extent largest = {512, 384};     // of a task: its columns and some rows fill the second-level cache
constexpr Extent comfortable = {96, 192};  // repays packing
constexpr Extent smallest = {24, 1};       // where there would be fewer tasks than threads
constexpr int64_t few_panels = 2;          // of rows: less work than widening the columns
constexpr int64_t panels_at_once = 12;     // of rows
constexpr int64_t tasks_a_thread = 2;      // more would pack more
constexpr double least_work = 1024 * 1024;  // multiply-adds that repay waking a thread

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of a problem have equal depth, but for the last. A panel of b should leave room beside it in the
// first-level cache, but one block is worth more than two low ones.
int64_t depth_of_blocks(int64_t k) {
  if (k <= most_depth) return std::max<int64_t>(k, 1);
  const int64_t blocks = divide_up(k, usual_depth);
  return divide_up(divide_up(k, blocks), 8) * 8;
}

// Each task packs all it needs for itself. Packing a shared operand once would save work, but writing to what
// another core has read can be ten times slower than packing it again.
template <class T, class S>
class Multiplication {
 public:
  Multiplication(ThreadPool& pool, std::span<const Problem<T, S>> problems)
      : pool_(pool), problems_(problems), divisions_(reused_divisions()) {}

  void run() {
    double work = 0;
    for (const auto& p : problems_) work += work_of(p.m, p.n, p.k);
    for (size_t i = 0; i < problems_.size(); ++i) {
      if (problems_[i].m > 0 && problems_[i].n > 0) divide(i, work / pool_.size());
    }
    // Small problems are handed out several at a time.
    const auto together =
        static_cast<int64_t>(std::min(least_work / std::max(work, 1.0), 1.0) * static_cast<double>(tasks_));
    pool_.parallel_for(tasks_, together, [this](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) compute(task);
    });
  }

 private:
  static std::vector<Division>& reused_divisions() {
    thread_local std::vector<Division> divisions;
    divisions.clear();
    return divisions;
  }

  // A few rows take as long as eight: as long as it takes to read the columns.
  static double work_of(int64_t m, int64_t n, int64_t k) {
    return static_cast<double>(std::max<int64_t>(m, 8) * n) * static_cast<double>(k);
  }

  // Tasks are nearly square, since each packs its rows and its columns. `share` is a thread's part of all
  // work.
  void divide(size_t index, double share) {
    const auto& p = problems_[index];
    int64_t width = std::min(p.n, largest.columns), height = std::min(p.m, largest.rows);
    const auto cut = [&](double work, Extent least) {
      while (work_of(height, width, p.k) > std::max(work, least_work)) {
        if (height >= 2 * least.rows && height >= width) {
          height /= 2;
        } else if (width >= 2 * std::max(least.columns, tile_columns<T>())) {
          width /= 2;
        } else if (height >= 2 * least.rows) {
          height /= 2;
        } else {
          break;
        }
      }
    };
    if (pool_.size() > 1) {
      cut(share / tasks_a_thread, {comfortable.rows, p.m > comfortable.rows ? comfortable.columns : 1});
      cut(share, smallest);
    }
    Division division;
    division.problem = index;
    division.panels = Panels(p.m, tile_rows());
    division.depth = depth_of_blocks(p.k);
    division.first_task = tasks_;
    division.across = divide_up(p.n, width);
    division.down = divide_up(p.m, height);
    tasks_ += division.across * division.down;
    divisions_.push_back(division);
  }

  void compute(int64_t task) {
    auto after = std::upper_bound(divisions_.begin(), divisions_.end(), task,
                                  [](int64_t i, const Division& d) { return i < d.first_task; });
    const Division& division = *(after - 1);
    const auto& p = problems_[division.problem];
    const int64_t across = (task - division.first_task) % division.across;
    const int64_t down = (task - division.first_task) / division.across;
    const int64_t unit = tile_columns<T>(), units = divide_up(p.n, unit);
    const int64_t n0 = across * units / division.across * unit;
    const int64_t n = std::min((across + 1) * units / division.across * unit, p.n) - n0;
    const int64_t first = down * division.panels.panels / division.down;
    const int64_t last = (down + 1) * division.panels.panels / division.down;
    if (n <= 0) return;
    if (p.panels && (std::is_same_v<T, S> || last - first <= few_panels)) {
      compute_packed(division, first, last, n0, n);
    } else if (!p.panels && is_direct(division.panels, p.b)) {
      compute_directly(division, n0, n);
    } else {
      compute(division, first, last, n0, n);
    }
    if (p.bias && p.accumulate) {
      for (int64_t r = division.panels.start(first); r < division.panels.start(last); ++r) {
        for (int64_t j = n0; j < n0 + n; ++j) p.c[r * p.c_row + j] += p.bias[j];
      }
    }
  }

  void compute(const Division& division, int64_t first, int64_t last, int64_t n0, int64_t n) {
    const auto& p = problems_[division.problem];
    thread_local Scratch<T> of_rows, of_columns;
    T* rows = of_rows.reserve(panels_at_once * (tile_rows() * most_depth + Panels::spill));
    T* columns = of_columns.reserve(largest.columns * most_depth);
    Block<T> block;
    block.panels = division.panels;
    block.a = rows;
    block.b = columns;
    block.n = n;
    for (int64_t k = 0; k == 0 || k < p.k; k += division.depth) {
      place(block, p, k, std::min(division.depth, p.k - k), n0);
      block.b_panel = block.k * tile_columns<T>();
      pack_columns(p, n0, n, k, block.k, columns);
      for (int64_t i = first; i < last; i += panels_at_once) {
        block.panels.origin = block.first = i;
        block.last = std::min(i + panels_at_once, last);
        pack_rows(p.a, block.panels, block.first, block.last, k, block.k, rows);
        multiply_block(block);
      }
    }
  }

  static const S* panels_at(const Problem<T, S>& p, int64_t n0, int64_t k) {
    return p.panels + n0 / tile_columns<T>() * p.panel + k * tile_columns<T>();
  }

  static void pack_columns(const Problem<T, S>& p, int64_t n0, int64_t n, int64_t k, int64_t count, T* to) {
    if constexpr (!std::is_same_v<T, S>) {
      if (p.panels) {
        return widen_panels(panels_at(p, n0, k), p.panel, n, count, to);
      }
    }
    gemm::pack_columns(p.b, n0, n, k, count, to);
  }

  // Columns were packed long ago.
  void compute_packed(const Division& division, int64_t first, int64_t last, int64_t n0, int64_t n) {
    const auto& p = problems_[division.problem];
    thread_local Scratch<T> of_rows;
    T* rows = of_rows.reserve(panels_at_once * (tile_rows() * most_depth + Panels::spill));
    Block<T, S> block;
    block.panels = division.panels;
    block.a = rows;
    block.b_panel = p.panel;
    block.n = n;
    for (int64_t k = 0; k == 0 || k < p.k; k += division.depth) {
      place(block, p, k, std::min(division.depth, p.k - k), n0);
      block.b = panels_at(p, n0, k);
      for (int64_t i = first; i < last; i += panels_at_once) {
        block.panels.origin = block.first = i;
        block.last = std::min(i + panels_at_once, last);
        pack_rows(p.a, block.panels, block.first, block.last, k, block.k, rows);
        multiply_block(block);
      }
    }
  }

  // A few rows: columns are not packed.
  void compute_directly(const Division& division, int64_t n0, int64_t n) {
    const auto& p = problems_[division.problem];
    thread_local Scratch<T> of_rows;
    T* rows = of_rows.reserve(p.m * p.k + divide_up(p.k, usual_depth) * Panels::spill);
    const int64_t block_size = division.panels.size(division.depth);
    Block<T> block;
    block.panels = division.panels;
    block.last = division.panels.panels;
    for (int64_t j = 0; j < n; j += direct_columns) {
      block.n = std::min(direct_columns, n - j);
      // A few columns along all of k: their lines are then read from end to end.
      for (int64_t k = 0, i = 0; k == 0 || k < p.k; k += division.depth, ++i) {
        place(block, p, k, std::min(division.depth, p.k - k), n0 + j);
        block.a = rows + i * block_size;
        if (j == 0) pack_rows(p.a, block.panels, 0, block.last, k, block.k, rows + i * block_size);
        multiply_direct(block, p.b, n0 + j, k);
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
  std::vector<Division>& divisions_;
  int64_t tasks_ = 0;
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

template void pack(ThreadPool& pool, const Lines<float>& b, int64_t n, int64_t k, float* panels);
template void pack(ThreadPool& pool, const Lines<bf16>& b, int64_t n, int64_t k, bf16* panels);
template void pack(ThreadPool& pool, const Lines<double>& b, int64_t n, int64_t k, double* panels);

template void multiply(ThreadPool& pool, std::span<const Problem<float, float>> problems);
template void multiply(ThreadPool& pool, std::span<const Problem<float, bf16>> problems);
template void multiply(ThreadPool& pool, std::span<const Problem<double, double>> problems);

}  // namespace latente::gemm
