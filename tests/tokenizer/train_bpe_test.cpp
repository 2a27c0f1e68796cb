#include "tokenizer/train_bpe.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <random>

#include "base/error.h"
#include "base/file.h"
#include "tokenizer/tokenizer.h"

namespace latente {
namespace {

TrainedBpe train(std::vector<std::string> documents, const BpeTrainOptions& options) {
  size_t at = 0;
  return train_bpe(
      [&](std::string& document) {
        if (at == documents.size()) return false;
        document = documents[at++];
        return true;
      },
      options);
}

std::vector<std::string> random_documents(unsigned seed, int count) {
  static const char* const words[] = {"the",    " river", " rivers", " walked", " walking", "\n\n", " 1931",
                                      " don't", "!",      " über",   " 中文",   "  ",       "ing",  "\xff"};
  std::mt19937 random(seed);
  std::vector<std::string> out(static_cast<size_t>(count));
  for (std::string& document : out) {
    for (int i = 0; i < 60; ++i) document += words[random() % std::size(words)];
  }
  return out;
}

std::string error_of(const BpeTrainOptions& options, std::vector<std::string> documents = {"some text"}) {
  try {
    train(std::move(documents), options);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(TrainBpe, TokensAndMergesAreThePackages) {
  const auto recorded =
      nlohmann::json::parse(read_file(LATENTE_TEST_DATA "/tokenizer/recorded/training.json"));
  for (const auto& expected : recorded["trained"]) {
    SCOPED_TRACE(expected["kind"].dump() + expected["vocab_size"].dump());
    BpeTrainOptions options;
    options.special_tokens = recorded["special"].get<std::vector<std::string>>();
    options.pre_tokenizer = expected["kind"];
    options.vocab_size = expected["vocab_size"];
    const TrainedBpe found = train({recorded["text"]}, options);
    EXPECT_EQ(found.tokens, expected["tokens"].get<std::vector<std::string>>());
    const auto file = nlohmann::json::parse(found.tokenizer_json());
    EXPECT_EQ(file["model"]["merges"], expected["merges"]);
    EXPECT_EQ(file["model"]["vocab"].size(), found.tokens.size());
  }
}

// The rule itself, by recounting all pairs for every merge.
TEST(TrainBpe, MergesTheMostFrequentPairFirst) {
  BpeTrainOptions options;
  options.special_tokens = {};
  options.pre_tokenizer = "gpt2";
  options.vocab_size = 256 + 12;
  const TrainedBpe found = train({"aab aab abab bb aab cab", "ab ab"}, options);
  std::vector<std::pair<std::vector<std::string>, int>> words{
      {{"a", "a", "b"}, 1}, {{"Ġ", "a", "a", "b"}, 2}, {{"Ġ", "a", "b", "a", "b"}, 1},
      {{"Ġ", "b", "b"}, 1}, {{"Ġ", "c", "a", "b"}, 1}, {{"a", "b"}, 1},
      {{"Ġ", "a", "b"}, 1}};
  const auto id = [&](const std::string& token) {
    return std::find(found.tokens.begin(), found.tokens.end(), token) - found.tokens.begin();
  };
  for (const auto& [left, right] : found.merges) {
    std::map<std::pair<long, long>, int> counts;
    for (const auto& [word, count] : words) {
      for (size_t i = 0; i + 1 < word.size(); ++i) counts[{id(word[i]), id(word[i + 1])}] += count;
    }
    auto best = counts.begin();
    for (auto pair = counts.begin(); pair != counts.end(); ++pair) {
      if (pair->second > best->second) best = pair;
    }
    EXPECT_EQ(best->first, (std::pair<long, long>(left, right)));
    EXPECT_GE(best->second, 2);
    const std::string a = found.tokens[static_cast<size_t>(left)];
    const std::string b = found.tokens[static_cast<size_t>(right)];
    for (auto& [word, count] : words) {
      for (size_t i = 0; i + 1 < word.size(); ++i) {
        if (word[i] != a || word[i + 1] != b) continue;
        word[i] += b;
        word.erase(word.begin() + static_cast<std::ptrdiff_t>(i) + 1);
      }
    }
  }
  EXPECT_GE(found.merges.size(), 4u);
}

TEST(TrainBpe, OrderAndThreadsDoNotMatter) {
  std::vector<std::string> documents = random_documents(1, 40);
  BpeTrainOptions options;
  options.vocab_size = 400;
  options.threads = 1;
  const std::string first = train(documents, options).tokenizer_json();
  std::shuffle(documents.begin(), documents.end(), std::mt19937(2));
  options.threads = 3;
  EXPECT_EQ(train(documents, options).tokenizer_json(), first);
}

TEST(TrainBpe, SavedFilesEncodeAndDecode) {
  const std::vector<std::string> documents = random_documents(3, 20);
  const auto folder =
      std::filesystem::temp_directory_path() / ("latente_train_bpe_" + std::to_string(getpid()));
  for (const char* kind : {"deepseek-v3", "gpt2", "llama3"}) {
    BpeTrainOptions options;
    options.pre_tokenizer = kind;
    options.vocab_size = 330;
    const TrainedBpe trained = train(documents, options);
    trained.save(folder.string());
    const Tokenizer tokenizer = Tokenizer::load(folder.string());
    EXPECT_EQ(tokenizer.vocab_size(), static_cast<int>(trained.tokens.size()));
    EXPECT_EQ(tokenizer.bos_token(), "<|endoftext|>");
    EXPECT_EQ(tokenizer.eos_id(), 0);
    EXPECT_TRUE(tokenizer.adds_bos());
    EXPECT_NE(tokenizer.chat_template().find("<|assistant|>"), std::string::npos);
    const std::string text = "the rivers don't über 中文  \n\x01 ☃";
    const auto ids = tokenizer.encode(text);
    EXPECT_EQ(ids.front(), 0);
    EXPECT_EQ(tokenizer.decode(ids, true), text);
    EXPECT_EQ(tokenizer.encode("<|user|>the").at(1), 2);
  }
  std::filesystem::remove_all(folder);
}

TEST(TrainBpe, SpecialTokensInTheTextAreNotCounted) {
  BpeTrainOptions options;
  options.special_tokens = {"<|endoftext|>", "<|user|>"};
  options.vocab_size = 300;
  const TrainedBpe with = train({"<|user|>hello hello<|user|>hello", "hello<|user|>"}, options);
  const TrainedBpe without = train({"hello hello", "hello", "hello"}, options);
  EXPECT_EQ(with.tokens, without.tokens);
}

TEST(TrainBpe, LongWordsAreNotCounted) {
  BpeTrainOptions options;
  options.vocab_size = 300;
  const TrainedBpe found = train({std::string(3'000'000, 'x'), "yes yes yes"}, options);
  EXPECT_EQ(std::count(found.tokens.begin(), found.tokens.end(), "xx"), 0);
  EXPECT_EQ(std::count(found.tokens.begin(), found.tokens.end(), "yes"), 1);
}

TEST(TrainBpe, ErrorsNameTheOption) {
  const auto with = [](auto change) {
    BpeTrainOptions options;
    change(options);
    return error_of(options);
  };
  EXPECT_EQ(with([](auto& o) { o.vocab_size = 259; }),
            "vocab_size: expected from 260 (256 bytes and 4 special tokens) to 4194303, found 259");
  EXPECT_EQ(with([](auto& o) { o.pre_tokenizer = "bert"; }),
            "pre-tokenizer: expected deepseek-v3, gpt2 or llama3, found 'bert'");
  EXPECT_EQ(with([](auto& o) {
              o.special_tokens = {"<s>", "<s>"};
            }),
            "special token '<s>': expected once, found twice");
  EXPECT_EQ(with([](auto& o) { o.special_tokens = {"é"}; }),
            "special token: expected two or more characters, found 'é'");
  EXPECT_EQ(with([](auto& o) { o.special_tokens = {"\xff\xfe"}; }), "special token: expected UTF-8");
  EXPECT_EQ(with([](auto& o) { o.bos = "<s>"; }), "bos: expected one of the special tokens, found '<s>'");
  EXPECT_EQ(with([](auto& o) { o.min_frequency = 0; }), "min_frequency: expected 1 or more, found 0");
  EXPECT_EQ(error_of({}, {}), "training a tokenizer: expected text, found no words");
  EXPECT_EQ(error_of({}, {""}), "training a tokenizer: expected text, found no words");
}

}  // namespace
}  // namespace latente
