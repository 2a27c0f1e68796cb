// What the tests of attention share: strided arrays with guarded surroundings, random inputs, comparison.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <ostream>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/random.h"
#include "cpu/cpu_backend.h"

namespace latente {

inline constexpr double nan = std::numeric_limits<double>::quiet_NaN();

// [rows, heads, width] standing as columns of wider rows, whatever surrounds it filled with NaN.
template <class T>
struct Strided {
  Strided(int64_t rows, int64_t heads, int64_t width, int64_t left = 0, int64_t right = 0)
      : data(static_cast<size_t>(rows * heads * (left + width + right)), static_cast<T>(nan)),
        columns(left + width + right) {
    view = View(data.data() + left, {rows, heads, width}, dtype_of<T>);
    view.strides = {heads * columns, columns, 1, 0};
  }
  Strided(const Strided& o) : data(o.data), columns(o.columns), view(o.view) {
    view.data = data.data() + (o.view.template as<T>() - o.data.data());
  }

  T& at(int64_t row, int64_t head, int64_t i) const {
    return view.as<T>()[row * view.stride(0) + head * view.stride(1) + i];
  }
  template <class Value>
  void fill(Value value) {
    for (int64_t r = 0; r < view[0]; ++r)
      for (int64_t h = 0; h < view[1]; ++h)
        for (int64_t i = 0; i < view[2]; ++i) at(r, h, i) = static_cast<T>(value());
  }
  void randomise(Random& random) {
    fill([&] { return random.normal(); });
  }
  View rows() const {  // [rows, width] of the only head
    View v(view.data, {view[0], view[2]}, view.dtype);
    v.strides = {view.stride(0), 1, 0, 0};
    return v;
  }
  // Elements outside the view that are no longer NaN.
  int64_t written_outside() const {
    Strided other(*this);
    other.fill([] { return nan; });
    return std::count_if(other.data.begin(), other.data.end(), [](T x) { return !std::isnan(x); });
  }

  std::vector<T> data;
  int64_t columns;
  View view;
};

template <class T>
View vector_view(std::vector<T>& v) {
  return View(v.data(), {static_cast<int64_t>(v.size())}, dtype_of<T>);
}

// Exact equality of views whose surroundings are NaN.
template <class T>
int64_t differences(const Strided<T>& a, const Strided<T>& b) {
  int64_t count = 0;
  for (size_t i = 0; i < a.data.size(); ++i) {
    count += !(a.data[i] == b.data[i] || (std::isnan(a.data[i]) && std::isnan(b.data[i])));
  }
  return count;
}

// Largest |a - (b + shift)| relative to the root mean square of b (or 0.05, if that is less).
template <class T>
double error(const Strided<T>& a, const Strided<double>& b, double shift = 0) {
  double worst = 0, squares = 0;
  for (int64_t r = 0; r < b.view[0]; ++r) {
    for (int64_t h = 0; h < b.view[1]; ++h) {
      for (int64_t i = 0; i < b.view[2]; ++i) {
        const double difference = std::abs(static_cast<double>(a.at(r, h, i)) - (b.at(r, h, i) + shift));
        worst =
            std::isnan(difference) ? std::numeric_limits<double>::infinity() : std::max(worst, difference);
        squares += b.at(r, h, i) * b.at(r, h, i);
      }
    }
  }
  return worst / std::max(std::sqrt(squares / static_cast<double>(b.view.count())), 0.05);
}

template <class T>
constexpr double tolerance = std::is_same_v<T, double> ? 1e-12 : 2e-5;

struct Dimensions {
  int64_t heads, groups, nope, rope, value;
  friend std::ostream& operator<<(std::ostream& os, const Dimensions& d) {
    return os << d.heads << "/" << d.groups << " heads, " << d.nope << "+" << d.rope << "/" << d.value;
  }
};

// Inputs as the model's projections leave them: k and v are columns of one matrix, k_rope follows a latent.
template <class T>
struct Inputs {
  Inputs(const Dimensions& d, std::vector<int32_t> s, uint64_t seed)
      : dims(d),
        starts(std::move(s)),
        tokens(static_cast<int64_t>(starts.size())),
        scale(1.0 / std::sqrt(static_cast<double>(d.nope + d.rope))),
        q(tokens, d.heads, d.nope + d.rope, 3, 2),
        k(tokens, d.groups, d.nope, 0, d.value),
        k_rope(tokens, 1, std::max<int64_t>(d.rope, 1), 5, 0),
        v(tokens, d.groups, d.value, d.nope, 0),
        d_out(tokens, d.heads, d.value) {
    Random random(seed);
    q.randomise(random);
    k.randomise(random);
    k_rope.randomise(random);
    v.randomise(random);
    d_out.randomise(random);
  }
  View rope_view() const { return dims.rope ? k_rope.rows() : View(); }

  Dimensions dims;
  std::vector<int32_t> starts;
  int64_t tokens;
  double scale;
  Strided<T> q, k, k_rope, v, d_out;
};

template <class T>
struct Outputs {
  explicit Outputs(const Inputs<T>& in)
      : out(in.tokens, in.dims.heads, in.dims.value, 1, 1), lse(in.tokens, 1, in.dims.heads) {}
  Strided<T> out, lse;
};

template <class T>
Outputs<T> forward(CpuBackend& cpu, Inputs<T>& in) {
  Outputs<T> o(in);
  cpu.attention_expanded(in.q.view, in.k.view, in.rope_view(), in.v.view, vector_view(in.starts), in.scale,
                         o.out.view, o.lse.rows());
  return o;
}

}  // namespace latente
