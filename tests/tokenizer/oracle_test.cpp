// The C++ half of compare_with_tokenizers.py: answers the requests in a file. Skipped unless the script runs
// it.
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>

#include "base/error.h"
#include "tokenizer/tokenizer.h"

namespace latente {
namespace {

class Reader {
 public:
  explicit Reader(std::string data) : data_(std::move(data)) {}
  bool done() const { return at_ == data_.size(); }
  std::uint32_t number() {
    std::uint32_t out;
    std::memcpy(&out, data_.data() + at_, 4);
    at_ += 4;
    return out;
  }
  std::string_view bytes() {
    const std::size_t size = number();
    at_ += size;
    return std::string_view(data_).substr(at_ - size, size);
  }

 private:
  std::string data_;
  std::size_t at_ = 0;
};

void put(std::ofstream& out, std::uint32_t number) { out.write(reinterpret_cast<const char*>(&number), 4); }

void put(std::ofstream& out, std::string_view text) {
  put(out, static_cast<std::uint32_t>(text.size()));
  out.write(text.data(), static_cast<std::streamsize>(text.size()));
}

void put(std::ofstream& out, const std::vector<std::int32_t>& ids) {
  put(out, static_cast<std::uint32_t>(ids.size() * 4));
  out.write(reinterpret_cast<const char*>(ids.data()), static_cast<std::streamsize>(ids.size() * 4));
}

// Requests: number 0, path of a tokenizer.json to use from here on → its size, or the error's text behind the
// number 0xFFFFFFFF; number 1 + flags (2: add_special, 4: parse_special), text → ids, decoded, decoded
// without special tokens; number 8, ids → the same without the ids.
TEST(Oracle, AnswersRequests) {
  const char* requests = std::getenv("LATENTE_ORACLE_REQUESTS");
  const char* answers = std::getenv("LATENTE_ORACLE_ANSWERS");
  if (!requests || !answers) GTEST_SKIP() << "for tests/tokenizer/compare_with_tokenizers.py";
  std::ifstream file(requests, std::ios::binary);
  Reader in(std::string((std::istreambuf_iterator<char>(file)), {}));
  std::ofstream out(answers, std::ios::binary);
  std::optional<Tokenizer> tokenizer;
  while (!in.done()) {
    const std::uint32_t kind = in.number();
    const std::string_view bytes = in.bytes();
    if (kind == 0) {
      tokenizer.reset();
      try {
        tokenizer = Tokenizer::load(std::string(bytes));
        put(out, static_cast<std::uint32_t>(tokenizer->vocab_size()));
      } catch (const Error& error) {
        put(out, 0xFFFFFFFF);
        put(out, error.what());
      }
      continue;
    }
    ASSERT_TRUE(tokenizer.has_value());
    std::vector<std::int32_t> ids;
    if (kind == 8) {
      ids.resize(bytes.size() / 4);
      std::memcpy(ids.data(), bytes.data(), bytes.size());
    } else {
      ids = tokenizer->encode(bytes, {.add_special = (kind & 2) != 0, .parse_special = (kind & 4) != 0});
      put(out, ids);
    }
    const std::string decoded = tokenizer->decode(ids);
    put(out, decoded);
    put(out, tokenizer->decode(ids, true));
    StreamDecoder stream(*tokenizer);
    std::string pieces;
    for (const std::int32_t id : ids) pieces += stream.push(id);
    EXPECT_EQ(pieces + stream.finish(), decoded);
  }
}

}  // namespace
}  // namespace latente
