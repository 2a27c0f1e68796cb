// Splitting and stripping, and the spellings Python and JSON give to strings and numbers.
#include <fmt/format.h>
#include <utf8proc.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>

#include "tokenizer/jinja_text.h"

namespace latente::jinja {

namespace {

// The start of the code point that ends before byte `end`.
size_t previous_point(std::string_view text, size_t end) {
  size_t at = end - 1;
  while (at > 0 && (text[at] & 0xC0) == 0x80) --at;
  return at;
}

bool is_line_end(char32_t point) {
  return (point >= 0x0A && point <= 0x0D) || (point >= 0x1C && point <= 0x1E) || point == 0x85 ||
         point == 0x2028 || point == 0x2029;
}

bool is_printable(char32_t point) {
  auto kind = utf8proc_category(static_cast<utf8proc_int32_t>(point));
  return kind != UTF8PROC_CATEGORY_CC && kind != UTF8PROC_CATEGORY_CF && kind != UTF8PROC_CATEGORY_CS &&
         kind != UTF8PROC_CATEGORY_CO && kind != UTF8PROC_CATEGORY_CN && kind != UTF8PROC_CATEGORY_ZL &&
         kind != UTF8PROC_CATEGORY_ZP && (kind != UTF8PROC_CATEGORY_ZS || point == ' ');
}

}  // namespace

std::string_view strip(std::string_view text, std::optional<std::string_view> chars, bool left, bool right) {
  std::vector<char32_t> set;
  if (chars) {
    for (size_t at = 0; at < chars->size();) set.push_back(decode_point(*chars, at));
    std::sort(set.begin(), set.end());
  }
  auto removable = [&](char32_t point) {
    return chars ? std::binary_search(set.begin(), set.end(), point) : is_space(point);
  };
  size_t begin = 0, end = text.size();
  while (left && begin < end) {
    size_t at = begin;
    if (!removable(decode_point(text, at))) break;
    begin = at;
  }
  while (right && begin < end) {
    size_t start = previous_point(text, end), at = start;
    if (!removable(decode_point(text, at))) break;
    end = start;
  }
  return text.substr(begin, end - begin);
}

std::vector<std::string_view> split_space(std::string_view text, int64_t max_splits) {
  std::vector<std::string_view> parts;
  text = strip(text, {}, true, false);
  while (!text.empty()) {
    if (max_splits >= 0 && static_cast<int64_t>(parts.size()) == max_splits) {
      parts.push_back(strip(text, {}, false, true));
      break;
    }
    size_t at = 0, end = text.size();
    while (at < text.size()) {
      size_t start = at;
      if (is_space(decode_point(text, at))) {
        end = start;
        break;
      }
    }
    parts.push_back(text.substr(0, end));
    text = strip(text.substr(end), {}, true, false);
  }
  return parts;
}

std::vector<std::string_view> split_space_right(std::string_view text, int64_t max_splits) {
  std::vector<std::string_view> parts;
  text = strip(text, {}, false, true);
  while (!text.empty()) {
    if (max_splits >= 0 && static_cast<int64_t>(parts.size()) == max_splits) {
      parts.push_back(strip(text, {}, true, false));
      break;
    }
    size_t begin = text.size();
    while (begin > 0) {
      size_t start = previous_point(text, begin), at = start;
      if (is_space(decode_point(text, at))) break;
      begin = start;
    }
    parts.push_back(text.substr(begin));
    text = strip(text.substr(0, begin), {}, false, true);
  }
  std::reverse(parts.begin(), parts.end());
  return parts;
}

std::vector<std::string_view> split_lines(std::string_view text, bool keep_ends) {
  std::vector<std::string_view> lines;
  size_t begin = 0;
  for (size_t at = 0; at < text.size();) {
    size_t start = at;
    char32_t point = decode_point(text, at);
    if (!is_line_end(point)) continue;
    if (point == '\r' && at < text.size() && text[at] == '\n') ++at;
    lines.push_back(text.substr(begin, (keep_ends ? at : start) - begin));
    begin = at;
  }
  if (begin < text.size()) lines.push_back(text.substr(begin));
  return lines;
}

size_t find_bytes(std::string_view text, std::string_view needle, size_t from) {
  if (from > text.size()) return std::string_view::npos;
  if (needle.empty()) return from;
  const void* found = memmem(text.data() + from, text.size() - from, needle.data(), needle.size());
  return found ? static_cast<size_t>(static_cast<const char*>(found) - text.data()) : std::string_view::npos;
}

std::string quote_python(std::string_view text) {
  char quote = text.find('\'') != text.npos && text.find('"') == text.npos ? '"' : '\'';
  std::string out(1, quote);
  for (size_t at = 0; at < text.size();) {
    char32_t point = decode_point(text, at);
    if (point == static_cast<char32_t>(quote) || point == '\\') {
      out += '\\';
      out += static_cast<char>(point);
    } else if (point == '\n') {
      out += "\\n";
    } else if (point == '\r') {
      out += "\\r";
    } else if (point == '\t') {
      out += "\\t";
    } else if (point >= 0x20 && point < 0x7F) {
      out += static_cast<char>(point);
    } else if (is_printable(point)) {
      append_point(out, point);
    } else if (point < 0x100) {
      out += fmt::format("\\x{:02x}", static_cast<uint32_t>(point));
    } else if (point < 0x10000) {
      out += fmt::format("\\u{:04x}", static_cast<uint32_t>(point));
    } else {
      out += fmt::format("\\U{:08x}", static_cast<uint32_t>(point));
    }
  }
  return out + quote;
}

std::string quote_json(std::string_view text, bool ensure_ascii) {
  std::string out = "\"";
  for (size_t at = 0; at < text.size();) {
    char32_t point = decode_point(text, at);
    auto code = static_cast<uint32_t>(point);
    if (point == '"' || point == '\\') {
      out += '\\';
      out += static_cast<char>(point);
    } else if (point == '\n') {
      out += "\\n";
    } else if (point == '\r') {
      out += "\\r";
    } else if (point == '\t') {
      out += "\\t";
    } else if (point == '\f') {
      out += "\\f";
    } else if (point == '\b') {
      out += "\\b";
    } else if (point < 0x20 || (ensure_ascii && point >= 0x7F && point < 0x10000 && point != 0x7F)) {
      out += fmt::format("\\u{:04x}", code);
    } else if (ensure_ascii && point >= 0x10000) {
      code -= 0x10000;
      out += fmt::format("\\u{:04x}\\u{:04x}", 0xD800 + (code >> 10), 0xDC00 + (code & 0x3FF));
    } else {
      append_point(out, point);
    }
  }
  return out + '"';
}

std::string escape_html(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&#34;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string format_real(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  char buffer[40];
  auto end = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific).ptr;
  std::string_view shortest(buffer, static_cast<size_t>(end - buffer));
  size_t e = shortest.find('e');
  int exponent = std::atoi(std::string(shortest.substr(e + 1)).c_str());
  if (exponent < -4 || exponent >= 16) return std::string(shortest);
  std::string sign, digits;
  for (char c : shortest.substr(0, e)) {
    if (c == '-') sign = "-";
    if (c >= '0' && c <= '9') digits += c;
  }
  if (exponent < 0) return sign + "0." + std::string(static_cast<size_t>(-exponent - 1), '0') + digits;
  auto whole = static_cast<size_t>(exponent) + 1;
  if (digits.size() <= whole) return sign + digits + std::string(whole - digits.size(), '0') + ".0";
  return sign + digits.substr(0, whole) + "." + digits.substr(whole);
}

std::optional<double> parse_real(std::string_view text) {
  text = strip(text, {}, true, true);
  std::string clean;
  for (size_t i = 0; i < text.size(); ++i) {
    auto is_digit = [&](size_t at) { return at < text.size() && text[at] >= '0' && text[at] <= '9'; };
    if (text[i] != '_') {
      clean += text[i];
    } else if (i == 0 || !is_digit(i - 1) || !is_digit(i + 1)) {
      return {};
    }
  }
  bool negative = !clean.empty() && clean[0] == '-';
  if (!clean.empty() && (clean[0] == '-' || clean[0] == '+')) clean.erase(0, 1);
  std::string lower = to_lower(clean);
  double value = 0;
  if (lower == "inf" || lower == "infinity") {
    value = std::numeric_limits<double>::infinity();
  } else if (lower == "nan") {
    value = std::numeric_limits<double>::quiet_NaN();
  } else {
    if (clean.empty() || !(clean[0] == '.' || (clean[0] >= '0' && clean[0] <= '9'))) return {};
    auto [end, status] = std::from_chars(clean.data(), clean.data() + clean.size(), value);
    if (end != clean.data() + clean.size() || status == std::errc::invalid_argument) return {};
    // Too large or too small for a double: strtod gives the limit, as Python does.
    if (status == std::errc::result_out_of_range) value = std::strtod(clean.c_str(), nullptr);
  }
  return negative ? -value : value;
}

}  // namespace latente::jinja
