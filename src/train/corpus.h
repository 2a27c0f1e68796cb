// The text to train on: files are tokenised once, in parallel, into a memory-mapped cache; a Corpus is a
// sequence of documents of such a cache.
//
// A cache file is named by a hash of what it was made from (the files' contents, the tokenizer, the tokens
// put around documents), is written under another name until it is whole, and carries a checksum that is
// verified on opening: a damaged one is made anew.
//
// Errors name the file, and the line where there is one: no match of a pattern, an unreadable file, invalid
// JSON or UTF-8, a missing field "text", no text at all, a token outside the vocabulary.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/fields.h"
#include "base/file.h"

namespace latente {

struct CorpusOptions {
  // Paths or shell patterns of plain text (any name) or .jsonl with a field "text", each also as .zst.
  std::vector<std::string> files;
  std::vector<std::string>
      validation;                  // the same, for validation; when empty a share of `files` is set aside
  double validation_share = 0.01;  // of the documents, or of the only document's tokens; 0: no validation
  std::string separator =
      "<|endoftext|>";          // a line of plain text that ends a document; "": a file is a document
  std::string cache = "cache";  // the directory of token caches
  int threads = 0;              // for tokenising; 0: one a core

  FIELDS(files, validation, validation_share, separator, cache, threads)
  bool operator==(const CorpusOptions&) const = default;
};

// What the corpus needs of a tokenizer.
struct TextEncoder {
  std::function<std::vector<int32_t>(std::string_view)> encode;  // called from several threads at once
  std::string fingerprint;             // differs when encode would give other tokens
  int64_t vocabulary = 0;              // tokens lie in [0, vocabulary)
  std::vector<int32_t> before, after;  // put around each document (BOS, EOS)
};

struct CorpusProgress {
  enum class Stage { checking, tokenising } stage = Stage::checking;
  int64_t bytes = 0, total_bytes = 0;  // of the files as stored
  int64_t documents = 0, tokens = 0;   // so far
};
// Called from one thread, a few times a second at most. What it throws ends the work and leaves no file.
using OnCorpusProgress = std::function<void(const CorpusProgress&)>;

class TokenCache {
 public:
  // The cache of the files' tokens, from `directory` if it is there and sound, or newly made.
  static std::shared_ptr<const TokenCache> open_or_make(const std::vector<std::string>& files,
                                                        const CorpusOptions& options,
                                                        const TextEncoder& encoder,
                                                        const OnCorpusProgress& progress = {});
  // Opens a cache file. Error naming the path when it is damaged or not of this key.
  TokenCache(const std::string& path, uint64_t key);

  const std::string& path() const { return file_.path(); }
  uint64_t key() const { return key_; }
  int64_t tokens() const { return tokens_; }
  int64_t documents() const { return documents_; }
  int64_t bytes() const { return byte_ends()[documents_]; }     // of text, as UTF-8
  int64_t blank_documents() const { return blank_documents_; }  // left out
  bool was_made() const { return was_made_; }                   // by this call, not found
  const std::string& damage() const { return damage_; }         // why a file that was there could not be used

  // Document d is the tokens [document_start(d), document_start(d + 1)), those around it included.
  int64_t document_start(int64_t d) const { return starts()[d]; }
  int64_t document_bytes(int64_t d) const { return byte_ends()[d + 1] - byte_ends()[d]; }
  void read(int64_t first, std::span<int32_t> out) const;

 private:
  const int64_t* starts() const;     // [documents + 1]
  const int64_t* byte_ends() const;  // [documents + 1], from 0

  MappedFile file_;
  uint64_t key_ = 0;
  int64_t tokens_ = 0, documents_ = 0, blank_documents_ = 0;
  int width_ = 0;  // bytes a token: 2 or 4
  bool was_made_ = false;
  std::string damage_;
};

// A stream of tokens: documents, or parts of documents, one after another.
class Corpus {
 public:
  struct Piece {
    int64_t first = 0, last = 0;  // tokens of the cache, [first, last)
    int64_t bytes = 0;            // of text; in proportion to the tokens when a document was cut
  };

  Corpus() = default;
  explicit Corpus(const std::shared_ptr<const TokenCache>& cache);  // all of it
  Corpus(std::shared_ptr<const TokenCache> cache, std::vector<Piece> pieces);

  bool empty() const { return tokens() == 0; }
  int64_t tokens() const { return starts_.empty() ? 0 : starts_.back(); }
  int64_t documents() const { return static_cast<int64_t>(pieces_.size()); }
  int64_t bytes() const { return bytes_; }
  const TokenCache& cache() const { return *cache_; }

  // Document d is the tokens [start(d), start(d + 1)) of this corpus.
  int64_t start(int64_t d) const { return starts_[static_cast<size_t>(d)]; }
  int64_t document_of(int64_t token) const;
  void read(int64_t first, std::span<int32_t> out) const;
  // Differs between corpora of different tokens.
  uint64_t fingerprint() const;

 private:
  std::shared_ptr<const TokenCache> cache_;
  std::vector<Piece> pieces_;
  std::vector<int64_t> starts_;
  int64_t bytes_ = 0;
};

struct CorpusSplit {
  Corpus train, validation;
};

// Sets aside a share of the documents: those whose tokens have the smallest hashes, so that the choice does
// not depend on the documents' order, and equal documents fall on the same side. The only document of a cache
// is cut.
CorpusSplit split_corpus(const std::shared_ptr<const TokenCache>& cache, double validation_share);

// Everything above in one call.
CorpusSplit load_corpus(const CorpusOptions& options, const TextEncoder& encoder,
                        const OnCorpusProgress& progress = {});

}  // namespace latente
