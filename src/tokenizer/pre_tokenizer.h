// Pre-tokenizers of tokenizer.json: they cut a text into the words that the model encodes one by one.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/regex.h"

namespace latente {

// What becomes of the matches that split a text.
enum class SplitBehavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };

struct PreTokenizerStep {
  enum class Kind { split, byte_level, metaspace };
  enum class Prepend { never, first, always };
  Kind kind;
  std::optional<Regex> pattern{};  // split; byte_level with use_regex
  SplitBehavior behavior = SplitBehavior::isolated;
  bool invert = false;            // split at what does not match
  bool add_prefix_space = false;  // byte_level
  std::string replacement{};      // metaspace: one character
  Prepend prepend = Prepend::always;
  bool split = true;  // metaspace

  static PreTokenizerStep digits(bool individual);
  static PreTokenizerStep punctuation(SplitBehavior behavior);
  static PreTokenizerStep whitespace();
  static PreTokenizerStep whitespace_split();
  static PreTokenizerStep delimiter(char32_t character);
  static PreTokenizerStep byte_level(bool add_prefix_space, bool use_regex);
  static PreTokenizerStep metaspace(std::string replacement, Prepend prepend, bool split);
};

class PreTokenizer {
 public:
  using Sink = std::function<void(std::string_view)>;
  std::vector<PreTokenizerStep> steps;

  // Whether words leave as raw bytes, to be read in the byte-level alphabet: the last step is ByteLevel.
  bool gives_bytes() const {
    return !steps.empty() && steps.back().kind == PreTokenizerStep::Kind::byte_level;
  }

  // Calls `sink` with every word in order; none is empty. `first`: whether `text` begins the input. A word is
  // valid only during the call.
  void split(std::string_view text, bool first, const Sink& sink) const { run(0, text, first, sink); }

 private:
  void run(std::size_t step, std::string_view text, bool first, const Sink& sink) const;
  void split_by(std::size_t step, const Regex& pattern, SplitBehavior behavior, bool invert,
                std::string_view text, bool first, const Sink& sink) const;
};

}  // namespace latente
