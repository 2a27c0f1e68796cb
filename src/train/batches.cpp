#include "train/batches.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/error.h"
#include "base/random.h"
#include "train/corpus_hash.h"

namespace latente {

namespace {

// Keeps these random numbers apart from others of the same seed.
constexpr uint64_t order_streams = uint64_t{0x0BD1} << 48, fim_streams = uint64_t{0xF111} << 48;
constexpr int fim_words = 24;     // 2^24 random words for a window are more than any length needs
constexpr int64_t fim_least = 8;  // shorter pieces stay as they are

void check(const BatchOptions& options) {
  if (options.length < 1) fail("length: expected at least 1 token, found {}", options.length);
  if (options.length > int64_t{1} << 24)
    fail("length: expected at most 2^24 tokens, found {}", options.length);
  if (options.depths < 0) fail("depths: expected at least 0, found {}", options.depths);
  if (options.world < 1 || options.rank < 0 || options.rank >= options.world) {
    fail("rank: expected a number in [0, world = {}), found {}", options.world, options.rank);
  }
  const FimOptions& fim = options.fim;
  if (!(fim.rate >= 0 && fim.rate <= 1)) fail("fim.rate: expected a number in [0, 1], found {}", fim.rate);
  if (fim.before < 0 || fim.after < 0) fail("fim.before, fim.after: expected numbers of at least 0");
  if (fim.rate > 0 && (fim.begin < 0 || fim.hole < 0 || fim.end < 0)) {
    fail("fim: expected the token ids begin, hole and end, found {}, {}, {}", fim.begin, fim.hole, fim.end);
  }
}

}  // namespace

Batches::Batches(Corpus corpus, const BatchOptions& options, std::vector<int32_t> token_bytes)
    : corpus_(std::move(corpus)), options_(options), token_bytes_(std::move(token_bytes)) {
  check(options_);
  const int64_t predicted = corpus_.tokens() - 1;
  windows_ =
      options_.keep_tail ? (predicted + options_.length - 1) / options_.length : predicted / options_.length;
  if (predicted < 1 || windows_ < 1) {
    fail("length: expected a corpus of at least {} tokens, found {}",
         options_.keep_tail ? 2 : options_.length + 1, corpus_.tokens());
  }
}

int64_t Batches::batches(int64_t sequences) const {
  const int64_t global = sequences * options_.world;
  return (windows_ + global - 1) / global;
}

void Batches::seek(BatchPosition position) {
  if (position.epoch < 0 || position.index < 0 || position.index > windows_) {
    fail("position: expected a window in [0, {}] of an epoch, found {} of epoch {}", windows_, position.index,
         position.epoch);
  }
  position_ = position;
}

uint64_t Batches::fingerprint() const {
  Hash64 hash;
  hash.add(corpus_.fingerprint());
  hash.add(static_cast<uint64_t>(options_.length));
  hash.add(static_cast<uint64_t>(options_.seed));
  hash.add(uint64_t{options_.shuffle} | uint64_t{options_.keep_tail} << 1);
  hash.add(std::as_bytes(std::span(&options_.fim.rate, 1)));
  return hash.value();
}

int64_t Batches::window_at(int64_t epoch, int64_t index) {
  if (!options_.shuffle) return index;
  if (ordered_epoch_ != epoch) {
    order_.resize(static_cast<size_t>(windows_));
    std::iota(order_.begin(), order_.end(), int64_t{0});
    Random(static_cast<uint64_t>(options_.seed), order_streams + static_cast<uint64_t>(epoch))
        .shuffle(std::span(order_));
    ordered_epoch_ = epoch;
  }
  return order_[static_cast<size_t>(index)];
}

void Batches::next(Batch& batch, int64_t sequences) {
  LATENTE_ASSERT(sequences > 0);
  const auto places = static_cast<size_t>(sequences * options_.length);
  const auto depths = static_cast<size_t>(options_.depths) + 1;
  batch.sequences = sequences;
  batch.length = options_.length;
  batch.inputs.resize(depths);
  batch.targets.resize(depths);
  for (auto& inputs : batch.inputs) inputs.assign(places, 0);
  for (auto& targets : batch.targets) targets.assign(places, -1);
  batch.starts.resize(places);
  std::iota(batch.starts.begin(), batch.starts.end(), 0);
  batch.lengths.assign(static_cast<size_t>(sequences), 0);

  const int64_t global = sequences * options_.world;
  const int64_t first = sequences * options_.rank;
  if (position_.index == windows_) position_ = {position_.epoch + 1, 0};
  BatchPosition at = position_;
  for (int64_t i = 0; i < global; ++i) {
    if (at.index == windows_) {
      if (options_.keep_tail) break;
      at = {at.epoch + 1, 0};
    }
    if (i >= first && i < first + sequences) {
      fill_row(batch, i - first, at.epoch, window_at(at.epoch, at.index));
    }
    ++at.index;
  }
  position_ = at;

  batch.target_counts.assign(depths, 0);
  for (size_t k = 0; k < depths; ++k) {
    batch.target_counts[k] = std::count_if(batch.targets[k].begin(), batch.targets[k].end(),
                                           [](int32_t target) { return target >= 0; });
  }
  batch.target_bytes = 0;
  if (token_bytes_.empty()) return;
  for (const int32_t target : batch.targets[0]) {
    if (target < 0) continue;
    if (static_cast<size_t>(target) >= token_bytes_.size()) {
      fail("token_bytes: expected a length for each token, found {} lengths and the token {}",
           token_bytes_.size(), target);
    }
    batch.target_bytes += token_bytes_[static_cast<size_t>(target)];
  }
}

void Batches::fill_row(Batch& batch, int64_t row, int64_t epoch, int64_t window) {
  const int64_t first = window * options_.length;
  const int64_t held = std::min(options_.length + 1 + options_.depths, corpus_.tokens() - first);
  tokens_.resize(static_cast<size_t>(held));
  corpus_.read(first, tokens_);

  // The documents' parts in this window: offsets_ has one end more.
  documents_.clear();
  offsets_.clear();
  for (int64_t d = corpus_.document_of(first), at = 0; at < held; ++d) {
    const int64_t end = std::min(corpus_.start(d + 1) - first, held);
    if (end == at) continue;
    documents_.push_back(d);
    offsets_.push_back(at);
    at = end;
  }
  offsets_.push_back(held);
  if (options_.fim.rate > 0) fill_in_the_middle(epoch, window);

  const int64_t base = row * options_.length;
  const int64_t filled = std::min(options_.length, held - 1);
  batch.lengths[static_cast<size_t>(row)] = filled;
  size_t part = 0;
  for (int64_t i = 0; i < filled; ++i) {
    while (offsets_[part + 1] <= i) ++part;
    const auto place = static_cast<size_t>(base + i);
    batch.starts[place] = static_cast<int32_t>(base + (options_.document_mask ? offsets_[part] : 0));
    const int64_t end = options_.document_mask ? offsets_[part + 1] : held;
    for (int64_t k = 0; k <= options_.depths; ++k) {
      const int64_t input = i + k;
      if (input < held) batch.inputs[static_cast<size_t>(k)][place] = tokens_[static_cast<size_t>(input)];
      if (input + 1 < end)
        batch.targets[static_cast<size_t>(k)][place] = tokens_[static_cast<size_t>(input + 1)];
    }
  }
}

void Batches::fill_in_the_middle(int64_t epoch, int64_t window) {
  const FimOptions& fim = options_.fim;
  Random random(RandomState{static_cast<uint64_t>(options_.seed), fim_streams + static_cast<uint64_t>(epoch),
                            static_cast<uint64_t>(window) << fim_words});
  const int64_t first = window * options_.length;
  std::vector<int32_t> piece;
  for (size_t part = 0; part < documents_.size(); ++part) {
    if (!random.chance(fim.rate)) continue;
    const int64_t d = documents_[part];
    const int64_t begin = std::max(offsets_[part], corpus_.start(d) + fim.before - first);
    const int64_t end = std::min(offsets_[part + 1], corpus_.start(d + 1) - fim.after - first);
    if (end - begin < fim_least) continue;
    const int64_t kept = end - begin - 3;
    int64_t from = static_cast<int64_t>(random.below(static_cast<uint64_t>(kept + 1)));
    int64_t to = static_cast<int64_t>(random.below(static_cast<uint64_t>(kept + 1)));
    if (from > to) std::swap(from, to);
    const auto text = tokens_.begin() + begin;
    piece.assign(1, fim.begin);
    piece.insert(piece.end(), text, text + from);
    piece.push_back(fim.hole);
    piece.insert(piece.end(), text + to, text + kept);
    piece.push_back(fim.end);
    piece.insert(piece.end(), text + from, text + to);
    std::copy(piece.begin(), piece.end(), text);
  }
}

}  // namespace latente
