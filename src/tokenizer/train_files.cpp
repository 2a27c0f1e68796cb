#include "tokenizer/train_files.h"

#include <algorithm>
#include <filesystem>

#include "base/error.h"
#include "base/file.h"

namespace latente {

namespace {

using Json = nlohmann::ordered_json;

Json split_at(const std::string& pattern) {
  return {{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}, {"invert", false}};
}

Json byte_level(bool use_regex) {
  return {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", use_regex}};
}

// The patterns are those of the models' published tokenizer.json.
Json pre_tokenizer(const std::string& kind) {
  if (kind == "gpt2") return byte_level(true);
  Json steps = Json::array();
  if (kind == "deepseek-v3") {
    steps.push_back(split_at("\\p{N}{1,3}"));
    steps.push_back(split_at("[一-龥぀-ゟ゠-ヿ]+"));
    steps.push_back(
        split_at("[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?"
                 "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"));
  } else if (kind == "llama3") {
    steps.push_back(split_at(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+"
        "[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"));
  } else {
    fail("pre-tokenizer: expected deepseek-v3, gpt2 or llama3, found '{}'", kind);
  }
  steps.push_back(byte_level(false));
  return {{"type", "Sequence"}, {"pretokenizers", steps}};
}

// <bos> text
Json post_processor(const TrainedBpe& trained) {
  const std::string& bos = trained.options.bos;
  if (bos.empty()) return nullptr;
  const auto id = std::find(trained.tokens.begin(), trained.tokens.end(), bos) - trained.tokens.begin();
  const Json begin = {{"SpecialToken", {{"id", bos}, {"type_id", 0}}}};
  const Json a = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}};
  const Json b = {{"Sequence", {{"id", "B"}, {"type_id", 1}}}};
  return {
      {"type", "TemplateProcessing"},
      {"single", Json::array({begin, a})},
      {"pair", Json::array({begin, a, b})},
      {"special_tokens", {{bos, {{"id", bos}, {"ids", Json::array({id})}, {"tokens", Json::array({bos})}}}}}};
}

constexpr const char* chat_template =
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'user' %}"
    "{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'system' %}"
    "{{ SYSTEM + message['content'] }}"
    "{% else %}"
    "{{ raise_exception('expected the role system, user or assistant, found ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}";

std::string fitting_chat_template(const std::vector<std::string>& special) {
  const auto has = [&](const char* token) {
    return std::find(special.begin(), special.end(), token) != special.end();
  };
  if (!has("<|user|>") || !has("<|assistant|>")) return {};
  std::string out = chat_template;
  // Without a token of its own, what the system says stands before the first user's turn.
  const std::string marker = has("<|system|>") ? "'<|system|>'" : "''";
  out.replace(out.find("SYSTEM"), 6, marker);
  return out;
}

}  // namespace

Json tokenizer_file(const TrainedBpe& trained) {
  const std::vector<std::string>& special = trained.options.special_tokens;
  Json added = Json::array();
  for (std::size_t i = 0; i < special.size(); ++i) {
    added.push_back({{"id", i},
                     {"content", special[i]},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  }
  Json vocabulary = Json::object();
  // Appended, not looked up: a lookup in ordered_json is linear.
  auto& entries = vocabulary.get_ref<Json::object_t&>();
  for (std::size_t id = 0; id < trained.tokens.size(); ++id) entries.emplace_back(trained.tokens[id], id);
  Json merges = Json::array();
  for (const auto& [left, right] : trained.merges) {
    merges.push_back(Json::array(
        {trained.tokens[static_cast<std::size_t>(left)], trained.tokens[static_cast<std::size_t>(right)]}));
  }
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", added},
          {"normalizer", nullptr},
          {"pre_tokenizer", pre_tokenizer(trained.options.pre_tokenizer)},
          {"post_processor", post_processor(trained)},
          {"decoder", byte_level(true)},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"ignore_merges", false},
            {"vocab", vocabulary},
            {"merges", merges}}}};
}

std::string TrainedBpe::tokenizer_json() const { return tokenizer_file(*this).dump(1) + "\n"; }

std::string TrainedBpe::config_json() const {
  Json out = {{"tokenizer_class", "PreTrainedTokenizerFast"},
              {"model_max_length", 1000000000},
              {"clean_up_tokenization_spaces", false}};
  if (!options.bos.empty()) out["bos_token"] = options.bos;
  if (!options.eos.empty()) {
    out["eos_token"] = options.eos;
    out["pad_token"] = options.eos;
  }
  const std::string chat = fitting_chat_template(options.special_tokens);
  if (!chat.empty()) out["chat_template"] = chat;
  return out.dump(1) + "\n";
}

void TrainedBpe::save(const std::string& directory) const {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) fail("{}: cannot make the directory: {}", directory, error.message());
  write_file_atomically(directory + "/tokenizer.json", tokenizer_json());
  write_file_atomically(directory + "/tokenizer_config.json", config_json());
}

}  // namespace latente
