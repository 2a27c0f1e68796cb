// Character classes and text as the Python package `tokenizers` sees them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/utf8.h"
#include "tokenizer/unicode_tables.h"

namespace latente::unicode {

using CodeSet = std::vector<CodeRange>;  // ascending, disjoint, not adjacent

std::u32string to_code_points(std::string_view text);  // text: valid UTF-8

// Appends `text` to `out`, each maximal invalid part replaced by U+FFFD (Unicode 15, section 3.9; Python's
// errors='replace').
void append_lossy(std::string& out, std::string_view text);

// Bytes of the invalid part at the start of `text`, which does not start with a valid character.
std::size_t invalid_part(std::string_view text);

// Set algebra.
CodeSet unite(const CodeSet& a, const CodeSet& b);
CodeSet intersect(const CodeSet& a, const CodeSet& b);
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
