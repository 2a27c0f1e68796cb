// The logits of a text as the running commands compute them, for comparing with other programs
// (logits_vs_llama_cpp.py): token ids from standard input, float32 rows [tokens, vocabulary] to standard
// output. All tokens but the last `written` are read at once, those one by one.
//
//     logits MODEL TYPE THREADS WRITTEN < ids > rows
#include <cstdio>
#include <iostream>

#include "cpu/cpu_backend.h"
#include "infer/sequence_runner.h"
#include "model/run_weights.h"

namespace latente {
namespace {

void run(const std::string& path, const std::string& type, int threads, int64_t written) {
  std::vector<int32_t> ids;
  for (int32_t id; std::cin >> id;) ids.push_back(id);
  const auto count = static_cast<int64_t>(ids.size()), read = std::max<int64_t>(count - written, 0);
  CpuBackend backend(threads);
  RunWeights weights;
  weights.type = type;
  const auto model = load_for_running(open_model(path), weights, backend);
  std::fprintf(stderr, "%s\n", type_text(*model).c_str());
  RunnerOptions options;
  options.context = count + 1;
  options.chunk = std::max<int64_t>(read, 1);
  SequenceRunner runner(backend, *model, options);
  const auto pass = [&](int64_t first, int64_t tokens) {
    if (tokens == 0) return;
    const auto piece = std::span(ids).subspan(static_cast<size_t>(first), static_cast<size_t>(tokens));
    const std::span<const float> rows = runner.forward(piece, first, tokens);
    std::fwrite(rows.data(), sizeof(float), rows.size(), stdout);
  };
  pass(0, read);
  for (int64_t at = read; at < count; ++at) pass(at, 1);
}

}  // namespace
}  // namespace latente

int main(int argc, char** argv) try {
  if (argc != 5) {
    std::fprintf(stderr, "usage: %s MODEL TYPE THREADS WRITTEN < ids > rows\n", argv[0]);
    return 2;
  }
  latente::run(argv[1], argv[2], std::stoi(argv[3]), std::stoll(argv[4]));
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 1;
}
