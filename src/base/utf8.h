// UTF-8.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace latente::unicode {

inline constexpr char32_t max_code_point = 0x10FFFF;

// The code point at text[at], which must be valid UTF-8; `at` moves past it.
inline char32_t decode(std::string_view text, std::size_t& at) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const char32_t lead = byte(at);
  if (lead < 0x80) return text[at++];
  if (lead < 0xE0) {
    const char32_t c = (lead & 0x1F) << 6 | (byte(at + 1) & 0x3F);
    at += 2;
    return c;
  }
  if (lead < 0xF0) {
    const char32_t c = (lead & 0x0F) << 12 | (byte(at + 1) & 0x3F) << 6 | (byte(at + 2) & 0x3F);
    at += 3;
    return c;
  }
  const char32_t c =
      (lead & 0x07) << 18 | (byte(at + 1) & 0x3F) << 12 | (byte(at + 2) & 0x3F) << 6 | (byte(at + 3) & 0x3F);
  at += 4;
  return c;
}

// Bytes of the character whose first byte is `lead`.
inline std::size_t length(char lead) {
  const auto byte = static_cast<unsigned char>(lead);
  return byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}

// Where the character before text[at] begins; at > 0.
inline std::size_t previous(std::string_view text, std::size_t at) {
  do --at;
  while ((static_cast<unsigned char>(text[at]) & 0xC0) == 0x80);
  return at;
}

void append(std::string& out, char32_t c);

// Length of the longest valid UTF-8 prefix. *incomplete: bytes of an incomplete but so far valid character at
// the end (0 if the text ends otherwise).
std::size_t valid_prefix(std::string_view text, std::size_t* incomplete = nullptr);

// Bytes of the valid character at the start of text[at..]; 0 if there is none. `have`: how many of the `want`
// bytes that its first one asks for are there and right.
std::size_t valid_character(std::string_view text, std::size_t at, std::size_t& have, std::size_t& want);

}  // namespace latente::unicode
