// SequenceRunner: one sequence over a cache of its own, without an engine: for measuring and testing passes.
#pragma once

#include "infer/runner.h"

namespace latente {

class SequenceRunner {
 public:
  // options.sequences, pages and states are its own affair.
  SequenceRunner(Backend& backend, const Transformer& model, RunnerOptions options);

  // The main model on `tokens` at positions first, first + 1, ... Returns the logits of the last `wanted`
  // tokens, [wanted, vocabulary], valid until the next call.
  std::span<float> forward(std::span<const int32_t> tokens, int64_t first, int64_t wanted);
  // MTP module k at positions first, first + 1, ...: later[i] is the token k + 1 places after position first
  // + i. Returns the logits of the last position.
  std::span<float> predict(int64_t k, std::span<const int32_t> later, int64_t first);

  const Runner& runner() const { return runner_; }
  Runner& runner() { return runner_; }

 private:
  Runner::Pass pass(int64_t module, std::span<const int32_t> tokens, int64_t first, int64_t wanted);
  int32_t state_of(int64_t position) const;

  Runner runner_;
};

}  // namespace latente
