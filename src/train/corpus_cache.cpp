// Making and opening token caches. The file, little-endian: Header; tokens (2 or 4 bytes each), padded to 8
// bytes; the documents' first tokens and one end, int64 [documents + 1]; the text bytes before each document
// and in all, int64 [documents + 1].
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <exception>
#include <filesystem>
#include <limits>
#include <numeric>
#include <thread>

#include "base/error.h"
#include "train/corpus.h"
#include "train/corpus_hash.h"
#include "train/corpus_reader.h"

namespace latente {

namespace {

namespace fs = std::filesystem;

constexpr uint64_t magic = 0x31304B4F544E544C;  // "LTNTOK01"

struct Header {
  uint64_t mark = magic;
  uint64_t key = 0;
  int64_t tokens = 0, documents = 0, blank_documents = 0;
  int64_t width = 0;
  uint64_t payload_hash = 0;  // of everything after the header
  uint64_t header_hash = 0;   // of the fields above
};
static_assert(sizeof(Header) == 64);

uint64_t hash_of(const Header& header) {
  Hash64 hash;
  hash.add(std::as_bytes(std::span(&header, 1)).first(offsetof(Header, header_hash)));
  return hash.value();
}

int64_t padded(int64_t bytes) { return (bytes + 7) / 8 * 8; }

// Tells the caller where we are, at most five times a second.
class Reporter {
 public:
  Reporter(const OnCorpusProgress& callback, int64_t total_bytes) : callback_(callback) {
    now_.total_bytes = total_bytes;
  }

  CorpusProgress& now() { return now_; }

  void report(bool always = false) {
    const auto time = std::chrono::steady_clock::now();
    if (!callback_ || (!always && time - last_ < std::chrono::milliseconds(200))) return;
    last_ = time;
    callback_(now_);
  }

 private:
  const OnCorpusProgress& callback_;
  CorpusProgress now_;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

// Passes on what it reads, and hashes it.
class HashedSource : public ByteSource {
 public:
  HashedSource(ByteSource& inner, std::function<void(size_t)> on_read)
      : inner_(inner), on_read_(std::move(on_read)) {}

  size_t read(std::span<char> buffer) override {
    const size_t got = inner_.read(buffer);
    hash_.add(std::as_bytes(buffer.first(got)));
    on_read_(got);
    return got;
  }
  uint64_t hash() const { return hash_.value(); }

 private:
  ByteSource& inner_;
  std::function<void(size_t)> on_read_;
  Hash64 hash_;
};

uint64_t hash_file(const std::string& path, Reporter& reporter) {
  FileSource file(path);
  Hash64 hash;
  std::vector<char> buffer(1 << 20);
  while (const size_t got = file.read(buffer)) {
    hash.add(std::as_bytes(std::span(buffer).first(got)));
    reporter.now().bytes += static_cast<int64_t>(got);
    reporter.report();
  }
  return hash.value();
}

struct Input {
  std::string path;
  TextFormat format;
  uint64_t hash;
};

uint64_t key_of(const std::vector<Input>& inputs, const CorpusOptions& options, const TextEncoder& encoder) {
  Hash64 hash;
  hash.add(magic);
  for (const std::string* text : {&options.separator, &encoder.fingerprint}) {
    hash.add(text->size());
    hash.add(*text);
  }
  hash.add(static_cast<uint64_t>(encoder.vocabulary));
  for (const auto* tokens : {&encoder.before, &encoder.after}) {
    hash.add(tokens->size());
    hash.add(std::as_bytes(std::span(*tokens)));
  }
  for (const Input& input : inputs) {
    hash.add(static_cast<uint64_t>(input.format));
    hash.add(uint64_t{is_compressed(input.path)});
    hash.add(input.hash);
  }
  return hash.value();
}

// One document's way through a batch.
struct Work {
  RawDocument raw;
  std::vector<int32_t> tokens;
  int64_t bytes = 0;  // 0: blank
};

void tokenise(Work& work, const Input& input, const TextEncoder& encoder) {
  const int64_t line = work.raw.line;
  const std::string text = document_text(std::move(work.raw), input.format, input.path);
  if (is_blank(text)) return;
  work.bytes = static_cast<int64_t>(text.size());
  try {
    work.tokens = encoder.encode(text);
  } catch (const Error& error) {
    fail("{}:{}: {}", input.path, line, error.what());
  }
  for (const int32_t token : work.tokens) {
    if (token < 0 || token >= encoder.vocabulary) {
      fail("{}:{}: expected tokens in [0, {}), found {}", input.path, line, encoder.vocabulary, token);
    }
  }
}

// Tokenises the batch on several threads, long documents first. The error of the earliest document is thrown.
void tokenise(std::vector<Work>& batch, const Input& input, const TextEncoder& encoder, int threads) {
  std::vector<size_t> order(batch.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return batch[a].raw.text.size() > batch[b].raw.text.size(); });
  std::vector<std::exception_ptr> errors(batch.size());
  std::atomic<size_t> next{0};
  const auto run = [&] {
    for (size_t i; (i = next.fetch_add(1)) < order.size();) {
      try {
        tokenise(batch[order[i]], input, encoder);
      } catch (...) {
        errors[order[i]] = std::current_exception();
      }
    }
  };
  {
    std::vector<std::jthread> helpers;
    const size_t wanted = std::min(static_cast<size_t>(threads), batch.size());
    for (size_t i = 1; i < wanted; ++i) helpers.emplace_back(run);
    run();
  }
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

class CacheWriter {
 public:
  CacheWriter(const std::string& path, uint64_t key, const TextEncoder& encoder)
      : encoder_(encoder), file_(path) {
    header_.key = key;
    header_.width = encoder.vocabulary <= 65536 ? 2 : 4;
    file_.write(std::as_bytes(std::span(&header_, 1)));
  }

  int64_t documents() const { return header_.documents; }
  int64_t tokens() const { return header_.tokens; }
  void add_blank(int64_t count) { header_.blank_documents += count; }

  void add(const Work& work) {
    if (work.bytes == 0) return add_blank(1);
    put(encoder_.before);
    put(work.tokens);
    put(encoder_.after);
    starts_.push_back(header_.tokens);
    byte_ends_.push_back(byte_ends_.back() + work.bytes);
    ++header_.documents;
    if (buffer_.size() >= size_t{1} << 22) flush();
  }

  void finish() {
    buffer_.resize(static_cast<size_t>(padded(static_cast<int64_t>(buffer_.size()))));
    flush();
    for (const auto* table : {&starts_, &byte_ends_}) write(std::as_bytes(std::span(*table)));
    header_.payload_hash = hash_.value();
    header_.header_hash = hash_of(header_);
    file_.write_at(0, std::as_bytes(std::span(&header_, 1)));
    file_.commit();
  }

 private:
  void put(const std::vector<int32_t>& tokens) {
    const size_t at = buffer_.size(), width = static_cast<size_t>(header_.width);
    buffer_.resize(at + tokens.size() * width);
    for (size_t i = 0; i < tokens.size(); ++i)
      std::memcpy(buffer_.data() + at + i * width, &tokens[i], width);
    header_.tokens += static_cast<int64_t>(tokens.size());
  }

  // All but an incomplete group of 8 bytes, so that the padding can be found from the buffer alone.
  void flush() {
    const size_t whole = buffer_.size() / 8 * 8;
    write(std::span(buffer_).first(whole));
    buffer_.erase(buffer_.begin(), buffer_.begin() + static_cast<ptrdiff_t>(whole));
  }

  void write(std::span<const std::byte> bytes) {
    hash_.add(bytes);
    file_.write(bytes);
  }

  const TextEncoder& encoder_;
  FileWriter file_;
  Header header_;
  Hash64 hash_;
  std::vector<std::byte> buffer_;
  std::vector<int64_t> starts_{0}, byte_ends_{0};
};

void tokenise_file(const Input& input, const CorpusOptions& options, const TextEncoder& encoder,
                   CacheWriter& writer, Reporter& reporter) {
  FileSource file(input.path);
  HashedSource hashed(file, [&](size_t got) { reporter.now().bytes += static_cast<int64_t>(got); });
  std::unique_ptr<ByteSource> plain;
  if (is_compressed(input.path)) plain = zstd_source(hashed, input.path);
  DocumentReader reader(plain ? *plain : hashed, input.format, options.separator);

  const int threads = options.threads > 0
                          ? options.threads
                          : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  const size_t enough = (size_t{1} << 22) * static_cast<size_t>(std::max(threads, 4));
  std::vector<Work> batch;
  for (bool more = true; more;) {
    size_t bytes = 0;
    batch.clear();
    while (bytes < enough) {
      Work work;
      more = reader.next(work.raw);
      if (!more) break;
      bytes += work.raw.text.size() + sizeof(Work);
      batch.push_back(std::move(work));
    }
    tokenise(batch, input, encoder, threads);
    for (const Work& work : batch) writer.add(work);
    reporter.now().documents = writer.documents();
    reporter.now().tokens = writer.tokens();
    reporter.report();
  }
  writer.add_blank(reader.blank_documents());
  if (hashed.hash() != input.hash) fail("{}: the file was changed while it was being read", input.path);
}

std::vector<std::string> matches(const std::vector<std::string>& patterns) {
  std::vector<std::string> paths;
  for (const std::string& pattern : patterns) {
    for (std::string& path : glob_files(pattern)) {
      if (std::find(paths.begin(), paths.end(), path) == paths.end()) paths.push_back(std::move(path));
    }
  }
  if (paths.empty()) fail("expected files of text, found none given");
  return paths;
}

}  // namespace

std::shared_ptr<const TokenCache> TokenCache::open_or_make(const std::vector<std::string>& files,
                                                           const CorpusOptions& options,
                                                           const TextEncoder& encoder,
                                                           const OnCorpusProgress& progress) {
  LATENTE_ASSERT(encoder.encode && encoder.vocabulary > 0);
  if (encoder.vocabulary > std::numeric_limits<int32_t>::max()) {
    fail("expected a vocabulary below 2^31, found {}", encoder.vocabulary);
  }
  for (const auto* tokens : {&encoder.before, &encoder.after}) {
    for (const int32_t token : *tokens) {
      if (token < 0 || token >= encoder.vocabulary) {
        fail("expected the tokens around documents in [0, {}), found {}", encoder.vocabulary, token);
      }
    }
  }
  const std::vector<std::string> paths = matches(files);
  int64_t total = 0;
  for (const std::string& path : paths) {
    text_format(path);
    total += FileSource(path).size();
  }
  Reporter checking(progress, total);
  std::vector<Input> inputs;
  inputs.reserve(paths.size());
  for (const std::string& path : paths)
    inputs.push_back({path, text_format(path), hash_file(path, checking)});
  checking.report(true);

  const uint64_t key = key_of(inputs, options, encoder);
  const std::string path = (fs::path(options.cache) / fmt::format("{:016x}.tokens", key)).string();
  std::string damage;
  if (fs::exists(path)) {
    try {
      return std::make_shared<const TokenCache>(path, key);
    } catch (const Error& error) {
      damage = error.what();
    }
  }

  std::error_code error;
  fs::create_directories(options.cache, error);
  if (error) fail("{}: cannot create the directory of token caches: {}", options.cache, error.message());
  Reporter tokenising(progress, total);
  tokenising.now().stage = CorpusProgress::Stage::tokenising;
  CacheWriter writer(path, key, encoder);
  for (const Input& input : inputs) tokenise_file(input, options, encoder, writer, tokenising);
  if (writer.documents() == 0) {
    fail("{}{}: expected text, found no document that is not blank", paths[0],
         paths.size() > 1 ? fmt::format(" and {} more files", paths.size() - 1) : "");
  }
  writer.finish();
  tokenising.report(true);
  auto cache = std::make_shared<TokenCache>(path, key);
  cache->was_made_ = true;
  cache->damage_ = damage;
  return cache;
}

TokenCache::TokenCache(const std::string& path, uint64_t key) : file_(path), key_(key) {
  Header header;
  if (file_.size() < static_cast<int64_t>(sizeof header)) {
    fail("{}: expected a token cache, found only {} bytes", path, file_.size());
  }
  std::memcpy(&header, file_.bytes().data(), sizeof header);
  if (header.mark != magic) fail("{}: expected a token cache, found another kind of file", path);
  if (header.header_hash != hash_of(header)) fail("{}: the token cache's header is damaged", path);
  if (header.key != key) fail("{}: expected the token cache {:016x}, found {:016x}", path, key, header.key);
  tokens_ = header.tokens;
  documents_ = header.documents;
  blank_documents_ = header.blank_documents;
  width_ = static_cast<int>(header.width);
  const int64_t wanted =
      static_cast<int64_t>(sizeof header) + padded(tokens_ * width_) + 2 * (documents_ + 1) * int64_t{8};
  if (file_.size() != wanted)
    fail("{}: expected a token cache of {} bytes, found {}", path, wanted, file_.size());
  Hash64 hash;
  hash.add(file_.bytes().subspan(sizeof header));
  if (hash.value() != header.payload_hash) fail("{}: the token cache is damaged", path);
}

const int64_t* TokenCache::starts() const {
  const std::byte* at = file_.bytes().data() + sizeof(Header) + padded(tokens_ * width_);
  return reinterpret_cast<const int64_t*>(at);
}

const int64_t* TokenCache::byte_ends() const { return starts() + documents_ + 1; }

void TokenCache::read(int64_t first, std::span<int32_t> out) const {
  LATENTE_ASSERT(first >= 0 && first + static_cast<int64_t>(out.size()) <= tokens_);
  const std::byte* at = file_.bytes().data() + sizeof(Header) + first * width_;
  if (width_ == 4) {
    std::memcpy(out.data(), at, out.size_bytes());
    return;
  }
  const auto* narrow = reinterpret_cast<const uint16_t*>(at);
  std::copy(narrow, narrow + out.size(), out.begin());
}

}  // namespace latente
