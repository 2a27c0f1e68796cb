// The model of tokenizer.json: byte-pair encoding of one word (Sennrich et al. 2016, as applied by GPT-2).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace latente {

// Immutable map from strings to ids; keys of up to 7 bytes are compared as one integer.
class TokenTable {
 public:
  static constexpr std::int32_t none = -1;
  void build(const std::vector<std::pair<std::string, std::int32_t>>& entries);
  std::int32_t find(std::string_view key) const;

 private:
  struct ShortEntry {
    std::uint64_t key;
    std::int32_t id;
  };
  struct LongEntry {
    std::uint64_t hash;
    std::uint32_t begin, size;
    std::int32_t id;
  };
  std::vector<ShortEntry> short_;
  std::vector<LongEntry> long_;
  std::string text_;
};

struct BpeOptions {
  std::string unk_token;  // empty: none
  std::string continuing_subword_prefix, end_of_word_suffix;
  bool fuse_unk = false, byte_fallback = false, ignore_merges = false;
};

class Bpe {
 public:
  static constexpr std::int32_t max_id = (1 << 22) - 1;

  struct Scratch {
    struct Symbol {
      std::int32_t id, previous, next;  // positions; -1 at the ends
    };
    struct Candidate {
      std::uint32_t rank;
      std::int32_t position, left, right;  // the ids it was made for
    };
    std::vector<std::int32_t> ids;
    std::vector<std::uint32_t> ranks;
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
    std::string text;
  };

  // Later duplicates of a merge win, as in the Python package. Throws Error, starting with `where`, on
  // duplicate or huge ids and on merges whose parts or result are not in the vocabulary.
  Bpe(std::vector<std::pair<std::string, std::int32_t>>&& vocabulary,
      const std::vector<std::pair<std::string, std::string>>& merges, BpeOptions options,
      const std::string& where);

  // As tiktoken encodes: two neighbours merge wherever their bytes together are a token, the one of the least
  // id first, and a word that is a token stays whole. `tokens` in bytes, by id; `others` are found by their
  // text and id alone. Throws Error, starting with `where`, on tokens that are empty or repeat, and where one
  // of the 256 bytes has none.
  static Bpe of_ranks(const std::vector<std::string>& tokens,
                      const std::vector<std::pair<std::string, std::int32_t>>& others,
                      const std::string& where);

  // Appends the ids of a word, valid UTF-8.
  void encode_text(std::string_view word, std::vector<std::int32_t>& out, Scratch& scratch) const;

  // Appends the ids of the word whose characters stand for these bytes in the byte-level alphabet: the same
  // as encode_text of the word so spelled. Only if byte_level().
  void encode_bytes(std::string_view bytes, std::vector<std::int32_t>& out, Scratch& scratch) const;
  bool byte_level() const {
    return options_.continuing_subword_prefix.empty() && options_.end_of_word_suffix.empty();
  }

  std::int32_t find(std::string_view token) const {
    return tokens_.find(token);
  }                                                                       // TokenTable::none if absent
  const std::string* token(std::int32_t id) const;                        // null if absent
  std::int32_t size() const { return static_cast<std::int32_t>(size_); }  // number of tokens
  std::int32_t end_id() const { return static_cast<std::int32_t>(text_.size()); }  // 1 + largest id

 private:
  struct PairEntry {
    std::uint64_t pair;
    std::uint32_t rank;
    std::int32_t merged;
  };
  static constexpr std::uint32_t no_rank = 0xFFFFFFFF;

  Bpe(std::vector<std::pair<std::string, std::int32_t>>&& vocabulary, BpeOptions options,
      const std::string& where);
  void reserve_merges(std::size_t count);
  void add_merge(std::int32_t left, std::int32_t right, std::uint32_t rank, std::int32_t merged);
  void build_merges(const std::vector<std::pair<std::string, std::string>>& merges, const std::string& where);
  void build_byte_ids();
  void build_whole_words();
  const PairEntry* find_pair(std::int32_t left, std::int32_t right) const;
  std::uint32_t rank(std::int32_t left, std::int32_t right) const;
  struct Unknown;
  void add_character(std::string_view token, Unknown& unknown, std::vector<std::int32_t>& ids) const;
  void merge(std::vector<std::int32_t>& out, Scratch& scratch) const;
  void merge_short(std::vector<std::int32_t>& out, Scratch& scratch) const;
  void merge_long(std::vector<std::int32_t>& out, Scratch& scratch) const;

  BpeOptions options_;
  std::string where_;
  TokenTable tokens_;
  std::vector<std::string> text_;  // by id
  std::vector<bool> present_;      // by id
  std::size_t size_ = 0;
  std::int32_t unk_ = TokenTable::none;
  std::vector<PairEntry> pairs_;
  std::uint64_t pair_mask_ = 0;
  std::int32_t fallback_[256];  // id of "<0xNN>"
  bool all_fallbacks_ = false;
  // The byte-level view: ids of single bytes, and tokens (spelled in bytes) that a word of the same bytes
  // becomes.
  std::int32_t byte_ids_[256];
  bool all_bytes_ = false;
  TokenTable whole_;
};

}  // namespace latente
