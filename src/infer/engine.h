// Engine: token ids in, token ids out. Decodes one sequence with speculation by the MTP modules (DeepSeek-V3
// report, section 2.2); it knows no text.
#pragma once

#include <functional>

#include "infer/draft_length.h"
#include "infer/runner.h"
#include "infer/sampler.h"

namespace latente {

struct GenerationOptions {
  int64_t max_tokens = 256;
  std::vector<int32_t> stop_tokens;
  SamplingOptions sampling;
  // Tokens drafted a pass, beyond the modules by the last one again; -1 = up to one for each module, as long
  // as that pays (DraftLength).
  int64_t draft = -1;
  // Sampled text depends on the seed alone; then -1 means one for each module, whether it pays or not.
  // (Greedy text depends on nothing anyway.)
  bool repeatable = true;
};

enum class Finish : uint8_t { length, stop_token, context_full, interrupted };

struct GenerationStats {
  int64_t prompt_tokens = 0, reused_tokens = 0, generated_tokens = 0;
  int64_t passes = 0;  // of the main model after the prompt
  int64_t drafted = 0, accepted = 0;
  double prompt_seconds = 0, decode_seconds = 0;
  Finish finish = Finish::length;

  // Per decoding pass; the token sampled from the prompt's own pass is not counted.
  double tokens_per_pass() const {
    return passes > 0 ? static_cast<double>(generated_tokens - 1) / static_cast<double>(passes) : 0;
  }
  double acceptance() const {
    return drafted > 0 ? static_cast<double>(accepted) / static_cast<double>(drafted) : 0;
  }
  double decode_tokens_per_second() const {
    return decode_seconds > 0 ? static_cast<double>(generated_tokens - 1) / decode_seconds : 0;
  }
  double prompt_tokens_per_second() const {
    return prompt_seconds > 0 ? static_cast<double>(prompt_tokens - reused_tokens) / prompt_seconds : 0;
  }
};

struct GeneratedToken {
  int32_t id;
  bool drafted;  // predicted by an MTP module and confirmed
};

class Engine {
 public:
  Engine(Backend& backend, const Transformer& model, const RunnerOptions& options = {});

  // Continues `prompt` until a stop token (which is not passed on), a limit, or until `on_token` returns
  // false. What the cache already holds of the prompt is reused. Errors: empty prompt, prompt beyond the
  // context, ids out of range, senseless options.
  GenerationStats generate(std::span<const int32_t> prompt, const GenerationOptions& options,
                           const std::function<bool(GeneratedToken)>& on_token);

  const Runner& runner() const { return runner_; }

 private:
  struct Draft {
    int32_t token;
    Distribution distribution;
  };
  void check(std::span<const int32_t> prompt, const GenerationOptions& options) const;
  std::span<float> prefill(std::span<const int32_t> prompt, int64_t reuse);
  void catch_up(int64_t processed);
  std::vector<Draft> draft(int64_t count, size_t prompt, const SamplingOptions& sampling, Random& random);
  std::span<float> row(std::span<float> logits, size_t index) const;

  const Config* config_;
  Runner runner_;
  std::vector<int32_t> tokens_;  // the sequence so far
  int64_t processed_ = 0;        // positions the main model has run
  int64_t depth_ = 0;            // drafts a pass in this generation, at most
  DraftLength draft_length_;
  std::vector<int64_t> predicted_;  // by module: positions run with known tokens
};

}  // namespace latente
