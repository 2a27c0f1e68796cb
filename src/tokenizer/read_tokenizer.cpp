// From tokenizer.json to the parts of a tokenizer.
#include <nlohmann/json.hpp>

#include "tokenizer/json_reader.h"
#include "tokenizer/tokenizer_impl.h"
#include "tokenizer/unicode.h"

namespace latente {

namespace {

constexpr int max_depth = 20;  // of sequences in sequences

void check_depth(const JsonReader& json, int depth) {
  if (depth > max_depth) fail("{}: expected at most {} nested sequences", json.path(), max_depth);
}

std::string one_character(const JsonReader& json) {
  const std::string& text = json.string();
  if (text.empty() || unicode::length(text[0]) != text.size()) json.expected("one character");
  return text;
}

Regex read_pattern(const JsonReader& json) {
  const JsonReader regex = json.get("Regex");
  if (!regex.is_null()) return Regex(regex.string(), regex.path());
  const JsonReader literal = json.get("String");
  if (!literal.is_null()) return Regex::literal(literal.string(), literal.path());
  json.expected("{\"Regex\": ...} or {\"String\": ...}");
}

void read_normalizer(const JsonReader& json, Normalizer& out, int depth) {
  if (json.is_null()) return;
  check_depth(json, depth);
  const std::string& type = json.get("type").string();
  const auto add = [&](NormalizerStep step) { out.steps.push_back(std::move(step)); };
  using Kind = NormalizerStep::Kind;
  if (type == "Sequence") {
    const JsonReader steps = json.get("normalizers");
    for (std::size_t i = 0; i < steps.array_size(); ++i) {
      if (steps.at(i).is_null()) steps.at(i).expected("a normalizer");
      read_normalizer(steps.at(i), out, depth + 1);
    }
  } else if (type == "NFC") {
    add({.kind = Kind::form, .form = unicode::Form::nfc});
  } else if (type == "NFD") {
    add({.kind = Kind::form, .form = unicode::Form::nfd});
  } else if (type == "NFKC") {
    add({.kind = Kind::form, .form = unicode::Form::nfkc});
  } else if (type == "NFKD") {
    add({.kind = Kind::form, .form = unicode::Form::nfkd});
  } else if (type == "Lowercase") {
    add({.kind = Kind::lowercase});
  } else if (type == "StripAccents") {
    add({.kind = Kind::strip_accents});
  } else if (type == "Strip") {
    add({.kind = Kind::strip,
         .left = json.get("strip_left").boolean(),
         .right = json.get("strip_right").boolean()});
  } else if (type == "Replace") {
    NormalizerStep step{.kind = Kind::replace};
    step.pattern = read_pattern(json.get("pattern"));
    step.content = json.get("content").string();
    add(std::move(step));
  } else if (type == "Prepend") {
    NormalizerStep step{.kind = Kind::prepend};
    step.content = json.get("prepend").string();
    add(std::move(step));
  } else if (type == "ByteLevel") {
    add({.kind = Kind::byte_level});
  } else {
    json.get("type").expected("a supported normalizer");
  }
}

SplitBehavior read_behavior(const JsonReader& json) {
  const std::string& name = json.string();
  if (name == "Removed") return SplitBehavior::removed;
  if (name == "Isolated") return SplitBehavior::isolated;
  if (name == "MergedWithPrevious") return SplitBehavior::merged_with_previous;
  if (name == "MergedWithNext") return SplitBehavior::merged_with_next;
  if (name == "Contiguous") return SplitBehavior::contiguous;
  json.expected("a split behavior");
}

PreTokenizerStep::Prepend read_prepend(const JsonReader& json) {
  using Prepend = PreTokenizerStep::Prepend;
  const JsonReader scheme = json.get("prepend_scheme");
  const std::string name = scheme.string_or("always");
  Prepend out = Prepend::always;
  if (name == "first") {
    out = Prepend::first;
  } else if (name == "never") {
    out = Prepend::never;
  } else if (name != "always") {
    scheme.expected("always, first or never");
  }
  const JsonReader old = json.get("add_prefix_space");
  if (!old.boolean_or(true)) {
    if (!scheme.is_null() && out != Prepend::never) old.expected("agreement with prepend_scheme");
    out = Prepend::never;
  }
  return out;
}

void read_pre_tokenizer(const JsonReader& json, PreTokenizer& out, int depth) {
  if (json.is_null()) return;
  check_depth(json, depth);
  const std::string& type = json.get("type").string();
  using Step = PreTokenizerStep;
  const auto add = [&](Step step) { out.steps.push_back(std::move(step)); };
  if (type == "Sequence") {
    const JsonReader steps = json.get("pretokenizers");
    for (std::size_t i = 0; i < steps.array_size(); ++i) {
      if (steps.at(i).is_null()) steps.at(i).expected("a pre-tokenizer");
      read_pre_tokenizer(steps.at(i), out, depth + 1);
    }
  } else if (type == "ByteLevel") {
    add(Step::byte_level(json.get("add_prefix_space").boolean(), json.get("use_regex").boolean_or(true)));
  } else if (type == "Split") {
    Step step{.kind = Step::Kind::split};
    step.pattern = read_pattern(json.get("pattern"));
    step.behavior = read_behavior(json.get("behavior"));
    step.invert = json.get("invert").boolean();
    add(std::move(step));
  } else if (type == "Digits") {
    add(Step::digits(json.get("individual_digits").boolean()));
  } else if (type == "Metaspace") {
    add(Step::metaspace(one_character(json.get("replacement")), read_prepend(json),
                        json.get("split").boolean_or(true)));
  } else if (type == "Punctuation") {
    const JsonReader behavior = json.get("behavior");
    add(Step::punctuation(behavior.is_null() ? SplitBehavior::isolated : read_behavior(behavior)));
  } else if (type == "Whitespace") {
    add(Step::whitespace());
  } else if (type == "WhitespaceSplit") {
    add(Step::whitespace_split());
  } else if (type == "CharDelimiterSplit" || type == "Delimiter") {
    const std::string character = one_character(json.get("delimiter"));
    std::size_t at = 0;
    add(Step::delimiter(unicode::decode(character, at)));
  } else {
    json.get("type").expected("a supported pre-tokenizer");
  }
}

void read_decoder(const JsonReader& json, Decoder& out, int depth) {
  if (json.is_null()) return;
  check_depth(json, depth);
  out.present = true;
  const std::string& type = json.get("type").string();
  using Kind = DecoderStep::Kind;
  const auto add = [&](DecoderStep step) { out.steps.push_back(std::move(step)); };
  if (type == "Sequence") {
    const JsonReader steps = json.get("decoders");
    for (std::size_t i = 0; i < steps.array_size(); ++i) {
      if (steps.at(i).is_null()) steps.at(i).expected("a decoder");
      read_decoder(steps.at(i), out, depth + 1);
    }
  } else if (type == "ByteLevel") {
    add({.kind = Kind::byte_level});
  } else if (type == "ByteFallback") {
    add({.kind = Kind::byte_fallback});
  } else if (type == "Fuse") {
    add({.kind = Kind::fuse});
  } else if (type == "Strip") {
    DecoderStep step{.kind = Kind::strip, .content = one_character(json.get("content"))};
    step.start = static_cast<std::size_t>(json.get("start").integer(0, 1 << 20));
    step.stop = static_cast<std::size_t>(json.get("stop").integer(0, 1 << 20));
    add(std::move(step));
  } else if (type == "Replace") {
    DecoderStep step{.kind = Kind::replace, .content = json.get("content").string()};
    step.pattern = read_pattern(json.get("pattern"));
    add(std::move(step));
  } else if (type == "Metaspace") {
    DecoderStep step{.kind = Kind::metaspace, .content = one_character(json.get("replacement"))};
    step.drops_first = read_prepend(json) != PreTokenizerStep::Prepend::never;
    add(std::move(step));
  } else if (type == "BPEDecoder") {
    DecoderStep step{.kind = Kind::bpe, .content = json.get("suffix").string()};
    if (step.content.empty()) json.get("suffix").expected("a suffix that is not empty");
    add(std::move(step));
  } else {
    json.get("type").expected("a supported decoder");
  }
}

std::int32_t read_id(const JsonReader& json) {
  return static_cast<std::int32_t>(json.integer(0, Bpe::max_id));
}

// The single-sequence template: special tokens before and after "$A".
void read_template(const JsonReader& json, PostProcessor& out) {
  const JsonReader pieces = json.get("single");
  const JsonReader special = json.get("special_tokens");
  special.object();
  bool seen = false;
  std::vector<std::int32_t> before, after;
  for (std::size_t i = 0; i < pieces.array_size(); ++i) {
    const JsonReader sequence = pieces.at(i).get("Sequence");
    if (!sequence.is_null()) {
      if (sequence.get("id").string() != "A" || seen) sequence.expected("the sequence A once");
      seen = true;
      continue;
    }
    const JsonReader token = pieces.at(i).get("SpecialToken");
    const JsonReader entry = special.get(token.get("id").string());
    if (entry.is_null()) token.get("id").expected("a key of special_tokens");
    const JsonReader ids = entry.get("ids");
    for (std::size_t k = 0; k < ids.array_size(); ++k) (seen ? after : before).push_back(read_id(ids.at(k)));
  }
  if (!seen) pieces.expected("the sequence A");
  out.before.insert(out.before.begin(), before.begin(), before.end());
  out.after.insert(out.after.end(), after.begin(), after.end());
}

std::int32_t read_token_pair(const JsonReader& json) {
  if (json.array_size() != 2) json.expected("a token and its id");
  return read_id(json.at(1));
}

void read_post_processor(const JsonReader& json, PostProcessor& out, int depth) {
  if (json.is_null()) return;
  check_depth(json, depth);
  const std::string& type = json.get("type").string();
  if (type == "Sequence") {
    const JsonReader steps = json.get("processors");
    for (std::size_t i = 0; i < steps.array_size(); ++i) {
      if (steps.at(i).is_null()) steps.at(i).expected("a post-processor");
      read_post_processor(steps.at(i), out, depth + 1);
    }
  } else if (type == "TemplateProcessing") {
    read_template(json, out);
  } else if (type == "RobertaProcessing" || type == "BertProcessing") {
    out.before.insert(out.before.begin(), read_token_pair(json.get("cls")));
    out.after.push_back(read_token_pair(json.get("sep")));
  } else if (type != "ByteLevel") {  // which concerns offsets only
    json.get("type").expected("a supported post-processor");
  }
}

std::vector<std::pair<std::string, std::string>> read_merges(const JsonReader& json) {
  std::vector<std::pair<std::string, std::string>> out;
  const std::size_t size = json.array_size();
  out.reserve(size);
  for (std::size_t i = 0; i < size; ++i) {
    const nlohmann::json& merge = json.value()[i];
    if (merge.is_string()) {
      const std::string& text = merge.get_ref<const std::string&>();
      if (text.starts_with("#version")) continue;
      const std::size_t space = text.find(' ');
      if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) {
        json.at(i).expected("two tokens with a space between them");
      }
      out.emplace_back(text.substr(0, space), text.substr(space + 1));
    } else {
      const JsonReader pair = json.at(i);
      if (!merge.is_array() || merge.size() != 2) pair.expected("two tokens");
      out.emplace_back(pair.at(0).string(), pair.at(1).string());
    }
  }
  return out;
}

Bpe read_model(const JsonReader& json) {
  json.object();
  const JsonReader type = json.get("type");
  if (type.string_or("BPE") != "BPE") type.expected("the model BPE");
  const JsonReader dropout = json.get("dropout");
  if (!dropout.is_null() && !(dropout.value().is_number() && dropout.value().get<double>() == 0)) {
    dropout.expected("no dropout");
  }
  BpeOptions options;
  options.unk_token = json.get("unk_token").string_or("");
  options.continuing_subword_prefix = json.get("continuing_subword_prefix").string_or("");
  options.end_of_word_suffix = json.get("end_of_word_suffix").string_or("");
  options.fuse_unk = json.get("fuse_unk").boolean_or(false);
  options.byte_fallback = json.get("byte_fallback").boolean_or(false);
  options.ignore_merges = json.get("ignore_merges").boolean_or(false);
  const JsonReader vocab = json.get("vocab");
  vocab.object();
  std::vector<std::pair<std::string, std::int32_t>> vocabulary;
  vocabulary.reserve(vocab.value().size());
  for (const auto& [token, id] : vocab.value().items()) {
    if (!id.is_number_unsigned() || id.get<std::uint64_t>() > Bpe::max_id)
      read_id({id, vocab.path() + "." + token});
    vocabulary.emplace_back(token, static_cast<std::int32_t>(id.get<std::uint64_t>()));
  }
  return Bpe(std::move(vocabulary), read_merges(json.get("merges")), std::move(options), json.path());
}

std::vector<AddedToken> read_added_tokens(const JsonReader& json) {
  std::vector<AddedToken> out;
  if (json.is_null()) return out;
  for (std::size_t i = 0; i < json.array_size(); ++i) {
    read_id(json.at(i).get("id"));
    out.push_back(read_added_token(json.at(i)));
  }
  return out;
}

}  // namespace

nlohmann::json parse_json(std::string_view text, const std::string& name) {
  try {
    return nlohmann::json::parse(text);
  } catch (const nlohmann::json::exception& error) {
    fail("{}: expected JSON: {}", name, error.what());
  }
}

AddedToken read_added_token(const JsonReader& json) {
  AddedToken out{.content = json.get("content").string()};
  out.single_word = json.get("single_word").boolean();
  out.lstrip = json.get("lstrip").boolean();
  out.rstrip = json.get("rstrip").boolean();
  out.normalized = json.get("normalized").boolean();
  out.special = json.get("special").boolean();
  return out;
}

TokenizerParts read_tokenizer(const nlohmann::json& value, const std::string& name) {
  const JsonReader json(value, name);
  const JsonReader version = json.get("version");
  if (version.string_or("1.0") != "1.0") version.expected("version 1.0");
  TokenizerParts out;
  read_normalizer(json.get("normalizer"), out.normalizer, 0);
  read_pre_tokenizer(json.get("pre_tokenizer"), out.pre_tokenizer, 0);
  read_post_processor(json.get("post_processor"), out.post_processor, 0);
  read_decoder(json.get("decoder"), out.decoder, 0);
  out.model.emplace(read_model(json.get("model")));
  const JsonReader added = json.get("added_tokens");
  out.added.build(
      read_added_tokens(added), *out.model, [&](std::string_view text) { return out.normalizer.apply(text); },
      added.path());
  return out;
}

TokenizerConfig read_tokenizer_config(const nlohmann::json& value, const std::string& name) {
  const JsonReader json(value, name);
  const auto token = [&](const char* key) -> std::string {
    const JsonReader entry = json.get(key);
    if (entry.is_null() || entry.value().is_string()) return entry.string_or("");
    return entry.get("content").string();
  };
  TokenizerConfig out;
  out.bos_token = token("bos_token");
  out.eos_token = token("eos_token");
  out.pad_token = token("pad_token");
  out.unk_token = token("unk_token");
  out.add_bos_token = json.get("add_bos_token").boolean_or(false);
  out.add_eos_token = json.get("add_eos_token").boolean_or(false);
  const JsonReader chat = json.get("chat_template");
  if (chat.value().is_array()) {
    for (std::size_t i = 0; i < chat.array_size(); ++i) {
      const bool named_default = chat.at(i).get("name").string() == "default";
      if (named_default) out.chat_template = chat.at(i).get("template").string();
    }
  } else {
    out.chat_template = chat.string_or("");
  }
  return out;
}

}  // namespace latente
