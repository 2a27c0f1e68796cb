#include "base/utf8.h"

namespace latente::unicode {
namespace {

unsigned char byte_at(std::string_view text, std::size_t i) { return static_cast<unsigned char>(text[i]); }

}  // namespace

std::size_t valid_character(std::string_view text, std::size_t at, std::size_t& have, std::size_t& want) {
  const unsigned char lead = byte_at(text, at);
  have = want = 1;
  if (lead < 0x80) return 1;
  if (lead < 0xC2 || lead > 0xF4) return 0;
  want = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  const unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  while (have < want && at + have < text.size()) {
    const unsigned char next = byte_at(text, at + have);
    if (have == 1 ? next < low || next > high : (next & 0xC0) != 0x80) return 0;
    ++have;
  }
  return have == want ? want : 0;
}

void append(std::string& out, char32_t c) {
  if (c < 0x80) {
    out += static_cast<char>(c);
  } else if (c < 0x800) {
    out += static_cast<char>(0xC0 | c >> 6);
    out += static_cast<char>(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    out += static_cast<char>(0xE0 | c >> 12);
    out += static_cast<char>(0x80 | (c >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (c & 0x3F));
  } else {
    out += static_cast<char>(0xF0 | c >> 18);
    out += static_cast<char>(0x80 | (c >> 12 & 0x3F));
    out += static_cast<char>(0x80 | (c >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (c & 0x3F));
  }
}

std::size_t valid_prefix(std::string_view text, std::size_t* incomplete) {
  if (incomplete) *incomplete = 0;
  std::size_t at = 0;
  while (at < text.size()) {
    if (byte_at(text, at) < 0x80) {
      ++at;
      continue;
    }
    std::size_t have, want;
    const std::size_t size = valid_character(text, at, have, want);
    if (size == 0) {
      if (incomplete && have < want && at + have == text.size()) *incomplete = have;
      return at;
    }
    at += size;
  }
  return at;
}

}  // namespace latente::unicode
