// Forward products with weights of any type and layout, to be solved together: the threads meet once for all
// whose weights are of one kind (quantised in any form, or of one float type) instead of once for each.
#pragma once

#include <vector>

#include "cpu/gemm.h"
#include "cpu/quantised.h"
#include "tensor/backend.h"

namespace latente {

class Products {
 public:
  // None yet. One object at a time in a thread.
  explicit Products(ThreadPool& pool);

  // out (+)= x · wᵀ + bias: Backend::linear. No two products may write the same elements.
  void add(const View& x, const View& w, const View& bias, const Grad& out);
  // out[r] = x[rows[r]] · w[e]ᵀ for begin <= r < end: a part of Backend::grouped_linear. w[e] is in memory.
  void add_expert(const View& x, const View& rows, int64_t begin, int64_t end, const View& w, int64_t e,
                  const View& out);
  // Of each expert that has rows.
  void add_experts(const View& x, const View& rows, const View& offsets, const View& w, const View& out);

  void solve();

 private:
  struct Lists {
    std::vector<quantised::Problem> quantised;
    std::vector<gemm::Problem<float, float>> full;
    std::vector<gemm::Problem<float, bf16>> half;
    std::vector<gemm::Problem<float, f8e4m3>> quarter;
    std::vector<gemm::Problem<double, double>> exact;
  };
  static Lists& reused_lists();
  // Calls fill(problem, number of the problem's type) for a new problem of w's kind, with its matrix e.
  template <class Fill>
  void append(const View& x, const View& w, int64_t e, const Fill& fill);

  ThreadPool& pool_;
  Lists& lists_ = reused_lists();
};

}  // namespace latente
