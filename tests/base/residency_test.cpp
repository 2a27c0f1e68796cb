// Pieces of files under a budget against a list of what should be in memory.
#include "base/residency.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <list>
#include <random>
#include <set>
#include <thread>

#include "base/error.h"

namespace latente {
namespace {

namespace fs = std::filesystem;

class ResidencyTest : public testing::Test {
 protected:
  ResidencyTest() {
    std::string pattern = (fs::temp_directory_path() / "latente-residency-XXXXXX").string();
    directory_ = ::mkdtemp(pattern.data());
  }
  ~ResidencyTest() override { fs::remove_all(directory_); }

  std::string random_file(const std::string& name, size_t bytes) {
    std::string text(bytes, '\0');
    for (char& c : text) c = static_cast<char>(random_());
    std::ofstream(at(name), std::ios::binary) << text;
    return text;
  }
  std::string at(const std::string& name) const { return directory_ + "/" + name; }
  size_t below(size_t n) { return random_() % n; }

  std::string directory_;
  std::mt19937_64 random_{std::random_device{}()};
};

std::string text_of(const std::byte* data, size_t bytes) {
  return {reinterpret_cast<const char*>(data), bytes};
}

TEST_F(ResidencyTest, ReadsAnyPieceOfAFile) {
  const std::string text = random_file("file", (size_t{3} << 20) + 1234);
  const MappedFile file(at("file"));
  const FileReader reader(file);
  std::vector<std::byte> memory(text.size() + 8192);
  for (int i = 0; i < 300; ++i) {
    size_t offset = below(text.size()), bytes = below(text.size() - offset) + 1;
    if (i % 3 == 0) bytes = std::min<size_t>(bytes, 9000);
    if (i % 5 == 0) bytes = text.size() - offset;
    // Also where addresses and blocks agree.
    const size_t base = reinterpret_cast<uintptr_t>(memory.data()) % 4096;
    const size_t lead = i % 2 == 0 ? (offset % 4096 + 4096 - base) % 4096 : below(4096);
    std::byte* const to = memory.data() + lead;
    std::fill(memory.begin(), memory.end(), std::byte{7});
    reader.read(static_cast<int64_t>(offset), {to, bytes});
    ASSERT_TRUE(text_of(to, bytes) == text.substr(offset, bytes)) << offset << " " << bytes;
    ASSERT_TRUE(to[bytes] == std::byte{7} && (lead == 0 || to[-1] == std::byte{7})) << offset << " " << bytes;
  }
}

TEST_F(ResidencyTest, AFileCutOffOrReplacedIsAnError) {
  random_file("file", 100000);
  const MappedFile file(at("file"));
  const FileReader reader(file);
  fs::resize_file(at("file"), 50000);
  std::vector<std::byte> memory(60000);
  reader.read(10000, std::span(memory).first(40000));
  for (int64_t offset : {0, 10001, 49999, 50000, 90000}) {
    try {
      reader.read(offset, std::span(memory).first(50001));
      FAIL() << offset;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(at("file") + ": expected "), std::string::npos)
          << error.what();
    }
  }
  random_file("other", 100000);
  fs::rename(at("other"), at("file"));
  EXPECT_THROW(FileReader again(file), Error);
}

// Random uses of random stacks; the pieces held are those used last, and what is held is what was read.
TEST_F(ResidencyTest, KeepsWhatWasUsedLastWithinTheBudget) {
  for (int round = 0; round < 6; ++round) {
    const std::string text = random_file("file", size_t{1} << 21);
    const MappedFile file(at("file"));
    Residency residency(1 + static_cast<int>(below(5)));
    struct Held {
      size_t offset, bytes;
      int64_t memory;
    };
    std::vector<Held> pieces;
    std::set<const std::byte*> pages;  // where pieces ever lay
    int64_t largest = 0, all = 0;
    for (int s = 0; s < 3; ++s) {
      const size_t count = 4 + below(8), bytes = 1 + below(60000), begin = below(200000),
                   step = bytes + below(3);
      std::vector<Residency::Piece> stack;
      for (size_t i = 0; i < count; ++i) stack.push_back({&file, static_cast<int64_t>(begin + i * step)});
      const int64_t alignment = s == 0 ? 1 : 64, memory = Residency::memory_for(static_cast<int64_t>(bytes));
      ASSERT_EQ(residency.add(stack, static_cast<int64_t>(bytes), alignment),
                static_cast<int32_t>(pieces.size()));
      for (size_t i = 0; i < count; ++i) pieces.push_back({begin + i * step, bytes, memory});
      all += memory * static_cast<int64_t>(count);
      largest = std::max(largest, memory);
    }
    const int64_t budget = largest + static_cast<int64_t>(below(static_cast<size_t>(all)));
    residency.start(budget);

    std::list<int32_t> used;  // oldest first
    const auto held = [&] {
      std::vector<int32_t> list;
      int64_t memory = 0;
      for (auto it = used.rbegin(); it != used.rend(); ++it) {
        memory += pieces[static_cast<size_t>(*it)].memory;
        if (memory > budget) break;
        list.push_back(*it);
      }
      return list;
    };
    for (int i = 0; i < 200; ++i) {
      std::vector<int32_t> asked;
      int64_t memory = 0;
      for (size_t wanted = 1 + below(6); wanted > 0; --wanted) {
        const auto piece = static_cast<int32_t>(below(pieces.size()));
        memory += pieces[static_cast<size_t>(piece)].memory;
        if (std::find(asked.begin(), asked.end(), piece) == asked.end()) asked.push_back(piece);
      }
      if (i % 4 != 0) residency.expect(asked);
      const bool at_once = memory <= budget;
      std::span<int32_t> left(asked);
      while (!left.empty()) {
        const size_t count = residency.await(left);
        for (int32_t piece : left.first(count)) {
          const Held& here = pieces[static_cast<size_t>(piece)];
          ASSERT_TRUE(residency.holds(piece));
          const std::byte* const data = residency.at(piece);
          ASSERT_EQ(reinterpret_cast<uintptr_t>(data) % (here.bytes == pieces[0].bytes ? 1 : 64), 0u);
          ASSERT_TRUE(text_of(data, here.bytes) == text.substr(here.offset, here.bytes));
          const std::byte* const page = data - reinterpret_cast<uintptr_t>(data) % 4096;
          for (size_t at = 0; at < here.bytes + 4095; at += 4096) pages.insert(page + at);
        }
        residency.release(left.first(count));
        for (int32_t piece : left.first(count)) {
          used.remove(piece);
          used.push_back(piece);
        }
        left = left.subspan(count);
      }
      const Residency::Figures figures = residency.figures();
      ASSERT_LE(figures.resident, budget);
      // Which of several goes first depends on the disk when they do not fit at once.
      if (!at_once) {
        used.clear();
        continue;
      }
      for (int32_t piece : held()) ASSERT_TRUE(residency.holds(piece)) << i;
    }
    const Residency::Figures figures = residency.figures();
    EXPECT_EQ(figures.memory, all);
    EXPECT_GT(figures.found, 0);
    EXPECT_GT(figures.wanted, figures.found);
    // Dropping is the readers' work, and may lag behind the count.
    int64_t resident = 0;
    for (int tries = 0; tries < 100; ++tries) {
      resident = 0;
      for (const std::byte* page : pages) {
        unsigned char here = 0;
        ASSERT_EQ(::mincore(const_cast<std::byte*>(page), 4096, &here), 0);
        resident += 4096 * (here & 1);
      }
      if (resident <= figures.resident) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    EXPECT_LE(resident, figures.resident);
    EXPECT_GE(resident, figures.resident / 2);
  }
}

TEST_F(ResidencyTest, AReadThatFailsIsAnErrorAndMayBeTriedAgain) {
  const std::string text = random_file("file", 80000);
  const MappedFile file(at("file"));
  Residency residency(3);
  std::vector<Residency::Piece> pieces;
  for (int64_t i = 0; i < 4; ++i) pieces.push_back({&file, i * 20000});
  residency.add(pieces, 20000);
  residency.start(1 << 20);
  fs::resize_file(at("file"), 30000);
  for (int tries = 0; tries < 2; ++tries) {
    std::vector<int32_t> three{3};
    EXPECT_THROW(residency.await(three), Error);
    std::vector<int32_t> first{0};
    EXPECT_EQ(residency.await(first), 1u);
    EXPECT_TRUE(text_of(residency.at(0), 20000) == text.substr(0, 20000));
    residency.release(first);
  }
  std::ofstream(at("file"), std::ios::binary | std::ios::in) << text;
  std::vector<int32_t> three{3};
  EXPECT_EQ(residency.await(three), 1u);
  EXPECT_TRUE(text_of(residency.at(3), 20000) == text.substr(60000));
}

}  // namespace
}  // namespace latente
