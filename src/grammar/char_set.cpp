#include "grammar/char_set.h"

#include <algorithm>
#include <string>

#include "base/utf8.h"

namespace latente::grammar {
namespace {

constexpr char32_t first_surrogate = 0xD800, last_surrogate = 0xDFFF;

// One range whose ends have UTF-8 of the same length. Where continuation bytes do not run from end to end
// under equal leading bytes, the range is cut (as in Russ Cox's "Regular expression matching in the wild").
void split(char32_t low, char32_t high, const std::function<void(std::span<const ByteRange>)>& f) {
  for (int i = 1; i < 4 && high > 0x7F; ++i) {
    const char32_t mask = (char32_t{1} << (6 * i)) - 1;
    if ((low & ~mask) == (high & ~mask)) continue;
    if ((low & mask) != 0) {
      split(low, low | mask, f);
      return split((low | mask) + 1, high, f);
    }
    if ((high & mask) != mask) {
      split(low, (high & ~mask) - 1, f);
      return split(high & ~mask, high, f);
    }
  }
  std::string first, last;
  unicode::append(first, low);
  unicode::append(last, high);
  ByteRange sequence[4];
  for (size_t i = 0; i < first.size(); ++i)
    sequence[i] = {static_cast<uint8_t>(first[i]), static_cast<uint8_t>(last[i])};
  f(std::span(sequence, first.size()));
}

}  // namespace

CharSet::CharSet(std::initializer_list<CharRange> ranges) {
  for (const CharRange& range : ranges) add(range.low, range.high);
}

CharSet CharSet::all() {
  CharSet set;
  set.ranges_ = {{0, first_surrogate - 1}, {last_surrogate + 1, unicode::max_code_point}};
  return set;
}

void CharSet::add(char32_t low, char32_t high) {
  high = std::min(high, unicode::max_code_point);
  if (low > high) return;
  if (low <= last_surrogate && high >= first_surrogate) {
    if (low < first_surrogate) add(low, first_surrogate - 1);
    if (high > last_surrogate) add(last_surrogate + 1, high);
    return;
  }
  auto at = std::lower_bound(ranges_.begin(), ranges_.end(), low,
                             [](const CharRange& range, char32_t c) { return range.high + 1 < c; });
  auto end = at;
  for (; end != ranges_.end() && end->low <= high + 1; ++end) {
    low = std::min(low, end->low);
    high = std::max(high, end->high);
  }
  at = ranges_.erase(at, end);
  ranges_.insert(at, {low, high});
}

void CharSet::add(const CharSet& other) {
  for (const CharRange& range : other.ranges_) add(range.low, range.high);
}

CharSet CharSet::complement() const {
  CharSet out;
  char32_t next = 0;
  for (const CharRange& range : ranges_) {
    if (range.low > next) out.add(next, range.low - 1);
    next = range.high + 1;
  }
  if (next <= unicode::max_code_point) out.add(next, unicode::max_code_point);
  return out;
}

CharSet CharSet::intersection(const CharSet& other) const {
  CharSet out;
  for (size_t i = 0, j = 0; i < ranges_.size() && j < other.ranges_.size();) {
    const CharRange &a = ranges_[i], &b = other.ranges_[j];
    const char32_t low = std::max(a.low, b.low), high = std::min(a.high, b.high);
    if (low <= high) out.ranges_.push_back({low, high});
    (a.high < b.high ? i : j) += 1;
  }
  return out;
}

bool CharSet::contains(char32_t c) const {
  auto at = std::lower_bound(ranges_.begin(), ranges_.end(), c,
                             [](const CharRange& range, char32_t value) { return range.high < value; });
  return at != ranges_.end() && at->low <= c;
}

void for_each_utf8_sequence(const CharSet& set, const std::function<void(std::span<const ByteRange>)>& f) {
  for (CharRange range : set.ranges()) {
    for (const char32_t last : {char32_t{0x7F}, char32_t{0x7FF}, char32_t{0xFFFF}, unicode::max_code_point}) {
      if (range.low > last) continue;
      split(range.low, std::min(range.high, last), f);
      range.low = last + 1;
      if (range.low > range.high) break;
    }
  }
}

}  // namespace latente::grammar
