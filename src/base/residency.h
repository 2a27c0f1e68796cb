// Pieces of files in memory, as many as a budget allows: those used last. For weights that only some tokens
// read, of models larger than memory.
//
// They lie in memory of the process's own rather than in a mapping of the file: what is resident is then
// exactly what is counted here, the system never drops a page that is about to be read, pages are large, and
// a piece read from the disk goes straight to the place of one that is not needed any more, without faults,
// clearing or copies.
//
//   Residency residency;
//   const int32_t first = residency.add(pieces, bytes);  // numbers first, first + 1, ...
//   residency.start(budget);
//   residency.expect(numbers);                   // in the order of their use: reading begins
//   while (!numbers.empty()) {
//     const size_t count = residency.await(numbers);
//     ...                                        // the first `count` of them are there: at(number)
//     residency.release(numbers.first(count));   // and may be dropped
//     numbers = numbers.subspan(count);
//   }
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/file.h"

namespace latente {

class Residency {
 public:
  // Threads that read, each up to a MiB at a time: what disks need to be fast.
  explicit Residency(int readers = 8);
  ~Residency();
  Residency(const Residency&) = delete;
  Residency& operator=(const Residency&) = delete;

  struct Piece {
    const MappedFile* file = nullptr;  // only looked at by add()
    int64_t offset = 0;
  };
  // Pieces of `bytes` each, which will lie on multiples of `alignment` (a power of two, at most 4096): the
  // number of the first. All are added before start(). Error when a file cannot be opened again.
  int32_t add(std::span<const Piece> pieces, int64_t bytes, int64_t alignment = 64);
  // The most memory that a piece of `bytes` takes.
  static int64_t memory_for(int64_t bytes);
  // The memory of pieces never takes more than `budget` bytes, at least that of the largest.
  void start(int64_t budget);

  // What is used next, in this order, replaces what was expected before. As many of the first of them as the
  // budget holds are kept or read from now on, and none of these is dropped before it is released; the others
  // follow as pieces are released.
  void expect(std::span<const int32_t> pieces);
  // Puts pieces that are in memory first and returns how many; waits until it is one. Those that were not
  // expected are from now on. Error when reading failed.
  size_t await(std::span<int32_t> pieces);
  void release(std::span<const int32_t> pieces);
  // Where a piece lies that was awaited and is not yet released.
  const std::byte* at(int32_t piece) const;

  struct Figures {
    int64_t budget = 0, resident = 0;  // bytes
    int64_t pieces = 0, memory = 0;    // all there are, and what they would take
    int64_t wanted = 0, found = 0;     // pieces expected so far, and those that were there
    int64_t bytes_read = 0;
    double waited = 0;  // seconds in await()
    // With what happened since `before` alone.
    Figures since(const Figures& before) const;
  };
  Figures figures() const;
  // In memory and read.
  bool holds(int32_t piece) const;

 private:
  enum class State : uint8_t { absent, loading, ready };
  // Places of one size, and the memory that they are cut from.
  struct Frames {
    int64_t size = 0;  // of one: whole pages
    int64_t pieces = 0;
    std::byte* begin = nullptr;
    size_t reserved = 0;
    std::vector<std::byte*> empty;  // without memory
  };
  struct Stack {
    int64_t bytes = 0;  // of a piece
    size_t frames = 0;
  };
  struct Unit {
    int32_t stack = 0, file = 0;
    int64_t offset = 0, lead = 0;     // in the file; of the data in its frame
    std::byte* frame = nullptr;       // unless absent
    int32_t before = -1, after = -1;  // in the order of use, while ready and not kept
    int32_t missing = 0;              // chunks
    State state = State::absent;
    bool expected = false;  // and not yet released
    bool kept = false;      // expected, and within the budget
    bool failed = false;
  };
  struct Drop {
    std::byte* frame = nullptr;
    size_t size = 0;
  };

  Unit& unit(int32_t piece) { return units_[static_cast<size_t>(piece)]; }
  const Stack& stack_of(int32_t piece) { return stacks_[static_cast<size_t>(unit(piece).stack)]; }
  Frames& frames_of(int32_t piece) { return frames_[stack_of(piece).frames]; }
  void expect_locked(std::span<const int32_t> pieces);
  void advance();
  void keep_ahead();
  bool find_frame(int32_t piece);
  void drop_frame(int32_t piece);
  void append(int32_t piece);
  void unlink(int32_t piece);
  void load(int32_t piece);
  int32_t chunks_of(int32_t piece);
  void read_chunk(int32_t piece, int32_t chunk);
  void finish(int32_t piece);
  void serve();

  mutable std::mutex mutex_;
  std::condition_variable work_, done_;
  std::vector<Unit> units_;
  std::vector<Stack> stacks_;
  std::vector<Frames> frames_;
  std::vector<std::unique_ptr<FileReader>> files_;
  std::unordered_map<std::string, int32_t> file_of_;
  std::vector<int32_t> expected_;
  size_t ahead_ = 0;  // of expected_: the first that is not kept
  int64_t kept_ = 0;  // bytes
  int32_t oldest_ = -1, newest_ = -1;
  std::deque<int32_t> queue_;
  std::deque<Drop> drops_;
  int32_t next_chunk_ = 0;  // of the queue's first
  int dropping_ = 0, loading_ = 0;
  std::string failure_;
  Figures figures_;
  bool ending_ = false;
  std::vector<std::thread> readers_;
};

}  // namespace latente
