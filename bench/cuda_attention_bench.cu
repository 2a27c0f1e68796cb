// Speed of attention on a GPU: medians of recorded calls, each with inputs of its own so that the
// second-level cache holds none of them. Operations are what the mathematics asks for: the causal half of the
// scores, five products for the gradient.
//
//   bench_cuda_attention decode [heads] | kinds | expanded | all
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "base/random.h"
#include "cuda/kernels.h"
#include "cuda_bench.cuh"

namespace latente::cuda {
namespace {

struct Bench : CudaBench {
  Bench() : CudaBench(int64_t{512} << 20) {}
  View indices(const std::vector<int32_t>& values, Shape shape) {
    kept.push_back(allocate(static_cast<int64_t>(values.size()) * 4));
    const View view(kept.back().get(), shape, DType::i32);
    upload(values.data(), view, stream);
    return view;
  }

  std::vector<std::shared_ptr<void>> kept;
};

// FlashMLA's dense bf16 decoding on an H100 (its head of April 2026; kernel and combination, medians), in
// microseconds: heads, query tokens, context, batch.
const std::map<std::tuple<int, int, int, int>, double> flash_mla = {
    {{128, 1, 1, 1}, 16.7},  {{128, 1, 1, 8}, 21.8},  {{128, 1, 1, 32}, 40.4},   {{128, 1, 1, 128}, 78.4},
    {{128, 1, 8, 1}, 28.3},  {{128, 1, 8, 8}, 54.3},  {{128, 1, 8, 32}, 136},    {{128, 1, 8, 128}, 519},
    {{128, 1, 32, 1}, 47.7}, {{128, 1, 32, 8}, 137},  {{128, 1, 32, 32}, 492},   {{128, 1, 32, 128}, 2030},
    {{128, 1, 128, 1}, 101}, {{128, 1, 128, 8}, 484}, {{128, 1, 128, 32}, 1980}, {{128, 1, 128, 128}, 7660},
    {{128, 2, 8, 1}, 43.0},  {{128, 2, 8, 8}, 84.9},  {{128, 2, 8, 32}, 251},    {{128, 2, 8, 128}, 929},
    {{64, 1, 8, 1}, 30.2},   {{64, 1, 8, 8}, 46.1},   {{64, 1, 8, 32}, 123},     {{64, 1, 8, 128}, 437},
    {{64, 1, 128, 1}, 100},  {{64, 1, 128, 8}, 441},  {{64, 1, 128, 32}, 1660},  {{64, 1, 128, 128}, 6480},
    {{16, 1, 8, 1}, 28.1},   {{16, 1, 8, 8}, 40.0},   {{16, 1, 8, 32}, 115},     {{16, 1, 8, 128}, 413},
    {{16, 1, 128, 1}, 98},   {{16, 1, 128, 8}, 420},  {{16, 1, 128, 32}, 1620},  {{16, 1, 128, 128}, 6390},
    {{16, 2, 8, 1}, 26.7},   {{16, 2, 8, 8}, 44.2},   {{16, 2, 8, 32}, 133},     {{16, 2, 8, 128}, 486},
};

void decode(Bench& bench, int heads_only) {
  constexpr int64_t page = 64, rank = 512, width = 576;
  const int64_t most_keys = int64_t{128} * 128 * 1024;
  const std::shared_ptr<void> pool = bench.random(most_keys * width);
  const std::shared_ptr<void> queries = bench.random(int64_t{256} * 128 * width);
  const std::shared_ptr<void> out = allocate(int64_t{256} * 128 * rank * 2);
  const View keys(pool.get(), {most_keys / page, page, 1, width}, DType::bf16);
  View values = keys;
  values.shape = {most_keys / page, page, 1, rank};
  Random random(1);
  std::printf("\n%-10s %6s %8s %10s %9s %7s %10s %6s\n", "heads x q", "batch", "context", "us", "TFLOP/s",
              "TB/s", "FlashMLA", "ratio");
  for (const int heads : {128, 64, 16}) {
    if (heads_only && heads != heads_only) continue;
    for (const int tokens : {1, 2}) {
      for (const int context : {1, 8, 32, 128}) {
        for (const int batch : {1, 8, 32, 128}) {
          const int64_t length = context * 1024, columns = length / page, pages = batch * columns;
          const int calls = static_cast<int>(std::clamp<int64_t>(most_keys / page / pages, 1, 20));
          bench.kept.clear();
          // Pages of one call lie anywhere in a stretch of the pool that no other call reads.
          std::vector<Pages> where;
          for (int call = 0; call < calls; ++call) {
            std::vector<int32_t> table(static_cast<size_t>(pages)), sequence, position;
            std::iota(table.begin(), table.end(), static_cast<int32_t>(call * pages));
            random.shuffle(std::span(table));
            for (int s = 0; s < batch; ++s) {
              for (int t = 0; t < tokens; ++t) {
                sequence.push_back(s);
                position.push_back(static_cast<int32_t>(length - tokens + t));
              }
            }
            const int64_t rows = batch * tokens;
            where.push_back({bench.indices(table, {batch, columns}), bench.indices(sequence, {rows}),
                             bench.indices(position, {rows})});
          }
          const View q(queries.get(), {batch * tokens, heads, width}, DType::bf16);
          const View to(out.get(), {batch * tokens, heads, rank}, DType::bf16);
          const double time = bench.time(calls, [&](int call) {
            attention_paged(q, keys, values, where[static_cast<size_t>(call)], 0.05, to, bench.context);
          });
          const double pairs = static_cast<double>(batch * tokens * heads) * static_cast<double>(length);
          const double bytes = 2.0 * (static_cast<double>(batch * length * width) +
                                      static_cast<double>(batch * tokens * heads * (width + rank)));
          std::printf("%4d x %-3d %6d %7dK %10.1f %9.0f %7.2f", heads, tokens, batch, context, time,
                      pairs * 2 * (width + rank) / time * 1e-6, bytes / time * 1e-6);
          const auto peer = flash_mla.find({heads, tokens, context, batch});
          if (peer != flash_mla.end()) std::printf(" %10.1f %6.2f", peer->second, peer->second / time);
          std::printf("\n");
          std::fflush(stdout);
        }
      }
    }
  }
}

// The kinds of attention of one model, a query token a sequence: what the smaller cache is worth. Latents are
// 512 wide with a rotary part of 64; the others' keys and values 128.
void kinds(Bench& bench) {
  struct Kind {
    const char* name;
    int64_t groups;  // 0: latents
    DType type;
  };
  constexpr int64_t page = 64, rank = 512, rope = 64, head = 128;
  const int64_t pool_bytes = int64_t{40} << 30;
  const std::shared_ptr<void> pool = bench.random(pool_bytes / 2);
  const std::shared_ptr<void> queries = bench.random(int64_t{128} * 128 * (rank + rope));
  const std::shared_ptr<void> out = allocate(int64_t{128} * 128 * rank * 2);
  Random random(2);
  std::printf("\n%-6s %-10s %8s %8s %6s %10s %7s %8s\n", "heads", "kind", "B/token", "context", "batch", "us",
              "TB/s", "of MHA");
  for (const int64_t heads : {128, 16}) {
    for (const int64_t length : {1024, 8192, 32768}) {
      for (const int64_t batch : {1, 16, 64}) {
        double mha = 0;
        for (const Kind& kind : {Kind{"MHA", heads, DType::bf16}, Kind{"GQA-8", 8, DType::bf16},
                                 Kind{"MQA", 1, DType::bf16}, Kind{"MLA", 0, DType::bf16},
                                 Kind{"MLA int8", 0, DType::u8}, Kind{"MLA FP8", 0, DType::f8e4m3}}) {
          const bool latent = kind.groups == 0;
          const int64_t groups = latent ? 1 : kind.groups;
          const int64_t width = !latent                    ? head
                                : kind.type == DType::bf16 ? rank + rope
                                                           : Backend::narrow_entry_bytes(rank, rope);
          const int64_t token_bytes = (latent ? 1 : 2) * groups * width * size_of(kind.type);
          const int64_t columns = length / page, pages = batch * columns;
          const int64_t call_bytes = batch * length * token_bytes;
          if (call_bytes > pool_bytes) {
            std::printf("%-6d %-10s %8d %7dK %6d %10s\n", static_cast<int>(heads), kind.name,
                        static_cast<int>(token_bytes), static_cast<int>(length / 1024),
                        static_cast<int>(batch), "no room");
            continue;
          }
          const auto calls = std::clamp<int64_t>(pool_bytes / call_bytes, 1, 12);
          const int64_t all_pages = calls * pages;
          const View keys(pool.get(), {all_pages, page, groups, width}, kind.type);
          View values = keys;
          if (latent) {
            values.shape = {all_pages, page, 1, rank};
          } else {
            values.data = static_cast<char*>(pool.get()) + keys.bytes();
          }
          bench.kept.clear();
          std::vector<Pages> where;
          for (int64_t call = 0; call < calls; ++call) {
            std::vector<int32_t> table(static_cast<size_t>(pages)), sequence(static_cast<size_t>(batch));
            std::iota(table.begin(), table.end(), static_cast<int32_t>(call * pages));
            random.shuffle(std::span(table));
            std::iota(sequence.begin(), sequence.end(), 0);
            const std::vector<int32_t> position(sequence.size(), static_cast<int32_t>(length - 1));
            where.push_back({bench.indices(table, {batch, columns}), bench.indices(sequence, {batch}),
                             bench.indices(position, {batch})});
          }
          const View q(queries.get(), {batch, heads, latent ? rank + rope : head}, DType::bf16);
          const View to(out.get(), {batch, heads, latent ? rank : head}, DType::bf16);
          const double time = bench.time(static_cast<int>(calls), [&](int call) {
            attention_paged(q, keys, values, where[static_cast<size_t>(call)], 0.05, to, bench.context);
          });
          if (kind.groups == heads) mha = time;
          std::printf("%-6d %-10s %8d %7dK %6d %10.1f %7.2f", static_cast<int>(heads), kind.name,
                      static_cast<int>(token_bytes), static_cast<int>(length / 1024), static_cast<int>(batch),
                      time, static_cast<double>(call_bytes) / time * 1e-6);
          if (mha > 0) std::printf(" %7.2fx", mha / time);
          std::printf("\n");
          std::fflush(stdout);
        }
      }
    }
  }
}

void expanded(Bench& bench) {
  struct Sizes {
    int64_t heads, nope, rope, value, sequences, length;
  };
  std::printf("\n%-22s %6s %7s %11s %9s %11s %9s\n", "heads, widths", "batch", "length", "forward us",
              "TFLOP/s", "backward us", "TFLOP/s");
  for (const Sizes& at :
       {Sizes{128, 128, 64, 128, 1, 2048}, Sizes{128, 128, 64, 128, 1, 4096},
        Sizes{128, 128, 64, 128, 1, 8192}, Sizes{128, 128, 64, 128, 1, 16384},
        Sizes{16, 128, 64, 128, 1, 4096}, Sizes{16, 128, 64, 128, 4, 4096}, Sizes{16, 128, 64, 128, 1, 32768},
        Sizes{12, 64, 32, 64, 16, 1024}, Sizes{12, 64, 32, 64, 1, 8192}, Sizes{16, 64, 64, 64, 4, 4096},
        Sizes{16, 128, 0, 128, 4, 4096}}) {
    const int64_t tokens = at.sequences * at.length, width = at.nope + at.rope, kv = at.nope + at.value;
    const auto q = bench.random(tokens * at.heads * width), k = bench.random(tokens * at.heads * kv);
    const auto rope = bench.random(tokens * std::max<int64_t>(at.rope, 1));
    const auto d_out = bench.random(tokens * at.heads * at.value);
    const auto d_q = bench.random(tokens * at.heads * width), d_k = bench.random(tokens * at.heads * kv);
    const auto d_rope = bench.random(tokens * std::max<int64_t>(at.rope, 1));
    const auto out = bench.random(tokens * at.heads * at.value);
    const auto lse = allocate(tokens * at.heads * 4), delta = allocate(tokens * at.heads * 4);
    std::vector<int32_t> starts;
    for (int64_t t = 0; t < tokens; ++t) starts.push_back(static_cast<int32_t>(t / at.length * at.length));
    bench.kept.clear();
    const View start = bench.indices(starts, {tokens});
    auto columns = [&](const std::shared_ptr<void>& x, int64_t first, int64_t count) {
      View view(static_cast<uint16_t*>(x.get()) + first, {tokens, at.heads, count}, DType::bf16);
      view.strides = {at.heads * kv, kv, 1, 0};
      return view;
    };
    auto heads_of = [&](const std::shared_ptr<void>& x, int64_t count) {
      return View(x.get(), {tokens, at.heads, count}, DType::bf16);
    };
    auto rotary = [&](const std::shared_ptr<void>& x) {
      return at.rope ? View(x.get(), {tokens, at.rope}, DType::bf16) : View();
    };
    const View statistics(lse.get(), {tokens, at.heads}, DType::f32);
    const View deltas(delta.get(), {tokens, at.heads}, DType::f32);
    const double forward = bench.time(4, [&](int) {
      attention_expanded(heads_of(q, width), columns(k, 0, at.nope), rotary(rope),
                         columns(k, at.nope, at.value), start, 0.07, heads_of(out, at.value), statistics,
                         bench.context);
    });
    const double backward = bench.time(4, [&](int) {
      attention_expanded_backward(heads_of(d_out, at.value), heads_of(q, width), columns(k, 0, at.nope),
                                  rotary(rope), columns(k, at.nope, at.value), start, 0.07,
                                  heads_of(out, at.value), statistics, {deltas, {}, at.length},
                                  {heads_of(d_q, width)}, {columns(d_k, 0, at.nope)}, {rotary(d_rope)},
                                  {columns(d_k, at.nope, at.value)}, bench.context);
    });
    const double pairs = 0.5 * static_cast<double>(tokens * at.heads) * static_cast<double>(at.length + 1);
    const double products = static_cast<double>(width + at.value);
    const double gradients = static_cast<double>(3 * width + 2 * at.value);
    const std::string name = std::to_string(at.heads) + ", " + std::to_string(at.nope) + "+" +
                             std::to_string(at.rope) + "/" + std::to_string(at.value);
    std::printf("%-22s %6d %7d %11.1f %9.0f %11.1f %9.0f\n", name.c_str(), static_cast<int>(at.sequences),
                static_cast<int>(at.length), forward, 2 * pairs * products / forward * 1e-6, backward,
                2 * pairs * gradients / backward * 1e-6);
    std::fflush(stdout);
  }
}

}  // namespace
}  // namespace latente::cuda

int main(int count, char** arguments) {
  using namespace latente::cuda;
  if (device_count() == 0) {
    std::fprintf(stderr, "no CUDA device\n");
    return 1;
  }
  const std::string what = count > 1 ? arguments[1] : "all";
  Bench bench;
  if (what == "kinds" || what == "all") kinds(bench);
  if (what == "expanded" || what == "all") expanded(bench);
  if (what == "decode" || what == "all") decode(bench, count > 2 ? std::atoi(arguments[2]) : 0);
  return 0;
}
