// tokenizer.json and text: refused with Error, or encoding and decoding keep their promises. The input is a
// tokenizer.json and a text with a zero byte between them; without one it is a text for one of a few
// tokenizers that are loaded once. A text's first byte chooses the options. No corpus is needed: the mutator
// brings small tokenizers (small_tokenizers.h) and changes them as JSON.
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "json_mutations.h"
#include "small_tokenizers.h"
#include "support.h"
#include "tokenizer/stop_strings.h"
#include "tokenizer/tokenizer.h"
#include "tokenizer/train_bpe.h"
#include "tokenizer/unicode.h"

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

namespace {

using latente::Tokenizer;

// Enough for words that are merged with a heap; longer ones cost time and find nothing more.
constexpr std::size_t max_text = 256;

std::string lossy(std::string_view text) {
  std::string out;
  latente::unicode::append_lossy(out, text);
  return out;
}

void check_decoding(const Tokenizer& tokenizer, const std::vector<std::int32_t>& ids, bool skip) {
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

void check_text(const Tokenizer& tokenizer, unsigned choices, std::string_view text) {
  const latente::EncodeOptions options{.add_special = (choices & 1) != 0,
                                       .parse_special = (choices & 2) != 0,
                                       .parse_added = (choices & 4) == 0};
  const bool skip = (choices & 8) != 0;
  const auto ids = tokenizer.encode(text, options);
  const std::string valid = lossy(text);
  if (valid != text) require(ids == tokenizer.encode(valid, options));
  for (const std::int32_t id : ids) require(id >= 0);
  check_decoding(tokenizer, ids, skip);
  std::vector<std::int32_t> any;
  for (const char c : text.substr(0, 32)) any.push_back(static_cast<unsigned char>(c) * 3 / 2);
  check_decoding(tokenizer, any, skip);
}

struct Loaded {
  Tokenizer tokenizer;
  bool byte_level;  // decoding gives the text again
  bool fallback;    // the same for texts without "▁"
};

const std::vector<Loaded>& loaded_tokenizers() {
  static const std::vector<Loaded> tokenizers = [] {
    std::vector<Loaded> out;
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
      out.push_back({Tokenizer::from_json(trained.tokenizer_json(), trained.config_json()), true, false});
    }
    for (const SmallTokenizer& small : small_tokenizers) {
      nlohmann::json json = json_of(small);
      const bool fallback = json["model"].value("byte_fallback", false);
      for (int byte = 0; fallback && byte < 256; ++byte) {
        nlohmann::json& vocabulary = json["model"]["vocab"];
        const std::size_t id = vocabulary.size();
        vocabulary.emplace(fmt::format("<0x{:02X}>", byte), id);
      }
      out.push_back({Tokenizer::from_json(json.dump()), false, fallback});
    }
    return out;
  }();
  return tokenizers;
}

void check_loaded(unsigned choices, std::string_view text) {
  const std::vector<Loaded>& all = loaded_tokenizers();
  const Loaded& loaded = all[choices / 16 % all.size()];
  check_text(loaded.tokenizer, choices, text);
  if (loaded.byte_level || (loaded.fallback && text.find("▁") == text.npos)) {
    const auto ids = loaded.tokenizer.encode(text, {.add_special = false, .parse_special = false});
    require(loaded.tokenizer.decode(ids) == lossy(text));
  }
  const std::size_t cut = text.empty() ? 0 : choices % text.size();
  latente::StopStrings stops({std::string(text.substr(0, cut)), "ab"});
  std::string shown;
  for (const char c : text.substr(cut)) shown += stops.push({&c, 1});
  if (!stops.stopped()) require(shown + stops.finish() == text.substr(cut));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const std::size_t zero = input.find('\0');
  std::string_view text = zero == input.npos ? input : input.substr(zero + 1);
  const unsigned choices = text.empty() ? 0 : static_cast<unsigned char>(text[0]);
  if (!text.empty()) text = text.substr(1, max_text);
  if (zero == input.npos) {
    check_loaded(choices, text);
    return 0;
  }
  try {
    check_text(Tokenizer::from_json(input.substr(0, zero)), choices, text);
  } catch (const latente::Error& error) {
    require(error.what()[0] != '\0');
  }
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size,
                                               unsigned seed) {
  static const std::vector<nlohmann::json> seeds = [] {
    std::vector<nlohmann::json> out;
    for (const SmallTokenizer& small : small_tokenizers) out.push_back(json_of(small));
    return out;
  }();
  JsonMutations mutations(seed);
  const nlohmann::json& other = seeds[mutations.below(seeds.size())];
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const std::size_t zero = input.find('\0');
  nlohmann::json json;
  std::string text;
  if (zero == input.npos) {
    if (mutations.below(16) > 0) return LLVMFuzzerMutate(data, size, max_size);
    json = other;
    text =
        std::string(1, static_cast<char>(mutations.below(16))) + "The the ab e\u0301 中 12 don't.,<s>  -\n";
  } else {
    json = nlohmann::json::parse(input.substr(0, zero), nullptr, false);
    if (json.is_discarded() || mutations.below(4) == 0) return LLVMFuzzerMutate(data, size, max_size);
    text = input.substr(zero + 1);
    for (std::size_t i = mutations.below(3) + 1; i > 0; --i) mutations.apply(json, other);
  }
  std::string out = json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  out += '\0';
  out += text;
  if (out.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
  std::memcpy(data, out.data(), out.size());
  return out.size();
}
