// Log-probabilities in the forms of OpenAI's two endpoints.
#pragma once

#include <span>

#include "infer/sampler.h"
#include "serve/json_fields.h"
#include "tokenizer/tokenizer.h"

namespace latente {

// A place in a text.
struct TextPosition {
  size_t bytes = 0, characters = 0;
  void pass(std::string_view text);
};

// A token: where its text begins, and how likely it was. A text's first one has nothing to say of that.
struct ScoredToken {
  TextPosition begin;
  TokenLogprobs logprobs;
  bool first = false;
};

// Texts may be no UTF-8.
Json chat_logprobs(const Tokenizer& tokenizer, std::span<const ScoredToken> tokens);
Json completion_logprobs(const Tokenizer& tokenizer, std::span<const ScoredToken> tokens);

}  // namespace latente
