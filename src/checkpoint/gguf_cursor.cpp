#include "checkpoint/gguf_cursor.h"

#include <algorithm>

namespace latente {

namespace {

constexpr int most_nested = 8;

// The fewest bytes an element takes: a string its length, an array its type and count.
uint64_t least_bytes(GgufType type) {
  if (type == GgufType::string) return 8;
  if (type == GgufType::array) return 12;
  return static_cast<uint64_t>(size_of(type));
}

}  // namespace

GgufType GgufCursor::type() {
  uint32_t number = read<uint32_t>("a value type");
  if (number > static_cast<uint32_t>(GgufType::f64))
    refuse("expected a value type from 0 to 12, found {}", static_cast<int32_t>(number));
  return static_cast<GgufType>(number);
}

GgufValue GgufCursor::value(GgufType type, int depth) {
  GgufValue value;
  value.type = type;
  if (type == GgufType::string) {
    value.bytes = std::as_bytes(std::span(string("a string")));
    return value;
  }
  bool array = type == GgufType::array;
  if (array) {
    if (depth == most_nested) refuse("expected at most {} nested arrays, found more", most_nested);
    value.element = this->type();
    value.count = count(least_bytes(value.element), "elements");
  }
  GgufType element = array ? value.element : type;
  if (size_of(element) > 0) {
    value.bytes = take(value.count * static_cast<uint64_t>(size_of(element)), "a value");
    if (element == GgufType::boolean &&
        !std::all_of(value.bytes.begin(), value.bytes.end(), [](std::byte b) { return b <= std::byte{1}; }))
      refuse("expected booleans of 0 or 1, found others");
    return value;
  }
  size_t begin = at_;
  for (uint64_t i = 0; i < value.count; ++i) this->value(element, depth + 1);
  value.bytes = bytes_.subspan(begin, at_ - begin);
  return value;
}

}  // namespace latente
