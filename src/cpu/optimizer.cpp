#include <cmath>

#include "cpu/cpu_backend.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/optimizer.cpp"
#include "hwy/foreach_target.h"  // must precede highway.h

#include "cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latente::HWY_NAMESPACE {

HWY_INLINE Vec<double> add_squares(Vec<double> sum, const double* x) {
  const auto v = hn::LoadU(Tag<double>(), x);
  return hn::MulAdd(v, v, sum);
}
// Half a vector of floats, in double.
HWY_INLINE Vec<double> add_squares(Vec<double> sum, const float* x) {
  const Tag<double> d;
  const auto v = hn::PromoteTo(d, hn::LoadU(hn::Rebind<float, Tag<double>>(), x));
  return hn::MulAdd(v, v, sum);
}

template <class T>
HWY_INLINE double sum_of_squares(const T* x, int64_t n) {
  const Tag<double> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  Vec<double> a = hn::Zero(d), b = a, c = a, e = a;
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    a = add_squares(a, x + i);
    b = add_squares(b, x + i + lanes);
    c = add_squares(c, x + i + 2 * lanes);
    e = add_squares(e, x + i + 3 * lanes);
  }
  double sum = hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(a, b), hn::Add(c, e))));
  for (; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return sum;
}

// decay = 1 - rate · weight_decay; step = rate / (1 - beta1^t); root = 1 / sqrt(1 - beta2^t)
template <class T>
HWY_INLINE void adamw_elements(T* parameter, const T* gradient, T* m, T* v, int64_t n, double factor,
                               double decay, double step, double root, const AdamW& options) {
  const Tag<T> d;
  auto set = [&](double value) LATENTE_VECTOR { return hn::Set(d, static_cast<T>(value)); };
  const auto clip = set(factor), beta1 = set(options.beta1), beta2 = set(options.beta2);
  const auto rest1 = set(1 - options.beta1), rest2 = set(1 - options.beta2), epsilon = set(options.epsilon);
  const auto keep = set(decay), rate = set(step), unbias = set(root);
  for_vectors<T>(n, [&](int64_t i, auto width) LATENTE_VECTOR {
    const Vec<T> g = hn::Mul(load(gradient + i, width), clip);
    const Vec<T> first = hn::MulAdd(load(m + i, width), beta1, hn::Mul(g, rest1));
    const Vec<T> second = hn::MulAdd(load(v + i, width), beta2, hn::Mul(hn::Mul(g, g), rest2));
    store(first, m + i, width);
    store(second, v + i, width);
    const Vec<T> direction = hn::Div(first, hn::MulAdd(hn::Sqrt(second), unbias, epsilon));
    store(hn::NegMulAdd(rate, direction, hn::Mul(load(parameter + i, width), keep)), parameter + i, width);
  });
}

HWY_INLINE void narrow_elements(const float* from, bf16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = bf16(from[i]);
}

double squares_f32(const float* x, int64_t n) { return sum_of_squares(x, n); }
double squares_f64(const double* x, int64_t n) { return sum_of_squares(x, n); }
void adamw_f32(float* parameter, const float* gradient, float* m, float* v, int64_t n, double factor,
               double decay, double step, double root, const AdamW& options) {
  adamw_elements(parameter, gradient, m, v, n, factor, decay, step, root, options);
}
void adamw_f64(double* parameter, const double* gradient, double* m, double* v, int64_t n, double factor,
               double decay, double step, double root, const AdamW& options) {
  adamw_elements(parameter, gradient, m, v, n, factor, decay, step, root, options);
}
// Blocks that stay in the first cache until they have been narrowed.
void adamw_bf16(bf16* parameter, float* master, const float* gradient, float* m, float* v, int64_t n,
                double factor, double decay, double step, double root, const AdamW& options) {
  constexpr int64_t block = 1024;
  for (int64_t i = 0; i < n; i += block) {
    const int64_t count = std::min(block, n - i);
    adamw_elements(master + i, gradient + i, m + i, v + i, count, factor, decay, step, root, options);
    narrow_elements(master + i, parameter + i, count);
  }
}

}  // namespace latente::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latente {
namespace {

HWY_EXPORT(squares_f32);
HWY_EXPORT(squares_f64);
HWY_EXPORT(adamw_f32);
HWY_EXPORT(adamw_f64);
HWY_EXPORT(adamw_bf16);

constexpr int64_t block_elements = 65536;

// A partial sum a block, added in order.
template <class T, class Kernel>
double blocked_squares(ThreadPool& pool, Kernel kernel, const View& x) {
  RowSplit split = split_rows({x});
  if (split.width == 0) return 0;
  int64_t per_row = (split.width + block_elements - 1) / block_elements;
  int64_t parts = split.rows * per_row;
  struct Parts;
  double* part = reused_memory<Parts, double>(parts);
  pool.parallel_for(
      parts, std::max<int64_t>(1, block_elements / split.width), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          int64_t from = i % per_row * block_elements;
          part[i] = kernel(row_of<T>(x, i / per_row) + from, std::min(block_elements, split.width - from));
        }
      });
  double sum = 0;
  for (int64_t i = 0; i < parts; ++i) sum += part[i];
  return sum;
}

}  // namespace

void CpuBackend::add_sum_of_squares(View x, View result) {
  *result.as<double>() += x.dtype == DType::f64
                              ? blocked_squares<double>(pool_, &HWY_DYNAMIC_DISPATCH(squares_f64), x)
                              : blocked_squares<float>(pool_, &HWY_DYNAMIC_DISPATCH(squares_f32), x);
}

void CpuBackend::adamw(View parameter, View master, View gradient, View m, View v, View scalars,
                       const AdamW& options) {
  LATENTE_ASSERT(parameter.contiguous() && gradient.contiguous() && m.contiguous() && v.contiguous());
  LATENTE_ASSERT(gradient.count() == parameter.count() && m.count() == parameter.count() &&
                 v.count() == parameter.count());
  const double* scalar = scalars.as<double>();
  double factor = scalar[1], decay = 1 - scalar[0] * options.weight_decay;
  double step = scalar[0] / scalar[2], root = 1 / std::sqrt(scalar[3]);
  const bool narrow = m.dtype == DType::bf16;
  LATENTE_ASSERT(v.dtype == m.dtype &&
                 (m.dtype == gradient.dtype || (narrow && gradient.dtype == DType::f32)));
  // Elements begin .. begin + n, whose moments are given.
  const auto update = [&](int64_t begin, int64_t n, auto* first, auto* second) {
    if constexpr (std::is_same_v<decltype(first), double*>) {
      HWY_DYNAMIC_DISPATCH(adamw_f64)
      (parameter.as<double>() + begin, gradient.as<double>() + begin, first, second, n, factor, decay, step,
       root, options);
    } else if (parameter.dtype == DType::bf16) {
      HWY_DYNAMIC_DISPATCH(adamw_bf16)
      (parameter.as<bf16>() + begin, master.as<float>() + begin, gradient.as<float>() + begin, first, second,
       n, factor, decay, step, root, options);
    } else {
      HWY_DYNAMIC_DISPATCH(adamw_f32)
      (parameter.as<float>() + begin, gradient.as<float>() + begin, first, second, n, factor, decay, step,
       root, options);
    }
  };
  pool_.parallel_for(parameter.count(), piece_elements, [&](int64_t begin, int64_t end) {
    if (parameter.dtype == DType::f64)
      return update(begin, end - begin, m.as<double>() + begin, v.as<double>() + begin);
    if (!narrow) return update(begin, end - begin, m.as<float>() + begin, v.as<float>() + begin);
    constexpr int64_t block = 1024;
    float first[block], second[block];
    for (; begin < end; begin += block) {
      const int64_t n = std::min(block, end - begin);
      bf16 *narrow_first = m.as<bf16>() + begin, *narrow_second = v.as<bf16>() + begin;
      for (int64_t i = 0; i < n; ++i) first[i] = static_cast<float>(narrow_first[i]);
      for (int64_t i = 0; i < n; ++i) second[i] = static_cast<float>(narrow_second[i]);
      update(begin, n, first, second);
      for (int64_t i = 0; i < n; ++i) narrow_first[i] = bf16(first[i]);
      for (int64_t i = 0; i < n; ++i) narrow_second[i] = bf16(second[i]);
    }
  });
}

void CpuBackend::update_routing_bias(View load, View bias, double rate) {
  LATENTE_ASSERT(load.contiguous() && bias.contiguous() && load.count() == bias.count());
  float* count = load.as<float>();
  int64_t experts = load.count();
  double mean = 0;
  for (int64_t e = 0; e < experts; ++e) mean += static_cast<double>(count[e]);
  mean /= static_cast<double>(experts);
  auto move = [&](auto* value) {
    for (int64_t e = 0; e < experts; ++e) {
      double error = mean - static_cast<double>(count[e]);
      double moved = static_cast<double>(value[e]) + rate * static_cast<double>((error > 0) - (error < 0));
      value[e] = static_cast<std::remove_reference_t<decltype(*value)>>(moved);
    }
  };
  bias.dtype == DType::f64 ? move(bias.as<double>()) : move(bias.as<float>());
  std::fill(count, count + experts, 0.0f);
}

}  // namespace latente
#endif
