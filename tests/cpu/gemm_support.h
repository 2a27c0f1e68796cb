// What the tests of matrix products share: strided arrays with guarded surroundings, and their comparison.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "base/random.h"
#include "cpu/cpu_backend.h"

namespace latente {

// 1 or 3.
inline CpuBackend& threads(int count) {
  static CpuBackend one(1), three(3);
  return count == 1 ? one : three;
}

// [outer, rows, columns]; with gaps after rows and matrices, filled with NaN.
template <class T>
struct Array {
  Array(int64_t outer, int64_t rows, int64_t columns, int64_t gap = 0, int64_t outer_gap = 0)
      : outers(outer),
        row_count(rows),
        column_count(columns),
        row_stride(columns + gap),
        outer_stride(rows * row_stride + outer_gap),
        data(static_cast<size_t>(outer * outer_stride + 1), T(std::numeric_limits<float>::quiet_NaN())) {}

  T& operator()(int64_t o, int64_t r, int64_t c) {
    return data[static_cast<size_t>(o * outer_stride + r * row_stride + c)];
  }
  T& operator()(int64_t r, int64_t c) { return (*this)(0, r, c); }
  double value(int64_t o, int64_t r, int64_t c) {
    if constexpr (sizeof(T) == 2) return static_cast<double>(static_cast<float>((*this)(o, r, c)));
    if constexpr (sizeof(T) != 2) return static_cast<double>((*this)(o, r, c));
  }
  template <class Make>
  Array& fill(const Make& make) {
    for (int64_t o = 0; o < outers; ++o)
      for (int64_t r = 0; r < row_count; ++r)
        for (int64_t c = 0; c < column_count; ++c) (*this)(o, r, c) = T(static_cast<float>(make()));
    return *this;
  }
  Array& randomise(Random& random) {
    return fill([&] { return random.normal(); });
  }
  View matrix() { return rows(0, row_count); }
  View rows(int64_t begin, int64_t count) {
    View v(data.data() + begin * row_stride, {count, column_count}, dtype_of<T>);
    v.strides = {row_stride, 1, 0, 0};
    return v;
  }
  View cube() {
    View v(data.data(), {outers, row_count, column_count}, dtype_of<T>);
    v.strides = {outer_stride, row_stride, 1, 0};
    return v;
  }
  // Equal elements, NaN being equal to NaN: nothing outside was written.
  int64_t differences(const Array& other) const {
    int64_t count = 0;
    for (size_t i = 0; i < data.size(); ++i) {
      const bool same = data[i] == other.data[i] || (std::isnan(data[i]) && std::isnan(other.data[i]));
      count += !same;
    }
    return count;
  }
  int64_t written_outside() const {
    Array other(*this);
    other.fill([] { return std::numeric_limits<float>::quiet_NaN(); });
    int64_t count = 0;
    for (T x : other.data) count += !std::isnan(x);
    return count;
  }

  int64_t outers, row_count, column_count, row_stride, outer_stride;
  std::vector<T> data;
};

template <class T>
View list_view(std::vector<T>& v) {
  return View(v.data(), {static_cast<int64_t>(v.size())}, dtype_of<T>);
}

// A sum of products in double, and the sum of their sizes, to which rounding errors are proportional.
struct Sum {
  double value = 0, size = 0;
  void add(double x) {
    value += x;
    size += std::abs(x);
  }
  template <class T>
  bool near(T x) const {
    return std::abs(static_cast<double>(x) - value) <=
           4 * static_cast<double>(std::numeric_limits<T>::epsilon()) * size;
  }
};

// Activations and weights of a product.
template <class Activation, class Weight>
struct Types {
  using T = Activation;
  using S = Weight;
};
using AllTypes = ::testing::Types<Types<float, float>, Types<float, bf16>, Types<double, double>>;

}  // namespace latente
