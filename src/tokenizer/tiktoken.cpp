// tiktoken.model, the tokenizers of Moonlight and Kimi: a line a token, in base64, and its rank.
#include <algorithm>
#include <array>
#include <charconv>
#include <map>

#include "tokenizer/tokenizer_impl.h"

namespace latente {

namespace {

// The pattern of these models' class TikTokenTokenizer, which no file says: Chinese characters are words of
// their own, capitals begin words.
constexpr const char* kimi_pattern =
    R"([\p{Han}]+)"
    R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+)"
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
    R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*)"
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
    R"(|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

constexpr std::int32_t reserved_tokens = 256;  // behind the ranks, named by the class unless the file does

constexpr std::array<std::int8_t, 256> base64_values = [] {
  std::array<std::int8_t, 256> out{};
  out.fill(-1);
  constexpr std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  for (std::size_t i = 0; i < digits.size(); ++i)
    out[static_cast<unsigned char>(digits[i])] = static_cast<std::int8_t>(i);
  return out;
}();

// False where `text` is not base64.
bool decode_base64(std::string_view text, std::string& out) {
  if (text.size() % 4 != 0) return false;
  while (!text.empty() && text.back() == '=') text.remove_suffix(1);
  if (text.size() % 4 == 1) return false;
  std::uint32_t bits = 0;
  int count = 0;
  for (const char c : text) {
    const std::int8_t value = base64_values[static_cast<unsigned char>(c)];
    if (value < 0) return false;
    bits = bits << 6 | static_cast<std::uint32_t>(value);
    count += 6;
    if (count >= 8) out.push_back(static_cast<char>(bits >> (count -= 8) & 0xff));
  }
  return true;
}

std::vector<std::string> read_ranks(std::string_view model, const std::string& name) {
  std::vector<std::string> tokens;
  while (!model.empty()) {
    const std::size_t end = std::min(model.find('\n'), model.size());
    std::string_view line = model.substr(0, end);
    model.remove_prefix(std::min(end + 1, model.size()));
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (line.empty()) continue;
    const auto where = [&, line_rank = tokens.size()] {
      return fmt::format("{}: line of rank {}", name, line_rank);
    };
    const std::size_t space = line.find(' ');
    std::size_t rank = 0;
    const char* const last = line.data() + line.size();
    if (space == line.npos) fail("{}: expected a token in base64, a space and its rank", where());
    const auto [stop, error] = std::from_chars(line.data() + space + 1, last, rank);
    if (error != std::errc() || stop != last || rank != tokens.size())
      fail("{}: expected the ranks in order, without holes", where());
    if (!decode_base64(line.substr(0, space), tokens.emplace_back())) fail("{}: expected base64", where());
    if (tokens.size() > static_cast<std::size_t>(Bpe::max_id)) fail("{}: too many tokens", name);
  }
  return tokens;
}

}  // namespace

TokenizerParts read_tiktoken(std::string_view model, const std::string& name, const nlohmann::json& value,
                             const std::string& config_name) {
  const JsonReader config(value, config_name);
  const JsonReader kind = config.get("tokenizer_class");
  if (kind.string_or("") != "TikTokenTokenizer") kind.expected("TikTokenTokenizer, whose pattern is known");
  const std::vector<std::string> tokens = read_ranks(model, name);
  const auto first = static_cast<std::int32_t>(tokens.size());

  std::map<std::int32_t, AddedToken> added;
  for (std::int32_t id = first; id < first + reserved_tokens; ++id) {
    AddedToken& token = added[id];
    token.content = fmt::format("<|reserved_token_{}|>", id);
    token.normalized = false;
    token.special = true;
  }
  const JsonReader named = config.get("added_tokens_decoder");
  if (!named.is_null()) {
    for (const auto& [key, token] : named.object().value().items()) {
      const JsonReader entry(token, named.path() + "." + key);
      std::int32_t id = -1;
      const auto [stop, error] = std::from_chars(key.data(), key.data() + key.size(), id);
      if (error != std::errc() || stop != key.data() + key.size() || id < first || id > Bpe::max_id)
        fail("{}: expected ids from {}, behind the ranks, to {}", entry.path(), first, Bpe::max_id);
      added[id] = read_added_token(entry);
    }
  }
  std::vector<std::pair<std::string, std::int32_t>> others;
  std::vector<AddedToken> found;
  for (const auto& [id, token] : added) {
    others.emplace_back(token.content, id);
    found.push_back(token);
  }

  TokenizerParts out;
  PreTokenizerStep split{.kind = PreTokenizerStep::Kind::split};
  split.pattern = Regex(kimi_pattern, "the pattern of TikTokenTokenizer");
  out.pre_tokenizer.steps.push_back(std::move(split));
  out.pre_tokenizer.steps.push_back(PreTokenizerStep::byte_level(false, false));
  out.decoder.present = true;
  out.decoder.steps.push_back({.kind = DecoderStep::Kind::byte_level});
  out.model.emplace(Bpe::of_ranks(tokens, others, name));
  out.added.build(
      std::move(found), *out.model, [](std::string_view text) { return std::string(text); }, named.path());
  return out;
}

}  // namespace latente
