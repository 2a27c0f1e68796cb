// tiktoken.model, tokenizer_config.json and text, zero bytes between them: refused with Error, or texts come
// back from their tokens. Where the model begins with '+', the lines of 256 bytes and a few pairs stand
// before it; an empty configuration is a small valid one. No corpus is needed.
#include <cstdint>
#include <string>
#include <string_view>

#include "base/error.h"
#include "support.h"
#include "tokenizer/tokenizer.h"
#include "tokenizer/unicode.h"

namespace {

constexpr std::string_view small_config = R"({"tokenizer_class": "TikTokenTokenizer", "bos_token": "[BOS]",
  "added_tokens_decoder": {"300": {"content": "[BOS]", "lstrip": false, "rstrip": false, "normalized": false,
  "single_word": false, "special": true}, "301": {"content": "<tool>", "lstrip": false, "rstrip": false,
  "normalized": false, "single_word": false, "special": false}}})";

std::string base64(std::string_view bytes) {
  constexpr std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    std::uint32_t bits = 0;
    for (std::size_t j = 0; j < 3; ++j)
      bits = bits << 8 | (i + j < bytes.size() ? static_cast<unsigned char>(bytes[i + j]) : 0u);
    for (std::size_t j = 0; j < 4; ++j)
      out += i + j < bytes.size() + 1 ? digits[bits >> (18 - 6 * j) & 63] : '=';
  }
  return out;
}

const std::string& small_model() {
  static const std::string model = [] {
    std::string out;
    int rank = 0;
    const auto add = [&](std::string_view token) { out += fmt::format("{} {}\n", base64(token), rank++); };
    for (int byte = 0; byte < 256; ++byte) {
      const char c = static_cast<char>(byte);
      add({&c, 1});
    }
    for (const char* pair :
         {"th", " t", "he", "the", " the", "12", "123", "\xe4\xb8", "\xad\xe6", "s ", "\r\n"})
      add(pair);
    return out;
  }();
  return model;
}

std::string_view take(std::string_view& input) {
  const std::size_t end = std::min(input.find('\0'), input.size());
  const std::string_view out = input.substr(0, end);
  input.remove_prefix(std::min(end + 1, input.size()));
  return out;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::string_view input(reinterpret_cast<const char*>(data), size);
  std::string model(take(input));
  if (model.starts_with('+')) model = small_model() + model.substr(1);
  std::string_view config = take(input);
  if (config.empty()) config = small_config;
  try {
    const auto tokenizer = latente::Tokenizer::from_tiktoken(model, config);
    std::string valid;
    latente::unicode::append_lossy(valid, input);
    for (const bool added : {false, true}) {
      const auto ids = tokenizer.encode(input, {.add_special = false, .parse_added = added});
      for (const std::int32_t id : ids) require(tokenizer.has(id));
      // Added tokens in letters of the byte alphabet, which no model has, are decoded as bytes.
      if (!added) require(tokenizer.decode(ids) == valid);
    }
  } catch (const latente::Error& error) {
    require(error.what()[0] != '\0');
  }
  return 0;
}
