// Cross entropy over a vocabulary: a chunk of rows of logits at a time.
#include <algorithm>
#include <cmath>

#include "cpu/cpu_backend.h"
#include "cpu/gemm_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/loss.cpp"
#include "hwy/foreach_target.h"  // must precede highway.h

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace latente::loss::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Index of the highest value, the first of equals.
template <class T>
HWY_INLINE int64_t argmax(const T* x, int64_t count) {
  const hn::ScalableTag<T> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  T highest = x[0];
  int64_t i = 0;
  if (count >= lanes) {
    auto top = hn::LoadU(d, x);
    for (i = lanes; i + lanes <= count; i += lanes) top = hn::Max(top, hn::LoadU(d, x + i));
    highest = hn::GetLane(hn::MaxOfLanes(d, top));
  }
  for (; i < count; ++i) highest = std::max(highest, x[i]);
  const T* found = std::find(x, x + count, highest);
  return found == x + count ? 0 : found - x;  // not found: NaNs
}

// x = exp(x - highest) if `store`; the sum of these, in an order that count alone decides.
template <bool store, class T>
HWY_INLINE double exponentials(T* x, int64_t count, T highest) {
  const hn::ScalableTag<T> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto shift = hn::Set(d, highest);
  constexpr int64_t block = 1024;
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += block) {
    const int64_t end = std::min(begin + block, count);
    auto sum = hn::Zero(d);
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes) {
      const auto e = hn::Exp(d, hn::Sub(hn::LoadU(d, x + i), shift));
      if constexpr (store) hn::StoreU(e, d, x + i);
      sum = hn::Add(sum, e);
    }
    total += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, sum)));
    for (; i < end; ++i) {
      const T e = std::exp(x[i] - highest);
      if constexpr (store) x[i] = e;
      total += static_cast<double>(e);
    }
  }
  return total;
}

template <class T>
HWY_INLINE void scale(T* x, int64_t count, T factor) {
  const hn::ScalableTag<T> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto by = hn::Set(d, factor);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) hn::StoreU(hn::Mul(hn::LoadU(d, x + i), by), d, x + i);
  for (; i < count; ++i) x[i] *= factor;
}

// With `gradient`, the logits become the gradient of weight · nll.
template <class T>
HWY_INLINE T row(T* logits, int64_t count, int32_t target, bool gradient, T weight, int32_t* predicted) {
  if (target < 0 && !predicted) {
    if (gradient) std::fill(logits, logits + count, T{0});
    return 0;
  }
  const int64_t best = argmax(logits, count);
  if (predicted) *predicted = static_cast<int32_t>(best);
  if (target < 0) {
    if (gradient) std::fill(logits, logits + count, T{0});
    return 0;
  }
  const T highest = logits[best];
  const double distance = static_cast<double>(highest) - static_cast<double>(logits[target]);
  if (!gradient) return static_cast<T>(distance + std::log(exponentials<false>(logits, count, highest)));
  const double sum = exponentials<true>(logits, count, highest);
  scale(logits, count, static_cast<T>(static_cast<double>(weight) / sum));
  logits[target] -= weight;
  return static_cast<T>(distance + std::log(sum));
}

float row_f32(float* logits, int64_t count, int32_t target, bool gradient, float weight, int32_t* predicted) {
  return row(logits, count, target, gradient, weight, predicted);
}
double row_f64(double* logits, int64_t count, int32_t target, bool gradient, double weight,
               int32_t* predicted) {
  return row(logits, count, target, gradient, weight, predicted);
}

}  // namespace latente::loss::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latente {
namespace loss {
HWY_EXPORT(row_f32);
HWY_EXPORT(row_f64);
}  // namespace loss

namespace {

float row_loss(float* logits, int64_t count, int32_t target, bool gradient, float weight,
               int32_t* predicted) {
  using namespace loss;
  return HWY_DYNAMIC_DISPATCH(row_f32)(logits, count, target, gradient, weight, predicted);
}
double row_loss(double* logits, int64_t count, int32_t target, bool gradient, double weight,
                int32_t* predicted) {
  using namespace loss;
  return HWY_DYNAMIC_DISPATCH(row_f64)(logits, count, target, gradient, weight, predicted);
}

View rows_of(const View& v, int64_t begin, int64_t count) {
  View part = v;
  part.data = static_cast<char*>(v.data) + begin * v.stride(0) * size_of(v.dtype);
  part.shape = {count, v[1]};
  return part;
}

template <class T>
void cross_entropy(CpuBackend& backend, const View& h, const View& w, const View& targets,
                   const View& token_weights, const View& scratch, const View& nll, const View& predicted,
                   const View& total, const Grad* d_h, const Grad* d_w) {
  const int64_t tokens = h[0], vocabulary = w[0], chunk = scratch[0];
  const int32_t* target = targets.as<int32_t>();
  const T* weight = token_weights.as<T>();
  T* losses = nll.as<T>();
  int32_t* best = predicted.as_or_null<int32_t>();
  for (int64_t begin = 0; begin == 0 || begin < tokens; begin += chunk) {
    const int64_t count = std::min(chunk, tokens - begin);
    const View rows = rows_of(h, begin, count), logits = rows_of(scratch, 0, count);
    backend.linear(rows, w, {}, {logits});
    backend.threads().parallel_for(count, 1, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const int64_t t = begin + r;
        losses[t] = row_loss(logits.as<T>() + r * logits.stride(0), vocabulary, target[t], d_h != nullptr,
                             weight[t], best ? best + t : nullptr);
      }
    });
    if (d_h && *d_h) {
      backend.linear_backward_input(logits, w, {rows_of(d_h->view, begin, count), d_h->accumulate});
    }
    if (d_w && *d_w) backend.linear_backward_weight(logits, rows, {d_w->view, d_w->accumulate || begin > 0});
  }
  double sum = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    sum += target[t] < 0 ? 0.0 : static_cast<double>(weight[t]) * static_cast<double>(losses[t]);
  }
  *total.as<T>() = static_cast<T>(sum);
}

void check(const View& h, const View& w, const View& targets, const View& token_weights, const View& scratch,
           const View& nll, const View& predicted) {
  const int64_t tokens = h[0];
  LATENTE_ASSERT(w[0] > 0 && scratch[0] > 0 && scratch[1] == w[0]);
  LATENTE_ASSERT(targets.count() == tokens && token_weights.count() == tokens && nll.count() == tokens);
  LATENTE_ASSERT(targets.contiguous() && token_weights.contiguous() && nll.contiguous());
  LATENTE_ASSERT(!predicted || (predicted.count() == tokens && predicted.contiguous()));
}

}  // namespace

void CpuBackend::linear_cross_entropy(View h, View w, View targets, View token_weights, View scratch,
                                      View nll, View predicted, View loss) {
  check(h, w, targets, token_weights, scratch, nll, predicted);
  auto run = h.dtype == DType::f64 ? cross_entropy<double> : cross_entropy<float>;
  run(*this, h, w, targets, token_weights, scratch, nll, predicted, loss, nullptr, nullptr);
}

void CpuBackend::linear_cross_entropy_with_gradient(View h, View w, View targets, View token_weights,
                                                    View scratch, View nll, View predicted, View loss,
                                                    Grad d_h, Grad d_w) {
  check(h, w, targets, token_weights, scratch, nll, predicted);
  auto run = h.dtype == DType::f64 ? cross_entropy<double> : cross_entropy<float>;
  run(*this, h, w, targets, token_weights, scratch, nll, predicted, loss, &d_h, &d_w);
}

}  // namespace latente
#endif
