// From logits to tokens: the transformations people use, as one distribution that plain decoding and
// speculation share.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "base/random.h"

namespace latente {

struct SamplingOptions {
  double temperature = 0.0;  // 0 = greedy
  int64_t top_k = 0;         // keep the k most likely; 0 = all
  double top_p = 1.0;        // keep the fewest that reach this probability
  double min_p = 0.0;        // keep those at least this share of the most likely
  double typical_p = 1.0;    // keep the fewest that reach this probability, those first whose information
                             // -log p is closest to the entropy (Meister et al. 2022)
  double repetition_penalty =
      1.0;  // divides positive and multiplies negative logits of tokens seen (Keskar et al. 2019)
  double presence_penalty = 0.0;   // taken once from the logits of tokens written, -2 to 2 (OpenAI's)
  double frequency_penalty = 0.0;  // taken as often as the token was written, -2 to 2 (OpenAI's)
  int64_t penalty_window = -1;     // penalties look at this many last tokens; -1 = at all
  // Added to tokens' logits: -100 to 100, or minus infinity, which bans the token.
  std::vector<std::pair<int32_t, double>> logit_bias{};
  uint64_t seed = 0;

  bool greedy() const { return temperature <= 0.0; }
  // Whether the logits stay as they are and the most likely tokens are those that are kept, so that
  // Backend::choose can do it. Without a temperature the rest does not matter.
  bool by_rank() const {
    return (greedy() || typical_p >= 1.0) && repetition_penalty == 1.0 && presence_penalty == 0.0 &&
           frequency_penalty == 0.0 && logit_bias.empty();
  }
  // Error naming the field for values that make no sense (NaN, negative, top_p of 0, ...).
  void validate() const;
};

// What penalties look at. The repetition penalty sees prompt and reply, as in transformers; presence and
// frequency see the reply alone: OpenAI counts what was sampled.
struct History {
  std::span<const int32_t> tokens;
  size_t prompt = 0;  // the first tokens that were given, not written

  History() = default;
  History(std::span<const int32_t> all, size_t given = 0) : tokens(all), prompt(given) {}
  History(const std::vector<int32_t>& all, size_t given = 0) : tokens(all), prompt(given) {}
};

// A token and its probability. Distributions are sorted by id; they sum to 1.
struct Candidate {
  int32_t id = 0;
  double probability = 0.0;
};
using Distribution = std::vector<Candidate>;

// Turns one row of logits into the distribution that is sampled. Greedy: the one most likely token (ties:
// lowest id). Order, as in transformers: bias, repetition penalty, presence and frequency penalty, what is
// not admitted, temperature, softmax, top-k, top-p, min-p, typical-p, each followed by renormalising.
// `admitted`: a bit a token, token i at bit i % 64 of word i / 64; empty = all. The logits are changed. Error
// when a logit is NaN or none is finite.
Distribution distribution_of(std::span<float> logits, const History& history, const SamplingOptions& options,
                             std::span<const uint64_t> admitted = {});

// The same of a token that a pass has chosen, for by_rank() options. Error where there was none to choose
// (Backend::not_a_number, not_finite).
Distribution distribution_of(int32_t chosen);

int32_t sample(const Distribution& distribution, Random& random);

// The token that a number of [0, 1) falls on where the probabilities stand one behind the other, the highest
// first (ties: lowest id). With the same number, distributions that are alike mostly give the same token:
// drafts that are so drawn, and taken where the model's own token is the same, leave the text what it is
// without them.
int32_t token_at(const Distribution& distribution, double number);

// How likely a token was: natural logarithms of the softmax over all logits, as the model gave them.
struct TokenLogprobs {
  int32_t token = 0;
  double logprob = 0;
  std::vector<std::pair<int32_t, double>> top{};  // the most likely, falling; ties by id
};
TokenLogprobs logprobs_of(std::span<const float> logits, int32_t token, int64_t top);

// Speculative sampling (Leviathan et al. 2023; Chen et al. 2023): a draft x drawn from q is kept with
// probability min(1, p(x)/q(x)); otherwise the token is drawn from the residual max(0, p - q), normalised.
// The result is distributed as p exactly, whatever q.
struct Verdict {
  bool accepted = false;
  int32_t token = 0;
};
Verdict verify(const Distribution& p, const Distribution& q, int32_t draft, Random& random);

}  // namespace latente
