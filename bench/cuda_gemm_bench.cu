// Speed of products in bfloat16 and FP8 on a GPU: medians of recorded calls, each with operands of its own
// where they would fit the second-level cache. Large ones in TFLOP/s, those of few rows in TB/s of weights.
//
//   bench_cuda_gemm [dense] [grouped] [fp8] [few]
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
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
  std::printf("\n%-32s %21s %21s %21s %21s %21s %21s %21s\n", "experts, rows, N x K", "forward us TFLOP/s",
              "input", "weight", "gathered: forward", "weight", "weight, bfloat16", "gathered, bfloat16");
  struct Case {
    int64_t experts, rows, n, k;
  };
  for (const Case c : {Case{32, 65536, 384, 768},
                       {32, 65536, 768, 384},
                       {32, 65536, 768, 768},
                       {64, 49152, 2816, 2048},
                       {64, 49152, 2048, 1408},
                       {128, 65536, 1408, 2048},
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
      for (int kind = 0; kind < 7; ++kind) {
        const bool narrow = kind >= 5;  // gradients of weights, as PyTorch writes them
        const double us = b.time(3, [&](int call) {
          b.begin_call(call, elements);
          const View x = b.take({c.rows, c.k}), y = b.take({c.rows, c.n});
          View chosen = x;
          chosen.shape = {tokens, c.k};
          const View w = b.take({c.experts, c.n, c.k});
          const View d_w = b.take({c.experts, c.n, c.k}, narrow ? DType::bf16 : DType::f32);
          if (kind == 0) grouped_linear(x, {}, on_device, w, y, b.context);
          if (kind == 1) grouped_linear_backward_input(y, on_device, w, {x, false}, b.context);
          if (kind == 2 || kind == 5)
            grouped_linear_backward_weight(y, x, {}, on_device, {d_w, false}, b.context);
          if (kind == 3) grouped_linear(chosen, gathered, on_device, w, y, b.context);
          if (kind == 4 || kind == 6) {
            grouped_linear_backward_weight(y, chosen, gathered, on_device, {d_w, false}, b.context);
          }
        });
        std::printf(" %11.1f %9.1f", us, operations / us);
      }
      std::printf("\n");
    }
  }
}

// -- FP8 beside bfloat16: operands in memory of their own, the same in every call; larger than the cache --

struct Fp8Room {
  std::vector<std::shared_ptr<void>> kept;
  View take(Shape shape, DType type) {
    kept.push_back(allocate(shape.count() * size_of(type)));
    return {kept.back().get(), shape, type};
  }
  Fp8Operand activations(int64_t rows, int64_t columns, int64_t experts) {
    const int64_t depth = fp8_depth(rows, experts);
    return {{take({rows, columns}, DType::f8e4m3), take({fp8_blocks(columns), rows}, DType::f32)},
            {take({columns, depth}, DType::f8e4m3), take({depth / fp8_block, columns}, DType::f32)}};
  }
  Fp8Operand weight(int64_t experts, int64_t n, int64_t k) {
    const auto shape = [&](int64_t r, int64_t c) { return experts > 0 ? Shape{experts, r, c} : Shape{r, c}; };
    return {{take(shape(n, k), DType::f8e4m3), take(shape(fp8_blocks(n), fp8_blocks(k)), DType::f32)},
            {take(shape(k, n), DType::f8e4m3), take(shape(fp8_blocks(k), fp8_blocks(n)), DType::f32)}};
  }
};

// A pair of times, as TFLOP/s in FP8 and as a ratio.
void print_pair(double bf16_us, double fp8_us, double operations) {
  std::printf(" %8.1f %6.0f (%.2f)", fp8_us, operations / fp8_us, bf16_us / fp8_us);
}

void fp8(Bench& b) {
  const Context& c = b.context;
  std::printf("\n%-24s %24s %24s %24s %12s %12s\n", "FP8: T x N x K", "forward us TFLOP/s (bf16)", "input",
              "weight", "x GB/s", "w GB/s");
  for (const auto& [t, n, k] : std::initializer_list<std::array<int64_t, 3>>{{4096, 4096, 4096},
                                                                             {8192, 8192, 8192},
                                                                             {16384, 3072, 2048},
                                                                             {16384, 576, 2048},
                                                                             {16384, 4096, 512},
                                                                             {16384, 2048, 2048},
                                                                             {16384, 1408, 2048},
                                                                             {16384, 2048, 1408},
                                                                             {16384, 8192, 2048},
                                                                             {16384, 2048, 8192}}) {
    b.begin_call(0, t * (k + n) + n * k + 256);
    Fp8Room room;
    const View x = b.take({t, k}), y = b.take({t, n}), w = b.take({n, k});
    const View out = room.take({t, n}, DType::bf16), d_x = room.take({t, k}, DType::bf16);
    const View d_w = room.take({n, k}, DType::f32);
    const Fp8Operand xq = room.activations(t, k, 0), yq = room.activations(t, n, 0),
                     wq = room.weight(0, n, k);
    quantise_fp8(y, {}, {}, yq, c);
    const double x_us = b.time(3, [&](int) { quantise_fp8(x, {}, {}, xq, c); });
    const double w_us = b.time(3, [&](int) { quantise_fp8_weight(w, wq, c); });
    const double operations = 2e-6 * static_cast<double>(t * n * k);
    std::printf("%-24s", (std::to_string(t) + " x " + std::to_string(n) + " x " + std::to_string(k)).c_str());
    print_pair(b.time(3,
                      [&](int) {
                        linear(x, w, {}, {out, false}, c);
                      }),
               b.time(3,
                      [&](int) {
                        linear_fp8(xq.along, wq.along, {}, {}, {out, false}, c);
                      }),
               operations);
    print_pair(b.time(3,
                      [&](int) {
                        linear_backward_input(y, w, {d_x, false}, c);
                      }),
               b.time(3,
                      [&](int) {
                        linear_fp8(yq.along, wq.across, {}, {}, {d_x, false}, c);
                      }),
               operations);
    print_pair(b.time(3,
                      [&](int) {
                        linear_backward_weight(y, x, {d_w, false}, c);
                      }),
               b.time(3,
                      [&](int) {
                        linear_fp8_backward_weight(yq.across, xq.across, {}, {d_w, false}, c);
                      }),
               operations);
    std::printf(" %12.0f %12.0f\n", 4e-3 * static_cast<double>(t * k) / x_us,
                4e-3 * static_cast<double>(n * k) / w_us);
  }

  std::printf("\n%-32s %24s %24s %24s %24s %24s\n", "experts, rows, F x K", "gates: forward us (bf16)",
              "input", "a weight, added to", "down: forward", "weight");
  struct Case {
    int64_t experts, rows, f, k;
  };
  for (const Case at : {Case{64, 98304, 704, 2048}, Case{32, 65536, 384, 768}}) {
    for (const bool skewed : {false, true}) {
      std::vector<int32_t> offsets{0};
      double total = 0, sum = 0;
      auto share = [&](int64_t e) { return skewed ? 1.0 / static_cast<double>(e + 1) : 1.0; };
      for (int64_t e = 0; e < at.experts; ++e) total += share(e);
      for (int64_t e = 0; e < at.experts; ++e) {
        sum += share(e);
        offsets.push_back(static_cast<int32_t>(static_cast<double>(at.rows) * sum / total + 0.5));
      }
      Fp8Room room;
      const View off = room.take({at.experts + 1}, DType::i32);
      upload(offsets.data(), off, b.stream);
      std::vector<int32_t> order(static_cast<size_t>(at.rows));
      const int64_t tokens = at.rows / 6;
      for (int64_t i = 0; i < at.rows; ++i)
        order[static_cast<size_t>(i)] = static_cast<int32_t>(i * 7919 % tokens);
      const View rows = room.take({at.rows}, DType::i32);
      upload(order.data(), rows, b.stream);
      b.begin_call(0, 0);
      const int64_t r = at.rows, f = at.f, k = at.k, e = at.experts;
      const View x = b.take({tokens, k}), d_gated = b.take({r, f}), d_risen = b.take({r, f});
      const View d_y = b.take({r, k}), gate = b.take({e, f, k}), up = b.take({e, f, k}),
                 down = b.take({e, k, f});
      const View gated = room.take({r, f}, DType::bf16), risen = room.take({r, f}, DType::bf16);
      const View inner = room.take({r, f}, DType::bf16), d_x = room.take({r, k}, DType::bf16);
      const View d_gate = room.take({e, f, k}, DType::f32), d_up = room.take({e, f, k}, DType::f32);
      const View d_down = room.take({e, k, f}, DType::f32);
      const Fp8Operand xq = room.activations(r, k, e), gq = room.activations(r, f, e);
      const Fp8Operand rq = room.activations(r, f, e), yq = room.activations(r, k, e);
      const Fp8Operand gw = room.weight(e, f, k), uw = room.weight(e, f, k), dw = room.weight(e, k, f);
      quantise_fp8_weight(gate, gw, c), quantise_fp8_weight(up, uw, c), quantise_fp8_weight(down, dw, c);
      quantise_fp8(d_risen, {}, off, rq, c), quantise_fp8(d_y, {}, off, yq, c);
      const double gather_us = b.time(2, [&](int) { quantise_fp8(x, rows, off, xq, c); });
      const double rows_us = b.time(2, [&](int) { quantise_fp8(d_gated, {}, off, gq, c); });
      const double swiglu_us =
          b.time(2, [&](int) { swiglu_backward_fp8(d_gated, d_gated, d_risen, {}, {}, off, gq, rq, {}, c); });
      quantise_fp8(d_gated, {}, off, gq, c), quantise_fp8(d_risen, {}, off, rq, c);
      const double one = 2e-6 * static_cast<double>(r * f * k);
      std::printf("%-32s", (std::to_string(e) + ", " + std::to_string(r) + ", " + std::to_string(f) + " x " +
                            std::to_string(k) + (skewed ? " skewed" : ""))
                               .c_str());
      print_pair(b.time(2, [&](int) { gated_linear(x, rows, off, gate, up, gated, risen, inner, c); }),
                 b.time(2,
                        [&](int) {
                          gated_linear_fp8(xq.along, gw.along, uw.along, off, {}, gated, risen, inner, c);
                        }),
                 2 * one);
      print_pair(b.time(2,
                        [&](int) {
                          gated_linear_backward_input(d_gated, d_risen, off, gate, up, {d_x, false}, c);
                        }),
                 b.time(2,
                        [&](int) {
                          gated_linear_fp8_backward_input(gq.along, rq.along, gw.across, uw.across, off,
                                                          {d_x, false}, c);
                        }),
                 2 * one);
      print_pair(
          b.time(
              2,
              [&](int) {
                gated_linear_backward_weight(d_gated, d_risen, x, rows, off, {d_gate, true}, {d_up, true}, c);
              }),
          b.time(2,
                 [&](int) {
                   linear_fp8_backward_weight(gq.across, xq.across, off, {d_gate, true}, c);
                   linear_fp8_backward_weight(rq.across, xq.across, off, {d_up, true}, c);
                 }),
          2 * one);
      print_pair(b.time(2, [&](int) { grouped_linear(d_gated, {}, off, down, d_x, c); }),
                 b.time(2,
                        [&](int) {
                          linear_fp8(gq.along, dw.along, off, {}, {d_x, false}, c);
                        }),
                 one);
      print_pair(b.time(2,
                        [&](int) {
                          grouped_linear_backward_weight(d_y, d_gated, {}, off, {d_down, false}, c);
                        }),
                 b.time(2,
                        [&](int) {
                          linear_fp8_backward_weight(yq.across, gq.across, off, {d_down, false}, c);
                        }),
                 one);
      std::printf(
          "\n  quantising: x gathered %.0f us (%.0f GB/s written), rows %.0f us (%.0f GB/s), swiglu's "
          "gradient %.0f us (%.0f GB/s)\n",
          gather_us, 2e-3 * static_cast<double>(r * k) / gather_us, rows_us,
          4e-3 * static_cast<double>(r * f) / rows_us, swiglu_us,
          1e-2 * static_cast<double>(r * f) / swiglu_us);
    }
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

int main(int argc, char** argv) {
  const auto wanted = [&](const char* part) {
    return argc == 1 ||
           std::any_of(argv + 1, argv + argc, [&](const char* name) { return !std::strcmp(name, part); });
  };
  try {
    latente::cuda::Bench bench;
    if (wanted("dense")) latente::cuda::dense(bench);
    if (wanted("grouped")) latente::cuda::grouped(bench);
    if (wanted("fp8")) latente::cuda::fp8(bench);
    if (wanted("few")) latente::cuda::few_rows(bench);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
