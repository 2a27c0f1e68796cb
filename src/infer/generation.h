// What a caller asks of the engine for one sequence, and what it gets back.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <vector>

#include "infer/sampler.h"
#include "infer/token_constraint.h"

namespace latente {

struct GenerationOptions {
  int64_t max_tokens = 256;
  std::vector<int32_t> stop_tokens;
  SamplingOptions sampling;
  // Tokens drafted a pass, beyond the modules by the last one again; -1 = up to one for each module, or what
  // followed the same few tokens before (prompt lookup, Saxena 2023), as long as that pays (DraftLength).
  int64_t draft = -1;
  // Sampled text depends on the seed alone, not on drafts: each token on the seed, its position and its
  // distribution, of which somewhat fewer drafts are right than speculative sampling would accept. (Greedy
  // text depends on nothing anyway.)
  bool repeatable = true;
  // What the reply must look like, as it is before the first token; null = anything. It must know the stop
  // tokens. Drafts obey it too, so that greedy text does not depend on them.
  std::shared_ptr<const TokenConstraint> constraint;
  // Likely tokens to report with each token that is written; -1 = not even its own log-probability.
  int64_t top_logprobs = -1;
  // The prompt's tokens are reported, too, so that it is read from its beginning. With max_tokens of 0 it is
  // read and nothing is written.
  bool prompt_logprobs = false;
};

// complete: the constraint lets nothing more follow. failed: see GenerationStats::error.
enum class Finish : uint8_t { length, stop_token, context_full, interrupted, complete, failed };

struct GenerationStats {
  int64_t prompt_tokens = 0, reused_tokens = 0, generated_tokens = 0;
  int64_t passes = 0;  // of the main model after the prompt
  int64_t drafted = 0, accepted = 0;
  double waiting_seconds = 0, prompt_seconds = 0, decode_seconds = 0;
  Finish finish = Finish::length;
  std::exception_ptr error;  // what ended it: of its logits, its constraint or its on_token

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
  bool drafted;                             // predicted by an MTP module, or looked up, and confirmed
  const TokenLogprobs* logprobs = nullptr;  // if asked for; valid during the call
  const GenerationStats* stats = nullptr;   // so far; valid during the call
};

struct Request {
  std::vector<int32_t> prompt;
  GenerationOptions options;
  int priority = 0;  // higher ones begin first
  // Called by step() as tokens come; false ends the sequence, and so does an exception. A stop token is not
  // passed on.
  std::function<bool(GeneratedToken)> on_token;
  // Called by step() with the prompt's tokens from the second on, in order, if they are to be reported.
  std::function<void(const TokenLogprobs&)> on_prompt_token;
  // Called once, last; not for what was cancelled.
  std::function<void(const GenerationStats&)> on_finish;
};

}  // namespace latente
