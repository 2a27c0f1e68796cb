// A linear layer an expert: the rows of expert e are offsets[e] <= r < offsets[e + 1].
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "base/residency.h"
#include "cpu/cpu_backend.h"
#include "cpu/products.h"

namespace latente {
namespace {

using gemm::Problem;

// Experts, or the numbers of their pieces.
struct Chosen {
  std::span<const int32_t> numbers;
  int32_t first = 0;  // of expert 0

  int64_t expert(int32_t number) const { return number - first; }
};

// Those with rows, valid until the next call.
std::span<int32_t> with_rows(const View& offsets) {
  thread_local std::vector<int32_t> experts;
  experts.clear();
  const int32_t* offset = offsets.as<int32_t>();
  for (int32_t e = 0; e + 1 < static_cast<int32_t>(offsets.count()); ++e) {
    if (offset[e] < offset[e + 1]) experts.push_back(e);
  }
  return experts;
}

Chosen all_of(const View& offsets) {
  thread_local std::vector<int32_t> experts;
  experts.resize(static_cast<size_t>(offsets.count() - 1));
  std::iota(experts.begin(), experts.end(), 0);
  return {experts};
}

// Calls products(chosen) for the experts with rows: for those in memory first, while others are read.
template <class Products>
void for_resident(const View& w, const View& offsets, const Products& products) {
  std::span<int32_t> experts = with_rows(offsets);
  if (!w.residency) return products(Chosen{experts});
  for (int32_t& number : experts) number += w.first_piece;
  while (!experts.empty()) {
    const auto there = experts.first(w.residency->await(experts));
    products(Chosen{there, w.first_piece});
    w.residency->release(there);
    experts = experts.subspan(there.size());
  }
}

// Calls problem(e, begin, end) for each expert and solves the problems it returns.
template <class T, class S, class MakeProblem>
void solve(ThreadPool& pool, const View& offsets, const Chosen& experts, const MakeProblem& problem) {
  thread_local std::vector<Problem<T, S>> problems;
  problems.clear();
  const int32_t* offset = offsets.as<int32_t>();
  for (int32_t number : experts.numbers) {
    const int64_t e = experts.expert(number);
    problems.push_back(problem(e, offset[e], offset[e + 1]));
  }
  gemm::multiply<T, S>(pool, problems);
}

// Rows begin.. of x as sorted, or found through `rows`.
template <class T>
gemm::Lines<T> sorted_lines(const View& x, const View& rows, int64_t begin, bool along_k) {
  if (rows) return {x.as<T>(), x.stride(0), along_k, rows.as<int32_t>() + begin};
  return {x.as<T>() + begin * x.stride(0), x.stride(0), along_k};
}

template <class T, class S>
void backward_input(ThreadPool& pool, const View& d_out, const View& offsets, const View& w,
                    const Grad& d_x) {
  solve<T, S>(pool, offsets, all_of(offsets), [&](int64_t e, int64_t begin, int64_t end) {
    return Problem<T, S>{.m = end - begin,
                         .n = w[2],
                         .k = w[1],
                         .a = sorted_lines<T>(d_out, {}, begin, true),
                         .b = {w.as<S>() + e * w.stride(0), w.stride(1), false},
                         .c = d_x.view.as<T>() + begin * d_x.view.stride(0),
                         .c_row = d_x.view.stride(0),
                         .accumulate = d_x.accumulate};
  });
}

template <class T>
void backward_weight(ThreadPool& pool, const View& d_out, const View& x, const View& rows,
                     const View& offsets, const Grad& d_w) {
  solve<T, T>(pool, offsets, all_of(offsets), [&](int64_t e, int64_t begin, int64_t end) {
    return Problem<T, T>{.m = d_out[1],
                         .n = x[1],
                         .k = end - begin,
                         .a = sorted_lines<T>(d_out, {}, begin, false),
                         .b = sorted_lines<T>(x, rows, begin, false),
                         .c = d_w.view.as<T>() + e * d_w.view.stride(0),
                         .c_row = d_w.view.stride(1),
                         .accumulate = d_w.accumulate};
  });
}

}  // namespace

void CpuBackend::grouped_linear(View x, View rows, View offsets, View w, View out) {
  LATENTE_ASSERT(w.shape.rank() == 3 && offsets.count() == w[0] + 1);
  LATENTE_ASSERT(out[0] == (rows ? rows.count() : x[0]));
  const int32_t* offset = offsets.as<int32_t>();
  for_resident(w, offsets, [&](const Chosen& experts) {
    Products products(pool_);
    for (int32_t number : experts.numbers) {
      const int64_t e = experts.expert(number);
      products.add_expert(x, rows, offset[e], offset[e + 1], w, e, out);
    }
    products.solve();
  });
}

void CpuBackend::will_read(View gate, View up, View down, View offsets) {
  if (!gate.residency) return;
  LATENTE_ASSERT(gate.residency == up.residency && gate.residency == down.residency);
  thread_local std::vector<int32_t> pieces;
  pieces.clear();
  const std::span<const int32_t> experts = with_rows(offsets);
  for (const View* w : {&gate, &up, &down}) {
    for (int32_t e : experts) pieces.push_back(w->first_piece + e);
  }
  gate.residency->expect(pieces);
}

void CpuBackend::grouped_linear_backward_input(View d_out, View offsets, View w, Grad d_x) {
  if (!d_x) return;
  LATENTE_ASSERT(w.shape.rank() == 3 && offsets.count() == w[0] + 1);
  LATENTE_ASSERT(d_out[1] == w[1] && d_x.view[1] == w[2] && d_x.view[0] == d_out[0]);
  if (d_out.dtype == DType::f64) {
    backward_input<double, double>(pool_, d_out, offsets, w, d_x);
  } else if (w.dtype == DType::bf16) {
    backward_input<float, bf16>(pool_, d_out, offsets, w, d_x);
  } else {
    backward_input<float, float>(pool_, d_out, offsets, w, d_x);
  }
}

void CpuBackend::grouped_linear_backward_weight(View d_out, View x, View rows, View offsets, Grad d_w) {
  if (!d_w) return;
  LATENTE_ASSERT(d_w.view.shape.rank() == 3 && offsets.count() == d_w.view[0] + 1);
  LATENTE_ASSERT(d_w.view[1] == d_out[1] && d_w.view[2] == x[1]);
  LATENTE_ASSERT(d_out[0] == (rows ? rows.count() : x[0]));
  if (d_out.dtype == DType::f64) {
    backward_weight<double>(pool_, d_out, x, rows, offsets, d_w);
  } else {
    backward_weight<float>(pool_, d_out, x, rows, offsets, d_w);
  }
}

}  // namespace latente
