// XXH64 (the xxHash specification, version 0.1.1): a fast 64-bit hash, for cache keys and for noticing
// damage. It is no protection against someone who makes collisions on purpose.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace latente {

class Hash64 {
 public:
  explicit Hash64(uint64_t seed = 0);

  void add(std::span<const std::byte> bytes);
  void add(std::string_view text) { add(std::as_bytes(std::span(text.data(), text.size()))); }
  // A value of fixed size, so that neighbouring fields cannot run into each other.
  void add(uint64_t value) { add(std::as_bytes(std::span(&value, 1))); }

  uint64_t value() const;  // of everything added so far

 private:
  uint64_t seed_, length_ = 0;
  std::array<uint64_t, 4> lanes_;
  std::array<std::byte, 32> rest_{};  // the length_ % 32 bytes that do not fill a stripe yet
};

}  // namespace latente
