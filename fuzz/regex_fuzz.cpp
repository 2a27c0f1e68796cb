// Regular expressions: a pattern and a text with a zero byte between them are refused with Error or give
// matches in order. And patterns that are made from the input's bytes, of what Ruby's and Perl's syntax have
// in common, match as with PCRE2.
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "support.h"
#include "tokenizer/regex.h"
#include "tokenizer/unicode.h"

namespace {

using latente::Regex;
using Matches = std::vector<std::pair<std::size_t, std::size_t>>;

Matches matches_of(const Regex& regex, std::string_view text) {
  Matches out;
  Regex::Matches matches(regex, text);
  std::size_t begin, end, done = 0;
  while (matches.next(begin, end)) {
    require(done <= begin && begin <= end && end <= text.size());
    require(out.empty() || out.back() != std::pair(begin, end));
    out.emplace_back(begin, end);
    done = end;
  }
  return out;
}

class PatternMaker {
 public:
  explicit PatternMaker(std::string_view bytes) : bytes_(bytes) {}

  std::string alternation(int depth) {
    std::string out = sequence(depth);
    for (int i = pick(3); i > 0; --i) out += "|" + sequence(depth);
    return out;
  }
  std::string_view rest() const { return bytes_; }

 private:
  int pick(int choices) {
    if (bytes_.empty()) return 0;
    const int out = static_cast<unsigned char>(bytes_[0]) % choices;
    bytes_.remove_prefix(1);
    return out;
  }

  std::string sequence(int depth) {
    std::string out;
    for (int i = 1 + pick(3); i > 0; --i) out += repeated(depth);
    return out;
  }

  std::string repeated(int depth) {
    static const char* const quantifiers[] = {"",   "",   "*",     "+",      "?",    "*?",    "+?",
                                              "??", "*+", "++",    "?+",     "{2}",  "{1,3}", "{2,}",
                                              "",   "",   "{0,2}", "{1,3}?", "{2,}?"};
    const int kind = pick(12);
    if (kind == 0) return "(?!" + atom(depth) + ")";
    if (kind == 1) return "(?=" + atom(depth) + ")";
    if (kind == 2) return pick(2) ? "(?<!" + one() + ")" : "(?<=" + one() + ")";
    if (kind == 3) return pick(2) ? "\\b" : "\\A";
    return atom(depth) + quantifiers[pick(sizeof(quantifiers) / sizeof(*quantifiers))];
  }

  std::string atom(int depth) {
    if (depth > 0) {
      const int kind = pick(8);
      if (kind == 0) return "(?:" + alternation(depth - 1) + ")";
      if (kind == 1) return "(?>" + alternation(depth - 1) + ")";
      if (kind == 2) return "(?i:" + one() + one() + ")";
    }
    return one();
  }

  std::string one() {
    static const char* const characters[] = {"a",
                                             "b",
                                             "c",
                                             " ",
                                             "x",
                                             "1",
                                             "-",
                                             "\\n",
                                             "\\s",
                                             "\\S",
                                             "\\d",
                                             "\\w",
                                             "\\W",
                                             "\\p{L}",
                                             "\\p{N}",
                                             "\\P{L}",
                                             "[ab]",
                                             "[^a]",
                                             "[a-c]",
                                             "[^\\s\\p{L}\\p{N}]",
                                             "[\\r\\n]",
                                             "\\p{Lu}",
                                             "中",
                                             "[一-龥]",
                                             ".",
                                             "[\\p{L}\\p{M}]",
                                             "[^\\r\\n\\p{L}]"};
    return characters[pick(sizeof(characters) / sizeof(*characters))];
  }

  std::string_view bytes_;
};

void compare_with_pcre2(const std::string& pattern, std::string_view text) {
  std::unique_ptr<Regex> regex;
  Matches found;
  try {
    regex = std::make_unique<Regex>(pattern);
    found = matches_of(*regex, text);
  } catch (const latente::Error&) {
    return;  // repetition of what can be empty, too many steps
  }
  int error;
  PCRE2_SIZE where;
  const std::unique_ptr<pcre2_code, void (*)(pcre2_code*)> code(
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, &error, &where, nullptr),
      pcre2_code_free);
  require(code != nullptr);
  const std::unique_ptr<pcre2_match_data, void (*)(pcre2_match_data*)> data(
      pcre2_match_data_create_from_pattern(code.get(), nullptr), pcre2_match_data_free);
  std::size_t at = 0, last_end = text.npos;
  for (const auto& [begin, end] : found) {
    PCRE2_SIZE their_begin, their_end;
    while (true) {
      const int status = pcre2_match(code.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                                     PCRE2_NO_UTF_CHECK, data.get(), nullptr);
      if (status == PCRE2_ERROR_MATCHLIMIT) return;
      if (status < 1) std::fprintf(stderr, "pattern %s: match only here\n", pattern.c_str());
      require(status >= 1);
      their_begin = pcre2_get_ovector_pointer(data.get())[0];
      their_end = pcre2_get_ovector_pointer(data.get())[1];
      // An empty match directly behind a match does not count.
      if (their_begin != their_end || their_end != last_end) break;
      require(at < text.size());
      at += latente::unicode::length(text[at]);
    }
    if (their_begin != begin || their_end != end) {
      std::fprintf(stderr, "pattern %s: %zu-%zu, PCRE2 %zu-%zu\n", pattern.c_str(), begin, end, their_begin,
                   their_end);
    }
    require(their_begin == begin && their_end == end);
    at = last_end = end;
  }
}

// Characters that both engines class alike: ASCII and a few others.
std::string common_text(std::string_view bytes) {
  static const char* const others[] = {"é", "Ω", "中", "٣", "\u3000", "€", "𝟘", "\u0085"};
  std::string out;
  for (const char c : bytes) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x80) {
      out += c;
    } else {
      out += others[byte % (sizeof(others) / sizeof(*others))];
    }
  }
  return out;
}

std::string lossy(std::string_view text) {
  std::string out;
  latente::unicode::append_lossy(out, text);
  return out;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const std::size_t zero = input.find('\0');
  if (zero != input.npos) {
    try {
      const Regex regex(lossy(input.substr(0, zero)));
      matches_of(regex, lossy(input.substr(zero + 1)));
    } catch (const latente::Error& error) {
      require(error.what()[0] != '\0');
    }
    return 0;
  }
  PatternMaker maker(input);
  const std::string pattern = maker.alternation(2);
  compare_with_pcre2(pattern, common_text(maker.rest()));
  return 0;
}
