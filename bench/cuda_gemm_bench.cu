// Speed of products in bfloat16 and FP8 on a GPU: medians of recorded calls, each with operands of its own
// where they would fit the second-level cache. Large ones in TFLOP/s, those of few rows in TB/s of weights.
//
//   bench_cuda_gemm
#include <algorithm>
#include <array>
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "cuda_bench.cuh"

namespace latente::cuda {
namespace {

struct Bench : CudaBench {
  Bench() : CudaBench(int64_t{64} << 20), pool(random(pool_elements)) {}
  void begin_call(int call, int64_t elements) {
    next = call * elements % std::max<int64_t>(pool_elements - elements, 1) / 64 * 64;
  }
  View take(Shape shape, DType type = DType::bf16) {
    const View view(static_cast<uint16_t*>(pool.get()) + next, shape, type);
    next += (shape.count() * size_of(type) / 2 + 63) / 64 * 64;
    return view;
  }

  static constexpr int64_t pool_elements = int64_t{3} << 29;
  std::shared_ptr<void> pool;
  int64_t next = 0;
};

void dense(Bench& b) {
  std::printf("\n%-24s %21s %21s %21s\n", "dense T x N x K", "forward us TFLOP/s", "input", "weight");
  // A square; a small model's layers (hidden 768); a larger one's (hidden 2048).
  for (const auto& [t, n, k] : std::initializer_list<std::array<int64_t, 3>>{{8192, 8192, 8192},
                                                                             {16384, 384, 768},
                                                                             {16384, 1152, 384},
                                                                             {16384, 224, 768},
                                                                             {16384, 1536, 192},
                                                                             {16384, 768, 768},
                                                                             {16384, 2048, 768},
                                                                             {16384, 768, 2048},
                                                                             {16384, 768, 384},
                                                                             {16384, 8192, 768},
                                                                             {16384, 3072, 2048},
                                                                             {16384, 576, 2048},
                                                                             {16384, 4096, 512},
                                                                             {16384, 2048, 2048},
                                                                             {16384, 10944, 2048},
                                                                             {16384, 2048, 10944}}) {
    const int64_t elements = t * k + n * k + t * n + 2 * n * k + 512;
    const double operations = 2e-6 * static_cast<double>(t * n * k);
    const int calls = static_cast<int>(std::clamp<int64_t>(2e6 / operations, 2, 10));
    std::printf("%-24s", (std::to_string(t) + " x " + std::to_string(n) + " x " + std::to_string(k)).c_str());
    for (int kind = 0; kind < 3; ++kind) {
      const double us = b.time(calls, [&](int call) {
        b.begin_call(call, elements);
        const View x = b.take({t, k}), w = b.take({n, k}), y = b.take({t, n});
        const View d_w = b.take({n, k}, DType::f32);
        if (kind == 0) linear(x, w, {}, {y, false}, b.context);
        if (kind == 1) linear_backward_input(y, w, {x, false}, b.context);
        if (kind == 2) linear_backward_weight(y, x, {d_w, false}, b.context);
      });
      std::printf(" %11.1f %9.1f", us, operations / us);
    }
    std::printf("\n");
  }
}

void grouped(Bench& b) {
  std::printf("\n%-32s %21s %21s %21s %21s %21s\n", "experts, rows, N x K", "forward us TFLOP/s", "input",
              "weight", "gathered: forward", "weight");
  struct Case {
    int64_t experts, rows, n, k;
  };
  for (const Case c : {Case{32, 65536, 384, 768},
                       {32, 65536, 768, 384},
                       {32, 65536, 768, 768},
                       {64, 49152, 2816, 2048},
                       {64, 49152, 2048, 1408},
                       {256, 65536, 1024, 2048}}) {
    for (const bool skewed : {false, true}) {
      std::vector<int32_t> offsets{0};
      double total = 0, sum = 0;
      auto weight = [&](int64_t e) { return skewed ? 1.0 / static_cast<double>(e + 1) : 1.0; };
      for (int64_t e = 0; e < c.experts; ++e) total += weight(e);
      for (int64_t e = 0; e < c.experts; ++e) {
        sum += weight(e);
        offsets.push_back(static_cast<int32_t>(static_cast<double>(c.rows) * sum / total + 0.5));
      }
      const std::shared_ptr<void> memory = allocate(4 * (c.experts + 1));
      const View on_device(memory.get(), {c.experts + 1}, DType::i32);
      upload(offsets.data(), on_device, b.stream);
      // Every token chose four experts, in no order.
      const int64_t tokens = c.rows / 4;
      std::vector<int32_t> order(static_cast<size_t>(c.rows));
      for (int64_t i = 0; i < c.rows; ++i)
        order[static_cast<size_t>(i)] = static_cast<int32_t>(i * 7919 % tokens);
      const std::shared_ptr<void> order_memory = allocate(4 * c.rows);
      const View gathered(order_memory.get(), {c.rows}, DType::i32);
      upload(order.data(), gathered, b.stream);
      const int64_t elements = c.rows * (c.k + c.n) + 3 * c.experts * c.n * c.k + 512;
      const double operations = 2e-6 * static_cast<double>(c.rows * c.n * c.k);
      std::printf("%-32s", (std::to_string(c.experts) + ", " + std::to_string(c.rows) + ", " +
                            std::to_string(c.n) + " x " + std::to_string(c.k) + (skewed ? " skewed" : ""))
                               .c_str());
      for (int kind = 0; kind < 5; ++kind) {
        const double us = b.time(3, [&](int call) {
          b.begin_call(call, elements);
          const View x = b.take({c.rows, c.k}), y = b.take({c.rows, c.n});
          View chosen = x;
          chosen.shape = {tokens, c.k};
          const View w = b.take({c.experts, c.n, c.k}), d_w = b.take({c.experts, c.n, c.k}, DType::f32);
          if (kind == 0) grouped_linear(x, {}, on_device, w, y, b.context);
          if (kind == 1) grouped_linear_backward_input(y, on_device, w, {x, false}, b.context);
          if (kind == 2) grouped_linear_backward_weight(y, x, {}, on_device, {d_w, false}, b.context);
          if (kind == 3) grouped_linear(chosen, gathered, on_device, w, y, b.context);
          if (kind == 4) {
            grouped_linear_backward_weight(y, chosen, gathered, on_device, {d_w, false}, b.context);
          }
        });
        std::printf(" %11.1f %9.1f", us, operations / us);
      }
      std::printf("\n");
    }
  }
}

// Operands in memory of their own, the same in every call: larger than the cache together.
void fp8(Bench& b) {
  std::printf("\n%-24s %21s %21s %21s %10s %10s %10s\n", "FP8: T x N x K", "forward us TFLOP/s", "input",
              "weight", "rows us", "columns", "squares");
  auto quantised = [](Shape shape, Shape scales, bool squares) {
    static std::vector<std::shared_ptr<void>> kept;
    kept.push_back(allocate(shape.count()));
    const View codes(kept.back().get(), shape, DType::f8e4m3);
    kept.push_back(allocate(4 * scales.count()));
    return Codes{codes, View(kept.back().get(), scales, DType::f32), squares};
  };
  for (const auto& [t, n, k] : std::initializer_list<std::array<int64_t, 3>>{{8192, 8192, 8192},
                                                                             {16384, 2048, 2048},
                                                                             {16384, 10944, 2048},
                                                                             {16384, 2048, 10944},
                                                                             {16384, 768, 768}}) {
    b.begin_call(0, t * (k + n) + n * k + 256);
    const View x = b.take({t, k}), y = b.take({t, n}), w = b.take({n, k});
    auto blocks = [](int64_t count) { return (count + 127) / 128; };
    const Codes xs = quantised({t, k}, {blocks(k), t}, false), ys = quantised({t, n}, {blocks(n), t}, false);
    const Codes xc = quantised({k, t}, {blocks(t), k}, false), yc = quantised({n, t}, {blocks(t), n}, false);
    const Codes ws = quantised({n, k}, {blocks(n), blocks(k)}, true);
    const Codes wt = quantised({k, n}, {blocks(k), blocks(n)}, true);
    quantise_rows(y, ys.codes, ys.scales, b.context);
    quantise_columns(y, yc.codes, yc.scales, b.context);
    const double rows = b.time(3, [&](int) { quantise_rows(x, xs.codes, xs.scales, b.context); });
    const double columns = b.time(3, [&](int) { quantise_columns(x, xc.codes, xc.scales, b.context); });
    const double squares =
        b.time(3, [&](int) { quantise_squares(w, ws.codes, ws.scales, wt.codes, wt.scales, b.context); });
    const std::shared_ptr<void> gradient = allocate(4 * n * k);
    const View d_w(gradient.get(), {n, k}, DType::f32);
    const double times[] = {b.time(3,
                                   [&](int) {
                                     product_fp8(xs, ws, {y, false}, b.context);
                                   }),
                            b.time(3,
                                   [&](int) {
                                     product_fp8(ys, wt, {x, false}, b.context);
                                   }),
                            b.time(3, [&](int) {
                              product_fp8(yc, xc, {d_w, false}, b.context);
                            })};
    std::printf("%-24s", (std::to_string(t) + " x " + std::to_string(n) + " x " + std::to_string(k)).c_str());
    for (const double us : times)
      std::printf(" %11.1f %9.1f", us, 2e-6 * static_cast<double>(t * n * k) / us);
    std::printf(" %10.1f %10.1f %10.1f\n", rows, columns, squares);
  }
}

void few_rows(Bench& b) {
  std::printf("\n%-16s %6s %9s %7s\n", "N x K", "rows", "us", "TB/s");
  for (const auto& [n, k] : std::initializer_list<std::array<int64_t, 2>>{
           {2048, 2048}, {10944, 2048}, {7168, 16384}, {102400, 2048}}) {
    for (const int64_t rows : {1, 8, 32, 33, 64, 128, 256}) {
      const int64_t elements = n * k + rows * (n + k) + 256;
      const double us = b.time(10, [&](int call) {
        b.begin_call(call, elements);
        const View w = b.take({n, k}), x = b.take({rows, k}), y = b.take({rows, n});
        linear(x, w, {}, {y, false}, b.context);
      });
      std::printf("%-16s %6ld %9.1f %7.2f\n", (std::to_string(n) + " x " + std::to_string(k)).c_str(),
                  static_cast<long>(rows), us, 2e-6 * static_cast<double>(n * k) / us);
    }
  }
}

}  // namespace
}  // namespace latente::cuda

int main() {
  try {
    latente::cuda::Bench bench;
    latente::cuda::dense(bench);
    latente::cuda::grouped(bench);
    latente::cuda::fp8(bench);
    latente::cuda::few_rows(bench);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
