#include <algorithm>
#include <array>
#include <span>
#include <vector>

#include "cpu/cpu_backend.h"
#include "cpu/products.h"

namespace latente {
namespace {

using gemm::Lines;
using gemm::Problem;

template <class T>
Lines<T> lines(const View& v, bool along_k) {
  return {v.as<T>(), v.stride(0), along_k};
}

// A matrix of one column may have any stride there.
void check_matrix(const View& v) { LATENTE_ASSERT(v.shape.rank() == 2 && (v[1] <= 1 || v.stride(1) == 1)); }

template <class T, class S>
void solve(ThreadPool& pool, const Problem<T, S>& problem) {
  gemm::multiply(pool, std::span(&problem, 1));
}

template <class T, class S>
void backward_input(ThreadPool& pool, const View& d_out, const View& w, const Grad& d_x) {
  solve<T, S>(pool, {.m = d_out[0],
                     .n = w[1],
                     .k = w[0],
                     .a = lines<T>(d_out, true),
                     .b = lines<S>(w, false),
                     .c = d_x.view.as<T>(),
                     .c_row = d_x.view.stride(0),
                     .accumulate = d_x.accumulate});
}

template <class T>
void backward_weight(ThreadPool& pool, const View& d_out, const View& x, const Grad& d_w) {
  solve<T, T>(pool, {.m = d_out[1],
                     .n = x[1],
                     .k = x[0],
                     .a = lines<T>(d_out, false),
                     .b = lines<T>(x, false),
                     .c = d_w.view.as<T>(),
                     .c_row = d_w.view.stride(0),
                     .accumulate = d_w.accumulate});
}

// Each column is summed by one thread, in rising rows.
template <class T>
void backward_bias(ThreadPool& pool, const View& d_out, const Grad& d_bias) {
  constexpr int64_t width = 64;
  const T* from = d_out.as<T>();
  T* to = d_bias.view.as<T>();
  pool.parallel_for(d_out[1], width, [&](int64_t begin, int64_t end) {
    std::array<double, width> sums{};
    for (int64_t t = 0; t < d_out[0]; ++t) {
      const T* row = from + t * d_out.stride(0) + begin;
      for (int64_t j = 0; j < end - begin; ++j) sums[static_cast<size_t>(j)] += static_cast<double>(row[j]);
    }
    for (int64_t j = 0; j < end - begin; ++j) {
      const T sum = static_cast<T>(sums[static_cast<size_t>(j)]);
      to[begin + j] = d_bias.accumulate ? to[begin + j] + sum : sum;
    }
  });
}

template <class T, class S>
void by_head(ThreadPool& pool, const View& x, const View& w, bool transpose, const View& out) {
  thread_local std::vector<Problem<T, S>> heads;
  heads.clear();
  for (int64_t h = 0; h < w[0]; ++h) {
    heads.push_back({.m = x[0],
                     .n = out[2],
                     .k = x[2],
                     .a = {x.as<T>() + h * x.stride(1), x.stride(0), true},
                     .b = {w.as<S>() + h * w.stride(0), w.stride(1), !transpose},
                     .c = out.as<T>() + h * out.stride(1),
                     .c_row = out.stride(0)});
  }
  gemm::multiply<T, S>(pool, heads);
}

std::byte* panels_of(const View& to, int64_t index, int64_t row) {
  LATENTE_ASSERT(to.layout == Layout::panels && row % quantised::panel_rows == 0);
  return static_cast<std::byte*>(to.data) + index * to.stride(0) +
         row / quantised::panel_rows * quantised::panel_bytes(quantised::form_of(to), to[-1]);
}

void by_head_quantised(ThreadPool& pool, const View& x, const View& w, const View& out) {
  LATENTE_ASSERT(!w.pending);
  thread_local std::vector<quantised::Problem> heads;
  heads.clear();
  for (int64_t h = 0; h < w[0]; ++h) {
    heads.push_back({.form = quantised::form_of(w),
                     .m = x[0],
                     .n = w[1],
                     .k = w[2],
                     .a = {x.as<float>() + h * x.stride(1), x.stride(0), true},
                     .panels = static_cast<const std::byte*>(w.data) + h * w.stride(0),
                     .c = out.as<float>() + h * out.stride(1),
                     .c_row = out.stride(0)});
  }
  quantised::multiply(pool, heads);
}

}  // namespace

void CpuBackend::linear(View x, View w, View bias, Grad out) {
  check_matrix(x);
  if (w.layout == Layout::rows) check_matrix(w);
  check_matrix(out.view);
  Products products(pool_);
  products.add(x, w, bias, out);
  products.solve();
}

void CpuBackend::linear_backward_input(View d_out, View w, Grad d_x) {
  if (!d_x) return;
  check_matrix(d_out);
  check_matrix(w);
  check_matrix(d_x.view);
  LATENTE_ASSERT(d_out[1] == w[0] && d_x.view[0] == d_out[0] && d_x.view[1] == w[1]);
  if (d_out.dtype == DType::f64) {
    backward_input<double, double>(pool_, d_out, w, d_x);
  } else if (w.dtype == DType::bf16) {
    backward_input<float, bf16>(pool_, d_out, w, d_x);
  } else {
    backward_input<float, float>(pool_, d_out, w, d_x);
  }
}

void CpuBackend::linear_backward_weight(View d_out, View x, Grad d_w) {
  if (!d_w) return;
  check_matrix(d_out);
  check_matrix(x);
  check_matrix(d_w.view);
  LATENTE_ASSERT(d_out[0] == x[0] && d_w.view[0] == d_out[1] && d_w.view[1] == x[1]);
  if (d_out.dtype == DType::f64) {
    backward_weight<double>(pool_, d_out, x, d_w);
  } else {
    backward_weight<float>(pool_, d_out, x, d_w);
  }
}

void CpuBackend::linear_backward_bias(View d_out, Grad d_bias) {
  if (!d_bias) return;
  check_matrix(d_out);
  LATENTE_ASSERT(d_bias.view.count() == d_out[1] && d_bias.view.contiguous());
  if (d_out.dtype == DType::f64) {
    backward_bias<double>(pool_, d_out, d_bias);
  } else {
    backward_bias<float>(pool_, d_out, d_bias);
  }
}

std::optional<Backend::Packed> CpuBackend::packed(View w) const {
  if (w.layout == Layout::panels || (w.shape.rank() != 2 && w.shape.rank() != 3)) return {};
  if (w.dtype == DType::f8e4m3 && w[-1] % 2 != 0) return {};
  if (w.dtype != DType::f32 && w.dtype != DType::f64 && w.dtype != DType::bf16 && w.dtype != DType::f8e4m3)
    return {};
  const int64_t width = gemm::panel_columns(w.dtype), n = w[-2], k = w[-1];
  const int64_t padded = (n + width - 1) / width * width;
  Packed packed;
  packed.view = w;
  packed.view.data = nullptr;
  packed.view.layout = Layout::panels;
  int64_t matrix = padded * k;
  if (w.dtype == DType::f8e4m3) {  // scales behind the codes
    const int64_t scales = gemm::scales_of(n) * gemm::scales_of(k) * static_cast<int64_t>(sizeof(float));
    matrix = (matrix + scales + 63) / 64 * 64;
  }
  packed.view.strides = w.shape.rank() == 2 ? std::array<int64_t, max_rank>{k, width}
                                            : std::array<int64_t, max_rank>{matrix, k, width};
  packed.bytes = (w.shape.rank() == 2 ? 1 : w[0]) * matrix * size_of(w.dtype);
  return packed;
}

void CpuBackend::pack(View w, View to) {
  LATENTE_ASSERT(w.dtype != DType::f8e4m3);
  const auto one = [&]<class S>(S) {
    const int64_t matrices = w.shape.rank() == 3 ? w[0] : 1;
    for (int64_t i = 0; i < matrices; ++i) {
      const Lines<S> from{w.as<S>() + (matrices > 1 ? i * w.stride(0) : 0), w.stride(-2), true};
      S* panels = const_cast<S*>(to.panels_as<S>()) + (matrices > 1 ? i * to.stride(0) : 0);
      gemm::pack(pool_, from, w[-2], w[-1], panels);
    }
  };
  if (w.dtype == DType::f64) {
    one(double{});
  } else if (w.dtype == DType::bf16) {
    one(bf16{});
  } else {
    one(float{});
  }
}

bool CpuBackend::pack_fp8(View codes, const float* scales, View to, int64_t index) {
  LATENTE_ASSERT(codes.contiguous() && to.dtype == DType::f8e4m3 && to.layout == Layout::panels);
  LATENTE_ASSERT(codes[0] == to[-2] && codes[1] == to[-1]);
  const int64_t n = to[-2], k = to[-1], width = to.stride(-1), panels = (n + width - 1) / width;
  auto* at = static_cast<f8e4m3*>(to.data) + (to.shape.rank() == 3 ? index * to.stride(0) : 0);
  return gemm::pack_fp8(pool_, static_cast<const uint8_t*>(codes.data), scales, n, k, at,
                        reinterpret_cast<float*>(at + panels * width * k));
}

std::optional<Backend::Packed> CpuBackend::quantised(Shape shape, DType type, int64_t group) const {
  if (!is_quantised(type) || (shape.rank() != 2 && shape.rank() != 3)) return {};
  const View view = quantised::view_of(shape, type, group);
  return Packed{view, quantised::bytes_of(view)};
}

std::shared_ptr<void> CpuBackend::take_panels(const void*, View&) {
  LATENTE_ASSERT(false);
  return nullptr;
}

void CpuBackend::pack_quantised(const int8_t* codes, const float* scales, View to, int64_t index, int64_t row,
                                int64_t rows) {
  quantised::pack(pool_, quantised::form_of(to), codes, scales, rows, to[-1], panels_of(to, index, row));
}

bool CpuBackend::pack_blocks(const std::byte* blocks, View to, int64_t index, int64_t row, int64_t rows) {
  return quantised::pack_blocks(pool_, quantised::form_of(to), blocks, rows, to[-1],
                                panels_of(to, index, row));
}

bool CpuBackend::quantise(const float* values, const float* importance, View to, int64_t index, int64_t row,
                          int64_t rows) {
  return quantised::quantise(pool_, quantised::form_of(to), values, importance, rows, to[-1],
                             panels_of(to, index, row));
}

void CpuBackend::head_linear(View x, View w, bool transpose, View out) {
  LATENTE_ASSERT(x.shape.rank() == 3 && w.shape.rank() == 3 && out.shape.rank() == 3);
  LATENTE_ASSERT(x[1] == w[0] && out[0] == x[0] && out[1] == x[1]);
  LATENTE_ASSERT(x[2] == w[transpose ? 1 : 2] && out[2] == w[transpose ? 2 : 1]);
  if (is_quantised(w.dtype)) {
    LATENTE_ASSERT(!transpose);
    by_head_quantised(pool_, x, w, out);
  } else if (x.dtype == DType::f64) {
    by_head<double, double>(pool_, x, w, transpose, out);
  } else if (w.dtype == DType::bf16) {
    by_head<float, bf16>(pool_, x, w, transpose, out);
  } else {
    by_head<float, float>(pool_, x, w, transpose, out);
  }
}

}  // namespace latente
