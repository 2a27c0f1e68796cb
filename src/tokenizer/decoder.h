// Decoders of tokenizer.json, as a chain of stages through which tokens stream.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/regex.h"

namespace latente {

struct DecoderStep {
  enum class Kind { byte_level, byte_fallback, fuse, strip, replace, metaspace, bpe };
  Kind kind;
  std::string content{};            // strip, metaspace: one character; replace: the new text; bpe: the suffix
  std::optional<Regex> pattern{};   // replace
  std::size_t start = 0, stop = 0;  // strip
  bool drops_first = false;         // metaspace: the replacement vanishes in the first token
};

// Without steps, tokens are joined by spaces.
struct Decoder {
  bool present = false;
  std::vector<DecoderStep> steps;
};

// Takes tokens, gives text, as early as it is certain.
class DecoderChain {
 public:
  explicit DecoderChain(const Decoder& decoder);  // which must outlive it
  ~DecoderChain();
  DecoderChain(DecoderChain&&) noexcept;
  DecoderChain& operator=(DecoderChain&&) noexcept;

  void token(std::string_view text);  // valid UTF-8
  void finish();                      // no more tokens
  std::string take();                 // the text since the last call

  class Stage;

 private:
  std::vector<std::unique_ptr<Stage>> stages_;
};

}  // namespace latente
