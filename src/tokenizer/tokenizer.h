// Hugging Face tokenizers of the byte-level BPE kind: reads tokenizer.json (and tokenizer_config.json beside
// it) and encodes and decodes as the Python package `tokenizers` 0.23 does.
//
// Understood are: model BPE (merges as "a b" or ["a", "b"], ignore_merges, byte_fallback, unk_token,
// fuse_unk, continuing_subword_prefix, end_of_word_suffix); added tokens with single_word, lstrip, rstrip,
// normalized, special; normalizers NFC, NFD, NFKC, NFKD, Lowercase, StripAccents, Strip, Replace, Prepend,
// ByteLevel, Sequence; pre-tokenizers ByteLevel, Split, Digits, Metaspace, Punctuation, Whitespace,
// WhitespaceSplit, CharDelimiterSplit, Sequence; post-processors TemplateProcessing, RobertaProcessing,
// BertProcessing, ByteLevel, Sequence; decoders ByteLevel, ByteFallback, Fuse, Strip, Replace, Metaspace,
// BPEDecoder, Sequence. Anything else is an Error at load that names it. The entries `truncation` and
// `padding` are ignored, as transformers does by default.
//
// Text that is not valid UTF-8 is encoded as if each maximal invalid part were U+FFFD, like Python's
// bytes.decode(errors='replace').
//
// A Tokenizer is immutable: any number of threads may encode and decode with one.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace latente {

struct EncodeOptions {
  bool add_special = true;    // what the post-processor adds (mostly the begin-of-sequence token), and the
                              // tokens that tokenizer_config.json asks for by add_bos_token and add_eos_token
  bool parse_special = true;  // find special tokens in the text; if not, they are ordinary text
  bool parse_added = true;    // find added tokens in the text, special or not; if not, all is ordinary text
};

class Tokenizer {
 public:
  // `path`: a tokenizer.json, a tiktoken.model, or a directory that has one. tokenizer_config.json and
  // chat_template.jinja are read from the same directory, where they exist. Throws Error naming the file and
  // what is wrong in it.
  static Tokenizer load(const std::string& path);

  // The file that says what the tokens are: `path` itself, or of a directory tokenizer.json, and only where
  // there is none tiktoken.model.
  static std::string file_of(const std::string& path);

  // From the texts of tokenizer.json and (if not empty) tokenizer_config.json; `name` stands for a file's in
  // errors.
  static Tokenizer from_json(std::string_view tokenizer_json, std::string_view config_json = {},
                             const std::string& name = "tokenizer.json");

  // From the texts of tiktoken.model (Moonlight's and Kimi's: tokens in base64 with their ranks) and
  // tokenizer_config.json, which has the added tokens: encodes as the package tiktoken does with those
  // models' pattern. An Error where the configuration names another class of tokenizer.
  static Tokenizer from_tiktoken(std::string_view tiktoken_model, std::string_view config_json,
                                 const std::string& name = "tiktoken.model");

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // Throws Error where the Python package would: an unk_token that is needed but not in the vocabulary.
  std::vector<std::int32_t> encode(std::string_view text, EncodeOptions options = {}) const;

  // Ids without a token are skipped, as the Python package does (models pad their vocabulary); negative ids
  // are an Error. The text is valid UTF-8: what the tokens leave incomplete is U+FFFD.
  std::string decode(std::span<const std::int32_t> ids, bool skip_special = false) const;

  int vocab_size() const;                                           // 1 + the largest id
  std::optional<std::int32_t> id_of(std::string_view token) const;  // as written in tokenizer.json
  bool has(std::int32_t id) const;                                  // whether there is such a token
  std::string token_text(std::int32_t id) const;   // as written in tokenizer.json; Error if there is none
  std::string token_bytes(std::int32_t id) const;  // what it stands for: raw bytes in a byte-level vocabulary
  bool is_special(std::int32_t id) const;          // also false for ids without a token

  // Of tokenizer_config.json, null where it has none.
  std::optional<std::int32_t> bos_id() const;
  std::optional<std::int32_t> eos_id() const;
  std::optional<std::int32_t> pad_id() const;
  std::optional<std::int32_t> unk_id() const;
  const std::string& bos_token() const;  // text, empty where there is none
  const std::string& eos_token() const;
  const std::string& pad_token() const;
  bool adds_bos() const;  // encode with add_special begins with bos_id()
  // The template named "default" where there are several; empty where there is none.
  const std::string& chat_template() const;

 private:
  friend class StreamDecoder;
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Decodes ids as they come. The pieces' concatenation, with finish()'s, equals decode() of all ids. A piece
// is valid UTF-8: the bytes of an unfinished character are held back. The tokenizer must outlive it.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer, bool skip_special = false);
  StreamDecoder(StreamDecoder&&) noexcept;
  StreamDecoder& operator=(StreamDecoder&&) noexcept;
  ~StreamDecoder();

  std::string push(std::int32_t id);
  std::string finish();  // the rest; the decoder is then as new

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace latente
