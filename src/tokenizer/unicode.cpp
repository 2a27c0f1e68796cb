#include "tokenizer/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>

#include "base/error.h"

namespace latente::unicode {

namespace {

constexpr std::array<std::string_view, 30> category_names = {
    "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps", "Pe",
    "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Co", "Cs", "Cn"};

void push(CodeSet& set, CodeRange range) {
  if (!set.empty() && range.first <= set.back().last + 1) {
    set.back().last = std::max(set.back().last, range.last);
  } else {
    set.push_back(range);
  }
}

}  // namespace

std::u32string to_code_points(std::string_view text) {
  std::u32string out;
  out.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) out += decode(text, at);
  return out;
}

std::size_t invalid_part(std::string_view text) {
  std::size_t have, want;
  const std::size_t size = valid_character(text, 0, have, want);
  LATENTE_ASSERT(size == 0);
  return have;
}

void append_lossy(std::string& out, std::string_view text) {
  while (!text.empty()) {
    const std::size_t valid = valid_prefix(text);
    out.append(text, 0, valid);
    text.remove_prefix(valid);
    if (text.empty()) break;
    append(out, 0xFFFD);
    text.remove_prefix(invalid_part(text));
  }
}

CodeSet unite(const CodeSet& a, const CodeSet& b) {
  CodeSet out;
  out.reserve(a.size() + b.size());
  auto x = a.begin(), y = b.begin();
  while (x != a.end() || y != b.end()) {
    const bool from_a = y == b.end() || (x != a.end() && x->first < y->first);
    push(out, from_a ? *x++ : *y++);
  }
  return out;
}

CodeSet complement(const CodeSet& a) {
  CodeSet out;
  char32_t next = 0;
  for (const CodeRange range : a) {
    if (range.first > next) out.push_back({next, range.first - 1});
    next = range.last + 1;
  }
  if (next <= max_code_point) out.push_back({next, max_code_point});
  return out;
}

CodeSet intersect(const CodeSet& a, const CodeSet& b) {
  return complement(unite(complement(a), complement(b)));
}

CodeSet symmetric_difference(const CodeSet& a, const CodeSet& b) {
  std::vector<char32_t> edges;  // where membership of a or of b flips
  for (const CodeSet* set : {&a, &b}) {
    for (const CodeRange range : *set) {
      edges.push_back(range.first);
      edges.push_back(range.last + 1);
    }
  }
  std::sort(edges.begin(), edges.end());
  std::vector<char32_t> flips;
  for (const char32_t edge : edges) {
    if (!flips.empty() && flips.back() == edge) {
      flips.pop_back();
    } else {
      flips.push_back(edge);
    }
  }
  CodeSet out;
  for (std::size_t i = 0; i + 1 < flips.size(); i += 2) out.push_back({flips[i], flips[i + 1] - 1});
  return out;
}

bool contains(const CodeSet& set, char32_t c) {
  const auto after = std::upper_bound(set.begin(), set.end(), c,
                                      [](char32_t x, CodeRange range) { return x < range.first; });
  return after != set.begin() && c <= std::prev(after)->last;
}

CodeSet category(std::string_view name) {
  std::array<bool, 30> wanted{};
  for (std::size_t i = 0; i < 30; ++i) wanted[i] = !name.empty() && category_names[i].starts_with(name);
  CodeSet out;
  for (std::size_t i = 0; i < category_runs.size(); ++i) {
    const char32_t first = category_runs[i] >> 5;
    const char32_t end = i + 1 < category_runs.size() ? category_runs[i + 1] >> 5 : max_code_point + 1;
    const unsigned code = category_runs[i] & 31;
    if (code < 30) {
      if (wanted[code]) push(out, {first, end - 1});
      continue;
    }
    for (char32_t c = first; c < end; ++c) {
      const bool upper = (c % 2 == 0) == (code == 30);
      if (wanted[upper ? 0 : 1]) push(out, {c, c});
    }
  }
  return out;
}

const CodeSet& letters_and_digits_of_regex() {
  static const CodeSet set = [] {
    CodeSet out = regex_word;
    for (const char* name : {"L", "M", "Nd", "Nl", "Pc"}) out = unite(out, category(name));
    return out;
  }();
  return set;
}

const CodeSet& word_of_regex_class() {
  static const CodeSet set =
      symmetric_difference(letters_and_digits_of_regex(), {{0xB2, 0xB3}, {0xB9, 0xB9}, {0xBC, 0xBE}});
  return set;
}

const CodeSet& word_of_added_tokens() {
  static const CodeSet set = symmetric_difference(letters_and_digits_of_regex(), word_difference);
  return set;
}

const CodeSet& numeric() {
  static const CodeSet set = symmetric_difference(category("N"), numeric_difference);
  return set;
}

const CodeSet& punctuation() {
  static const CodeSet set = symmetric_difference(category("P"), punctuation_difference);
  return set;
}

const CodeSet& combining_marks() {
  static const CodeSet set = symmetric_difference(category("M"), mark_difference);
  return set;
}

bool is_space(char32_t c) { return contains(space, c); }

namespace {

void append_normalized(std::string& out, std::string_view piece, Form form) {
  if (piece.empty()) return;
  int options = UTF8PROC_STABLE;
  options |= form == Form::nfc || form == Form::nfkc ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE;
  if (form == Form::nfkc || form == Form::nfkd) options |= UTF8PROC_COMPAT;
  utf8proc_uint8_t* result = nullptr;
  const utf8proc_ssize_t size = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(piece.data()),
                                             static_cast<utf8proc_ssize_t>(piece.size()), &result,
                                             static_cast<utf8proc_option_t>(options));
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(result, &std::free);
  if (size < 0) fail("normalizing {} bytes: {}", piece.size(), utf8proc_errmsg(size));
  out.append(reinterpret_cast<const char*>(result), static_cast<std::size_t>(size));
}

}  // namespace

std::string normalize(std::string_view text, Form form) {
  std::string out;
  out.reserve(text.size());
  std::size_t begin = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t here = at;
    const char32_t c = decode(text, at);
    if (c < 0x80 || !contains(normalization_inert, c)) continue;
    append_normalized(out, text.substr(begin, here - begin), form);
    append(out, c);
    begin = at;
  }
  append_normalized(out, text.substr(begin), form);
  return out;
}

std::string lowercase(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) {
    const char32_t c = decode(text, at);
    if (c < 0x80) {
      out += static_cast<char>(c >= 'A' && c <= 'Z' ? c + 32 : c);
    } else if (c == 0x130) {  // the only character whose lower case is two
      out += "i\u0307";
    } else {
      const auto entry = std::lower_bound(lowercase_difference.begin(), lowercase_difference.end(), c,
                                          [](const auto& pair, char32_t x) { return pair.first < x; });
      const bool differs = entry != lowercase_difference.end() && entry->first == c;
      append(out, differs ? entry->second
                          : static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c))));
    }
  }
  return out;
}

}  // namespace latente::unicode
