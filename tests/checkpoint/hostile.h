// Files that somebody meant to break a parser with, or that were damaged on the way.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/support.h"

namespace latente {

struct Hostile {
  const char* what;
  std::string bytes;
  const char* message;
};

// Each is an Error of one short line, from memory (named "file") and mapped as a File alike.
template <class File, class OpenBytes>
void expect_errors(const std::vector<Hostile>& files, const OpenBytes& open_bytes) {
  TemporaryDirectory directory;
  for (const Hostile& each : files) {
    SCOPED_TRACE(each.what);
    std::string text = message_of([&] { open_bytes(each.bytes); });
    expect_has(text, each.message);
    EXPECT_EQ(text.rfind("file: ", 0), 0u) << text;
    EXPECT_LT(text.size(), 400u);
    directory.put("x", each.bytes);  // the mapping behaves as the bytes do
    expect_has(message_of([&] { File file(directory.at("x")); }), each.message);
  }
}

// Cut at every byte, a good file is an Error; with any one bit changed it is an Error or one that passes
// check(file, bytes). Returns how many changed files were no Error.
template <class OpenBytes, class Check>
int expect_errors_when_damaged(const std::string& good, const OpenBytes& open_bytes, const Check& check) {
  for (size_t size = 0; size < good.size(); ++size) {
    EXPECT_THROW(open_bytes(good.substr(0, size)), Error) << size;
  }
  int accepted = 0;
  for (size_t at = 0; at < good.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string bytes = good;
      bytes[at] = static_cast<char>(bytes[at] ^ 1 << bit);
      try {
        const auto file = open_bytes(bytes);
        ++accepted;
        check(file, bytes);
      } catch (const Error&) {
      }
    }
  }
  return accepted;
}

}  // namespace latente
