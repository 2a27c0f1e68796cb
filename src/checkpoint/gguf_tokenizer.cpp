#include "checkpoint/gguf_tokenizer.h"

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "checkpoint/json.h"

namespace latente {
namespace {

using Json = nlohmann::json;

constexpr std::string_view prefix = "tokenizer.ggml.";

enum TokenType : int64_t { normal = 1, unknown = 2, control = 3, user_defined = 4, unused = 5, byte = 6 };

std::string key_of(std::string_view name) { return fmt::format("{}{}", prefix, name); }

Json split(std::string_view regex) {
  return {{"type", "Split"}, {"pattern", {{"Regex", regex}}}, {"behavior", "Isolated"}, {"invert", false}};
}

Json byte_level(bool use_regex) {
  return {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", use_regex}};
}

Json sequence(std::vector<Json> steps) {
  steps.push_back(byte_level(false));
  return {{"type", "Sequence"}, {"pretokenizers", std::move(steps)}};
}

Json individual_digits() { return {{"type", "Digits"}, {"individual_digits", true}}; }

// Letters of scripts with upper and lower case, as DeepSeek's first tokenizer lists them.
constexpr std::string_view cased_letters =
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943";

constexpr std::string_view cjk_and_hangul = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+";

// DeepSeek LLM, V2 and V2.5.
Json deepseek_llm() {
  return sequence({split("[\r\n]"), split(fmt::format("\\s?[{}]+", cased_letters)),
                   split("\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"), split("\\s+$"),
                   split(cjk_and_hangul), individual_digits()});
}

Json deepseek_coder() {
  return sequence({split("[\r\n]"), split("\\s?\\p{L}+"), split("\\s?\\p{P}+"), split(cjk_and_hangul),
                   individual_digits()});
}

// DeepSeek V3 and R1.
Json deepseek_v3() {
  return sequence({split("\\p{N}{1,3}"), split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
                   split("[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|"
                         "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|"
                         "\\s*[\r\n]+|\\s+(?!\\S)|\\s+")});
}

// Of OpenAI's cl100k and its heirs, who differ in how many digits make a word.
Json cl100k(std::string_view digits) {
  return sequence(
      {split(fmt::format("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|{}|"
                         " ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
                         digits))});
}

Json llama3() { return cl100k("\\p{N}{1,3}"); }
Json qwen2() { return cl100k("\\p{N}"); }
// Moonlight and Kimi: Chinese characters are words of their own, capitals begin words.
Json kimi_k2() {
  constexpr std::string_view contraction = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?";
  constexpr std::string_view upper = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]",
                             lower = "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]",
                             before = "[^\\r\\n\\p{L}\\p{N}]?";
  return sequence(
      {split(fmt::format("[\\p{{Han}}]+|{3}{0}*{1}+{2}|{3}{0}+{1}*{2}|\\p{{N}}{{1,3}}|"
                         " ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
                         upper, lower, contraction, before))});
}

Json gpt2() { return byte_level(true); }

struct PreTokenizer {
  std::string_view name;
  Json (*make)();
  bool adds_bos = false, ignores_merges = false, normalises = false;
};

constexpr PreTokenizer pre_tokenizers[] = {
    {"deepseek-llm", deepseek_llm},
    {"deepseek-coder", deepseek_coder},
    {"deepseek-v3", deepseek_v3},
    {"llama-bpe", llama3, true, true},
    {"llama3", llama3, true, true},
    {"llama-v3", llama3, true, true},
    {"glm4", llama3, false, true},
    {"chatglm-bpe", llama3},
    {"kimi-k2", kimi_k2},
    {"qwen2", qwen2, false, false, true},
    {"deepseek-r1-qwen", qwen2, false, false, true},
    {"gpt-2", gpt2},
    {"gigachat", gpt2},
};

const PreTokenizer& pre_tokenizer_of(const GgufFile& file) {
  const std::string_view name = file.string_at(key_of("pre"));
  std::string known;
  for (const PreTokenizer& each : pre_tokenizers) {
    if (each.name == name) return each;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", each.name);
  }
  fail("{}: {}: unknown pre-tokenizer {} (known: {})", file.path(), key_of("pre"), printable(name), known);
}

// The vocabulary and the tokens that are found in texts before they are split.
void add_tokens(const GgufFile& file, const std::vector<std::string_view>& tokens, Json& json) {
  const std::string types_key = key_of("token_type");
  const std::vector<int64_t> types =
      file.integers(types_key).value_or(std::vector<int64_t>(tokens.size(), TokenType::normal));
  if (types.size() != tokens.size())
    fail("{}: {}: expected {} values, one a token, found {}", file.path(), types_key, tokens.size(),
         types.size());
  Json vocabulary = Json::object(), added = Json::array();
  for (size_t id = 0; id < tokens.size(); ++id) {
    const std::string text(tokens[id]);
    if (types[id] < TokenType::normal || types[id] > TokenType::byte)
      fail("{}: {}: expected 1 to 6, found {} for token {}", file.path(), types_key, types[id], id);
    // What converters put where the vocabulary has holes.
    if (text.empty() || (types[id] == TokenType::unused && text == fmt::format("[PAD{}]", id))) continue;
    if (!vocabulary.emplace(text, id).second)
      fail("{}: {}: token {} repeats {}", file.path(), key_of("tokens"), id, printable(text));
    if (types[id] != TokenType::control && types[id] != TokenType::user_defined) continue;
    added.push_back({{"id", id},
                     {"content", text},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", types[id] == TokenType::control}});
  }
  json["model"]["vocab"] = std::move(vocabulary);
  json["added_tokens"] = std::move(added);
}

Json read_merges(const GgufFile& file) {
  const std::string key = key_of("merges");
  std::optional<std::vector<std::string_view>> merges = file.strings(key);
  if (!merges) fail("{}: no key {}", file.path(), key);
  Json all = Json::array();
  for (size_t i = 0; i < merges->size(); ++i) {
    const std::string_view merge = (*merges)[i];
    const size_t space = merge.find(' ', 1);
    if (space == merge.npos || space + 1 == merge.size())
      fail("{}: {}: expected two tokens with a space between them, found {} at {}", file.path(), key,
           printable(merge), i);
    all.push_back({merge.substr(0, space), merge.substr(space + 1)});
  }
  return all;
}

Json read_config(const GgufFile& file, const std::vector<std::string_view>& tokens, bool adds_bos) {
  Json config = Json::object();
  constexpr std::pair<std::string_view, const char*> specials[] = {{"bos_token_id", "bos_token"},
                                                                   {"eos_token_id", "eos_token"},
                                                                   {"padding_token_id", "pad_token"},
                                                                   {"unknown_token_id", "unk_token"}};
  for (const auto& [name, ours] : specials) {
    const int64_t id = file.integer(key_of(name)).value_or(-1);
    if (id == -1 || id == 0xffffffff) continue;  // both say: none
    if (id < 0 || id >= static_cast<int64_t>(tokens.size()))
      fail("{}: {}: expected 0 to {}, found {}", file.path(), key_of(name),
           static_cast<int64_t>(tokens.size()) - 1, id);
    config[ours] = tokens[static_cast<size_t>(id)];
  }
  config["add_bos_token"] = file.boolean(key_of("add_bos_token")).value_or(adds_bos);
  config["add_eos_token"] = file.boolean(key_of("add_eos_token")).value_or(false);
  if (std::optional<std::string_view> text = file.string("tokenizer.chat_template"))
    config["chat_template"] = *text;
  return config;
}

std::string text_of(const Json& json, const GgufFile& file) {
  try {
    return json.dump();
  } catch (const Json::type_error&) {
    fail("{}: tokenizer: a token, a merge or the chat template is not UTF-8", file.path());
  }
}

}  // namespace

GgufTokenizer gguf_tokenizer(const GgufFile& file) {
  const std::string model_key = key_of("model");
  const std::string_view model = file.string_at(model_key);
  if (model != "gpt2") fail("{}: {}: expected gpt2, found {}", file.path(), model_key, printable(model));
  const PreTokenizer& pre = pre_tokenizer_of(file);
  std::optional<std::vector<std::string_view>> tokens = file.strings(key_of("tokens"));
  if (!tokens) fail("{}: no key {}", file.path(), key_of("tokens"));

  Json json = {{"version", "1.0"}};
  if (pre.normalises) json["normalizer"] = {{"type", "NFC"}};
  json["pre_tokenizer"] = pre.make();
  json["decoder"] = byte_level(true);
  json["model"] = {{"type", "BPE"}, {"ignore_merges", pre.ignores_merges}};
  add_tokens(file, *tokens, json);
  json["model"]["merges"] = read_merges(file);
  return {text_of(json, file), text_of(read_config(file, *tokens, pre.adds_bos), file)};
}

}  // namespace latente
