#include "tokenizer/jinja_lexer.h"

#include <algorithm>

#include "tokenizer/jinja_text.h"

namespace latente::jinja {

void syntax_error(int line, const std::string& message) { fail("chat template, line {}: {}", line, message); }

std::optional<Int> parse_integer(std::string_view text, int base) {
  text = strip(text, {}, true, true);
  bool negative = !text.empty() && text[0] == '-';
  if (!text.empty() && (text[0] == '-' || text[0] == '+')) text.remove_prefix(1);
  int prefix = 0;
  if (text.size() > 1 && text[0] == '0') {
    char letter = text[1] | 0x20;
    prefix = letter == 'x' ? 16 : letter == 'o' ? 8 : letter == 'b' ? 2 : 0;
  }
  bool underscore_allowed = false;
  if (prefix && (base == 0 || base == prefix)) {
    base = prefix;
    text.remove_prefix(2);
    underscore_allowed = true;
  }
  bool literal = base == 0;
  if (literal) base = 10;
  Int value = 0;
  bool any = false, nonzero = false;
  if (literal && text.size() > 1 && text[0] == '0') nonzero = text.find_first_not_of("0_") != text.npos;
  for (char c : text) {
    if (c == '_') {
      if (!underscore_allowed) return {};
      underscore_allowed = false;
      continue;
    }
    char lower = c | 0x20;
    int digit = c >= '0' && c <= '9' ? c - '0' : lower >= 'a' && lower <= 'z' ? lower - 'a' + 10 : 99;
    if (digit >= base) return {};
    if (value > (Int{1} << 120)) return {};
    value = value * base + digit;
    any = underscore_allowed = true;
  }
  if (!any || !underscore_allowed || nonzero) return {};
  return negative ? -value : value;
}

namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }

class Lexer {
 public:
  explicit Lexer(std::string source) : source_(std::move(source)) {}

  std::vector<Token> run() {
    while (at_ < source_.size()) root();
    tokens_.push_back({TokenKind::end, line_, "", {}});
    return std::move(tokens_);
  }

 private:
  bool starts(std::string_view text, size_t at) const { return source_.compare(at, text.size(), text) == 0; }

  size_t skip_space(size_t at) const {
    while (at < source_.size()) {
      size_t next = at;
      if (!is_space(decode_point(source_, next))) break;
      at = next;
    }
    return at;
  }

  // The end of a tag's closing mark at `at`: `+%}`, `-%}` with the space after it, or `%}` with one newline.
  size_t closing(std::string_view mark, size_t at, bool plus_and_trim) const {
    if (plus_and_trim && source_[at] == '+' && starts(mark, at + 1)) return at + 1 + mark.size();
    if (source_[at] == '-' && starts(mark, at + 1)) return skip_space(at + 1 + mark.size());
    if (!starts(mark, at)) return 0;
    size_t end = at + mark.size();
    return plus_and_trim && end < source_.size() && source_[end] == '\n' ? end + 1 : end;
  }

  // After `{%` and its sign at `at`: the end of `raw %}` (or `endraw`), or 0.
  size_t raw_tag(size_t at, std::string_view word, bool ends) const {
    at = skip_space(at);
    if (!starts(word, at)) return 0;
    at = skip_space(at + word.size());
    if (at >= source_.size()) return 0;
    return closing("%}", at, ends);
  }

  void advance(size_t to) {
    line_ += static_cast<int>(std::count(source_.begin() + static_cast<ptrdiff_t>(at_),
                                         source_.begin() + static_cast<ptrdiff_t>(to), '\n'));
    line_starting_ = to > at_ && source_[to - 1] == '\n';
    at_ = to;
  }

  // The data before a tag at `tag`, stripped as the tag's sign and lstrip_blocks ask.
  void data(size_t tag, char sign, bool is_print) {
    std::string_view text = std::string_view(source_).substr(at_, tag - at_);
    if (sign == '-') {
      text = strip(text, {}, false, true);
    } else if (sign != '+' && !is_print) {
      size_t line_start = text.rfind('\n') == text.npos ? 0 : text.rfind('\n') + 1;
      std::string_view indent = text.substr(line_start);
      if ((line_start > 0 || line_starting_) && strip(indent, {}, true, false).empty()) {
        text = text.substr(0, line_start);
      }
    }
    if (!text.empty()) tokens_.push_back({TokenKind::data, line_, std::string(text), {}});
  }

  char sign_at(size_t at) const {
    return at < source_.size() && (source_[at] == '-' || source_[at] == '+') ? source_[at] : 0;
  }

  void root() {
    size_t tag = at_;
    while ((tag = source_.find('{', tag)) != source_.npos) {
      char kind = tag + 1 < source_.size() ? source_[tag + 1] : 0;
      if (kind == '%' || kind == '#' || kind == '{') break;
      ++tag;
    }
    if (tag == source_.npos) {
      tokens_.push_back({TokenKind::data, line_, source_.substr(at_), {}});
      advance(source_.size());
      return;
    }
    char kind = source_[tag + 1], sign = sign_at(tag + 2);
    data(tag, sign, kind == '{');
    size_t inside = tag + 2 + (sign ? 1 : 0);
    size_t raw = kind == '%' ? raw_tag(inside, "raw", false) : 0;
    advance(raw ? raw : inside);
    if (raw) {
      raw_block();
    } else if (kind == '#') {
      comment();
    } else {
      bool print = kind == '{';
      tokens_.push_back({print ? TokenKind::print_begin : TokenKind::block_begin, line_, "", {}});
      while (!tag_token(print)) {
      }
    }
  }

  void raw_block() {
    size_t tag = at_;
    while ((tag = source_.find("{%", tag)) != source_.npos) {
      char sign = sign_at(tag + 2);
      if (size_t end = raw_tag(tag + 2 + (sign ? 1 : 0), "endraw", true)) {
        data(tag, sign, false);
        advance(end);
        return;
      }
      tag += 2;
    }
    if (at_ < source_.size()) syntax_error(line_, "Missing end of raw directive");
  }

  void comment() {
    size_t mark = source_.find("#}", at_);
    if (mark == source_.npos) {
      if (at_ < source_.size()) syntax_error(line_, "Missing end of comment tag");
      return;
    }
    if (mark > at_ && (source_[mark - 1] == '-' || source_[mark - 1] == '+')) --mark;
    advance(closing("#}", mark, true));
  }

  // Reads one token inside a tag; true at the tag's end or the source's.
  bool tag_token(bool print) {
    if (at_ >= source_.size()) return true;
    if (brackets_.empty()) {
      if (size_t end = closing(print ? "}}" : "%}", at_, !print)) {
        tokens_.push_back({print ? TokenKind::print_end : TokenKind::block_end, line_, "", {}});
        advance(end);
        return true;
      }
    }
    char c = source_[at_];
    size_t after = skip_space(at_);
    if (after > at_) {
      advance(after);
    } else if (is_digit(c)) {
      number();
    } else if (c == '\'' || c == '"') {
      string(c);
    } else {
      size_t end = at_;
      while (end < source_.size()) {
        size_t next = end;
        if (!is_word(decode_point(source_, next))) break;
        end = next;
      }
      end > at_ ? name(end) : op();
    }
    return false;
  }

  void name(size_t end) {
    std::string text = source_.substr(at_, end - at_);
    if (!is_identifier(text)) syntax_error(line_, "Invalid character in identifier");
    tokens_.push_back({TokenKind::name, line_, std::move(text), {}});
    advance(end);
  }

  // digits(_digits)* from `at`; `at` itself when there are none.
  size_t digits(size_t at, std::string_view set = "0123456789") const {
    auto in_set = [&](size_t i) { return i < source_.size() && set.find(source_[i]) != set.npos; };
    size_t end = at;
    while (in_set(end) || (end > at && end < source_.size() && source_[end] == '_' && in_set(end + 1))) ++end;
    return end;
  }

  void number() {
    size_t whole = digits(at_), end = whole;
    bool real = false;
    if (at_ == 0 || source_[at_ - 1] != '.') {
      if (end < source_.size() && source_[end] == '.' && digits(end + 1) > end + 1) {
        end = digits(end + 1);
        real = true;
      }
      if (end < source_.size() && (source_[end] | 0x20) == 'e') {
        size_t exponent = end + 1;
        if (exponent < source_.size() && (source_[exponent] == '+' || source_[exponent] == '-')) ++exponent;
        if (size_t last = digits(exponent); last > exponent) {
          end = last;
          real = true;
        }
      }
    }
    if (!real) end = integer_end();
    std::string text = source_.substr(at_, end - at_);
    Value value;
    if (real) {
      value = Value::real(*parse_real(text));
    } else if (auto integer = parse_integer(text, 0)) {
      value = Value::integer(*integer);
    } else {
      syntax_error(line_, "expected an integer below 2^120, found more digits");
    }
    tokens_.push_back({TokenKind::number, line_, std::move(text), std::move(value)});
    advance(end);
  }

  size_t integer_end() const {
    if (source_[at_] != '0') return digits(at_);
    if (at_ + 2 < source_.size()) {
      char letter = source_[at_ + 1] | 0x20;
      std::string_view set = letter == 'b' ? "01" : letter == 'o' ? "01234567" : "0123456789abcdefABCDEF";
      size_t first = at_ + 2 + (source_[at_ + 2] == '_' ? 1 : 0);
      if ((letter == 'b' || letter == 'o' || letter == 'x') && digits(first, set) > first)
        return digits(first, set);
    }
    return digits(at_, "0");
  }

  void op() {
    static constexpr std::string_view kPairs[] = {"//", "**", "==", "!=", ">=", "<="};
    size_t size = 1;
    for (std::string_view pair : kPairs) {
      if (starts(pair, at_)) size = 2;
    }
    char c = source_[at_];
    if (size == 1 && std::string_view("+-/*%~[](){}><=.:|,;").find(c) == std::string_view::npos) {
      size_t end = at_;
      decode_point(source_, end);
      syntax_error(line_,
                   fmt::format("unexpected char '{}' at byte {}", source_.substr(at_, end - at_), at_));
    }
    if (c == '(' || c == '[' || c == '{') brackets_ += c == '(' ? ')' : c == '[' ? ']' : '}';
    if (c == ')' || c == ']' || c == '}') {
      if (brackets_.empty()) syntax_error(line_, fmt::format("unexpected '{}'", c));
      if (brackets_.back() != c) {
        syntax_error(line_, fmt::format("unexpected '{}', expected '{}'", c, brackets_.back()));
      }
      brackets_.pop_back();
    }
    tokens_.push_back({TokenKind::op, line_, source_.substr(at_, size), {}});
    advance(at_ + size);
  }

  void string(char quote) {
    size_t end = at_ + 1;
    while (end < source_.size() && source_[end] != quote) end += source_[end] == '\\' ? 2 : 1;
    if (end >= source_.size())
      syntax_error(line_, fmt::format("unexpected char '{}' at byte {}", quote, at_));
    tokens_.push_back({TokenKind::string, line_, unescape(source_.substr(at_ + 1, end - at_ - 1)), {}});
    advance(end + 1);
  }

  // Python's unicode-escape codec, after every non-ASCII character has been written as an escape: so a
  // backslash before one stays, followed by that escape's letters.
  std::string unescape(const std::string& raw) const {
    std::string out;
    for (size_t at = 0; at < raw.size();) {
      if (raw[at] != '\\') {
        out += raw[at++];
        continue;
      }
      if (++at >= raw.size()) syntax_error(line_, "\\ at end of string");
      char c = raw[at];
      static constexpr std::string_view kLetters = "\\'\"abfnrtv\n";
      static constexpr std::string_view kMeanings("\\'\"\a\b\f\n\r\t\v", 10);
      if (size_t which = kLetters.find(c); which != kLetters.npos) {
        if (c != '\n') out += kMeanings[which];
        ++at;
      } else if (c >= '0' && c <= '7') {
        char32_t point = 0;
        for (int i = 0; i < 3 && at < raw.size() && raw[at] >= '0' && raw[at] <= '7'; ++i)
          point = point * 8 + raw[at++] - '0';
        append_point(out, point);
      } else if (c == 'x' || c == 'u' || c == 'U') {
        append_point(out, hex_escape(raw, at));
      } else if (c == 'N') {
        syntax_error(line_, "\\N{...} escapes are not supported");
      } else {
        char32_t point = decode_point(raw, at);
        auto code = static_cast<uint32_t>(point);
        out += point < 0x80      ? fmt::format("\\{}", c)
               : point < 0x100   ? fmt::format("\\x{:02x}", code)
               : point < 0x10000 ? fmt::format("\\u{:04x}", code)
                                 : fmt::format("\\U{:08x}", code);
      }
    }
    return out;
  }

  // At the letter of \xHH, \uHHHH or \UHHHHHHHH; moves past the escape.
  char32_t hex_escape(const std::string& raw, size_t& at) const {
    size_t size = raw[at] == 'x' ? 2 : raw[at] == 'u' ? 4 : 8;
    ++at;
    uint64_t point = 0;
    for (size_t i = 0; i < size; ++i, ++at) {
      char lower = at < raw.size() ? raw[at] | 0x20 : 0;
      bool hex = at < raw.size() && (is_digit(raw[at]) || (lower >= 'a' && lower <= 'f'));
      if (!hex)
        syntax_error(line_, fmt::format("truncated \\{} escape", size == 2   ? "xXX"
                                                                 : size == 4 ? "uXXXX"
                                                                             : "UXXXXXXXX"));
      point = point * 16 + static_cast<uint64_t>(is_digit(raw[at]) ? raw[at] - '0' : lower - 'a' + 10);
    }
    if (point > 0x10FFFF) syntax_error(line_, "illegal Unicode character");
    if (point >= 0xD800 && point < 0xE000) syntax_error(line_, "surrogate escapes are not supported");
    return static_cast<char32_t>(point);
  }

  std::string source_;
  size_t at_ = 0;
  int line_ = 1;
  bool line_starting_ = true;
  std::string brackets_;  // the closing brackets that are due
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokenize(std::string_view source) {
  if (!is_utf8(source)) fail("chat template: expected UTF-8, found other bytes");
  std::string text;
  text.reserve(source.size());
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r' && i + 1 < source.size() && source[i + 1] == '\n') continue;
    text += source[i] == '\r' ? '\n' : source[i];
  }
  if (!text.empty() && text.back() == '\n') text.pop_back();
  return Lexer(std::move(text)).run();
}

}  // namespace latente::jinja
