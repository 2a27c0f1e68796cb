#include "base/large_pages.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>

#include "base/file.h"
#include "base/random.h"
#include "checkpoint/support.h"

namespace latente {
namespace {

constexpr size_t page = LargePages::size;

std::string random_bytes(size_t count, uint64_t seed) {
  Random random(seed, 0);
  std::string bytes(count, '\0');
  for (char& c : bytes) c = static_cast<char>(random.below(256));
  return bytes;
}

void overwrite(const std::string& path, const std::string& bytes) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

// Offsets in the file of the whole large pages behind it.
std::pair<size_t, size_t> whole_pages(const MappedFile& file) {
  const auto begin = reinterpret_cast<uintptr_t>(file.bytes().data());
  const size_t first = (page - begin % page) % page;
  const size_t end = (begin + file.bytes().size()) / page * page - begin;
  return {first, end};
}

TEST(LargePages, TakeThePlaceOfAFileThatIsBeingRead) {
  const TemporaryDirectory directory;
  const std::string path = directory.at("file"), held = random_bytes(9 * page + 12345, 1);
  write_file_atomically(path, held);
  const MappedFile file(path);
  std::atomic<bool> done{false}, differed{false};
  std::vector<std::jthread> readers;
  for (int i = 0; i < 3; ++i) {
    readers.emplace_back([&] {
      while (!done) {
        if (std::memcmp(file.bytes().data(), held.data(), held.size()) != 0) differed = true;
      }
    });
  }
  {
    LargePages pages({file.bytes()});
    pages.wait();
  }
  done = true;
  readers.clear();
  EXPECT_FALSE(differed);
  EXPECT_EQ(file.text(), held);
  file.keep_pages();
  file.advise(MappedFile::Advice::dont_need);
  EXPECT_EQ(file.text(), held);

  // What moved no longer is the file's; the ends are.
  const std::string other = random_bytes(held.size(), 2);
  overwrite(path, other);
  auto [first, end] = whole_pages(file);
  if (!LargePages::available()) first = end = 0;
  EXPECT_EQ(file.text().substr(first, end - first), held.substr(first, end - first));
  EXPECT_EQ(file.text().substr(0, first), other.substr(0, first));
  EXPECT_EQ(file.text().substr(end), other.substr(end));
}

TEST(LargePages, LeaveSmallRangesAlone) {
  const TemporaryDirectory directory;
  const std::string path = directory.at("file"), held = random_bytes(page - 1, 3);
  write_file_atomically(path, held);
  const MappedFile file(path);
  LargePages({file.bytes(), {}}).wait();
  const std::string other = random_bytes(held.size(), 4);
  overwrite(path, other);
  EXPECT_EQ(file.text(), other);
}

TEST(LargePages, StopHalfWay) {
  const TemporaryDirectory directory;
  const std::string path = directory.at("file"), held = random_bytes(20 * page, 5);
  write_file_atomically(path, held);
  for (int i = 0; i < 20; ++i) {
    const MappedFile file(path);
    { LargePages pages({file.bytes()}); }
    EXPECT_EQ(file.text(), held);
  }
}

}  // namespace
}  // namespace latente
