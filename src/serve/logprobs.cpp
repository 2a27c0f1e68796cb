#include "serve/logprobs.h"

#include <algorithm>

namespace latente {

void TextPosition::pass(std::string_view text) {
  bytes += text.size();
  for (char byte : text) characters += (static_cast<unsigned char>(byte) & 0xC0) != 0x80 ? 1 : 0;
}

namespace {

std::string bytes_of(const Tokenizer& tokenizer, int32_t id) {
  return tokenizer.has(id) ? tokenizer.token_bytes(id) : "";
}

// JSON has no infinity; OpenAI's stand-in.
double bounded(double logprob) { return std::max(logprob, -9999.0); }

Json described(const Tokenizer& tokenizer, int32_t id, double logprob) {
  const std::string bytes = bytes_of(tokenizer, id);
  return {{"token", bytes}, {"logprob", bounded(logprob)}, {"bytes", byte_list(bytes)}};
}

}  // namespace

Json chat_logprobs(const Tokenizer& tokenizer, std::span<const ScoredToken> tokens) {
  Json content = Json::array();
  for (const auto& [begin, logprobs, first] : tokens) {
    Json entry = described(tokenizer, logprobs.token, logprobs.logprob);
    entry["top_logprobs"] = Json::array();
    for (const auto& [id, logprob] : logprobs.top)
      entry["top_logprobs"].push_back(described(tokenizer, id, logprob));
    content.push_back(std::move(entry));
  }
  return {{"content", std::move(content)}, {"refusal", nullptr}};
}

Json completion_logprobs(const Tokenizer& tokenizer, std::span<const ScoredToken> tokens) {
  Json texts = Json::array(), own = Json::array(), top = Json::array(), offsets = Json::array();
  for (const auto& [begin, logprobs, first] : tokens) {
    texts.push_back(bytes_of(tokenizer, logprobs.token));
    offsets.push_back(begin.characters);
    own.push_back(first ? Json() : Json(bounded(logprobs.logprob)));
    Json likely = Json::object();
    // Tokens that read the same: the most likely one stands for them.
    for (const auto& [id, logprob] : logprobs.top) {
      const std::string text = bytes_of(tokenizer, id);
      if (!likely.contains(text)) likely[text] = bounded(logprob);
    }
    top.push_back(first ? Json() : std::move(likely));
  }
  return {{"tokens", std::move(texts)},
          {"token_logprobs", std::move(own)},
          {"top_logprobs", std::move(top)},
          {"text_offset", std::move(offsets)}};
}

}  // namespace latente
