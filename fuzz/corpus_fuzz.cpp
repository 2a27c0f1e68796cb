// Corpus files: plain text and JSON Lines, as they are and as zstd. The first byte chooses.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "base/error.h"
#include "support.h"
#include "train/corpus_reader.h"

namespace {

class Bytes final : public latente::ByteSource {
 public:
  explicit Bytes(std::string_view bytes) : bytes_(bytes) {}
  size_t read(std::span<char> buffer) override {
    size_t count = std::min({buffer.size(), bytes_.size(), size_t{1000}});
    std::memcpy(buffer.data(), bytes_.data(), count);
    bytes_.remove_prefix(count);
    return count;
  }

 private:
  std::string_view bytes_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  Bytes bytes(std::string_view(reinterpret_cast<const char*>(data) + 1, size - 1));
  latente::TextFormat format = data[0] & 1 ? latente::TextFormat::jsonl : latente::TextFormat::plain;
  try {
    std::unique_ptr<latente::ByteSource> unpacked;
    if (data[0] & 2) unpacked = latente::zstd_source(bytes, "input");
    latente::DocumentReader reader(unpacked ? *unpacked : bytes, format, data[0] & 4 ? "" : "<|endoftext|>");
    int64_t last_line = 0;
    for (latente::RawDocument document; reader.next(document);) {
      require(document.line > last_line || last_line == 0);
      last_line = document.line;
      std::string text = latente::document_text(std::move(document), format, "input");
      require(latente::find_invalid_utf8(text) == text.npos);
    }
  } catch (const latente::Error& error) {
    require(error.what()[0] != '\0');
  }
  return 0;
}
