// Normalizers of tokenizer.json.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/regex.h"
#include "tokenizer/unicode.h"

namespace latente {

struct NormalizerStep {
  enum class Kind { form, lowercase, strip_accents, strip, replace, prepend, byte_level };
  Kind kind;
  unicode::Form form = unicode::Form::nfc;
  bool left = false, right = false;  // strip
  std::optional<Regex> pattern{};    // replace
  std::string content{};             // replace, prepend
};

class Normalizer {
 public:
  std::vector<NormalizerStep> steps;

  // `text`: valid UTF-8. *keeps_start becomes false where the result's first character no longer stems from
  // the text's first one.
  std::string apply(std::string_view text, bool* keeps_start = nullptr) const;
};

}  // namespace latente
