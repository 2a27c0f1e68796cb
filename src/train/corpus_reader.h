// Documents of text files: plain text, split at separator lines, and JSON Lines with a string in the field
// "text"; both also compressed by zstd (NAME.zst). Files are read as streams; a document is held in memory
// whole.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace latente {

// Bytes one after another. read() returns how many it put into the buffer, 0 only at the end.
class ByteSource {
 public:
  virtual ~ByteSource() = default;
  virtual size_t read(std::span<char> buffer) = 0;
};

// The bytes of a regular file as they are; progress and content() count and hash what was read.
class FileSource : public ByteSource {
 public:
  explicit FileSource(std::string path);
  ~FileSource() override;
  FileSource(const FileSource&) = delete;
  FileSource& operator=(const FileSource&) = delete;

  size_t read(std::span<char> buffer) override;
  int64_t size() const { return size_; }
  int64_t done() const { return done_; }

 private:
  std::string path_;
  int fd_ = -1;
  int64_t size_ = 0, done_ = 0;
};

// What `compressed`, which must outlive it, holds as zstd frames. Errors name `name`.
std::unique_ptr<ByteSource> zstd_source(ByteSource& compressed, std::string name);

enum class TextFormat { plain, jsonl };

// By the file's name, without a final ".zst"; Error for the names of archives and other structured formats.
TextFormat text_format(const std::string& path);
bool is_compressed(const std::string& path);

// A document before decoding: a text, or a line of JSON. `line` is where it begins, from 1.
struct RawDocument {
  std::string text;
  int64_t line = 0;
};

class DocumentReader {
 public:
  // An empty separator means that a plain file is one document. `source` must outlive the reader.
  DocumentReader(ByteSource& source, TextFormat format, std::string separator);

  // The next document that is not blank; false at the end.
  bool next(RawDocument& document);
  int64_t blank_documents() const { return blank_; }  // passed over so far, between separators

 private:
  bool next_line(std::string& line);  // with its '\n' if it has one; appends

  ByteSource& source_;
  TextFormat format_;
  std::string separator_;
  std::string buffer_;
  size_t begin_ = 0, end_ = 0;
  int64_t line_ = 0, blank_ = 0;
  bool ended_ = false;
};

// The text of a document: itself, checked to be UTF-8, or the field "text" of its line of JSON. Errors begin
// with file:line.
std::string document_text(RawDocument document, TextFormat format, const std::string& file);

bool is_blank(std::string_view text);  // nothing but spaces, tabs and line ends

// The first byte that is not part of a UTF-8 character (Unicode 15, table 3-7), or npos.
size_t find_invalid_utf8(std::string_view text);

}  // namespace latente
