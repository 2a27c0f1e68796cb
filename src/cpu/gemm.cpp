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

// Rows [m, m + panels.rows) of a problem and its depth [k, k + depth): a part of `a` that is packed at once.
struct Piece {
  size_t problem = 0;
  int64_t m = 0, k = 0, count = 0;
  Panels panels;
  int64_t memory = 0;  // where its packed form begins
  int64_t first_pack = 0, first_task = 0;
  int64_t panels_a_task = 0, tasks_across = 0, tasks_down = 0;

  // A packed piece is a block after another; all but the last have full depth.
  int64_t block(int64_t i) const { return memory + i * panels.size(depth); }
  int64_t blocks() const { return std::max<int64_t>((count + depth - 1) / depth, 1); }
  int64_t block_depth(int64_t i) const { return std::min(depth, count - i * depth); }
  int64_t size() const { return blocks() * panels.size(depth); }
};

constexpr int64_t packed_elements = 2 << 20;  // of `a` at once: together they stay in the last-level cache
constexpr int64_t packed_depth = 16 * depth;  // of a piece
constexpr int64_t widest = 256, usual = 64;   // columns of b that a task packs
constexpr int64_t least_rows = 96;            // rows that repay packing b, where there are so many
constexpr int64_t tasks_a_thread = 8;

template <class Items>
auto& piece_of(Items& pieces, int64_t Piece::*first, int64_t index) {
  auto after = std::upper_bound(pieces.begin(), pieces.end(), index,
                                [first](int64_t i, const Piece& p) { return i < p.*first; });
  return *(after - 1);
}

template <class T, class S>
class Multiplication {
 public:
  Multiplication(ThreadPool& pool, std::span<const Problem<T, S>> problems)
      : pool_(pool), problems_(problems), pieces_(reused_pieces()) {}

  void run() {
    int64_t deepest = 0;
    for (const auto& p : problems_) deepest = std::max(deepest, p.k);
    // Depth outermost: each element of c is then added to in rising k.
    for (int64_t k = 0; k == 0 || k < deepest; k += packed_depth) {
      for (size_t i = 0; i < problems_.size(); ++i) {
        const auto& p = problems_[i];
        if (p.m > 0 && p.n > 0 && (k == 0 || k < p.k)) add(i, k);
      }
      flush();
    }
  }

 private:
  static std::vector<Piece>& reused_pieces() {
    thread_local std::vector<Piece> pieces;
    pieces.clear();
    return pieces;
  }

  void add(size_t index, int64_t k) {
    const auto& problem = problems_[index];
    const int64_t count = std::min(packed_depth, problem.k - k);
    const int64_t parts =
        std::max<int64_t>((problem.m * count + packed_elements / 2) / packed_elements, 1);  // of equal height
    for (int64_t part = 0; part < parts; ++part) {
      Piece piece;
      piece.problem = index;
      piece.m = part * problem.m / parts;
      piece.k = k;
      piece.count = count;
      const int64_t rows = (part + 1) * problem.m / parts - piece.m;
      piece.panels = {rows, (rows + tile_rows() - 1) / tile_rows()};
      if (memory_ + piece.size() > 2 * packed_elements) flush();
      piece.memory = memory_;
      memory_ += piece.size();
      pieces_.push_back(piece);
    }
  }

  void flush() {
    if (pieces_.empty()) return;
    thread_local Scratch<T> scratch;
    packed_ = scratch.reserve(memory_);
    pack();
    divide();
    compute();
    pieces_.clear();
    memory_ = 0;
  }

  // Where lines run along m, wide groups touch few pages.
  int64_t pack_group(const Piece& piece) const { return problems_[piece.problem].a.along_k ? 16 : 64; }

  void pack() {
    int64_t tasks = 0;
    for (Piece& piece : pieces_) {
      piece.first_pack = tasks;
      const int64_t group = pack_group(piece);
      tasks += (piece.panels.panels + group - 1) / group * piece.blocks();
    }
    const bool alone = memory_ <= 1 << 14;  // less work than waking threads
    pool_.parallel_for(tasks, alone ? tasks : 1, [this](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const Piece& piece = piece_of(pieces_, &Piece::first_pack, task);
        const int64_t i = (task - piece.first_pack) % piece.blocks(), group = pack_group(piece);
        const int64_t first = (task - piece.first_pack) / piece.blocks() * group;
        const int64_t last = std::min(first + group, piece.panels.panels);
        pack_rows(problems_[piece.problem].a, piece.m, piece.panels, first, last, piece.k + i * depth,
                  piece.block_depth(i), packed_ + piece.block(i));
      }
    });
  }

  int64_t tasks_across(int64_t width) const {
    int64_t tasks = 0;
    for (const Piece& piece : pieces_) tasks += (problems_[piece.problem].n + width - 1) / width;
    return tasks;
  }

  void divide() {
    const int64_t wanted = pool_.size() == 1 ? 1 : tasks_a_thread * pool_.size();
    const int64_t narrowest = tile_columns<T>();
    double work = 0;
    int64_t rows = 0;
    for (const Piece& piece : pieces_) {
      rows = std::max(rows, piece.panels.rows);
      work += static_cast<double>(piece.panels.rows * problems_[piece.problem].n) *
              static_cast<double>(piece.count);
    }
    width_ = widest;
    const int64_t limit = rows > least_rows ? std::max(usual, narrowest) : narrowest;
    while (width_ > limit && tasks_across(width_) < wanted) width_ /= 2;
    tasks_ = 0;
    for (Piece& piece : pieces_) {
      const double row_work = static_cast<double>(width_ * std::max<int64_t>(piece.count, 1));
      const auto fair = static_cast<int64_t>(work / static_cast<double>(wanted) / row_work);
      const int64_t height = std::clamp(fair, std::min(least_rows, piece.panels.rows), piece.panels.rows);
      piece.tasks_down = (piece.panels.rows + height - 1) / height;
      piece.tasks_across = (problems_[piece.problem].n + width_ - 1) / width_;
      piece.first_task = tasks_;
      tasks_ += piece.tasks_down * piece.tasks_across;
    }
  }

  void compute() {
    pool_.parallel_for(tasks_, 1, [this](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) compute(task);
    });
  }

  void compute(int64_t task) {
    const Piece& piece = piece_of(pieces_, &Piece::first_task, task);
    const auto& p = problems_[piece.problem];
    const int64_t across = (task - piece.first_task) / piece.tasks_down;
    const int64_t down = (task - piece.first_task) % piece.tasks_down;
    const int64_t n0 = across * width_, n = std::min(width_, p.n - n0);
    Block<T> block;
    block.panels = piece.panels;
    block.first = down * piece.panels.panels / piece.tasks_down;
    block.last = (down + 1) * piece.panels.panels / piece.tasks_down;
    block.c_row = p.c_row;
    if (is_direct(block.panels, p.b)) {
      // A few columns along all of k: their lines are then read from end to end.
      for (int64_t j = 0; j < n; j += direct_columns) {
        block.n = std::min(direct_columns, n - j);
        for (int64_t i = 0; i < piece.blocks(); ++i) {
          place(block, piece, i, n0 + j);
          multiply_direct(block, p.b, n0 + j, piece.k + i * depth);
        }
      }
    } else {
      thread_local Scratch<T> scratch;
      T* columns = scratch.reserve(widest * depth);
      block.b = columns;
      block.n = n;
      for (int64_t i = 0; i < piece.blocks(); ++i) {
        place(block, piece, i, n0);
        pack_columns(p.b, n0, n, piece.k + i * depth, block.k, columns);
        multiply_block(block);
      }
    }
    if (p.bias && p.accumulate && piece.k + piece.count == p.k) {
      T* c = p.c + piece.m * p.c_row + n0;
      for (int64_t r = piece.panels.start(block.first); r < piece.panels.start(block.last); ++r) {
        for (int64_t j = 0; j < n; ++j) c[r * p.c_row + j] += p.bias[n0 + j];
      }
    }
  }

  // Lets `block` multiply the piece's block i of depth, for the columns from n0 on.
  void place(Block<T>& block, const Piece& piece, int64_t i, int64_t n0) const {
    const auto& p = problems_[piece.problem];
    block.k = piece.block_depth(i);
    block.a = packed_ + piece.block(i);
    block.c = p.c + piece.m * p.c_row + n0;
    const bool first = piece.k == 0 && i == 0;
    if (!first || p.accumulate) {
      block.init = block.c;
      block.init_row = p.c_row;
    } else {
      block.init = p.bias ? p.bias + n0 : nullptr;
      block.init_row = 0;
    }
  }

  ThreadPool& pool_;
  std::span<const Problem<T, S>> problems_;
  std::vector<Piece>& pieces_;
  int64_t memory_ = 0;
  T* packed_ = nullptr;
  int64_t width_ = 0, tasks_ = 0;
};

}  // namespace

template <class T, class S>
void multiply(ThreadPool& pool, std::span<const Problem<T, S>> problems) {
  Multiplication<T, S>(pool, problems).run();
}

template void multiply(ThreadPool& pool, std::span<const Problem<float, float>> problems);
template void multiply(ThreadPool& pool, std::span<const Problem<float, bf16>> problems);
template void multiply(ThreadPool& pool, std::span<const Problem<double, double>> problems);

}  // namespace latente::gemm
