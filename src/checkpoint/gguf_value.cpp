#include <cstring>
#include <limits>

#include "checkpoint/gguf_cursor.h"
#include "checkpoint/json.h"

namespace latente {

namespace {

template <class T>
T load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

// Nothing for types that are no integers, and for those above int64.
std::optional<int64_t> load_integer(GgufType type, const std::byte* at) {
  switch (type) {
    case GgufType::u8:
      return load<uint8_t>(at);
    case GgufType::i8:
      return load<int8_t>(at);
    case GgufType::u16:
      return load<uint16_t>(at);
    case GgufType::i16:
      return load<int16_t>(at);
    case GgufType::u32:
      return load<uint32_t>(at);
    case GgufType::i32:
      return load<int32_t>(at);
    case GgufType::i64:
      return load<int64_t>(at);
    case GgufType::u64: {
      uint64_t value = load<uint64_t>(at);
      if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return std::nullopt;
      return static_cast<int64_t>(value);
    }
    default:
      return std::nullopt;
  }
}

std::optional<double> load_number(GgufType type, const std::byte* at) {
  if (type == GgufType::f32) return load<float>(at);
  if (type == GgufType::f64) return load<double>(at);
  if (type == GgufType::u64) return static_cast<double>(load<uint64_t>(at));
  std::optional<int64_t> integer = load_integer(type, at);
  if (!integer) return std::nullopt;
  return static_cast<double>(*integer);
}

// An array's elements of one size through `load_one`; nothing when one of them gives nothing.
template <class T, class Load>
std::optional<std::vector<T>> list(const GgufValue& value, Load load_one) {
  int64_t size = size_of(value.element);
  if (value.type != GgufType::array || size == 0) return std::nullopt;
  std::vector<T> all;
  all.reserve(value.count);
  for (const std::byte* at = value.bytes.data(); all.size() < value.count; at += size) {
    std::optional<T> one = load_one(value.element, at);
    if (!one) return std::nullopt;
    all.push_back(*one);
  }
  return all;
}

}  // namespace

std::optional<int64_t> GgufValue::integer() const { return load_integer(type, bytes.data()); }

std::optional<double> GgufValue::number() const { return load_number(type, bytes.data()); }

std::optional<bool> GgufValue::boolean() const {
  if (type != GgufType::boolean) return std::nullopt;
  return bytes[0] != std::byte{0};
}

std::optional<std::string_view> GgufValue::string() const {
  if (type != GgufType::string) return std::nullopt;
  return std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

std::optional<std::vector<int64_t>> GgufValue::integers() const { return list<int64_t>(*this, load_integer); }

std::optional<std::vector<double>> GgufValue::numbers() const { return list<double>(*this, load_number); }

std::optional<std::vector<std::string_view>> GgufValue::strings() const {
  if (type != GgufType::array || element != GgufType::string) return std::nullopt;
  std::vector<std::string_view> all;
  all.reserve(count);
  const char* at = reinterpret_cast<const char*>(bytes.data());
  while (all.size() < count) {
    uint64_t length = load<uint64_t>(reinterpret_cast<const std::byte*>(at));
    all.emplace_back(at + 8, length);
    at += 8 + length;
  }
  return all;
}

std::vector<GgufValue> GgufValue::elements() const {
  std::vector<GgufValue> all;
  if (type != GgufType::array) return all;
  GgufCursor cursor(bytes, "");
  all.reserve(count);
  while (all.size() < count) all.push_back(cursor.value(element));
  return all;
}

std::string GgufValue::describe() const {
  if (std::optional<std::string_view> text = string()) return printable(*text);
  if (std::optional<bool> truth = boolean()) return *truth ? "true" : "false";
  if (std::optional<int64_t> whole = integer()) return fmt::format("{}", *whole);
  if (std::optional<double> real = number()) return fmt::format("{}", *real);
  static constexpr std::string_view plurals[] = {
      "8-bit integers",  "8-bit integers",  "16-bit integers", "16-bit integers", "32-bit integers",
      "32-bit integers", "32-bit floats",   "booleans",        "strings",         "arrays",
      "64-bit integers", "64-bit integers", "64-bit floats"};
  return fmt::format("an array of {} {}", count, plurals[static_cast<size_t>(element)]);
}

}  // namespace latente
