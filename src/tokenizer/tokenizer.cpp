#include "tokenizer/tokenizer.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "tokenizer/byte_alphabet.h"
#include "tokenizer/tokenizer_impl.h"
#include "tokenizer/unicode.h"

namespace latente {

namespace fs = std::filesystem;

namespace {

fs::path beside(const fs::path& file, const char* name) { return file.parent_path() / name; }

std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail("{}: expected a file that can be read", path.string());
  std::string out((std::istreambuf_iterator<char>(file)), {});
  if (file.bad()) fail("{}: expected a file that can be read", path.string());
  return out;
}

void add_around(PostProcessor& around, const TokenizerConfig& config, std::optional<std::int32_t> bos,
                std::optional<std::int32_t> eos) {
  if (config.add_bos_token && bos &&
      std::find(around.before.begin(), around.before.end(), *bos) == around.before.end()) {
    around.before.insert(around.before.begin(), *bos);
  }
  if (config.add_eos_token && eos &&
      std::find(around.after.begin(), around.after.end(), *eos) == around.after.end()) {
    around.after.push_back(*eos);
  }
}

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokenizer::Impl::Impl(TokenizerParts read_parts, TokenizerConfig read_config)
    : parts(std::move(read_parts)), config(std::move(read_config)), around(parts.post_processor) {
  const auto id_of = [&](const std::string& token) -> std::optional<std::int32_t> {
    if (token.empty()) return std::nullopt;
    std::int32_t id = parts.added.id_of(token);
    if (id == TokenTable::none) id = parts.model->find(token);
    return id == TokenTable::none ? std::nullopt : std::optional(id);
  };
  bos = id_of(config.bos_token);
  eos = id_of(config.eos_token);
  pad = id_of(config.pad_token);
  unk = id_of(config.unk_token);
  add_around(around, config, bos, eos);
}

std::string Tokenizer::file_of(const std::string& path) {
  std::error_code ignored;
  if (!fs::is_directory(path, ignored)) return path;
  const fs::path json = fs::path(path) / "tokenizer.json", tiktoken = fs::path(path) / "tiktoken.model";
  return (!fs::exists(json, ignored) && fs::exists(tiktoken, ignored) ? tiktoken : json).string();
}

Tokenizer Tokenizer::load(const std::string& path) {
  std::error_code ignored;
  const fs::path file = file_of(path);
  const fs::path config = beside(file, "tokenizer_config.json");
  const fs::path chat_template = beside(file, "chat_template.jinja");
  const std::string text = read_file(file);
  std::string config_json;
  if (fs::exists(config, ignored)) config_json = read_file(config);
  Tokenizer out = file.extension() == ".model" ? from_tiktoken(text, config_json, file.string())
                                               : from_json(text, config_json, file.string());
  if (fs::exists(chat_template, ignored)) out.impl_->config.chat_template = read_file(chat_template);
  return out;
}

Tokenizer Tokenizer::from_json(std::string_view tokenizer_json, std::string_view config_json,
                               const std::string& name) {
  TokenizerParts parts = read_tokenizer(parse_json(tokenizer_json, name), name);
  TokenizerConfig config;
  if (!config_json.empty()) {
    const std::string config_name = beside(name, "tokenizer_config.json").string();
    config = read_tokenizer_config(parse_json(config_json, config_name), config_name);
  }
  return Tokenizer(std::make_unique<Impl>(std::move(parts), std::move(config)));
}

Tokenizer Tokenizer::from_tiktoken(std::string_view tiktoken_model, std::string_view config_json,
                                   const std::string& name) {
  const std::string config_name = beside(name, "tokenizer_config.json").string();
  if (config_json.empty()) fail("{}: expected {} beside it, with the added tokens", name, config_name);
  const nlohmann::json config = parse_json(config_json, config_name);
  TokenizerParts parts = read_tiktoken(tiktoken_model, name, config, config_name);
  return Tokenizer(std::make_unique<Impl>(std::move(parts), read_tokenizer_config(config, config_name)));
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text, EncodeOptions options) const {
  const TokenizerParts& parts = impl_->parts;
  std::string repaired;
  if (unicode::valid_prefix(text) != text.size()) {
    unicode::append_lossy(repaired, text);
    text = repaired;
  }
  std::vector<std::int32_t> ids;
  if (options.add_special) ids = impl_->around.before;
  Bpe::Scratch scratch;
  const bool bytes = parts.pre_tokenizer.gives_bytes() && parts.model->byte_level();
  const PreTokenizer::Sink word = [&](std::string_view piece) {
    if (bytes) {
      parts.model->encode_bytes(piece, ids, scratch);
    } else if (parts.pre_tokenizer.gives_bytes()) {
      parts.model->encode_text(spell_bytes(piece), ids, scratch);
    } else {
      parts.model->encode_text(piece, ids, scratch);
    }
  };
  std::vector<AddedTokens::Piece> outer, inner;
  if (options.parse_added) {
    parts.added.split(text, false, options.parse_special, outer);
  } else if (!text.empty()) {
    outer.push_back({0, text.size(), TokenTable::none});
  }
  std::string normalized;
  for (const AddedTokens::Piece& piece : outer) {
    if (piece.id != TokenTable::none) {
      if (piece.begin != piece.end) ids.push_back(piece.id);
      continue;
    }
    std::string_view segment = text.substr(piece.begin, piece.end - piece.begin);
    bool first = piece.begin == 0;
    if (!parts.normalizer.steps.empty()) {
      bool keeps_start;
      normalized = parts.normalizer.apply(segment, &keeps_start);
      segment = normalized;
      first = first && keeps_start;
    }
    inner.clear();
    if (options.parse_added) {
      parts.added.split(segment, true, options.parse_special, inner);
    } else if (!segment.empty()) {
      inner.push_back({0, segment.size(), TokenTable::none});
    }
    for (const AddedTokens::Piece& part : inner) {
      if (part.id != TokenTable::none) {
        if (part.begin != part.end) ids.push_back(part.id);
      } else {
        parts.pre_tokenizer.split(segment.substr(part.begin, part.end - part.begin), first && part.begin == 0,
                                  word);
      }
    }
  }
  if (options.add_special) ids.insert(ids.end(), impl_->around.after.begin(), impl_->around.after.end());
  return ids;
}

const std::string* Tokenizer::Impl::decoded_text(std::int32_t id) const {
  if (parts.added.find(id)) return &parts.added.decoded_text(id);
  return parts.model->token(id);
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids, bool skip_special) const {
  StreamDecoder stream(*this, skip_special);
  std::string out;
  for (const std::int32_t id : ids) out += stream.push(id);
  out += stream.finish();
  return out;
}

int Tokenizer::vocab_size() const {
  return std::max(impl_->parts.model->end_id(), impl_->parts.added.end_id());
}

std::optional<std::int32_t> Tokenizer::id_of(std::string_view token) const {
  std::int32_t id = impl_->parts.added.id_of(token);
  if (id == TokenTable::none) id = impl_->parts.model->find(token);
  return id == TokenTable::none ? std::nullopt : std::optional(id);
}

bool Tokenizer::has(std::int32_t id) const { return impl_->decoded_text(id) != nullptr; }

std::string Tokenizer::token_text(std::int32_t id) const {
  if (const AddedToken* added = impl_->parts.added.find(id)) return added->content;
  const std::string* token = impl_->parts.model->token(id);
  if (!token) fail("token id: expected one of the vocabulary's {}, found {}", vocab_size(), id);
  return *token;
}

std::string Tokenizer::token_bytes(std::int32_t id) const {
  std::string text = token_text(id);
  const auto& steps = impl_->parts.decoder.steps;
  const bool byte_level = std::any_of(steps.begin(), steps.end(), [](const DecoderStep& step) {
    return step.kind == DecoderStep::Kind::byte_level;
  });
  if (!byte_level || impl_->parts.added.find(id)) return text;
  return unspell_bytes(text).value_or(text);
}

bool Tokenizer::is_special(std::int32_t id) const {
  const AddedToken* added = impl_->parts.added.find(id);
  return added && added->special;
}

std::optional<std::int32_t> Tokenizer::bos_id() const { return impl_->bos; }
std::optional<std::int32_t> Tokenizer::eos_id() const { return impl_->eos; }
std::optional<std::int32_t> Tokenizer::pad_id() const { return impl_->pad; }
std::optional<std::int32_t> Tokenizer::unk_id() const { return impl_->unk; }
const std::string& Tokenizer::bos_token() const { return impl_->config.bos_token; }
const std::string& Tokenizer::eos_token() const { return impl_->config.eos_token; }
const std::string& Tokenizer::pad_token() const { return impl_->config.pad_token; }
const std::string& Tokenizer::chat_template() const { return impl_->config.chat_template; }
bool Tokenizer::adds_bos() const {
  return impl_->bos && !impl_->around.before.empty() && impl_->around.before.front() == *impl_->bos;
}

struct StreamDecoder::State {
  const Tokenizer::Impl* tokenizer;
  bool skip_special;
  DecoderChain chain;
};

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, bool skip_special)
    : state_(new State{tokenizer.impl_.get(), skip_special, DecoderChain(tokenizer.impl_->parts.decoder)}) {}
StreamDecoder::StreamDecoder(StreamDecoder&&) noexcept = default;
StreamDecoder& StreamDecoder::operator=(StreamDecoder&&) noexcept = default;
StreamDecoder::~StreamDecoder() = default;

std::string StreamDecoder::push(std::int32_t id) {
  if (id < 0) fail("token id: expected 0 or more, found {}", id);
  const std::string* text = state_->tokenizer->decoded_text(id);
  if (!text || (state_->skip_special && state_->tokenizer->skipped(*text))) return {};
  state_->chain.token(*text);
  return state_->chain.take();
}

std::string StreamDecoder::finish() {
  state_->chain.finish();
  std::string out = state_->chain.take();
  state_->chain = DecoderChain(state_->tokenizer->parts.decoder);
  return out;
}

}  // namespace latente
