// What a configuration means in numbers, before any weight exists: parameters, cache, memory, operations.
#pragma once

#include <string>
#include <vector>

#include "model/transformer.h"

namespace latente {

// Counts of elements. `active` is what one token touches, without the input embedding (the report's
// convention).
struct ParameterCount {
  struct Part {
    std::string name;
    int64_t total = 0, active = 0;
  };
  std::vector<Part>
      parts;            // of the main model: embedding, attention, dense FFN, routers, experts, norms, head
  int64_t total = 0;    // main model
  int64_t active = 0;   // main model, per token, without the input embedding
  int64_t mtp_own = 0;  // what the MTP modules add
  int64_t mtp_with_shared = 0;  // with the embedding and head they share
};
ParameterCount count_parameters(const Config& config);

// Cache values a token, over all main layers, for this model's attention and for others with the same heads.
struct CacheFigures {
  int64_t own = 0;   // MLA: layers · (kv_lora_rank + rope); otherwise 2 · layers · kv heads · head dim
  int64_t mha = 0;   // layers · heads · (key + value dim)
  int64_t gqa8 = 0;  // 8 key/value heads (or as many as there are heads)
  int64_t mqa = 0;   // one
};
CacheFigures cache_figures(const Config& config);

// Floating-point operations of one token's forward pass: two per active weight, plus attention over `context`
// tokens. `absorbed` counts MLA over the latent (decode), otherwise expanded (training: half the context on
// average is the caller's to pass).
double forward_flops(const Config& config, int64_t context, bool absorbed);

// Operations of training on one token of a sequence of `length`: forward and backward (three times forward),
// MTP modules with their use of the head included, attention over half the sequence.
double training_flops(const Config& config, int64_t length);

// Bytes that decoding one token must read: active weights and the cache of `context` tokens.
double decode_bytes(const Config& config, int64_t context, double bytes_per_weight,
                    double bytes_per_cache_value);

}  // namespace latente
