#include "train/batches.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <set>

#include "base/error.h"

namespace latente {
namespace {

namespace fs = std::filesystem;

constexpr int32_t eos = 0, fim_begin = 1, fim_hole = 2, fim_end = 3, first_token = 4;

// Documents of the given lengths (EOS included) over the tokens 4, 5, 6, ..., all different: a token tells
// its place.
class Stream {
 public:
  explicit Stream(const std::vector<int>& lengths) {
    static int made = 0;
    directory_ = fs::path(testing::TempDir()) / fmt::format("latente_batches_{}_{}", getpid(), made++);
    fs::remove_all(directory_);
    fs::create_directories(directory_);
    std::ofstream file(directory_ / "a.jsonl");
    int32_t token = first_token;
    for (const int length : lengths) {
      std::string text;
      for (int i = 1; i < length; ++i) text += fmt::format(" {}", token++);
      file << "{\"text\":\"x" << text << "\"}\n";
    }
    file.close();
    CorpusOptions options;
    options.cache = (directory_ / "cache").string();
    TextEncoder encoder;
    encoder.vocabulary = 1 << 20;
    encoder.after = {eos};
    encoder.encode = [](std::string_view text) {
      std::vector<int32_t> tokens;
      for (size_t at; (at = text.find(' ')) != text.npos;) {
        text.remove_prefix(at + 1);
        tokens.push_back(std::stoi(std::string(text.substr(0, text.find(' ')))));
      }
      return tokens;
    };
    corpus = Corpus(TokenCache::open_or_make({(directory_ / "a.jsonl").string()}, options, encoder));
    all.resize(static_cast<size_t>(corpus.tokens()));
    corpus.read(0, all);
    for (int64_t d = 0; d < corpus.documents(); ++d) {
      document.insert(document.end(), static_cast<size_t>(corpus.start(d + 1) - corpus.start(d)), d);
    }
  }
  ~Stream() { fs::remove_all(directory_); }

  Corpus corpus;
  std::vector<int32_t> all;
  std::vector<int64_t> document;  // of each token

 private:
  fs::path directory_;
};

BatchOptions plain(int64_t length, int depths = 0) {
  BatchOptions options;
  options.length = length;
  options.depths = depths;
  options.shuffle = false;
  return options;
}

using Tokens = std::vector<int32_t>;

TEST(Batches, InputsAndTargetsAreShifted) {
  Stream stream({7, 5, 9});
  Batches batches(stream.corpus, plain(5, 2));
  EXPECT_EQ(batches.windows(), 4);
  Batch batch;
  batches.next(batch, 4);
  for (int64_t place = 0; place < 20; ++place) {
    for (int64_t k = 0; k < 3; ++k) {
      const auto input = static_cast<size_t>(place + k);
      ASSERT_EQ(batch.inputs[k][place], input < 21 ? stream.all[input] : 0);
      ASSERT_EQ(batch.targets[k][place], input + 1 < 21 ? stream.all[input + 1] : -1);
    }
    ASSERT_EQ(batch.starts[place], place / 5 * 5);
  }
  EXPECT_EQ(batch.lengths, (std::vector<int64_t>{5, 5, 5, 5}));
  EXPECT_EQ(batch.target_counts, (std::vector<int64_t>{20, 19, 18}));
}

TEST(Batches, TheDocumentMaskKeepsToTheDocument) {
  std::random_device device;
  for (int round = 0; round < 20; ++round) {
    std::mt19937 random(device());
    std::vector<int> lengths;
    for (int i = 0; i < 12; ++i) lengths.push_back(1 + random() % 9);
    Stream stream(lengths);
    const auto& document = stream.document;
    auto options = plain(1 + random() % 7, 2);
    options.document_mask = true;
    options.keep_tail = true;
    Batches batches(stream.corpus, options);
    Batch batch;
    batches.next(batch, batches.windows());
    std::vector<int64_t> counts(3);
    for (size_t place = 0; place + 1 < document.size(); ++place) {
      const size_t window = place / options.length * options.length;
      size_t start = place;
      while (start > window && document[start - 1] == document[place]) --start;
      ASSERT_EQ(static_cast<size_t>(batch.starts[place]), start);
      for (size_t k = 0; k < 3; ++k) {
        const size_t target = place + k + 1;
        const bool inside = target < document.size() && document[target] == document[place];
        ASSERT_EQ(batch.targets[k][place], inside ? stream.all[target] : -1);
        counts[k] += inside;
      }
    }
    EXPECT_EQ(batch.target_counts, counts);
  }
}

TEST(Batches, KeepTailPredictsEveryTokenOnce) {
  Stream stream({10, 3, 10});
  for (int64_t length : {1, 4, 5, 22, 23, 100}) {
    auto options = plain(length, 1);
    options.keep_tail = true;
    Batches batches(stream.corpus, options);
    Tokens seen;
    Batch batch;
    for (int64_t b = 0; b < batches.batches(3); ++b) {
      batches.next(batch, 3);
      for (size_t place = 0; place < batch.targets[0].size(); ++place) {
        const int64_t row = static_cast<int64_t>(place) / length,
                      column = static_cast<int64_t>(place) % length;
        ASSERT_EQ(batch.targets[0][place] >= 0, column < batch.lengths[row]);
        if (batch.targets[0][place] >= 0) seen.push_back(batch.targets[0][place]);
        if (column >= batch.lengths[row]) {
          ASSERT_EQ(batch.inputs[0][place], 0);
          ASSERT_EQ(batch.starts[place], static_cast<int64_t>(place));
        }
      }
    }
    ASSERT_EQ(seen, Tokens(stream.all.begin() + 1, stream.all.end())) << length;
    batches.next(batch, 1);
    ASSERT_EQ(batch.inputs[0][0], stream.all[0]);
    ASSERT_EQ(batches.position(), (BatchPosition{1, 1}));
  }
}

TEST(Batches, EachEpochIsAnotherOrderOfAllWindows) {
  Stream stream({300});
  auto options = plain(3);
  options.shuffle = true;
  Batches batches(stream.corpus, options);
  Batch batch;
  std::set<Tokens> orders;
  for (int epoch = 0; epoch < 4; ++epoch) {
    batches.next(batch, batches.windows());
    Tokens order;
    for (size_t row = 0; row < 99; ++row) order.push_back(batch.inputs[0][row * 3]);
    orders.insert(order);
    std::sort(order.begin(), order.end());
    for (size_t row = 0; row < 99; ++row) ASSERT_EQ(order[row], stream.all[row * 3]);
  }
  EXPECT_EQ(orders.size(), 4u);
  options.seed = 2;
  Batches(stream.corpus, options).next(batch, 99);
  Tokens other;
  for (size_t row = 0; row < 99; ++row) other.push_back(batch.inputs[0][row * 3]);
  EXPECT_FALSE(orders.contains(other));
}

TEST(Batches, APositionResumesExactly) {
  std::mt19937 random(std::random_device{}());
  Stream stream({40, 7, 60, 30});
  BatchOptions options;
  options.length = 5;
  options.depths = 1;
  options.fim = {0.5, fim_begin, fim_hole, fim_end, 0, 1};
  Batches first(stream.corpus, options);
  for (int round = 0; round < 60; ++round) {
    Batches second(stream.corpus, options);
    EXPECT_EQ(first.fingerprint(), second.fingerprint());
    second.seek(first.position());
    const int64_t sequences = 1 + random() % 5;
    Batch a, b;
    first.next(a, sequences);
    second.next(b, sequences);
    ASSERT_EQ(a.inputs, b.inputs);
    ASSERT_EQ(a.targets, b.targets);
    ASSERT_EQ(first.position(), second.position());
  }
  EXPECT_GT(first.position().epoch, 1);
  EXPECT_THROW(first.seek({0, first.windows() + 1}), Error);
  EXPECT_THROW(first.seek({-1, 0}), Error);
  options.seed = 3;
  EXPECT_NE(Batches(stream.corpus, options).fingerprint(), first.fingerprint());
}

TEST(Batches, ManyRanksSeeTheBatchOfOne) {
  Stream stream({100, 23});
  for (const bool keep_tail : {false, true}) {
    BatchOptions options;
    options.length = 4;
    options.document_mask = true;
    options.keep_tail = keep_tail;
    Batches one(stream.corpus, options);
    std::vector<Batches> ranks;
    options.world = 3;
    for (options.rank = 0; options.rank < 3; ++options.rank) ranks.emplace_back(stream.corpus, options);
    for (int round = 0; round < 12; ++round) {
      Batch whole;
      one.next(whole, 6);
      Tokens inputs, targets;
      for (auto& rank : ranks) {
        Batch part;
        rank.next(part, 2);
        inputs.insert(inputs.end(), part.inputs[0].begin(), part.inputs[0].end());
        targets.insert(targets.end(), part.targets[0].begin(), part.targets[0].end());
        ASSERT_EQ(rank.position(), one.position());
      }
      ASSERT_EQ(inputs, whole.inputs[0]);
      ASSERT_EQ(targets, whole.targets[0]);
    }
  }
}

TEST(Batches, BytesOfTheTargetsAreCounted) {
  Stream stream({4, 4, 4});
  std::vector<int32_t> lengths(first_token + 20, 1);
  lengths[eos] = 0;
  auto options = plain(100);
  options.keep_tail = true;
  Batch batch;
  Batches(stream.corpus, options, lengths).next(batch, 1);
  EXPECT_EQ(batch.target_bytes, 8);
  options.document_mask = true;
  Batches(stream.corpus, options, lengths).next(batch, 1);
  EXPECT_EQ(batch.target_bytes, 6);
  EXPECT_THROW(Batches(stream.corpus, options, {0, 1}).next(batch, 1), Error);
}

// Undoing BEGIN prefix HOLE suffix END middle must give the piece without its last three tokens.
TEST(Batches, FillInTheMiddleOnlyReordersPieces) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  std::vector<int> sizes;
  for (int i = 0; i < 400; ++i) sizes.push_back(1 + random() % 60);
  Stream stream(sizes);
  auto options = plain(64);
  options.keep_tail = true;
  options.seed = static_cast<int64_t>(seed >> 1);
  options.fim = {0.3, fim_begin, fim_hole, fim_end, 0, 1};
  Batches batches(stream.corpus, options);
  Batch batch;
  batches.next(batch, batches.windows());
  int64_t possible = 0, changed = 0;
  std::set<int64_t> prefix_lengths;
  for (int64_t w = 0; w < batches.windows(); ++w) {
    Tokens row(batch.inputs[0].begin() + w * 64, batch.inputs[0].begin() + w * 64 + batch.lengths[w]);
    row.push_back(batch.targets[0][w * 64 + batch.lengths[w] - 1]);
    const auto first = static_cast<size_t>(w * 64);
    for (size_t at = 0; at < row.size();) {
      size_t end = at;
      while (end < row.size() && stream.document[first + end] == stream.document[first + at]) ++end;
      Tokens before(stream.all.begin() + first + at, stream.all.begin() + first + end);
      Tokens after(row.begin() + at, row.begin() + end);
      at = end;
      const bool closed = before.back() == eos;
      if (closed) {
        ASSERT_EQ(after.back(), eos);
        before.pop_back();
        after.pop_back();
      }
      if (before.size() < 8) {
        ASSERT_EQ(before, after);
        continue;
      }
      ++possible;
      if (before == after) continue;
      ++changed;
      ASSERT_EQ(after.front(), fim_begin);
      const auto hole = std::find(after.begin(), after.end(), fim_hole);
      const auto mark = std::find(after.begin(), after.end(), fim_end);
      ASSERT_TRUE(hole < mark && mark < after.end());
      Tokens undone(after.begin() + 1, hole);
      prefix_lengths.insert(static_cast<int64_t>(undone.size()));
      undone.insert(undone.end(), mark + 1, after.end());
      undone.insert(undone.end(), hole + 1, mark);
      before.resize(before.size() - 3);
      ASSERT_EQ(undone, before);
    }
  }
  const double expected = 0.3 * static_cast<double>(possible);
  EXPECT_NEAR(static_cast<double>(changed), expected, 6 * std::sqrt(expected * 0.7));
  EXPECT_GT(prefix_lengths.size(), 10u);
}

TEST(Batches, BadOptionsAreNamed) {
  Stream stream({10});
  const auto error_of = [&](auto change) -> std::string {
    BatchOptions options = plain(4);
    change(options);
    try {
      Batches batches(stream.corpus, options);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_EQ(error_of([](auto&) {}), "no error");
  EXPECT_EQ(error_of([](auto& o) { o.length = 9; }), "no error");
  EXPECT_EQ(error_of([](auto& o) { o.length = 10; }),
            "length: expected a corpus of at least 11 tokens, found 10");
  EXPECT_EQ(error_of([](auto& o) { o.length = 0; }), "length: expected at least 1 token, found 0");
  EXPECT_EQ(error_of([](auto& o) { o.rank = 1; }), "rank: expected a number in [0, world = 1), found 1");
  EXPECT_EQ(error_of([](auto& o) { o.fim.rate = 0.1; }),
            "fim: expected the token ids begin, hole and end, found -1, -1, -1");
  EXPECT_THROW(Batches(Corpus(), plain(4)), Error);
}

}  // namespace
}  // namespace latente
