#include "tokenizer/jinja_text.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <utility>

namespace latente::jinja {

namespace {

utf8proc_category_t category(char32_t point) {
  return utf8proc_category(static_cast<utf8proc_int32_t>(point));
}

bool is_letter(char32_t point) {
  auto kind = category(point);
  return kind >= UTF8PROC_CATEGORY_LU && kind <= UTF8PROC_CATEGORY_LO;
}

bool is_mark(char32_t point) {
  auto kind = category(point);
  return kind == UTF8PROC_CATEGORY_MN || kind == UTF8PROC_CATEGORY_MC;
}

bool is_number(char32_t point) {
  auto kind = category(point);
  return kind == UTF8PROC_CATEGORY_ND || kind == UTF8PROC_CATEGORY_NL || kind == UTF8PROC_CATEGORY_NO;
}

bool is_cased(char32_t point) {
  auto kind = category(point);
  return kind == UTF8PROC_CATEGORY_LU || kind == UTF8PROC_CATEGORY_LL || kind == UTF8PROC_CATEGORY_LT ||
         (point >= 0x2160 && point <= 0x217F) || (point >= 0x24B6 && point <= 0x24E9) || point == 0xAA ||
         point == 0xBA;
}

bool is_upper_point(char32_t point) {
  return category(point) == UTF8PROC_CATEGORY_LU || (point >= 0x2160 && point <= 0x216F) ||
         (point >= 0x24B6 && point <= 0x24CF);
}

// Case mappings to several code points (Unicode's SpecialCasing.txt): upper case, and title case where it
// differs.
struct Special {
  char32_t from;
  const char* upper;
  const char* title;
};
constexpr std::array<Special, 13> kSpecial = {{{0xDF, "SS", "Ss"},
                                               {0x149, "ʼN", "ʼN"},
                                               {0x1F0, "J̌", "J̌"},
                                               {0x390, "Ϊ́", "Ϊ́"},
                                               {0x3B0, "Ϋ́", "Ϋ́"},
                                               {0x587, "ԵՒ", "Եւ"},
                                               {0xFB00, "FF", "Ff"},
                                               {0xFB01, "FI", "Fi"},
                                               {0xFB02, "FL", "Fl"},
                                               {0xFB03, "FFI", "Ffi"},
                                               {0xFB04, "FFL", "Ffl"},
                                               {0xFB05, "ST", "St"},
                                               {0xFB06, "ST", "St"}}};

void append_upper(std::string& out, char32_t point, bool title) {
  if (point < 0x80) {
    out += static_cast<char>(point >= 'a' && point <= 'z' ? point - 32 : point);
    return;
  }
  for (const Special& special : kSpecial) {
    if (special.from == point) {
      out += title ? special.title : special.upper;
      return;
    }
  }
  auto code = static_cast<utf8proc_int32_t>(point);
  append_point(out, static_cast<char32_t>(title ? utf8proc_totitle(code) : utf8proc_toupper(code)));
}

bool is_case_ignorable(char32_t point) {
  auto kind = category(point);
  return is_mark(point) || kind == UTF8PROC_CATEGORY_ME || kind == UTF8PROC_CATEGORY_CF ||
         kind == UTF8PROC_CATEGORY_LM || kind == UTF8PROC_CATEGORY_SK || point == '\'' || point == '.' ||
         point == ':' || point == 0xB7 || point == 0x2018 || point == 0x2019 || point == 0x2024 ||
         point == 0x2027;
}

// Greek sigma is final when a cased letter stands before it and none after, skipping case-ignorable points.
bool is_final_sigma(std::string_view text, size_t start, size_t end) {
  bool before = false;
  for (size_t at = 0; at < start;) {
    char32_t point = decode_point(text, at);
    if (!is_case_ignorable(point)) before = is_cased(point);
  }
  if (!before) return false;
  for (size_t at = end; at < text.size();) {
    char32_t point = decode_point(text, at);
    if (!is_case_ignorable(point)) return !is_cased(point);
  }
  return true;
}

// `sigma_left` bounds the scans that final sigmas may cost, so that a text of sigmas stays linear.
void append_lower(std::string& out, std::string_view text, size_t start, size_t end, char32_t point,
                  int& sigma_left) {
  if (point < 0x80) {
    out += static_cast<char>(point >= 'A' && point <= 'Z' ? point + 32 : point);
  } else if (point == 0x130) {
    out += "i̇";
  } else if (point == 0x3A3) {
    append_point(out, sigma_left-- > 0 && is_final_sigma(text, start, end) ? 0x3C2 : 0x3C3);
  } else {
    append_point(out, static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(point))));
  }
}

constexpr int kSigmaScans = 64;

}  // namespace

bool is_utf8(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    if (static_cast<unsigned char>(text[at]) < 0x80) {
      ++at;
      continue;
    }
    utf8proc_int32_t point;
    auto used = utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()) + at,
                                 static_cast<utf8proc_ssize_t>(text.size() - at), &point);
    if (used <= 0) return false;
    at += static_cast<size_t>(used);
  }
  return true;
}

size_t count_points(std::string_view text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

char32_t decode_point(std::string_view text, size_t& at) {
  auto byte = static_cast<unsigned char>(text[at++]);
  if (byte < 0x80) return byte;
  int more = byte >= 0xF0 ? 3 : byte >= 0xE0 ? 2 : 1;
  char32_t point = byte & (0x3F >> more);
  while (more-- > 0 && at < text.size())
    point = (point << 6) | (static_cast<unsigned char>(text[at++]) & 0x3F);
  return point;
}

void append_point(std::string& out, char32_t point) {
  if (point < 0x80) {
    out += static_cast<char>(point);
    return;
  }
  std::array<utf8proc_uint8_t, 4> bytes{};
  auto used = utf8proc_encode_char(static_cast<utf8proc_int32_t>(point), bytes.data());
  out.append(reinterpret_cast<const char*>(bytes.data()), static_cast<size_t>(used));
}

size_t byte_offset(std::string_view text, size_t index) {
  size_t at = 0;
  while (index > 0 && at < text.size()) {
    do {
      ++at;
    } while (at < text.size() && (text[at] & 0xC0) == 0x80);
    --index;
  }
  return at;
}

bool is_space(char32_t point) {
  return (point >= 0x09 && point <= 0x0D) || (point >= 0x1C && point <= 0x20) || point == 0x85 ||
         point == 0xA0 || point == 0x1680 || (point >= 0x2000 && point <= 0x200A) || point == 0x2028 ||
         point == 0x2029 || point == 0x202F || point == 0x205F || point == 0x3000;
}

bool is_word(char32_t point) {
  return point == '_' || is_letter(point) || is_number(point) || is_mark(point);
}

bool is_identifier(std::string_view name) {
  for (size_t at = 0; at < name.size();) {
    bool first = at == 0;
    char32_t point = decode_point(name, at);
    bool start = point == '_' || is_letter(point) || category(point) == UTF8PROC_CATEGORY_NL;
    bool inner = is_mark(point) || category(point) == UTF8PROC_CATEGORY_ND || point == 0xB7;
    if (!start && (first || !inner)) return false;
  }
  return !name.empty();
}

std::string to_upper(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t at = 0; at < text.size();) append_upper(out, decode_point(text, at), false);
  return out;
}

std::string to_lower(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  int sigma_left = kSigmaScans;
  for (size_t at = 0; at < text.size();) {
    size_t start = at;
    char32_t point = decode_point(text, at);
    append_lower(out, text, start, at, point, sigma_left);
  }
  return out;
}

std::string to_title(std::string_view text) {
  std::string out;
  int sigma_left = kSigmaScans;
  bool inside = false;
  for (size_t at = 0; at < text.size();) {
    size_t start = at;
    char32_t point = decode_point(text, at);
    if (inside) {
      append_lower(out, text, start, at, point, sigma_left);
    } else {
      append_upper(out, point, true);
    }
    inside = is_cased(point);
  }
  return out;
}

std::string to_capitalized(std::string_view text) {
  std::string out;
  int sigma_left = kSigmaScans;
  for (size_t at = 0; at < text.size();) {
    size_t start = at;
    char32_t point = decode_point(text, at);
    if (start == 0) {
      append_upper(out, point, true);
    } else {
      append_lower(out, text, start, at, point, sigma_left);
    }
  }
  return out;
}

bool all_in(CharClass wanted, std::string_view text) {
  if (text.empty()) return false;
  bool any_cased = false;
  for (size_t at = 0; at < text.size();) {
    char32_t point = decode_point(text, at);
    auto kind = category(point);
    switch (wanted) {
      case CharClass::alnum:
        if (!is_letter(point) && !is_number(point)) return false;
        break;
      case CharClass::alpha:
        if (!is_letter(point)) return false;
        break;
      case CharClass::decimal:
        if (kind != UTF8PROC_CATEGORY_ND) return false;
        break;
      case CharClass::space:
        if (!is_space(point)) return false;
        break;
      case CharClass::lower:
        if (is_cased(point) && (is_upper_point(point) || kind == UTF8PROC_CATEGORY_LT)) return false;
        any_cased |= is_cased(point);
        break;
      case CharClass::upper:
        if (is_cased(point) && !is_upper_point(point)) return false;
        any_cased |= is_cased(point);
        break;
    }
  }
  bool needs_cased = wanted == CharClass::lower || wanted == CharClass::upper;
  return !needs_cased || any_cased;
}

}  // namespace latente::jinja
