#include "train/corpus_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zstd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <vector>

#include "base/error.h"

namespace latente {

namespace {

constexpr size_t buffer_bytes = 1 << 20;
constexpr std::string_view byte_order_mark = "\xEF\xBB\xBF";

class ZstdSource : public ByteSource {
 public:
  ZstdSource(ByteSource& compressed, std::string name)
      : compressed_(compressed),
        name_(std::move(name)),
        context_(ZSTD_createDCtx()),
        buffer_(ZSTD_DStreamInSize()) {
    if (!context_) fail("{}: out of memory for decompression", name_);
  }

  size_t read(std::span<char> buffer) override {
    ZSTD_outBuffer out{buffer.data(), buffer.size(), 0};
    while (out.pos == 0 && out.size > 0) {
      if (in_.pos == in_.size) {
        in_ = {buffer_.data(), compressed_.read(buffer_), 0};
        if (in_.size == 0) {
          if (inside_frame_) fail("{}: expected the rest of a zstd frame, found the end of the file", name_);
          return 0;
        }
      }
      const size_t result = ZSTD_decompressStream(context_.get(), &out, &in_);
      if (ZSTD_isError(result)) fail("{}: expected zstd data, found: {}", name_, ZSTD_getErrorName(result));
      inside_frame_ = result != 0;
    }
    return out.pos;
  }

 private:
  struct Free {
    void operator()(ZSTD_DCtx* context) const { ZSTD_freeDCtx(context); }
  };
  ByteSource& compressed_;
  std::string name_;
  std::unique_ptr<ZSTD_DCtx, Free> context_;
  std::vector<char> buffer_;
  ZSTD_inBuffer in_{nullptr, 0, 0};
  bool inside_frame_ = false;
};

std::string lower_case(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

// nlohmann's messages begin with "[json.exception...] " and the place within the line.
std::string reason_of(const nlohmann::json::exception& error) {
  std::string_view text = error.what();
  if (const size_t at = text.find("] "); at != text.npos) text.remove_prefix(at + 2);
  std::string out;
  for (const char c : text.substr(0, 200)) {
    out += static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) >= 0x7f ? '?' : c;
  }
  return out;
}

std::string json_text(const std::string& line, const std::string& file, int64_t number) {
  nlohmann::json object;
  try {
    object = nlohmann::json::parse(line);
  } catch (const nlohmann::json::exception& error) {
    fail("{}:{}: expected a JSON object, found invalid JSON: {}", file, number, reason_of(error));
  }
  if (!object.is_object()) fail("{}:{}: expected a JSON object, found {}", file, number, object.type_name());
  const auto field = object.find("text");
  if (field == object.end()) fail("{}:{}: expected a field \"text\", found none", file, number);
  if (!field->is_string()) {
    fail("{}:{}: expected a string in the field \"text\", found {}", file, number, field->type_name());
  }
  return std::move(field->get_ref<std::string&>());
}

}  // namespace

FileSource::FileSource(std::string path) : path_(std::move(path)) {
  do {
    fd_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  } while (fd_ < 0 && errno == EINTR);
  if (fd_ < 0) fail("{}: cannot open: {}", path_, std::strerror(errno));
  struct stat info {};
  if (::fstat(fd_, &info) != 0 || !S_ISREG(info.st_mode)) {
    ::close(fd_);
    fail("{}: expected a regular file", path_);
  }
  size_ = info.st_size;
}

FileSource::~FileSource() { ::close(fd_); }

size_t FileSource::read(std::span<char> buffer) {
  for (;;) {
    const ssize_t got = ::read(fd_, buffer.data(), buffer.size());
    if (got >= 0) {
      done_ += got;
      return static_cast<size_t>(got);
    }
    if (errno != EINTR) fail("{}: cannot read: {}", path_, std::strerror(errno));
  }
}

std::unique_ptr<ByteSource> zstd_source(ByteSource& compressed, std::string name) {
  return std::make_unique<ZstdSource>(compressed, std::move(name));
}

bool is_compressed(const std::string& path) { return lower_case(path).ends_with(".zst"); }

TextFormat text_format(const std::string& path) {
  std::string name = lower_case(path);
  if (name.ends_with(".zst")) name.resize(name.size() - 4);
  if (name.ends_with(".jsonl") || name.ends_with(".ndjson")) return TextFormat::jsonl;
  for (const char* other : {".json", ".gz", ".xz", ".bz2", ".zip", ".tar", ".parquet", ".arrow", ".csv"}) {
    if (name.ends_with(other))
      fail("{}: expected plain text or .jsonl, each also as .zst, found {}", path, other);
  }
  return TextFormat::plain;
}

DocumentReader::DocumentReader(ByteSource& source, TextFormat format, std::string separator)
    : source_(source), format_(format), separator_(std::move(separator)), buffer_(buffer_bytes, '\0') {}

bool DocumentReader::next_line(std::string& line) {
  const size_t before = line.size();
  for (;;) {
    if (begin_ == end_) {
      begin_ = 0;
      end_ = ended_ ? 0 : source_.read(buffer_);
      ended_ = end_ == 0;
      if (ended_) break;
    }
    const char* const from = buffer_.data() + begin_;
    const void* const newline = std::memchr(from, '\n', end_ - begin_);
    const size_t taken =
        newline ? static_cast<size_t>(static_cast<const char*>(newline) - from) + 1 : end_ - begin_;
    line.append(from, taken);
    begin_ += taken;
    if (newline) break;
  }
  if (line.size() == before) return false;
  if (++line_ == 1 && std::string_view(line).substr(before).starts_with(byte_order_mark)) {
    line.erase(before, byte_order_mark.size());
  }
  return true;
}

bool DocumentReader::next(RawDocument& document) {
  document.text.clear();
  document.line = line_ + 1;
  bool bounded = false;  // by a separator, so that a blank document is one
  for (;;) {
    const size_t before = document.text.size();
    const bool more = next_line(document.text);
    bounded = false;
    if (more && format_ == TextFormat::plain) {
      std::string_view line = std::string_view(document.text).substr(before);
      while (line.ends_with('\n') || line.ends_with('\r')) line.remove_suffix(1);
      bounded = !separator_.empty() && line == separator_;
      if (!bounded) continue;
      document.text.resize(before);
    }
    if (!is_blank(document.text)) return true;
    if (!more) return false;
    blank_ += bounded;
    document.text.clear();
    document.line = line_ + 1;
  }
}

std::string document_text(RawDocument document, TextFormat format, const std::string& file) {
  if (format == TextFormat::jsonl) return json_text(document.text, file, document.line);
  const size_t at = find_invalid_utf8(document.text);
  if (at != std::string::npos) {
    const auto lines =
        std::count(document.text.begin(), document.text.begin() + static_cast<ptrdiff_t>(at), '\n');
    fail("{}:{}: expected UTF-8, found the byte 0x{:02x}", file, document.line + lines,
         static_cast<unsigned>(static_cast<unsigned char>(document.text[at])));
  }
  return std::move(document.text);
}

bool is_blank(std::string_view text) { return text.find_first_not_of(" \t\r\n\v\f") == text.npos; }

size_t find_invalid_utf8(std::string_view text) {
  const auto* const bytes = reinterpret_cast<const unsigned char*>(text.data());
  const size_t size = text.size();
  for (size_t i = 0; i < size;) {
    uint64_t word = 0;
    if (i + 8 <= size && (std::memcpy(&word, bytes + i, 8), (word & 0x8080808080808080) == 0)) {
      i += 8;
      continue;
    }
    const unsigned char lead = bytes[i];
    if (lead < 0x80) {
      ++i;
      continue;
    }
    // The second byte's range excludes overlong forms, surrogates and what lies above U+10FFFF.
    const size_t length = lead >= 0xC2 && lead <= 0xDF   ? 2
                          : lead >= 0xE0 && lead <= 0xEF ? 3
                          : lead >= 0xF0 && lead <= 0xF4 ? 4
                                                         : 0;
    if (length == 0 || i + length > size) return i;
    const unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    const unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    if (bytes[i + 1] < low || bytes[i + 1] > high) return i;
    for (size_t k = 2; k < length; ++k) {
      if ((bytes[i + k] & 0xC0) != 0x80) return i;
    }
    i += length;
  }
  return std::string_view::npos;
}

}  // namespace latente
