// The parts of a Tokenizer and how they are read.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "tokenizer/added_tokens.h"
#include "tokenizer/bpe.h"
#include "tokenizer/decoder.h"
#include "tokenizer/json_reader.h"
#include "tokenizer/normalizer.h"
#include "tokenizer/pre_tokenizer.h"
#include "tokenizer/tokenizer.h"

namespace latente {

// Special tokens around the text.
struct PostProcessor {
  std::vector<std::int32_t> before, after;
};

struct TokenizerParts {
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  std::optional<Bpe> model;
  AddedTokens added;
  PostProcessor post_processor;
  Decoder decoder;
};

struct TokenizerConfig {
  std::string bos_token, eos_token, pad_token, unk_token, chat_template;
  bool add_bos_token = false, add_eos_token = false;
};

struct Tokenizer::Impl {
  Impl(TokenizerParts parts, TokenizerConfig config);

  TokenizerParts parts;
  TokenizerConfig config;
  std::optional<std::int32_t> bos, eos, pad, unk;
  PostProcessor around;  // the post-processor's tokens and those that the configuration asks for

  const std::string* decoded_text(std::int32_t id) const;  // null if there is no token
  bool skipped(const std::string& text) const { return parts.added.special_text(text); }
};

// Throw Error that begins with `name` and the path of the faulty value.
nlohmann::json parse_json(std::string_view text, const std::string& name);
TokenizerParts read_tokenizer(const nlohmann::json& json, const std::string& name);
TokenizerConfig read_tokenizer_config(const nlohmann::json& json, const std::string& name);
AddedToken read_added_token(const JsonReader& json);

// From tiktoken.model and tokenizer_config.json, which has the added tokens (tiktoken.cpp).
TokenizerParts read_tiktoken(std::string_view model, const std::string& name, const nlohmann::json& config,
                             const std::string& config_name);

}  // namespace latente
