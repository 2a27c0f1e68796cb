// How products are divided among threads. A task is a piece of one product: some panels of its rows and a
// range of its columns. Tasks are nearly square, since each packs its rows and its columns for itself:
// packing a shared operand once would save work, but writing to what another core has read can be ten times
// slower.
//
// Products of a few rows are bound by reading their columns. Each thread has a run of these to itself,
// through all products in their order, so that what it reads next is known.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "base/threads.h"
#include "cpu/gemm_panels.h"

namespace latente::gemm {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Tile {
  int64_t (*rows)(int64_t m);  // for a product of m rows
  int64_t columns;
  int64_t streamed;  // columns that one row reads side by side, a multiple of `columns`
};

struct Task {
  size_t problem = 0;
  Panels panels;                // of the problem's rows
  int64_t first = 0, last = 0;  // of them
  int64_t n0 = 0, n = 0;        // columns; n0 is a multiple of the tile's
};

class Tasks {
 public:
  struct Extent {
    int64_t rows, columns;
  };
  static constexpr Extent largest = {512, 384};  // its columns and some rows fill the second-level cache

  // Problems have extents m, n and k.
  template <class Problem>
  Tasks(ThreadPool& pool, std::span<const Problem> problems, Tile tile) : pool_(pool), tile_(tile) {
    double work = 0;
    for (const Problem& p : problems) {
      work += work_of(p.m, p.n, p.k);
      streams_ = streams_ && p.m <= few_rows;
    }
    divisions_.clear();
    for (size_t i = 0; i < problems.size(); ++i) {
      const Problem& p = problems[i];
      if (p.m <= 0 || p.n <= 0) continue;
      if (streams_) {
        add_stream(i, p.m, p.n, p.k, work / (pool.size() * pieces_a_thread));
      } else {
        divide(i, p.m, p.n, p.k, work / pool.size());
      }
    }
    // Small problems are handed out several at a time.
    together_ =
        static_cast<int64_t>(std::min(least_work / std::max(work, 1.0), 1.0) * static_cast<double>(count_));
  }

  // body(const Task&, const Task& next) for each, by whoever is free; `next` is what its thread will probably
  // do after it, or has n = 0.
  template <class Body>
  void run(const Body& body) {
    if (streams_) return stream(body);
    pool_.parallel_for(count_, together_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (const Task task = at(i); task.n > 0) body(task, Task());
      }
    });
  }

 private:
  // A problem's tasks: `across` its columns and `down` its panels of rows.
  struct Division {
    size_t problem = 0;
    Panels panels;
    int64_t n = 0;
    int64_t first_task = 0, across = 1, down = 1;
    int64_t unit = 1;  // columns: a multiple of it begins a task
  };
  static constexpr Extent comfortable = {96, 192};  // repays packing
  static constexpr Extent smallest = {24, 1};       // where there would be fewer tasks than threads
  static constexpr int64_t tasks_a_thread = 2;      // more would pack more
  static constexpr int64_t few_rows = 8;            // hardly need packing
  static constexpr int64_t pieces_a_thread = 64;    // of a stream: how evenly it can be shared
  static constexpr int64_t least_units = 4;         // of a thread, to be as wide as what is read side by side
  static constexpr double least_work = 384 * 1024;  // multiply-adds that repay waking a thread

  static std::vector<Division>& reused_divisions() {
    thread_local std::vector<Division> divisions;
    return divisions;
  }

  // A few rows take as long as eight: as long as it takes to read the columns.
  static double work_of(int64_t m, int64_t n, int64_t k) {
    return static_cast<double>(std::max<int64_t>(m, few_rows) * n) * static_cast<double>(k);
  }

  // `share` is a thread's part of all work.
  void divide(size_t index, int64_t m, int64_t n, int64_t k, double share) {
    int64_t width = std::min(n, largest.columns), height = std::min(m, largest.rows);
    const auto cut = [&](double work, Extent least) {
      while (work_of(height, width, k) > std::max(work, least_work)) {
        if (height >= 2 * least.rows && height >= width) {
          height /= 2;
        } else if (width >= 2 * std::max(least.columns, tile_.columns)) {
          width /= 2;
        } else if (height >= 2 * least.rows) {
          height /= 2;
        } else {
          break;
        }
      }
    };
    if (pool_.size() > 1) {
      cut(share / tasks_a_thread, {comfortable.rows, m > comfortable.rows ? comfortable.columns : 1});
      cut(share, smallest);
    }
    Division division;
    division.problem = index;
    division.panels = Panels(m, tile_.rows(m));
    division.n = n;
    division.unit = tile_.columns;
    division.first_task = count_;
    division.across = divide_up(n, width);
    division.down = divide_up(m, height);
    count_ += division.across * division.down;
    divisions_.push_back(division);
  }

  // Pieces of about `work`.
  void add_stream(size_t index, int64_t m, int64_t n, int64_t k, double work) {
    Division division;
    division.problem = index;
    division.panels = Panels(m, tile_.rows(m));
    division.n = n;
    // Pieces that begin and end within what is read side by side would be read a few columns at a time.
    division.unit = n >= least_units * pool_.size() * tile_.streamed ? tile_.streamed : tile_.columns;
    const int64_t units = divide_up(n, division.unit);
    division.first_task = count_;
    division.across =
        std::clamp(static_cast<int64_t>(work_of(m, n, k) / work), divide_up(n, largest.columns), units);
    count_ += division.across;
    divisions_.push_back(division);
  }

  template <class Body>
  void stream(const Body& body) {
    if (count_ == 0) return;
    const auto pieces = [&](int64_t begin, int64_t end) {
      size_t division = division_of(begin);
      for (Task task = stretch(division, begin, end); task.n > 0;) {
        // Whoever has come to the end of a run of pieces probably goes on behind it.
        const bool last = begin == end;
        const Task next = begin == count_ ? Task() : stretch(division, begin, last ? count_ : end);
        body(task, next);
        if (last) break;
        task = next;
      }
    };
    if (together_ == count_) {
      pieces(0, count_);
    } else {
      pool_.parallel_shares(count_, pieces);
    }
  }

  // Pieces from `begin` on, up to `end`, that are neighbouring columns of one product; moves `begin` and
  // `division` behind them.
  Task stretch(size_t& division, int64_t& begin, int64_t end) const {
    const Division& d = divisions_[division];
    const auto column = [&](int64_t index) {
      const int64_t units = divide_up(d.n, d.unit);
      return std::min((index - d.first_task) * units / d.across * d.unit, d.n);
    };
    Task task;
    task.problem = d.problem;
    task.panels = d.panels;
    task.last = d.panels.panels;
    task.n0 = column(begin);
    const int64_t ending = d.first_task + d.across;
    do {
      ++begin;
    } while (begin < std::min(end, ending) && column(begin + 1) - task.n0 <= largest.columns);
    task.n = column(begin) - task.n0;
    if (begin == ending) ++division;
    return task;
  }

  size_t division_of(int64_t index) const {
    const auto after = std::upper_bound(divisions_.begin(), divisions_.end(), index,
                                        [](int64_t i, const Division& d) { return i < d.first_task; });
    return static_cast<size_t>(after - divisions_.begin()) - 1;
  }

  Task at(int64_t index) const {
    const Division& division = divisions_[division_of(index)];
    const int64_t across = (index - division.first_task) % division.across;
    const int64_t down = (index - division.first_task) / division.across;
    const int64_t units = divide_up(division.n, division.unit);
    Task task;
    task.problem = division.problem;
    task.panels = division.panels;
    task.first = down * division.panels.panels / division.down;
    task.last = (down + 1) * division.panels.panels / division.down;
    task.n0 = across * units / division.across * division.unit;
    task.n = std::min((across + 1) * units / division.across * division.unit, division.n) - task.n0;
    return task;
  }

  ThreadPool& pool_;
  Tile tile_;
  std::vector<Division>& divisions_ = reused_divisions();
  int64_t count_ = 0, together_ = 1;
  bool streams_ = true;
};

}  // namespace latente::gemm
