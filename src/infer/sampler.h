// From logits to tokens: the transformations people use, as one distribution that plain decoding and
// speculation share.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/random.h"

namespace latente {

struct SamplingOptions {
  double temperature = 0.0;  // 0 = greedy
  int64_t top_k = 0;         // keep the k most likely; 0 = all
  double top_p = 1.0;        // keep the fewest that reach this probability
  double min_p = 0.0;        // keep those at least this share of the most likely
  double repetition_penalty =
      1.0;  // divides positive and multiplies negative logits of tokens seen (Keskar et al. 2019)
  uint64_t seed = 0;

  bool greedy() const { return temperature <= 0.0; }
  // Error naming the field for values that make no sense (NaN, negative, top_p of 0, ...).
  void validate() const;
};

// A token and its probability. Distributions are sorted by falling probability, ties by id; they sum to 1.
struct Candidate {
  int32_t id = 0;
  double probability = 0.0;
};
using Distribution = std::vector<Candidate>;

// Turns one row of logits into the distribution that is sampled. Greedy: the one most likely token (ties:
// lowest id). Order: repetition penalty, temperature, softmax, top-k, top-p, min-p, renormalised. `history`
// is what the repetition penalty looks at. The logits are changed. Error when a logit is NaN or all are -inf.
Distribution distribution_of(std::span<float> logits, std::span<const int32_t> history,
                             const SamplingOptions& options);

int32_t sample(const Distribution& distribution, Random& random);

// Speculative sampling (Leviathan et al. 2023; Chen et al. 2023): a draft x drawn from q is kept with
// probability min(1, p(x)/q(x)); otherwise the token is drawn from the residual max(0, p - q), normalised.
// The result is distributed as p exactly, whatever q.
struct Verdict {
  bool accepted = false;
  int32_t token = 0;
};
Verdict verify(const Distribution& p, const Distribution& q, int32_t draft, Random& random);

}  // namespace latente
