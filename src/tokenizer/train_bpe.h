// Trains a byte-level BPE vocabulary from text (Sennrich et al. 2016; bytes as in GPT-2) and writes it as
// Hugging Face files.
//
// The merges are those of the Python package `tokenizers`' BpeTrainer with the 256 bytes as initial alphabet:
// the most frequent pair first, of equally frequent ones that of the smaller ids (left, then right). Two
// things differ: text is cut at the special tokens before it is counted, and words of more than
// BpeTrainOptions::max_word bytes (encoded data) are not counted.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace latente {

struct BpeTrainOptions {
  int vocab_size = 8192;  // special tokens and the 256 bytes included
  // How text is cut into words that merges do not cross: deepseek-v3, gpt2 or llama3.
  std::string pre_tokenizer = "deepseek-v3";
  // Get the first ids. The first is begin and end of text unless `bos` and `eos` name others.
  std::vector<std::string> special_tokens = {"<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"};
  std::string bos, eos;
  std::int64_t min_frequency = 2;  // of a pair in the text, to be merged
  std::size_t max_word = 1024;     // bytes
  int threads = 0;                 // for counting; 0: one a core
};

struct BpeTrainProgress {
  enum class Stage { counting, merging } stage = Stage::counting;
  std::int64_t documents = 0, bytes = 0;  // of text, counted so far
  std::int64_t words = 0;                 // distinct, when merging
  int vocab_size = 0;                     // so far
};

struct TrainedBpe {
  std::vector<std::string> tokens;  // by id, as written in tokenizer.json
  std::vector<std::pair<std::int32_t, std::int32_t>> merges;
  std::int64_t documents = 0, bytes = 0, words = 0;
  BpeTrainOptions options;  // bos and eos filled in

  std::string tokenizer_json() const;
  // With a chat template where the special tokens include <|user|> and <|assistant|>.
  std::string config_json() const;
  // tokenizer.json and tokenizer_config.json in `directory`, which is made if it is not there.
  void save(const std::string& directory) const;
};

// Puts the next document (UTF-8; invalid parts count as U+FFFD) into its argument; false at the end.
using NextDocument = std::function<bool(std::string&)>;

// The vocabulary may end smaller than asked for, when the text has no more pairs. The same documents give the
// same result in any order and with any number of threads. `progress` is called from the calling thread.
// Throws Error if an option is out of range or the text has no words.
TrainedBpe train_bpe(const NextDocument& next, BpeTrainOptions options,
                     const std::function<void(const BpeTrainProgress&)>& progress = {});

}  // namespace latente
