#include "base/large_pages.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>

#include "base/background_pace.h"

namespace latente {
namespace {

constexpr double share = 0.05;  // of one core's time

uintptr_t rounded_up(uintptr_t address) {
  return (address + LargePages::size - 1) / LargePages::size * LargePages::size;
}

// The pages change places in one step: who reads `to` meanwhile finds the file's page or the copy, which hold
// the same bytes. False when there was no memory.
bool move_page(std::byte* copy, std::byte* to) {
  std::memcpy(copy, to, LargePages::size);
  return ::mprotect(copy, LargePages::size, PROT_READ) == 0 &&
         ::mremap(copy, LargePages::size, LargePages::size, MREMAP_MAYMOVE | MREMAP_FIXED, to) != MAP_FAILED;
}

void move_range(std::span<const std::byte> range, const std::stop_token& stop) {
  const auto begin = reinterpret_cast<uintptr_t>(range.data());
  const uintptr_t first = rounded_up(begin);
  const uintptr_t end = (begin + range.size()) / LargePages::size * LargePages::size;
  if (first >= end) return;
  // One reservation for all, so that neighbours stay one area for the kernel after their move.
  const size_t reserved = end - first + LargePages::size;
  void* memory =
      ::mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return;
  auto* copies = reinterpret_cast<std::byte*>(rounded_up(reinterpret_cast<uintptr_t>(memory)));
  size_t done = 0;
  if (::madvise(memory, reserved, MADV_HUGEPAGE) == 0) {
    for (BackgroundPace pace; first + done < end && !stop.stop_requested(); pace.keep(stop, share)) {
      if (!move_page(copies + done, reinterpret_cast<std::byte*>(first + done))) break;
      done += LargePages::size;
    }
  }
  // What moved is no longer here.
  auto* rest = copies + done;
  if (copies != memory) ::munmap(memory, static_cast<size_t>(copies - static_cast<std::byte*>(memory)));
  ::munmap(rest, static_cast<size_t>(static_cast<std::byte*>(memory) + reserved - rest));
}

}  // namespace

LargePages::LargePages(std::vector<std::span<const std::byte>> ranges) {
  if (!available()) return;
  thread_ = std::jthread([ranges = std::move(ranges)](const std::stop_token& stop) {
    for (const auto& range : ranges) move_range(range, stop);
  });
}

LargePages::~LargePages() = default;

void LargePages::wait() {
  if (thread_.joinable()) thread_.join();
}

bool LargePages::available() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string text;
  return std::getline(file, text) && text.find("[never]") == std::string::npos;
}

}  // namespace latente
