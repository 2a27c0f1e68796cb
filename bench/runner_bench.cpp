// Passes of the runner: what a token costs alone, what verifying several at once costs, what a draft costs.
// Random bfloat16 weights of the shape of LATENTE_BENCH_CONFIG (default: the demo's).
#include <benchmark/benchmark.h>

#include <cstdlib>
#include <memory>

#include "cpu/cpu_backend.h"
#include "infer/sequence_runner.h"
#include "model/weights.h"

namespace latente {
namespace {

struct Bench {
  CpuBackend backend;
  Transformer model;
  std::unique_ptr<SequenceRunner> runner;

  Bench() : model(config(), DType::bf16) {
    allocate_parameters(model);
    initialise(model, 1);
    pack_weights(model, backend);
    RunnerOptions options;
    options.context = 512;
    runner = std::make_unique<SequenceRunner>(backend, model, options);
    std::vector<int32_t> prompt(256, 1);
    runner->forward(prompt, 0, 1);
    if (!model.mtp.empty()) runner->predict(0, prompt, 0);
  }

  static Config config() {
    const char* path = std::getenv("LATENTE_BENCH_CONFIG");
    return Config::from_file(path ? path : LATENTE_BENCH_CONFIGS "/demo.json");
  }
};

Bench& bench() {
  static Bench one;
  return one;
}

void verify(benchmark::State& state) {
  std::vector<int32_t> tokens(static_cast<size_t>(state.range(0)));
  int32_t next = 0;
  for (auto _ : state) {
    for (int32_t& token : tokens) token = next = (next * 31 + 7) % 1000;
    bench().runner->forward(tokens, 256, state.range(0));
  }
}
BENCHMARK(verify)->DenseRange(1, 4)->Arg(8)->UseRealTime()->Unit(benchmark::kMicrosecond);

void draft(benchmark::State& state) {
  if (bench().model.mtp.empty()) return state.SkipWithError("the model has no MTP module");
  std::vector<int32_t> tokens(static_cast<size_t>(state.range(0)), 5);
  for (auto _ : state) bench().runner->predict(0, tokens, 254);
}
BENCHMARK(draft)->DenseRange(1, 2)->UseRealTime()->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace latente

BENCHMARK_MAIN();
