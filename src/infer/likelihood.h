// How likely a model finds a text: what perplexity and bits per byte are made of.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "model/transformer.h"

namespace latente {

struct LikelihoodOptions {
  int64_t context = 2048;  // tokens read at once
  int64_t stride = 1024;   // tokens from one reading to the next: 1 to context - 1
  // Type of the cache that a reading goes over, piece by piece, as prompts are read for generation
  // (RunnerOptions::cache_type); without one it is a single pass.
  std::optional<DType> cache;
  // Called after each reading with the number of tokens done and the total; may be empty.
  std::function<void(int64_t done, int64_t total)> progress;
};

// -log p(token | those before it), in nats, of each token but the first. A token is scored in the first
// reading that holds it: with at least context - stride tokens before it, except at the text's beginning.
// Error when there are fewer than two tokens, or for a stride out of range.
std::vector<double> negative_log_likelihoods(Backend& backend, const Transformer& model,
                                             std::span<const int32_t> tokens,
                                             const LikelihoodOptions& options = {});

struct Perplexity {
  int64_t tokens = 0;         // scored
  double mean = 0;            // nats a token
  double standard_error = 0;  // of the mean, tokens taken as independent
  double perplexity() const;
  double bits_per_byte(int64_t bytes) const;  // of the scored tokens' text
};
Perplexity perplexity_of(std::span<const double> negative_log_likelihoods);

}  // namespace latente
