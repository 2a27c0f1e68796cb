#include "cpu/products.h"

#include "base/residency.h"

namespace latente {
namespace {

// Where matrix e of a stack, or the only one, lies; in `pending` where it is not laid out yet.
struct Matrix {
  const void* data = nullptr;
  PendingMatrix pending{};
};

Matrix matrix_of(const View& w, int64_t e) {
  if (w.residency) return {w.residency->at(w.first_piece + static_cast<int32_t>(e))};
  if (w.pending) {
    if (const std::byte* panels = w.pending->want(e)) return {panels};
    return {nullptr, {w.pending, e}};
  }
  const int64_t unit = is_quantised(w.dtype) ? 1 : size_of(w.dtype);
  return {static_cast<const std::byte*>(w.data) + e * w.stride(0) * unit};
}

template <class T, class S>
void set_weight(gemm::Problem<T, S>& problem, const View& w, const Matrix& matrix) {
  LATENTE_ASSERT(w.dtype == dtype_of<S>);
  const void* rows = matrix.pending ? matrix.pending.panels->rows(matrix.pending.index) : nullptr;
  if (rows) {
    problem.b = {static_cast<const S*>(rows), w[-1], true};
  } else if (w.layout == Layout::panels) {
    problem.panels = static_cast<const S*>(matrix.data);
    problem.pending = matrix.pending;
    problem.panel = w.stride(-2) * w.stride(-1);
    if constexpr (std::is_same_v<S, f8e4m3>) {
      const int64_t panels = (w[-2] + w.stride(-1) - 1) / w.stride(-1);
      problem.scales = matrix.pending
                           ? matrix.pending.panels->scales(matrix.pending.index)
                           : reinterpret_cast<const float*>(problem.panels + panels * problem.panel);
    }
  } else {
    LATENTE_ASSERT(w.dtype != DType::f8e4m3);
    problem.b = {static_cast<const S*>(matrix.data), w.stride(-2), true};
  }
}

void set_weight(quantised::Problem& problem, const View& w, const Matrix& matrix) {
  LATENTE_ASSERT(w.layout == Layout::panels);
  problem.form = quantised::form_of(w);
  problem.panels = static_cast<const std::byte*>(matrix.data);
  problem.pending = matrix.pending;
}

}  // namespace

Products::Lists& Products::reused_lists() {
  thread_local Lists lists;
  return lists;
}

Products::Products(ThreadPool& pool) : pool_(pool) {
  lists_.quantised.clear(), lists_.full.clear(), lists_.half.clear(), lists_.quarter.clear(),
      lists_.exact.clear();
}

template <class Fill>
void Products::append(const View& x, const View& w, int64_t e, const Fill& fill) {
  const auto to = [&]<class T>(auto& list, T number) {
    auto& problem = list.emplace_back();
    problem.n = w[-2];
    problem.k = w[-1];
    set_weight(problem, w, matrix_of(w, e));
    fill(problem, number);
  };
  if (is_quantised(w.dtype)) {
    to(lists_.quantised, float{});
  } else if (x.dtype == DType::f64) {
    to(lists_.exact, double{});
  } else if (w.dtype == DType::bf16) {
    to(lists_.half, float{});
  } else if (w.dtype == DType::f8e4m3) {
    to(lists_.quarter, float{});
  } else {
    to(lists_.full, float{});
  }
}

void Products::add(const View& x, const View& w, const View& bias, const Grad& out) {
  LATENTE_ASSERT(w[1] == x[1] && out.view[0] == x[0] && out.view[1] == w[0]);
  LATENTE_ASSERT(!bias || (bias.count() == w[0] && bias.contiguous()));
  append(x, w, 0, [&]<class T>(auto& problem, T) {
    problem.m = x[0];
    problem.a = {x.as<T>(), x.stride(0), true};
    problem.c = out.view.as<T>();
    problem.c_row = out.view.stride(0);
    problem.bias = bias.as_or_null<T>();
    problem.accumulate = out.accumulate;
  });
}

void Products::add_expert(const View& x, const View& rows, int64_t begin, int64_t end, const View& w,
                          int64_t e, const View& out) {
  LATENTE_ASSERT(w.shape.rank() == 3 && x[1] == w[2] && out[1] == w[1]);
  append(x, w, e, [&]<class T>(auto& problem, T) {
    problem.m = end - begin;
    if (rows) {
      problem.a = {x.as<T>(), x.stride(0), true, rows.as<int32_t>() + begin};
    } else {
      problem.a = {x.as<T>() + begin * x.stride(0), x.stride(0), true};
    }
    problem.c = out.as<T>() + begin * out.stride(0);
    problem.c_row = out.stride(0);
  });
}

void Products::add_experts(const View& x, const View& rows, const View& offsets, const View& w,
                           const View& out) {
  const int32_t* offset = offsets.as<int32_t>();
  for (int64_t e = 0; e + 1 < offsets.count(); ++e) {
    if (offset[e] < offset[e + 1]) add_expert(x, rows, offset[e], offset[e + 1], w, e, out);
  }
}

void Products::solve() {
  if (!lists_.quantised.empty()) quantised::multiply(pool_, lists_.quantised);
  if (!lists_.full.empty()) gemm::multiply<float, float>(pool_, lists_.full);
  if (!lists_.half.empty()) gemm::multiply<float, bf16>(pool_, lists_.half);
  if (!lists_.quarter.empty()) gemm::multiply<float, f8e4m3>(pool_, lists_.quarter);
  if (!lists_.exact.empty()) gemm::multiply<double, double>(pool_, lists_.exact);
}

}  // namespace latente
