#include "serve/logprobs.h"

#include <algorithm>

namespace latente {

void TextPosition::pass(std::string_view text) {
  bytes += text.size();
  for (char byte : text) characters += (static_cast<unsigned char>(byte) & 0xC0) != 0x80 ? 1 : 0;
}

Json logprob_entry(const Tokenizer& tokenizer, const TokenLogprobs& logprobs) {
  const auto describe = [&](int32_t id, double logprob) {
    const std::string bytes = tokenizer.has(id) ? tokenizer.token_bytes(id) : "";
    Json list = Json::array();
    for (unsigned char byte : bytes) list.push_back(byte);
    // JSON has no infinity; OpenAI's stand-in.
    return Json{{"token", bytes}, {"logprob", std::max(logprob, -9999.0)}, {"bytes", std::move(list)}};
  };
  Json entry = describe(logprobs.token, logprobs.logprob);
  entry["top_logprobs"] = Json::array();
  for (const auto& [id, logprob] : logprobs.top) entry["top_logprobs"].push_back(describe(id, logprob));
  return entry;
}

Json first_entry(const Tokenizer& tokenizer, int32_t token) {
  Json entry = logprob_entry(tokenizer, {token, 0, {}});
  entry["logprob"] = nullptr;
  return entry;
}

Json chat_logprobs(std::span<const ScoredToken> tokens) {
  Json content = Json::array();
  for (const ScoredToken& token : tokens) content.push_back(token.entry);
  return {{"content", std::move(content)}, {"refusal", nullptr}};
}

Json completion_logprobs(std::span<const ScoredToken> tokens) {
  Json texts = Json::array(), own = Json::array(), top = Json::array(), offsets = Json::array();
  for (const ScoredToken& token : tokens) {
    texts.push_back(token.entry["token"]);
    own.push_back(token.entry["logprob"]);
    offsets.push_back(token.begin.characters);
    Json likely = Json::object();
    // Tokens that read the same: the most likely one stands for them.
    for (const Json& other : token.entry["top_logprobs"]) {
      const std::string& text = other["token"].get_ref<const std::string&>();
      if (!likely.contains(text)) likely[text] = other["logprob"];
    }
    top.push_back(token.entry["logprob"].is_null() ? Json() : std::move(likely));
  }
  return {{"tokens", std::move(texts)},
          {"token_logprobs", std::move(own)},
          {"top_logprobs", std::move(top)},
          {"text_offset", std::move(offsets)}};
}

}  // namespace latente
