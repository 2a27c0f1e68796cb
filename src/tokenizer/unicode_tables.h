// Character properties, read off the Python package `tokenizers` (tests/tokenizer/make_unicode_tables.py).
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace latente::unicode {

struct CodeRange {
  char32_t first, last;  // inclusive
};

extern const std::vector<std::uint32_t> category_runs;
extern const std::vector<CodeRange> space, regex_word, word_difference, numeric_difference,
    punctuation_difference, mark_difference, normalization_inert, han, hiragana, katakana, hangul;
extern const std::vector<std::pair<char32_t, char32_t>> lowercase_difference;

}  // namespace latente::unicode
