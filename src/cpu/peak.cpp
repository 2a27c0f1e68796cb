#include "cpu/peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <vector>

#include "cpu/quantised_kernels.h"
#include "tensor/tensor.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/peak.cpp"
#include "hwy/foreach_target.h"
// After foreach_target.h.
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace latente::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Twelve independent chains hide the latency of a multiply-add; they start from different values, lest the
// compiler see that they are one. Returns the operations done.
double multiply_adds(int64_t rounds, float* sink) {
  const hn::ScalableTag<float> d;
  using V = hn::Vec<decltype(d)>;
  V x = hn::Set(d, 0.999f), y = hn::Set(d, 0.001f);
  const auto start = [&](float value) HWY_ATTR { return hn::Set(d, value); };
  V a = start(1), b = start(2), c = start(3), e = start(4), f = start(5), g = start(6);
  V h = start(7), i = start(8), j = start(9), k = start(10), l = start(11), m = start(12);
  for (int64_t round = 0; round < rounds; ++round) {
    a = hn::MulAdd(a, x, y), b = hn::MulAdd(b, x, y), c = hn::MulAdd(c, x, y), e = hn::MulAdd(e, x, y);
    f = hn::MulAdd(f, x, y), g = hn::MulAdd(g, x, y), h = hn::MulAdd(h, x, y), i = hn::MulAdd(i, x, y);
    j = hn::MulAdd(j, x, y), k = hn::MulAdd(k, x, y), l = hn::MulAdd(l, x, y), m = hn::MulAdd(m, x, y);
  }
  V sum = hn::Add(hn::Add(hn::Add(a, b), hn::Add(c, e)), hn::Add(hn::Add(f, g), hn::Add(h, i)));
  *sink = hn::GetLane(hn::Add(sum, hn::Add(hn::Add(j, k), hn::Add(l, m))));
  return 12.0 * 2.0 * static_cast<double>(rounds) * static_cast<double>(hn::Lanes(d));
}

// Reads in four streams, as products read panels; returns what keeps the compiler from leaving it out.
uint64_t read_words(const uint64_t* words, int64_t count) {
  const hn::ScalableTag<uint64_t> d;
  const auto step = static_cast<int64_t>(hn::Lanes(d));
  const int64_t quarter = count / 4;
  auto a = hn::Zero(d), b = hn::Zero(d), c = hn::Zero(d), e = hn::Zero(d);
  for (int64_t i = 0; i + step <= quarter; i += step) {
    a = hn::Xor(a, hn::Load(d, words + i));
    b = hn::Xor(b, hn::Load(d, words + quarter + i));
    c = hn::Xor(c, hn::Load(d, words + 2 * quarter + i));
    e = hn::Xor(e, hn::Load(d, words + 3 * quarter + i));
  }
  return hn::GetLane(hn::Xor(hn::Xor(a, b), hn::Xor(c, e)));
}

}  // namespace latente::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latente {

HWY_EXPORT(multiply_adds);
HWY_EXPORT(read_words);

namespace {

// Of a few runs of body(), which returns what it did, on all threads at once; rising.
template <class Body>
std::vector<double> rates(ThreadPool& pool, const Body& body) {
  std::vector<double> rates;
  for (int attempt = 0; attempt < 9; ++attempt) {
    std::atomic<double> done = 0;
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](int thread) { done += body(thread); });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    rates.push_back(done.load() / seconds);
  }
  std::sort(rates.begin(), rates.end());
  return rates;
}

template <class Body>
double best_rate(ThreadPool& pool, const Body& body) {
  return rates(pool, body).back();
}

}  // namespace

double measure_peak_flops(ThreadPool& pool) {
  return best_rate(pool, [](int) {
    volatile float keep = 0;
    float result = 0;
    const double operations = HWY_DYNAMIC_DISPATCH(multiply_adds)(1'000'000, &result);
    keep = result;
    (void)keep;
    return operations;
  });
}

double measure_peak_of_bytes(ThreadPool& pool) {
  return best_rate(pool, [](int) {
    volatile int32_t keep = 0;
    int32_t result = 0;
    const double operations = quantised::run_products(1'000'000, &result);
    keep = result;
    (void)keep;
    return operations;
  });
}

double measure_read_bandwidth(ThreadPool& pool) {
  constexpr int64_t words = int64_t{32} << 20;  // a thread's own: 256 MiB, beyond any cache
  const std::shared_ptr<void> memory = aligned_memory(words * 8 * pool.size());
  auto* all = static_cast<uint64_t*>(memory.get());
  pool.run([&](int thread) { std::fill_n(all + thread * words, words, uint64_t{1}); });
  const std::vector<double> found = rates(pool, [&](int thread) {
    volatile uint64_t keep = HWY_DYNAMIC_DISPATCH(read_words)(all + thread * words, words);
    (void)keep;
    return static_cast<double>(words * 8);
  });
  // Whoever shares the memory takes a part of it, which changes: the median is what a longer run gets, too.
  return found[found.size() / 2];
}

}  // namespace latente
#endif
