// Speed of attention on the CPU. The counter FLOP/s counts what the mathematics asks for: the causal half of
// the scores, and five products for the gradient (scores are computed anew).
#include <benchmark/benchmark.h>

#include <numeric>
#include <random>
#include <vector>

#include "cpu/cpu_backend.h"

namespace latente {
namespace {

CpuBackend& cpu() {
  static CpuBackend backend;
  return backend;
}

template <class T>
std::vector<T> random_values(int64_t count) {
  std::minstd_rand random(1);
  std::normal_distribution<float> normal;
  std::vector<T> values(static_cast<size_t>(count));
  for (T& x : values) x = T(normal(random));
  return values;
}

// Arguments: sequences, tokens of each, heads, nope, rope, value dimensions.
struct Training {
  explicit Training(const benchmark::State& state)
      : length(state.range(1)),
        tokens(state.range(0) * length),
        heads(state.range(2)),
        nope(state.range(3)),
        rope(state.range(4)),
        value(state.range(5)),
        q(random_values<float>(tokens * heads * (nope + rope))),
        kv(random_values<float>(tokens * heads * (nope + value))),
        k_rope(random_values<float>(tokens * rope)),
        out(random_values<float>(tokens * heads * value)),
        lse(static_cast<size_t>(tokens * heads)),
        starts(static_cast<size_t>(tokens)) {
    for (int64_t t = 0; t < tokens; ++t) {
      starts[static_cast<size_t>(t)] = static_cast<int32_t>(t / length * length);
    }
  }

  View query(std::vector<float>& x) const { return View(x.data(), {tokens, heads, nope + rope}, DType::f32); }
  View key(std::vector<float>& x) const { return columns(x, 0, nope); }
  View values(std::vector<float>& x) const { return columns(x, nope, value); }
  View key_rope(std::vector<float>& x) const {
    return rope ? View(x.data(), {tokens, rope}, DType::f32) : View();
  }
  View result(std::vector<float>& x) const { return View(x.data(), {tokens, heads, value}, DType::f32); }
  View a_head(std::vector<float>& x) const { return View(x.data(), {tokens, heads}, DType::f32); }
  View columns(std::vector<float>& x, int64_t first, int64_t width) const {
    View view(x.data() + first, {tokens, heads, width}, DType::f32);
    view.strides = {heads * (nope + value), nope + value, 1, 0};
    return view;
  }

  void forward() {
    cpu().attention_expanded(query(q), key(kv), key_rope(k_rope), values(kv),
                             View(starts.data(), {tokens}, DType::i32), 0.1, result(out), a_head(lse));
  }
  double pairs() const { return 0.5 * static_cast<double>(tokens * heads * (length + 1)); }

  int64_t length, tokens, heads, nope, rope, value;
  std::vector<float> q, kv, k_rope, out, lse;
  std::vector<int32_t> starts;
};

void report(benchmark::State& state, double flops) {
  state.counters["FLOP/s"] = benchmark::Counter(flops, benchmark::Counter::kIsIterationInvariantRate);
}

void attention_forward(benchmark::State& state) {
  Training a(state);
  for (auto _ : state) a.forward();
  report(state, a.pairs() * 2 * static_cast<double>(a.nope + a.rope + a.value));
}

void attention_backward(benchmark::State& state) {
  Training a(state);
  a.forward();
  std::vector<float> d_out = random_values<float>(a.tokens * a.heads * a.value);
  std::vector<float> d_q(a.q.size()), d_kv(a.kv.size()), d_k_rope(a.k_rope.size()), delta(a.lse.size());
  for (auto _ : state) {
    cpu().attention_expanded_backward(a.result(d_out), a.query(a.q), a.key(a.kv), a.key_rope(a.k_rope),
                                      a.values(a.kv), View(a.starts.data(), {a.tokens}, DType::i32), 0.1,
                                      a.result(a.out), a.a_head(a.lse), a.a_head(delta), {a.query(d_q)},
                                      {a.key(d_kv)}, {a.key_rope(d_k_rope)}, {a.values(d_kv)});
  }
  report(state, a.pairs() * 2 * static_cast<double>(3 * (a.nope + a.rope) + 2 * a.value));
}

// Absorbed MLA. Arguments: sequences, cached tokens of each, heads, latent, rope. The calls take turns with
// several caches, as layers do: each has left the processor's caches when its turn comes.
template <DType type>
void attention_decode(benchmark::State& state) {
  constexpr int64_t page = 64;
  const int64_t sequences = state.range(0), length = state.range(1), heads = state.range(2),
                latent = state.range(3), rope = state.range(4), width = latent + rope, pages = length / page;
  const bool narrow = Backend::is_narrow_cache(type);
  const int64_t entry = narrow ? Backend::narrow_entry_bytes(latent, rope) : width;  // elements
  const int64_t layers =
      std::max<int64_t>(1, (int64_t{256} << 20) / (sequences * length * entry * size_of(type)));
  const int64_t entries = layers * sequences * length, bytes = entries * entry * size_of(type);
  const std::shared_ptr<void> cache = cpu().allocate(bytes);
  const View stored(cache.get(), {entries / page, page, entry}, type);
  for (int64_t at = 0; at < entries; at += length) {
    std::vector<float> x = random_values<float>(length * width);
    std::vector<int32_t> slots(static_cast<size_t>(length));
    std::iota(slots.begin(), slots.end(), static_cast<int32_t>(at));
    View slot(slots.data(), {length}, DType::i32), both(x.data(), {length, width}, DType::f32);
    if (narrow) {
      cpu().cache_store_narrow(columns_of(both, 0, latent), columns_of(both, latent, width), slot, stored);
    } else {
      cpu().cache_store(both, slot, stored);
    }
  }
  std::vector<float> q = random_values<float>(sequences * heads * width);
  std::vector<float> out(static_cast<size_t>(sequences * heads * latent));
  std::vector<int32_t> table(static_cast<size_t>(layers * sequences * pages)),
      sequence(static_cast<size_t>(sequences));
  std::iota(table.begin(), table.end(), 0);
  std::iota(sequence.begin(), sequence.end(), 0);
  std::vector<int32_t> position(static_cast<size_t>(sequences), static_cast<int32_t>(length - 1));
  const View keys(cache.get(), {entries / page, page, 1, entry}, type);
  View values = keys;
  values.shape = {layers * sequences * pages, page, 1, latent};
  Pages at{View(table.data(), {sequences, pages}, DType::i32), View(sequence.data(), {sequences}, DType::i32),
           View(position.data(), {sequences}, DType::i32)};
  int64_t layer = 0;
  for (auto _ : state) {
    at.block_table.data = table.data() + layer++ % layers * sequences * pages;
    cpu().attention_paged(View(q.data(), {sequences, heads, width}, DType::f32), keys, values, at, 0.1,
                          View(out.data(), {sequences, heads, latent}, DType::f32));
  }
  report(state, 2 * static_cast<double>(sequences * length * heads * (width + latent)));
  state.counters["bytes/s"] = benchmark::Counter(static_cast<double>(bytes) / static_cast<double>(layers),
                                                 benchmark::Counter::kIsIterationInvariantRate);
}

void training_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"sequences", "tokens", "heads", "nope", "rope", "value"});
  b->Args({16, 256, 4, 48, 16, 48})->Args({16, 256, 8, 64, 32, 64})->Args({16, 512, 8, 64, 32, 64});
  b->Args({16, 1024, 12, 64, 32, 64})->Args({16, 512, 8, 128, 64, 128})->Args({1, 2048, 2, 64, 32, 64});
  b->UseRealTime()->Unit(benchmark::kMillisecond);
}
BENCHMARK(attention_forward)->Apply(training_shapes);
BENCHMARK(attention_backward)->Apply(training_shapes);

void decode_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"sequences", "tokens", "heads", "latent", "rope"});
  b->Args({1, 4096, 8, 512, 64})->Args({1, 4096, 16, 512, 64})->Args({8, 4096, 16, 512, 64});
  b->Args({1, 4096, 128, 512, 64})->UseRealTime()->Unit(benchmark::kMillisecond);
}
BENCHMARK(attention_decode<DType::f32>)->Apply(decode_shapes);
BENCHMARK(attention_decode<DType::bf16>)->Apply(decode_shapes);
BENCHMARK(attention_decode<DType::u8>)->Apply(decode_shapes);
BENCHMARK(attention_decode<DType::f8e4m3>)->Apply(decode_shapes);

}  // namespace
}  // namespace latente

BENCHMARK_MAIN();
