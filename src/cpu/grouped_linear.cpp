// A linear layer an expert: the rows of expert e are offsets[e] <= r < offsets[e + 1].
#include <span>
#include <vector>

#include "cpu/cpu_backend.h"
#include "cpu/gemm.h"
#include "cpu/quantised.h"

namespace latente {
namespace {

using gemm::Problem;

// Calls problem(e, begin, end) for each expert and solves the problems it returns.
template <class T, class S, class MakeProblem>
void solve(ThreadPool& pool, const View& offsets, const MakeProblem& problem) {
  thread_local std::vector<Problem<T, S>> problems;
  problems.clear();
  const int32_t* offset = offsets.as<int32_t>();
  for (int64_t e = 0; e + 1 < offsets.count(); ++e) problems.push_back(problem(e, offset[e], offset[e + 1]));
  gemm::multiply<T, S>(pool, problems);
}

// Rows begin.. of x as sorted, or found through `rows`.
template <class T>
gemm::Lines<T> sorted_lines(const View& x, const View& rows, int64_t begin, bool along_k) {
  if (rows) return {x.as<T>(), x.stride(0), along_k, rows.as<int32_t>() + begin};
  return {x.as<T>() + begin * x.stride(0), x.stride(0), along_k};
}

template <class T, class S>
void forward(ThreadPool& pool, const View& x, const View& rows, const View& offsets, const View& w,
             const View& out) {
  solve<T, S>(pool, offsets, [&](int64_t e, int64_t begin, int64_t end) {
    Problem<T, S> problem{.m = end - begin,
                          .n = w[1],
                          .k = w[2],
                          .a = sorted_lines<T>(x, rows, begin, true),
                          .c = out.as<T>() + begin * out.stride(0),
                          .c_row = out.stride(0)};
    if (w.layout == Layout::panels) {
      problem.panels = w.panels_as<S>() + e * w.stride(0);
      problem.panel = w.stride(1) * w.stride(2);
    } else {
      problem.b = {w.as<S>() + e * w.stride(0), w.stride(1), true};
    }
    return problem;
  });
}

void forward_quantised(ThreadPool& pool, const View& x, const View& rows, const View& offsets, const View& w,
                       const View& out) {
  thread_local std::vector<quantised::Problem> problems;
  problems.clear();
  const int32_t* offset = offsets.as<int32_t>();
  for (int64_t e = 0; e + 1 < offsets.count(); ++e) {
    if (offset[e] == offset[e + 1]) continue;
    problems.push_back({.m = offset[e + 1] - offset[e],
                        .n = w[1],
                        .k = w[2],
                        .a = sorted_lines<float>(x, rows, offset[e], true),
                        .panels = static_cast<const std::byte*>(w.data) + e * w.stride(0),
                        .c = out.as<float>() + offset[e] * out.stride(0),
                        .c_row = out.stride(0)});
  }
  quantised::multiply(pool, quantised::form_of(w), problems);
}

template <class T, class S>
void backward_input(ThreadPool& pool, const View& d_out, const View& offsets, const View& w,
                    const Grad& d_x) {
  solve<T, S>(pool, offsets, [&](int64_t e, int64_t begin, int64_t end) {
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
  solve<T, T>(pool, offsets, [&](int64_t e, int64_t begin, int64_t end) {
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
  LATENTE_ASSERT(x[1] == w[2] && out[1] == w[1] && out[0] == (rows ? rows.count() : x[0]));
  if (is_quantised(w.dtype)) {
    forward_quantised(pool_, x, rows, offsets, w, out);
  } else if (x.dtype == DType::f64) {
    forward<double, double>(pool_, x, rows, offsets, w, out);
  } else if (w.dtype == DType::bf16) {
    forward<float, bf16>(pool_, x, rows, offsets, w, out);
  } else {
    forward<float, float>(pool_, x, rows, offsets, w, out);
  }
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
