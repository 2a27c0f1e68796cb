// Speed of matrix products on the CPU, in multiply-adds and in bytes of weights a second; where OpenBLAS was
// found, its sgemm beside each. Compare within one run, with
// --benchmark_enable_random_interleaving=true --benchmark_repetitions=9.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "cpu/cpu_backend.h"
#include "cpu/peak.h"
#include "tensor/quantise.h"
#include "tensor/tensor.h"

#ifdef LATENTE_OPENBLAS
#include <cblas.h>
extern "C" void openblas_set_num_threads(int);
#endif

namespace latente {
namespace {

CpuBackend& cpu() {
  static CpuBackend backend;
  return backend;
}

enum class Kind { forward, backward_input, backward_weight };

// Memory like that of a plan and of weights: in large pages.
template <class T>
class Array {
 public:
  explicit Array(int64_t count)
      : memory_(aligned_memory(count * static_cast<int64_t>(sizeof(T)))),
        data_(static_cast<T*>(memory_.get())) {
    std::minstd_rand random(1);
    std::uniform_real_distribution<float> uniform(-1, 1);
    for (int64_t i = 0; i < count; ++i) data_[i] = T(uniform(random));
  }
  T* data() { return data_; }

 private:
  std::shared_ptr<void> memory_;
  T* data_;
};

// Arguments: rows, K, N, experts (rows are shared out evenly).
template <class S>
struct Layer {
  explicit Layer(const benchmark::State& state)
      : rows(state.range(0)),
        k(state.range(1)),
        n(state.range(2)),
        experts(state.range(3)),
        x(rows * k),
        y(rows * n),
        d_w(experts * n * k),
        w(experts * n * k) {
    for (int64_t e = 0; e <= experts; ++e) offsets.push_back(static_cast<int32_t>(rows * e / experts));
  }
  View input() { return View(x.data(), {rows, k}, DType::f32); }
  View output() { return View(y.data(), {rows, n}, DType::f32); }
  View weights() { return View(w.data(), {n, k}, dtype_of<S>); }
  View all_weights() { return View(w.data(), {experts, n, k}, dtype_of<S>); }
  View starts() { return View(offsets.data(), {experts + 1}, DType::i32); }

  void count(benchmark::State& state) const {
    state.counters["MAC/s"] = benchmark::Counter(static_cast<double>(state.iterations() * rows * k * n),
                                                 benchmark::Counter::kIsRate);
    state.counters["weight B/s"] = benchmark::Counter(
        static_cast<double>(state.iterations() * experts * n * k) * sizeof(S), benchmark::Counter::kIsRate);
  }

  int64_t rows, k, n, experts;
  Array<float> x, y, d_w;
  Array<S> w;
  std::vector<int32_t> offsets;
};

template <Kind kind, class S>
void product(benchmark::State& state) {
  Layer<S> layer(state);
  const View d_w(layer.d_w.data(), {layer.experts, layer.n, layer.k}, DType::f32);
  const View d_w_matrix(layer.d_w.data(), {layer.n, layer.k}, DType::f32);
  const bool grouped = layer.experts > 1;
  for (auto _ : state) {
    switch (kind) {
      case Kind::forward:
        if (grouped) {
          cpu().grouped_linear(layer.input(), {}, layer.starts(), layer.all_weights(), layer.output());
        } else {
          cpu().linear(layer.input(), layer.weights(), {}, {layer.output()});
        }
        break;
      case Kind::backward_input:
        if (grouped) {
          cpu().grouped_linear_backward_input(layer.output(), layer.starts(), layer.all_weights(),
                                              {layer.input()});
        } else {
          cpu().linear_backward_input(layer.output(), layer.weights(), {layer.input()});
        }
        break;
      case Kind::backward_weight:
        if (grouped) {
          cpu().grouped_linear_backward_weight(layer.output(), layer.input(), {}, layer.starts(), {d_w});
        } else {
          cpu().linear_backward_weight(layer.output(), layer.input(), {d_w_matrix});
        }
        break;
    }
  }
  layer.count(state);
}

// Weights of 8 or 4 bits, a scale for every 64.
template <DType type>
void quantised(benchmark::State& state) {
  Layer<float> layer(state);
  const bool grouped = layer.experts > 1;
  const Shape shape = grouped ? Shape{layer.experts, layer.n, layer.k} : Shape{layer.n, layer.k};
  Backend::Packed packed = *cpu().quantised(shape, type, 64);
  const std::shared_ptr<void> memory = cpu().allocate(packed.bytes);
  packed.view.data = memory.get();
  std::vector<int8_t> codes(static_cast<size_t>(layer.n * layer.k));
  std::vector<float> scales(codes.size() / 32);
  for (int64_t e = 0; e < layer.experts; ++e) {
    quantise_rows(layer.w.data() + e * layer.n * layer.k, layer.n, layer.k, type == DType::q8 ? 8 : 4, 64,
                  codes.data(), scales.data());
    cpu().pack_quantised(codes.data(), scales.data(), packed.view, e, 0, layer.n);
  }
  for (auto _ : state) {
    if (grouped) {
      cpu().grouped_linear(layer.input(), {}, layer.starts(), packed.view, layer.output());
    } else {
      cpu().linear(layer.input(), packed.view, {}, {layer.output()});
    }
  }
  layer.count(state);
  state.counters["weight B/s"] =
      benchmark::Counter(static_cast<double>(state.iterations() * packed.bytes), benchmark::Counter::kIsRate);
}

#ifdef LATENTE_OPENBLAS
template <Kind kind>
void openblas(benchmark::State& state) {
  openblas_set_num_threads(cpu().threads().size());
  Layer<float> layer(state);
  const int m = static_cast<int>(layer.rows / layer.experts), k = static_cast<int>(layer.k),
            n = static_cast<int>(layer.n);
  for (auto _ : state) {
    for (int64_t e = 0; e < layer.experts; ++e) {
      float* x = layer.x.data() + e * m * k;
      float* y = layer.y.data() + e * m * n;
      const float* w = layer.w.data() + e * n * k;
      switch (kind) {
        case Kind::forward:
          if (m == 1) {
            cblas_sgemv(CblasRowMajor, CblasNoTrans, n, k, 1, w, k, x, 1, 0, y, 1);
          } else {
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, n, k, 1, x, k, w, k, 0, y, n);
          }
          break;
        case Kind::backward_input:
          cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, k, n, 1, y, n, w, k, 0, x, k);
          break;
        case Kind::backward_weight:
          cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, n, k, m, 1, y, n, x, k, 0,
                      layer.d_w.data() + e * n * k, k);
          break;
      }
    }
  }
  layer.count(state);
}
#endif

void training_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "K", "N", "experts"})->UseRealTime()->Unit(benchmark::kMicrosecond);
  for (const auto& [k, n] : {std::pair{256, 768}, {512, 2048}, {1024, 1024}, {1024, 4096}}) {
    b->Args({2048, k, n, 1});
  }
  b->Args({512, 2048, 32000, 1})->Args({8192, 256, 256, 32});
  // Of bench/configs/5m.json and 42m.json: attention, experts, a piece of the cross entropy.
  b->Args({4096, 192, 192, 1})->Args({8192, 192, 96, 8})->Args({8192, 96, 192, 8})->Args({512, 192, 4096, 1});
  b->Args({4096, 384, 576, 1})
      ->Args({16384, 384, 256, 16})
      ->Args({16384, 256, 384, 16})
      ->Args({512, 384, 8192, 1});
}
// Of DeepSeek-V2-Lite: attention, experts.
void prefill_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "K", "N", "experts"})->UseRealTime()->Unit(benchmark::kMicrosecond);
  b->Args({512, 2048, 3072, 1})->Args({3072, 2048, 1408, 64})->Args({3072, 1408, 2048, 64});
}
void decode_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "K", "N", "experts"})->UseRealTime()->Unit(benchmark::kMicrosecond);
  for (int rows : {1, 2, 4, 8, 16, 64}) b->Args({rows, 1024, 4096, 1});
  b->Args({1, 2048, 32000, 1})->Args({8, 2048, 1408, 8});
}

// The most multiply-adds a second these cores do on registers, beside which the others stand.
void peak(benchmark::State& state) {
  double best = 0;
  for (auto _ : state) best = std::max(best, measure_peak_flops(cpu().threads()));
  state.counters["MAC/s"] = best / 2;
}
BENCHMARK(peak)->UseRealTime()->Unit(benchmark::kMicrosecond);

BENCHMARK(product<Kind::forward, float>)->Apply(training_shapes);
BENCHMARK(product<Kind::backward_input, float>)->Apply(training_shapes);
BENCHMARK(product<Kind::backward_weight, float>)->Apply(training_shapes);
BENCHMARK(product<Kind::forward, bf16>)->Apply(training_shapes);
BENCHMARK(product<Kind::forward, float>)->Apply(decode_shapes);
BENCHMARK(product<Kind::forward, bf16>)->Apply(decode_shapes);
BENCHMARK(quantised<DType::q8>)->Apply(decode_shapes)->Apply(prefill_shapes);
BENCHMARK(quantised<DType::q4>)->Apply(decode_shapes)->Apply(prefill_shapes);
#ifdef LATENTE_OPENBLAS
BENCHMARK(openblas<Kind::forward>)->Apply(training_shapes);
BENCHMARK(openblas<Kind::backward_input>)->Apply(training_shapes);
BENCHMARK(openblas<Kind::backward_weight>)->Apply(training_shapes);
BENCHMARK(openblas<Kind::forward>)->Apply(decode_shapes);
#endif

}  // namespace
}  // namespace latente

BENCHMARK_MAIN();
