#include "tokenizer/bpe.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>

#include "base/error.h"
#include "tokenizer/byte_alphabet.h"
#include "tokenizer/unicode.h"

namespace latente {

namespace {

std::uint64_t mix(std::uint64_t x) {
  x *= 0x9E3779B97F4A7C15ULL;
  x ^= x >> 32;
  x *= 0xD6E8FEB86659FD93ULL;
  return x ^ x >> 29;
}

// Up to 7 bytes and their number.
std::uint64_t short_key(std::string_view key) {
  std::uint64_t out = 0;
  const std::size_t size = key.size();
  if (size >= 4) {
    std::uint32_t low, high;
    std::memcpy(&low, key.data(), 4);
    std::memcpy(&high, key.data() + size - 4, 4);
    out = low | static_cast<std::uint64_t>(high) << 8 * (size - 4);
  } else {
    for (std::size_t i = 0; i < size; ++i) out |= std::uint64_t{static_cast<unsigned char>(key[i])} << 8 * i;
  }
  return out | static_cast<std::uint64_t>(size) << 56;
}

std::uint64_t long_hash(std::string_view key) {
  std::uint64_t hash = key.size();
  std::size_t i = 0;
  for (; i + 8 <= key.size(); i += 8) {
    std::uint64_t word;
    std::memcpy(&word, key.data() + i, 8);
    hash = mix(hash ^ word);
  }
  std::uint64_t tail;
  std::memcpy(&tail, key.data() + key.size() - 8, 8);  // long keys have at least 8 bytes
  return mix(hash ^ tail) | 1;                         // 0: an empty place
}

constexpr std::size_t longest_rank = 4096;  // keeps loading linear in the file; Kimi's have up to 256 bytes

constexpr std::uint64_t no_pair = ~std::uint64_t{0};

std::uint64_t pair_key(std::int32_t left, std::int32_t right) {
  return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 |
         static_cast<std::uint32_t>(right);
}

}  // namespace

void TokenTable::build(const std::vector<std::pair<std::string, std::int32_t>>& entries) {
  std::size_t short_count = 0;
  for (const auto& entry : entries) short_count += entry.first.size() < 8;
  short_.assign(std::bit_ceil(short_count * 2 + 2), {0, none});
  long_.assign(std::bit_ceil((entries.size() - short_count) * 2 + 2), {0, 0, 0, none});
  for (const auto& [key, id] : entries) {
    if (key.size() < 8) {
      const std::uint64_t packed = short_key(key);
      std::size_t at = mix(packed) & (short_.size() - 1);
      while (short_[at].id != none) at = (at + 1) & (short_.size() - 1);
      short_[at] = {packed, id};
    } else {
      const std::uint64_t hash = long_hash(key);
      std::size_t at = hash >> 8 & (long_.size() - 1);
      while (long_[at].hash != 0) at = (at + 1) & (long_.size() - 1);
      long_[at] = {hash, static_cast<std::uint32_t>(text_.size()), static_cast<std::uint32_t>(key.size()),
                   id};
      text_ += key;
    }
  }
}

std::int32_t TokenTable::find(std::string_view key) const {
  if (key.size() < 8) {
    if (short_.empty()) return none;
    const std::uint64_t packed = short_key(key);
    for (std::size_t at = mix(packed) & (short_.size() - 1); short_[at].id != none;
         at = (at + 1) & (short_.size() - 1)) {
      if (short_[at].key == packed) return short_[at].id;
    }
    return none;
  }
  if (long_.empty()) return none;
  const std::uint64_t hash = long_hash(key);
  for (std::size_t at = hash >> 8 & (long_.size() - 1); long_[at].hash != 0;
       at = (at + 1) & (long_.size() - 1)) {
    const LongEntry& entry = long_[at];
    if (entry.hash == hash && std::string_view(text_).substr(entry.begin, entry.size) == key) return entry.id;
  }
  return none;
}

Bpe::Bpe(std::vector<std::pair<std::string, std::int32_t>>&& vocabulary, BpeOptions options,
         const std::string& where)
    : options_(std::move(options)), where_(where) {
  std::int32_t largest = -1;
  for (const auto& [token, id] : vocabulary) {
    if (id < 0 || id > max_id)
      fail("{}: expected ids from 0 to {}, found {} for '{}'", where, max_id, id, token);
    largest = std::max(largest, id);
  }
  tokens_.build(vocabulary);
  text_.resize(static_cast<std::size_t>(largest) + 1);
  present_.resize(text_.size());
  size_ = vocabulary.size();
  for (auto& [token, id] : vocabulary) {
    const auto index = static_cast<std::size_t>(id);
    if (present_[index])
      fail("{}: expected one token for id {}, found '{}' and '{}'", where, id, text_[index], token);
    present_[index] = true;
    text_[index] = std::move(token);
  }
  if (!options_.unk_token.empty()) unk_ = tokens_.find(options_.unk_token);
  all_fallbacks_ = true;
  for (int byte = 0; byte < 256; ++byte) {
    fallback_[byte] = tokens_.find(fmt::format("<0x{:02X}>", byte));
    all_fallbacks_ = all_fallbacks_ && fallback_[byte] != TokenTable::none;
  }
  if (byte_level()) build_byte_ids();
}

Bpe::Bpe(std::vector<std::pair<std::string, std::int32_t>>&& vocabulary,
         const std::vector<std::pair<std::string, std::string>>& merges, BpeOptions options,
         const std::string& where)
    : Bpe(std::move(vocabulary), std::move(options), where) {
  build_merges(merges, where);
  if (byte_level()) build_whole_words();
}

Bpe Bpe::of_ranks(const std::vector<std::string>& tokens,
                  const std::vector<std::pair<std::string, std::int32_t>>& others, const std::string& where) {
  std::vector<std::pair<std::string, std::int32_t>> vocabulary = others, whole;
  for (const std::string& token : tokens) {
    const auto id = static_cast<std::int32_t>(whole.size());
    if (token.empty()) fail("{}: token {} is empty", where, id);
    if (token.size() > longest_rank)
      fail("{}: token {}: expected at most {} bytes, found {}", where, id, longest_rank, token.size());
    vocabulary.emplace_back(spell_bytes(token), id);
    whole.emplace_back(token, id);
  }
  BpeOptions options;
  options.ignore_merges = true;
  Bpe out(std::move(vocabulary), std::move(options), where);
  if (!out.all_bytes_) fail("{}: expected a token for each of the 256 bytes", where);
  out.whole_.build(whole);
  for (const auto& [text, id] : others) {
    const std::optional<std::string> bytes = unspell_bytes(text);
    std::int32_t found = bytes ? out.whole_.find(*bytes) : TokenTable::none;
    if (found == TokenTable::none) found = out.tokens_.find(text);
    if (text.empty() || found != id) fail("{}: tokens {} and {} are both '{}'", where, found, id, text);
  }
  struct Merge {
    std::int32_t left, right, id;
  };
  std::vector<Merge> merges;
  for (const auto& [token, id] : whole) {
    if (out.whole_.find(token) != id) fail("{}: token {} repeats another", where, id);
    for (std::size_t i = 1; i < token.size(); ++i) {
      const std::int32_t left = out.whole_.find(std::string_view(token).substr(0, i));
      if (left == TokenTable::none) continue;
      const std::int32_t right = out.whole_.find(std::string_view(token).substr(i));
      if (right != TokenTable::none) merges.push_back({left, right, id});
    }
  }
  out.reserve_merges(merges.size());
  for (const auto& [left, right, id] : merges) out.add_merge(left, right, static_cast<std::uint32_t>(id), id);
  return out;
}

void Bpe::reserve_merges(std::size_t count) {
  pairs_.assign(std::bit_ceil(count * 2 + 2), {no_pair, no_rank, 0});
  pair_mask_ = pairs_.size() - 1;
}

void Bpe::add_merge(std::int32_t left, std::int32_t right, std::uint32_t rank, std::int32_t merged) {
  const std::uint64_t key = pair_key(left, right);
  std::size_t at = mix(key) & pair_mask_;
  while (pairs_[at].pair != no_pair && pairs_[at].pair != key) at = (at + 1) & pair_mask_;
  pairs_[at] = {key, rank, merged};
}

void Bpe::build_merges(const std::vector<std::pair<std::string, std::string>>& merges,
                       const std::string& where) {
  reserve_merges(merges.size());
  const std::size_t prefix = options_.continuing_subword_prefix.size();
  for (std::size_t i = 0; i < merges.size(); ++i) {
    const std::string& a = merges[i].first;
    const std::string& b = merges[i].second;
    const auto known = [&](std::string_view token) {
      const std::int32_t id = tokens_.find(token);
      if (id == TokenTable::none) {
        fail("{}.merges[{}]: expected tokens of the vocabulary in '{} {}', found '{}'", where, i, a, b,
             token);
      }
      return id;
    };
    if (b.size() < prefix) {
      fail("{}.merges[{}]: expected '{}' to begin with continuing_subword_prefix", where, i, b);
    }
    const std::int32_t left = known(a), right = known(b);
    add_merge(left, right, static_cast<std::uint32_t>(i), known(a + b.substr(prefix)));
  }
}

void Bpe::build_byte_ids() {
  all_bytes_ = true;
  for (int byte = 0; byte < 256; ++byte) {
    const char raw = static_cast<char>(byte);
    byte_ids_[byte] = tokens_.find(spell_bytes({&raw, 1}));
    all_bytes_ = all_bytes_ && byte_ids_[byte] != TokenTable::none;
  }
}

void Bpe::build_whole_words() {
  std::vector<std::pair<std::string, std::int32_t>> whole;
  Scratch scratch;
  std::vector<std::int32_t> ids;
  for (std::size_t id = 0; id < text_.size(); ++id) {
    if (!present_[id] || text_[id].empty()) continue;
    const std::optional<std::string> bytes = unspell_bytes(text_[id]);
    if (!bytes) continue;
    if (!options_.ignore_merges) {
      if (bytes->size() > 256) continue;  // merged each time; keeps loading linear
      ids.clear();
      encode_bytes(*bytes, ids, scratch);
      if (ids.size() != 1 || ids[0] != static_cast<std::int32_t>(id)) continue;
    }
    whole.emplace_back(*bytes, static_cast<std::int32_t>(id));
  }
  whole_.build(whole);
}

const std::string* Bpe::token(std::int32_t id) const {
  const auto index = static_cast<std::size_t>(id);
  return id >= 0 && index < text_.size() && present_[index] ? &text_[index] : nullptr;
}

inline const Bpe::PairEntry* Bpe::find_pair(std::int32_t left, std::int32_t right) const {
  const std::uint64_t key = pair_key(left, right);
  for (std::size_t at = mix(key) & pair_mask_;; at = (at + 1) & pair_mask_) {
    if (pairs_[at].pair == key) return &pairs_[at];
    if (pairs_[at].pair == no_pair) return nullptr;
  }
}

inline std::uint32_t Bpe::rank(std::int32_t left, std::int32_t right) const {
  const PairEntry* entry = find_pair(left, right);
  return entry ? entry->rank : no_rank;
}

// An unknown token that is not written yet: with fuse_unk the next unknown character joins it. Characters
// that fall back to bytes are written before it, as in the Python package.
struct Bpe::Unknown {
  bool pending = false;
};

// `token`: the character with its prefix and suffix.
void Bpe::add_character(std::string_view token, Unknown& unknown, std::vector<std::int32_t>& ids) const {
  const std::int32_t id = tokens_.find(token);
  if (id != TokenTable::none) {
    if (unknown.pending) ids.push_back(unk_);
    unknown.pending = false;
    ids.push_back(id);
    return;
  }
  if (options_.byte_fallback) {
    const bool all = all_fallbacks_ || std::all_of(token.begin(), token.end(), [&](char c) {
                       return fallback_[static_cast<unsigned char>(c)] != TokenTable::none;
                     });
    if (all) {
      for (const char c : token) ids.push_back(fallback_[static_cast<unsigned char>(c)]);
      return;
    }
  }
  if (options_.unk_token.empty()) return;
  if (unk_ == TokenTable::none)
    fail("{}: unk_token '{}' is not in the vocabulary", where_, options_.unk_token);
  if (unknown.pending && !options_.fuse_unk) ids.push_back(unk_);
  unknown.pending = true;
}

void Bpe::encode_text(std::string_view word, std::vector<std::int32_t>& out, Scratch& scratch) const {
  if (word.empty()) return;
  if (options_.ignore_merges) {
    const std::int32_t id = tokens_.find(word);
    if (id != TokenTable::none) {
      out.push_back(id);
      return;
    }
  }
  scratch.ids.clear();
  Unknown unknown;
  for (std::size_t at = 0; at < word.size();) {
    const std::size_t size = unicode::length(word[at]);
    const std::string_view character = word.substr(at, size);
    std::string_view token = character;
    if (!byte_level()) {
      scratch.text.clear();
      if (at > 0) scratch.text += options_.continuing_subword_prefix;
      scratch.text += character;
      if (at + size == word.size()) scratch.text += options_.end_of_word_suffix;
      token = scratch.text;
    }
    add_character(token, unknown, scratch.ids);
    at += size;
  }
  if (unknown.pending) scratch.ids.push_back(unk_);
  merge(out, scratch);
}

void Bpe::encode_bytes(std::string_view bytes, std::vector<std::int32_t>& out, Scratch& scratch) const {
  if (bytes.empty()) return;
  const std::int32_t whole = whole_.find(bytes);
  if (whole != TokenTable::none) {
    out.push_back(whole);
    return;
  }
  scratch.ids.clear();
  if (all_bytes_) {
    for (const char c : bytes) scratch.ids.push_back(byte_ids_[static_cast<unsigned char>(c)]);
  } else {
    Unknown unknown;
    for (const char c : bytes) {
      const std::string token = spell_bytes({&c, 1});
      add_character(token, unknown, scratch.ids);
    }
    if (unknown.pending) scratch.ids.push_back(unk_);
  }
  merge(out, scratch);
}

void Bpe::merge(std::vector<std::int32_t>& out, Scratch& scratch) const {
  constexpr std::size_t short_word = 48;
  if (scratch.ids.size() <= short_word) {
    merge_short(out, scratch);
  } else {
    merge_long(out, scratch);
  }
}

// Merges the leftmost pair of lowest rank until there is none.
void Bpe::merge_short(std::vector<std::int32_t>& out, Scratch& scratch) const {
  std::vector<std::int32_t>& ids = scratch.ids;
  std::vector<std::uint32_t>& ranks = scratch.ranks;  // of (ids[i], ids[i + 1])
  std::size_t size = ids.size();
  ranks.resize(size + 1);
  for (std::size_t i = 0; i + 1 < size; ++i) ranks[i] = rank(ids[i], ids[i + 1]);
  while (size > 1) {
    std::size_t best = 0;
    for (std::size_t i = 1; i + 1 < size; ++i) {
      if (ranks[i] < ranks[best]) best = i;
    }
    if (ranks[best] == no_rank) break;
    ids[best] = find_pair(ids[best], ids[best + 1])->merged;
    std::copy(ids.begin() + static_cast<std::ptrdiff_t>(best) + 2,
              ids.begin() + static_cast<std::ptrdiff_t>(size),
              ids.begin() + static_cast<std::ptrdiff_t>(best) + 1);
    std::copy(ranks.begin() + static_cast<std::ptrdiff_t>(best) + 2,
              ranks.begin() + static_cast<std::ptrdiff_t>(size),
              ranks.begin() + static_cast<std::ptrdiff_t>(best) + 1);
    --size;
    if (best + 1 < size) ranks[best] = rank(ids[best], ids[best + 1]);
    if (best > 0) ranks[best - 1] = rank(ids[best - 1], ids[best]);
  }
  out.insert(out.end(), ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(size));
}

// The same by a heap of candidates over a linked list: n log n for words of any length.
void Bpe::merge_long(std::vector<std::int32_t>& out, Scratch& scratch) const {
  auto& symbols = scratch.symbols;
  auto& heap = scratch.heap;
  const auto size = static_cast<std::int32_t>(scratch.ids.size());
  symbols.resize(scratch.ids.size());
  heap.clear();
  const auto later = [](const Scratch::Candidate& x, const Scratch::Candidate& y) {
    return x.rank != y.rank ? x.rank > y.rank : x.position > y.position;
  };
  const auto add = [&](std::int32_t position, std::int32_t left, std::int32_t right) {
    const std::uint32_t found = rank(left, right);
    if (found == no_rank) return false;
    heap.push_back({found, position, left, right});
    return true;
  };
  for (std::int32_t i = 0; i < size; ++i) {
    symbols[static_cast<std::size_t>(i)] = {scratch.ids[static_cast<std::size_t>(i)], i - 1,
                                            i + 1 < size ? i + 1 : -1};
    if (i + 1 < size)
      add(i, scratch.ids[static_cast<std::size_t>(i)], scratch.ids[static_cast<std::size_t>(i) + 1]);
  }
  std::make_heap(heap.begin(), heap.end(), later);
  constexpr std::int32_t dead = -1;
  while (!heap.empty()) {
    const Scratch::Candidate top = heap.front();
    std::pop_heap(heap.begin(), heap.end(), later);
    heap.pop_back();
    auto& symbol = symbols[static_cast<std::size_t>(top.position)];
    if (symbol.id != top.left || symbol.next < 0) continue;
    auto& right = symbols[static_cast<std::size_t>(symbol.next)];
    if (right.id != top.right) continue;
    symbol.id = find_pair(top.left, top.right)->merged;
    right.id = dead;
    symbol.next = right.next;
    if (symbol.next >= 0) {
      auto& after = symbols[static_cast<std::size_t>(symbol.next)];
      after.previous = top.position;
      if (add(top.position, symbol.id, after.id)) std::push_heap(heap.begin(), heap.end(), later);
    }
    if (symbol.previous >= 0) {
      const auto& before = symbols[static_cast<std::size_t>(symbol.previous)];
      if (add(symbol.previous, before.id, symbol.id)) std::push_heap(heap.begin(), heap.end(), later);
    }
  }
  for (std::int32_t i = 0; i >= 0 && i < size; i = symbols[static_cast<std::size_t>(i)].next) {
    out.push_back(symbols[static_cast<std::size_t>(i)].id);
  }
}

}  // namespace latente
