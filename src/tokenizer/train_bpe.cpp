#include "tokenizer/train_bpe.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <queue>
#include <set>
#include <unordered_map>

#include "base/error.h"
#include "base/threads.h"
#include "tokenizer/byte_alphabet.h"
#include "tokenizer/tokenizer_impl.h"
#include "tokenizer/train_files.h"
#include "tokenizer/unicode.h"

namespace latente {

namespace {

struct TextHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
};
using WordCounts = std::unordered_map<std::string, std::int64_t, TextHash, std::equal_to<>>;

void check(BpeTrainOptions& options) {
  std::set<std::string> distinct;
  for (const std::string& token : options.special_tokens) {
    if (unicode::valid_prefix(token) != token.size()) fail("special token: expected UTF-8");
    // One character would be taken for a byte's.
    if (token.empty() || unicode::length(token[0]) == token.size())
      fail("special token: expected two or more characters, found '{}'", token);
    if (!distinct.insert(token).second) fail("special token '{}': expected once, found twice", token);
  }
  const std::string first = options.special_tokens.empty() ? "" : options.special_tokens.front();
  if (options.bos.empty()) options.bos = first;
  if (options.eos.empty()) options.eos = first;
  for (const auto& [name, token] : {std::pair("bos", options.bos), std::pair("eos", options.eos)}) {
    if (!token.empty() && !distinct.contains(token))
      fail("{}: expected one of the special tokens, found '{}'", name, token);
  }
  const std::size_t least = options.special_tokens.size() + 256;
  if (options.vocab_size < static_cast<std::int64_t>(least) || options.vocab_size > Bpe::max_id) {
    fail("vocab_size: expected from {} (256 bytes and {} special tokens) to {}, found {}", least,
         options.special_tokens.size(), Bpe::max_id, options.vocab_size);
  }
  if (options.min_frequency < 1) fail("min_frequency: expected 1 or more, found {}", options.min_frequency);
  if (options.max_word < 1) fail("max_word: expected 1 or more, found {}", options.max_word);
}

// Special tokens, then the bytes in the order of the characters that spell them. `of_byte` gets their ids.
std::vector<std::string> first_tokens(const BpeTrainOptions& options, std::int32_t (&of_byte)[256]) {
  std::vector<std::string> out = options.special_tokens;
  std::map<char32_t, unsigned char> bytes;
  for (int byte = 0; byte < 256; ++byte) {
    const auto b = static_cast<unsigned char>(byte);
    bytes[character_of_byte(b)] = b;
  }
  for (const auto& [character, byte] : bytes) {
    of_byte[byte] = static_cast<std::int32_t>(out.size());
    unicode::append(out.emplace_back(), character);
  }
  return out;
}

void count_words(std::string_view text, const TokenizerParts& parts, std::size_t max_word,
                 WordCounts& counts) {
  std::string repaired;
  if (unicode::valid_prefix(text) != text.size()) {
    unicode::append_lossy(repaired, text);
    text = repaired;
  }
  const PreTokenizer::Sink sink = [&](std::string_view word) {
    if (word.size() > max_word) return;
    const auto known = counts.find(word);
    if (known != counts.end()) {
      ++known->second;
    } else {
      counts.emplace(word, 1);
    }
  };
  std::vector<AddedTokens::Piece> pieces;
  parts.added.split(text, false, true, pieces);
  for (const AddedTokens::Piece& piece : pieces) {
    if (piece.id != TokenTable::none) continue;
    parts.pre_tokenizer.split(text.substr(piece.begin, piece.end - piece.begin), piece.begin == 0, sink);
  }
}

using Words = std::vector<std::pair<std::string, std::int64_t>>;

Words count_all(const NextDocument& next, const TokenizerParts& parts, const BpeTrainOptions& options,
                BpeTrainProgress& at, const std::function<void(const BpeTrainProgress&)>& progress) {
  ThreadPool pool(options.threads);
  std::vector<WordCounts> counts(static_cast<std::size_t>(pool.size()));
  const std::size_t batch_bytes = std::size_t{4 << 20} * counts.size();
  std::vector<std::string> batch;
  for (bool more = true; more;) {
    batch.clear();
    std::size_t bytes = 0;
    while (bytes < batch_bytes) {
      std::string document;
      more = next(document);
      if (!more) break;
      bytes += document.size();
      batch.push_back(std::move(document));
    }
    std::atomic<std::size_t> taken{0};
    pool.run([&](int thread) {
      for (std::size_t i; (i = taken++) < batch.size();) {
        count_words(batch[i], parts, options.max_word, counts[static_cast<std::size_t>(thread)]);
      }
    });
    at.documents += static_cast<std::int64_t>(batch.size());
    at.bytes += static_cast<std::int64_t>(bytes);
    if (progress) progress(at);
  }
  for (std::size_t i = 1; i < counts.size(); ++i) {
    for (const auto& [word, count] : counts[i]) counts[0][word] += count;
    counts[i] = {};
  }
  Words out(counts[0].begin(), counts[0].end());
  std::sort(out.begin(), out.end());
  return out;
}

// The words as ids, the number of every pair in them, and a queue of pairs. A pair's count in the queue may
// be out of date: it is put right when it comes first.
class Merger {
 public:
  Merger(const Words& words, const std::int32_t (&of_byte)[256]) {
    words_.reserve(words.size());
    for (const auto& [text, count] : words) {
      const auto word = static_cast<std::uint32_t>(words_.size());
      words_.push_back({symbols_.size(), text.size(), count});
      for (std::size_t i = 0; i < text.size(); ++i) {
        symbols_.push_back(of_byte[static_cast<unsigned char>(text[i])]);
        if (i > 0) change(symbols_[symbols_.size() - 2], symbols_.back(), 1, word);
      }
    }
    queue_changed();
  }

  struct Pair {
    std::int32_t left, right;
    std::int64_t count;
    std::size_t places;
  };

  // The most frequent pair; false if none is left.
  bool next(Pair& out) {
    while (!queue_.empty()) {
      Entry top = queue_.top();
      queue_.pop();
      const std::int64_t count = counts_.at(top.pair);
      if (count != top.count) {
        top.count = count;
        queue_.push(top);
        continue;
      }
      if (count < 1) return false;
      out = {static_cast<std::int32_t>(top.pair >> 32), static_cast<std::int32_t>(top.pair & 0xFFFFFFFF),
             count, top.places};
      return true;
    }
    return false;
  }

  // The pair's own count stays: it is out of the queue. If it comes back, made of a token that two merges
  // make, the old count is part of the new one, as in the Python package.
  void merge(const Pair& pair, std::int32_t merged) {
    const std::vector<std::uint32_t> places = std::move(places_[pair.places]);
    for (const std::uint32_t index : places) {
      Word& word = words_[index];
      std::int32_t* const s = symbols_.data() + word.begin;
      std::size_t size = 0;
      for (std::size_t i = 0; i < word.size;) {
        if (s[i] != pair.left || i + 1 == word.size || s[i + 1] != pair.right) {
          s[size++] = s[i++];
          continue;
        }
        i += 2;
        if (size > 0) {
          change(s[size - 1], pair.left, -1, index);
          change(s[size - 1], merged, 1, index);
        }
        if (i < word.size) {
          change(pair.right, s[i], -1, index);
          change(merged, s[i], 1, index);
        }
        s[size++] = merged;
      }
      word.size = size;
    }
    queue_changed();
  }

 private:
  struct Word {
    std::size_t begin, size;  // in symbols_
    std::int64_t count;
  };
  struct Entry {
    std::int64_t count;
    std::uint64_t pair;
    std::size_t places;
    bool operator<(const Entry& other) const {
      return count != other.count ? count < other.count : pair > other.pair;
    }
  };

  void change(std::int32_t left, std::int32_t right, int sign, std::uint32_t word) {
    const std::uint64_t pair = static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint32_t>(right);
    counts_[pair] += sign * words_[word].count;
    if (sign < 0) return;
    std::vector<std::uint32_t>& places = changed_[pair];
    if (places.empty() || places.back() != word) places.push_back(word);
  }

  void queue_changed() {
    for (auto& [pair, places] : changed_) {
      const std::int64_t count = counts_.at(pair);
      if (count <= 0) continue;
      queue_.push({count, pair, places_.size()});
      places_.push_back(std::move(places));
    }
    changed_.clear();
  }

  std::vector<std::int32_t> symbols_;
  std::vector<Word> words_;
  std::unordered_map<std::uint64_t, std::int64_t> counts_;
  std::unordered_map<std::uint64_t, std::vector<std::uint32_t>> changed_;  // pair → words it is new in
  std::vector<std::vector<std::uint32_t>> places_;                         // of the queue's entries
  std::priority_queue<Entry> queue_;
};

}  // namespace

TrainedBpe train_bpe(const NextDocument& next, BpeTrainOptions options,
                     const std::function<void(const BpeTrainProgress&)>& progress) {
  check(options);
  TrainedBpe out;
  std::int32_t of_byte[256];
  out.tokens = first_tokens(options, of_byte);
  out.options = options;
  const TokenizerParts parts = read_tokenizer(nlohmann::json(tokenizer_file(out)), "tokenizer.json");

  BpeTrainProgress at;
  const Words words = count_all(next, parts, options, at, progress);
  if (words.empty()) fail("training a tokenizer: expected text, found no words");
  out.documents = at.documents;
  out.bytes = at.bytes;
  out.words = at.words = static_cast<std::int64_t>(words.size());
  at.stage = BpeTrainProgress::Stage::merging;

  std::unordered_map<std::string, std::int32_t> ids;
  for (const std::string& token : out.tokens) ids.emplace(token, static_cast<std::int32_t>(ids.size()));
  Merger merger(words, of_byte);
  Merger::Pair pair;
  std::vector<std::pair<std::int32_t, std::int32_t>> merges;
  while (static_cast<int>(out.tokens.size()) < options.vocab_size && merger.next(pair)) {
    if (pair.count < options.min_frequency) break;
    std::string token =
        out.tokens[static_cast<std::size_t>(pair.left)] + out.tokens[static_cast<std::size_t>(pair.right)];
    const auto [entry, added] = ids.try_emplace(token, static_cast<std::int32_t>(out.tokens.size()));
    if (static_cast<std::size_t>(entry->second) < options.special_tokens.size())
      fail("special token '{}': expected one that does not spell bytes of the text", token);
    if (added) out.tokens.push_back(std::move(token));
    merges.emplace_back(pair.left, pair.right);
    merger.merge(pair, entry->second);
    if (progress && merges.size() % 64 == 0) {
      at.vocab_size = static_cast<int>(out.tokens.size());
      progress(at);
    }
  }
  // A pair that was merged again has its last rank.
  std::set<std::pair<std::int32_t, std::int32_t>> seen;
  for (auto merge = merges.rbegin(); merge != merges.rend(); ++merge) {
    if (seen.insert(*merge).second) out.merges.push_back(*merge);
  }
  std::reverse(out.merges.begin(), out.merges.end());
  return out;
}

}  // namespace latente
