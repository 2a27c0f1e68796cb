// Large pages under files that are in use.
#pragma once

#include <cstddef>
#include <span>
#include <thread>
#include <vector>

namespace latente {

// Moves what private or read-only shared mappings hold into memory of large pages, behind the same addresses,
// by a thread of its own while others read them: a mapped file is there at once, and is then read as fast as
// a copy of it. Only whole large pages within a range move; nothing does where the system has no large pages,
// and what finds no memory stays as it is. The mappings must outlive this object. Once moved, a part of a
// range no longer follows the file, and must not be given back to the system (MADV_DONTNEED): it would read
// as zeros.
class LargePages {
 public:
  explicit LargePages(std::vector<std::span<const std::byte>> ranges);
  ~LargePages();  // stops moving
  LargePages(const LargePages&) = delete;
  LargePages& operator=(const LargePages&) = delete;

  void wait();  // until everything has moved

  static constexpr size_t size = size_t{2} << 20;
  // Whether the system gives large pages to who asks for them.
  static bool available();

 private:
  std::jthread thread_;
};

}  // namespace latente
