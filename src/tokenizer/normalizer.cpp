#include "tokenizer/normalizer.h"

#include "tokenizer/byte_alphabet.h"

namespace latente {

namespace {

std::string strip(std::string_view text, bool left, bool right, bool& keeps_start) {
  std::size_t begin = 0, end = text.size();
  while (left && begin < end) {
    std::size_t next = begin;
    if (!unicode::is_space(unicode::decode(text, next))) break;
    begin = next;
  }
  while (right && end > begin) {
    const std::size_t last = unicode::previous(text, end);
    std::size_t at = last;
    if (!unicode::is_space(unicode::decode(text, at))) break;
    end = last;
  }
  if (begin > 0) keeps_start = false;
  return std::string(text.substr(begin, end - begin));
}

std::string strip_accents(std::string_view text, bool& keeps_start) {
  std::string out;
  for (std::size_t at = 0; at < text.size();) {
    const char32_t c = unicode::decode(text, at);
    if (!unicode::contains(unicode::combining_marks(), c)) {
      unicode::append(out, c);
    } else if (out.empty()) {
      keeps_start = false;
    }
  }
  return out;
}

std::string replace(std::string_view text, const NormalizerStep& step, bool& keeps_start) {
  std::string out;
  std::size_t done = 0, begin, end;
  Regex::Matches matches(*step.pattern, text);
  while (matches.next(begin, end)) {
    out.append(text, done, begin - done);
    out += step.content;
    done = end;
    const bool one_character = end > begin && end - begin == unicode::length(text[begin]);
    if (begin == 0 && end > 0 && (step.content.empty() || !one_character)) keeps_start = false;
  }
  out.append(text, done);
  return out;
}

}  // namespace

std::string Normalizer::apply(std::string_view text, bool* keeps_start) const {
  std::string out(text);
  bool keeps = true;
  for (const NormalizerStep& step : steps) {
    switch (step.kind) {
      case NormalizerStep::Kind::form:
        out = unicode::normalize(out, step.form);
        break;
      case NormalizerStep::Kind::lowercase:
        out = unicode::lowercase(out);
        break;
      case NormalizerStep::Kind::strip_accents:
        out = strip_accents(out, keeps);
        break;
      case NormalizerStep::Kind::strip:
        out = strip(out, step.left, step.right, keeps);
        break;
      case NormalizerStep::Kind::replace:
        if (!out.empty()) out = replace(out, step, keeps);
        break;
      case NormalizerStep::Kind::prepend:
        if (!out.empty()) out.insert(0, step.content);
        break;
      case NormalizerStep::Kind::byte_level:
        out = spell_bytes(out);
        break;
    }
  }
  if (keeps_start) *keeps_start = keeps;
  return out;
}

}  // namespace latente
