// tokenizer.json and text: refused with Error, or encoding and decoding keep their promises. The input is a
// tokenizer.json and a text with a zero byte between them; without one it is a text for a small byte-level
// tokenizer.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "support.h"
#include "tokenizer/stop_strings.h"
#include "tokenizer/tokenizer.h"
#include "tokenizer/train_bpe.h"
#include "tokenizer/unicode.h"

namespace {

using latente::Tokenizer;

std::string lossy(std::string_view text) {
  std::string out;
  latente::unicode::append_lossy(out, text);
  return out;
}

void check_decoding(const Tokenizer& tokenizer, const std::vector<std::int32_t>& ids) {
  for (const bool skip : {false, true}) {
    const std::string whole = tokenizer.decode(ids, skip);
    require(latente::unicode::valid_prefix(whole) == whole.size());
    latente::StreamDecoder stream(tokenizer, skip);
    std::string pieces;
    for (const std::int32_t id : ids) {
      const std::string piece = stream.push(id);
      require(latente::unicode::valid_prefix(piece) == piece.size());
      pieces += piece;
    }
    require(pieces + stream.finish() == whole);
  }
}

void check_text(const Tokenizer& tokenizer, std::string_view text) {
  for (const bool parse : {false, true}) {
    const auto ids = tokenizer.encode(text, {.add_special = parse, .parse_special = parse});
    require(ids == tokenizer.encode(lossy(text), {.add_special = parse, .parse_special = parse}));
    for (const std::int32_t id : ids) require(id >= 0);
    check_decoding(tokenizer, ids);
  }
  std::vector<std::int32_t> ids;
  for (const char c : text) ids.push_back(static_cast<unsigned char>(c) * 3);
  check_decoding(tokenizer, ids);
}

void check_byte_level(std::string_view text) {
  static const std::vector<Tokenizer> tokenizers = [] {
    std::vector<Tokenizer> out;
    for (const char* kind : {"deepseek-v3", "gpt2", "llama3"}) {
      latente::BpeTrainOptions options;
      options.vocab_size = 400;
      options.pre_tokenizer = kind;
      options.threads = 1;
      int left = 1;
      const auto trained = latente::train_bpe(
          [&](std::string& document) {
            document =
                "The quick brown fox don't jump over the 12345 lazy dogs.\n\n  Is it über? 中文 中文\r\n";
            for (int i = 0; i < 3; ++i) document += document;
            return left-- > 0;
          },
          options);
      out.push_back(Tokenizer::from_json(trained.tokenizer_json(), trained.config_json()));
    }
    return out;
  }();
  for (const Tokenizer& tokenizer : tokenizers) {
    check_text(tokenizer, text);
    const auto ids = tokenizer.encode(text, {.add_special = false, .parse_special = false});
    require(tokenizer.decode(ids) == lossy(text));
  }
  const size_t cut = text.empty() ? 0 : static_cast<unsigned char>(text[0]) % text.size();
  latente::StopStrings stops({std::string(text.substr(0, cut)), "ab"});
  std::string shown;
  for (const char c : text.substr(cut)) shown += stops.push({&c, 1});
  if (!stops.stopped()) require(shown + stops.finish() == text.substr(cut));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const std::size_t zero = input.find('\0');
  if (zero == input.npos) {
    check_byte_level(input);
    return 0;
  }
  try {
    const Tokenizer tokenizer = Tokenizer::from_json(input.substr(0, zero));
    check_text(tokenizer, input.substr(zero + 1));
  } catch (const latente::Error& error) {
    require(error.what()[0] != '\0');
  }
  return 0;
}
