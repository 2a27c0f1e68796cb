// Sets of characters, and the byte sequences that spell them in UTF-8.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace latente::grammar {

struct CharRange {
  char32_t low, high;
  bool operator==(const CharRange&) const = default;
};

// Unicode scalar values (surrogates are none), as sorted ranges that neither overlap nor touch.
class CharSet {
 public:
  CharSet() = default;
  CharSet(std::initializer_list<CharRange> ranges);
  static CharSet all();

  void add(char32_t low, char32_t high);
  void add(const CharSet& other);
  CharSet complement() const;
  CharSet intersection(const CharSet& other) const;
  CharSet minus(const CharSet& other) const { return intersection(other.complement()); }

  bool empty() const { return ranges_.empty(); }
  bool contains(char32_t c) const;
  const std::vector<CharRange>& ranges() const { return ranges_; }
  bool operator==(const CharSet&) const = default;

 private:
  std::vector<CharRange> ranges_;
};

struct ByteRange {
  uint8_t low, high;
  auto operator<=>(const ByteRange&) const = default;
};

// Calls f with sequences of byte ranges that together spell exactly the characters of the set; no two
// sequences spell the same character.
void for_each_utf8_sequence(const CharSet& set, const std::function<void(std::span<const ByteRange>)>& f);

}  // namespace latente::grammar
