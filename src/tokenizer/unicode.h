// UTF-8 and character classes as the Python package `tokenizers` sees them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/unicode_tables.h"

namespace latente::unicode {

using CodeSet = std::vector<CodeRange>;  // ascending, disjoint, not adjacent

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
std::u32string to_code_points(std::string_view text);  // text: valid UTF-8

// Length of the longest valid UTF-8 prefix. *needed: bytes of an incomplete but so far valid character at the
// end (0 if the text ends otherwise).
std::size_t valid_prefix(std::string_view text, std::size_t* incomplete = nullptr);

// Appends `text` to `out`, each maximal invalid part replaced by U+FFFD (Unicode 15, section 3.9; Python's
// errors='replace').
void append_lossy(std::string& out, std::string_view text);

// Bytes of the invalid part at the start of `text`, which does not start with a valid character.
std::size_t invalid_part(std::string_view text);

// Set algebra.
CodeSet unite(CodeSet a, const CodeSet& b);
CodeSet complement(const CodeSet& a);
CodeSet symmetric_difference(const CodeSet& a, const CodeSet& b);
bool contains(const CodeSet& set, char32_t c);

// Code points of a general category ("Lu") or of a group of them ("L"); empty set if there is no such
// category.
CodeSet category(std::string_view name);

const CodeSet& letters_and_digits_of_regex();  // \w of a regular expression
const CodeSet& word_of_regex_class();          // \w in brackets, which leaves out ² ³ ¹ ¼ ½ ¾
const CodeSet& word_of_added_tokens();         // \w for `single_word`, and of the pre-tokenizer Whitespace
const CodeSet& numeric();                      // of the pre-tokenizer Digits
const CodeSet& punctuation();                  // of the pre-tokenizer Punctuation
const CodeSet& combining_marks();              // of the normalizer StripAccents
bool is_space(char32_t c);

enum class Form { nfc, nfd, nfkc, nfkd };
std::string normalize(std::string_view text, Form form);
std::string lowercase(std::string_view text);

}  // namespace latente::unicode
