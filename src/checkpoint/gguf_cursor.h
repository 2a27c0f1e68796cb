// Reading GGUF's bytes in order, with errors that say where they end or break.
#pragma once

#include <cstring>
#include <span>
#include <string>
#include <string_view>

#include "base/error.h"
#include "checkpoint/gguf.h"

namespace latente {

// Bytes of a value of fixed size; 0 for strings and arrays.
constexpr int64_t size_of(GgufType type) {
  constexpr int sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  return sizes[static_cast<size_t>(type)];
}

class GgufCursor {
 public:
  // `label` begins every message.
  GgufCursor(std::span<const std::byte> bytes, std::string label) : bytes_(bytes), label_(std::move(label)) {}

  // What is being read, for messages: "key \"general.name\"".
  void enter(std::string what) { what_ = std::move(what); }
  size_t at() const { return at_; }
  uint64_t left() const { return bytes_.size() - at_; }

  template <class... Args>
  [[noreturn]] void refuse(fmt::format_string<Args...> format, Args&&... args) const {
    fail("{}: {}: {}", label_, what_, fmt::format(format, std::forward<Args>(args)...));
  }

  // `part` is for the message: "a string".
  std::span<const std::byte> take(uint64_t count, std::string_view part) {
    if (count > left()) refuse("expected {} bytes of {}, found {}", count, part, left());
    std::span<const std::byte> taken = bytes_.subspan(at_, count);
    at_ += count;
    return taken;
  }
  template <class T>
  T read(std::string_view part) {
    T value;
    std::memcpy(&value, take(sizeof(T), part).data(), sizeof(T));
    return value;
  }
  std::string_view string(std::string_view part) {
    std::span<const std::byte> text = take(read<uint64_t>(part), part);
    return {reinterpret_cast<const char*>(text.data()), text.size()};
  }
  // A count of things that take at least `least` bytes each.
  uint64_t count(uint64_t least, std::string_view things) {
    uint64_t found = read<uint64_t>("a count");
    if (found > left() / least)
      refuse("expected at most {} {} in {} bytes, found {}", left() / least, things, left(), found);
    return found;
  }
  GgufType type();
  GgufValue value(GgufType type, int depth = 0);  // depth: of the arrays around it

 private:
  std::span<const std::byte> bytes_;
  std::string label_, what_;
  size_t at_ = 0;
};

}  // namespace latente
