#include "train/corpus.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/error.h"
#include "train/corpus_hash.h"

namespace latente {

namespace {

Corpus::Piece document_piece(const TokenCache& cache, int64_t d) {
  return {cache.document_start(d), cache.document_start(d + 1), cache.document_bytes(d)};
}

std::vector<Corpus::Piece> all_documents(const TokenCache& cache) {
  std::vector<Corpus::Piece> pieces;
  for (int64_t d = 0; d < cache.documents(); ++d) pieces.push_back(document_piece(cache, d));
  return pieces;
}

uint64_t hash_of_document(const TokenCache& cache, int64_t d, std::vector<int32_t>& tokens) {
  const Corpus::Piece piece = document_piece(cache, d);
  tokens.resize(static_cast<size_t>(piece.last - piece.first));
  cache.read(piece.first, tokens);
  Hash64 hash;
  hash.add(std::as_bytes(std::span(tokens)));
  return hash.value();
}

}  // namespace

Corpus::Corpus(const std::shared_ptr<const TokenCache>& cache) : Corpus(cache, all_documents(*cache)) {}

Corpus::Corpus(std::shared_ptr<const TokenCache> cache, std::vector<Piece> pieces)
    : cache_(std::move(cache)), pieces_(std::move(pieces)), starts_{0} {
  for (const Piece& piece : pieces_) {
    starts_.push_back(starts_.back() + piece.last - piece.first);
    bytes_ += piece.bytes;
  }
}

int64_t Corpus::document_of(int64_t token) const {
  LATENTE_ASSERT(token >= 0 && token < tokens());
  return std::upper_bound(starts_.begin(), starts_.end(), token) - starts_.begin() - 1;
}

void Corpus::read(int64_t first, std::span<int32_t> out) const {
  if (out.empty()) return;
  for (auto d = static_cast<size_t>(document_of(first)); !out.empty(); ++d) {
    LATENTE_ASSERT(d < pieces_.size());
    const int64_t skipped = first - starts_[d];
    const int64_t count = std::min(static_cast<int64_t>(out.size()), starts_[d + 1] - first);
    cache_->read(pieces_[d].first + skipped, out.first(static_cast<size_t>(count)));
    out = out.subspan(static_cast<size_t>(count));
    first += count;
  }
}

uint64_t Corpus::fingerprint() const {
  Hash64 hash;
  if (cache_) hash.add(cache_->key());
  for (const Piece& piece : pieces_) {
    hash.add(static_cast<uint64_t>(piece.first));
    hash.add(static_cast<uint64_t>(piece.last));
  }
  return hash.value();
}

CorpusSplit split_corpus(const std::shared_ptr<const TokenCache>& cache, double share) {
  if (!(share >= 0 && share < 1)) fail("validation_share: expected a number in [0, 1), found {}", share);
  if (share == 0) return {Corpus(cache), {}};
  const int64_t documents = cache->documents();
  std::vector<Corpus::Piece> train, validation;
  if (documents == 1) {
    const Corpus::Piece whole = document_piece(*cache, 0);
    const int64_t tokens = whole.last - whole.first;
    const int64_t kept = tokens - static_cast<int64_t>(std::ceil(share * static_cast<double>(tokens)));
    const auto bytes = static_cast<int64_t>(static_cast<double>(whole.bytes) * static_cast<double>(kept) /
                                            static_cast<double>(tokens));
    if (kept <= 0) fail("validation_share: expected a corpus to share out, found {} tokens", tokens);
    train.push_back({whole.first, whole.first + kept, bytes});
    validation.push_back({whole.first + kept, whole.last, whole.bytes - bytes});
  } else {
    std::vector<uint64_t> hashes;
    std::vector<int32_t> tokens;
    for (int64_t d = 0; d < documents; ++d) hashes.push_back(hash_of_document(*cache, d, tokens));
    std::vector<uint64_t> sorted = hashes;
    std::sort(sorted.begin(), sorted.end());
    const auto wanted =
        std::clamp<int64_t>(std::llround(share * static_cast<double>(documents)), 1, documents - 1);
    const uint64_t limit = sorted[static_cast<size_t>(wanted - 1)];
    if (limit == sorted.back()) {
      fail(
          "validation_share: expected different documents to set aside, found {} of which at least {} are "
          "equal",
          documents, documents - wanted + 1);
    }
    for (int64_t d = 0; d < documents; ++d) {
      (hashes[static_cast<size_t>(d)] <= limit ? validation : train).push_back(document_piece(*cache, d));
    }
  }
  return {Corpus(cache, std::move(train)), Corpus(cache, std::move(validation))};
}

CorpusSplit load_corpus(const CorpusOptions& options, const TextEncoder& encoder,
                        const OnCorpusProgress& progress) {
  auto cache = TokenCache::open_or_make(options.files, options, encoder, progress);
  if (options.validation.empty()) return split_corpus(cache, options.validation_share);
  return {Corpus(cache), Corpus(TokenCache::open_or_make(options.validation, options, encoder, progress))};
}

}  // namespace latente
