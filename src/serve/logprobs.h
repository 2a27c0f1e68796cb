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

// A token: where its text begins, and its entry as chats have it.
struct ScoredToken {
  TextPosition begin;
  Json entry;
};

// {"token", "logprob", "bytes", "top_logprobs"}; texts may be no UTF-8.
Json logprob_entry(const Tokenizer& tokenizer, const TokenLogprobs& logprobs);
// The same of a text's first token, whose log-probability is null.
Json first_entry(const Tokenizer& tokenizer, int32_t token);

Json chat_logprobs(std::span<const ScoredToken> tokens);
Json completion_logprobs(std::span<const ScoredToken> tokens);

}  // namespace latente
