// The tokenizer in a GGUF file, as the files that Hugging Face's tokenizers are read from.
#pragma once

#include <string>

#include "checkpoint/gguf.h"

namespace latente {

struct GgufTokenizer {
  std::string tokenizer_json, config_json;  // texts of tokenizer.json and tokenizer_config.json
};

// Byte-level BPE ("gpt2") with a pre-tokenizer of DeepSeek's models or one of a few others; the file only
// names it, and what it does is that of the original models. The chat template and the tokens that begin and
// end texts come along. Errors name the file and the key: no or another tokenizer, lists of different
// lengths, repeated tokens, text that is not UTF-8, merges that are no pair, ids beyond the vocabulary.
GgufTokenizer gguf_tokenizer(const GgufFile& file);

}  // namespace latente
