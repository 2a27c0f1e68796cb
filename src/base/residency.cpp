#include "base/residency.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <utility>

#include "base/error.h"

namespace latente {
namespace {

constexpr int64_t chunk_bytes = int64_t{1} << 20;
constexpr int64_t page = FileReader::block;
constexpr size_t large = size_t{4} << 20;  // worth large pages

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

Residency::Residency(int readers) {
  for (int i = 0; i < readers; ++i) readers_.emplace_back([this] { serve(); });
}

Residency::~Residency() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  work_.notify_all();
  for (std::thread& reader : readers_) reader.join();
  for (const Frames& frames : frames_) {
    if (frames.begin) ::munmap(frames.begin, frames.reserved);
  }
}

int64_t Residency::memory_for(int64_t bytes) { return round_up(bytes, page) + page; }

int32_t Residency::add(std::span<const Piece> pieces, int64_t bytes, int64_t alignment) {
  LATENTE_ASSERT(bytes > 0 && figures_.budget == 0);
  const auto first = static_cast<int32_t>(units_.size());
  const auto count = static_cast<int64_t>(pieces.size());
  LATENTE_ASSERT(first + count <= std::numeric_limits<int32_t>::max());
  for (const Piece& piece : pieces) {
    const auto [found, added] = file_of_.emplace(piece.file->path(), static_cast<int32_t>(files_.size()));
    if (added) files_.push_back(std::make_unique<FileReader>(*piece.file));
    Unit made;
    made.stack = static_cast<int32_t>(stacks_.size());
    made.file = found->second;
    made.offset = piece.offset;
    // Where addresses agree with offsets, whole blocks go from the disk to their place.
    if (piece.offset % alignment == 0) made.lead = piece.offset % page;
    units_.push_back(made);
  }
  const int64_t size = memory_for(bytes);
  const auto frames =
      std::find_if(frames_.begin(), frames_.end(), [&](const Frames& each) { return each.size == size; });
  stacks_.push_back({bytes, static_cast<size_t>(frames - frames_.begin())});
  if (frames == frames_.end()) frames_.push_back({.size = size, .empty = {}});
  frames_[stacks_.back().frames].pieces += count;
  figures_.pieces += count;
  figures_.memory += count * size;
  return first;
}

void Residency::start(int64_t budget) {
  const std::lock_guard lock(mutex_);
  LATENTE_ASSERT(figures_.budget == 0);
  figures_.budget = budget;
  for (Frames& frames : frames_) {
    const int64_t count = std::min(frames.pieces, budget / frames.size);
    LATENTE_ASSERT(count > 0);
    frames.reserved = static_cast<size_t>(count * frames.size);
    void* memory = ::mmap(nullptr, frames.reserved, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("out of memory: could not reserve {} bytes of addresses", frames.reserved);
    if (frames.reserved >= large) ::madvise(memory, frames.reserved, MADV_HUGEPAGE);
    frames.begin = static_cast<std::byte*>(memory);
    // The lowest first, so that large pages fill up.
    for (int64_t i = count; i-- > 0;) frames.empty.push_back(frames.begin + i * frames.size);
  }
}

const std::byte* Residency::at(int32_t piece) const {
  // What is kept does not change its place.
  const Unit& here = units_[static_cast<size_t>(piece)];
  return here.frame + here.lead;
}

// Least recently used first, those kept left out.
void Residency::append(int32_t piece) {
  Unit& last = unit(piece);
  last.before = newest_;
  last.after = -1;
  (newest_ >= 0 ? unit(newest_).after : oldest_) = piece;
  newest_ = piece;
}

void Residency::unlink(int32_t piece) {
  const Unit& gone = unit(piece);
  (gone.before >= 0 ? unit(gone.before).after : oldest_) = gone.after;
  (gone.after >= 0 ? unit(gone.after).before : newest_) = gone.before;
}

void Residency::drop_frame(int32_t piece) {
  Frames& frames = frames_of(piece);
  std::byte* const frame = std::exchange(unit(piece).frame, nullptr);
  figures_.resident -= frames.size;
  frames.empty.push_back(frame);
  drops_.push_back({frame, static_cast<size_t>(frames.size)});
}

// Memory for a piece: some that the budget has left, or that of those used least recently. False when all is
// kept or being read.
bool Residency::find_frame(int32_t piece) {
  Frames& frames = frames_of(piece);
  while (figures_.resident + frames.size > figures_.budget) {
    const int32_t oldest = oldest_;
    if (oldest < 0) return false;
    unlink(oldest);
    unit(oldest).state = State::absent;
    if (&frames_of(oldest) == &frames) {
      unit(piece).frame = std::exchange(unit(oldest).frame, nullptr);
      return true;
    }
    drop_frame(oldest);
  }
  LATENTE_ASSERT(!frames.empty.empty());
  unit(piece).frame = frames.empty.back();
  frames.empty.pop_back();
  figures_.resident += frames.size;
  return true;
}

int32_t Residency::chunks_of(int32_t piece) {
  const Unit& of = unit(piece);
  const int64_t end = of.offset + stack_of(piece).bytes;
  return static_cast<int32_t>((end - 1) / chunk_bytes - of.offset / chunk_bytes + 1);
}

void Residency::load(int32_t piece) {
  Unit& loaded = unit(piece);
  loaded.state = State::loading;
  loaded.failed = false;
  loaded.missing = chunks_of(piece);
  ++loading_;
  queue_.push_back(piece);
}

void Residency::expect(std::span<const int32_t> pieces) {
  const std::lock_guard lock(mutex_);
  expect_locked(pieces);
}

void Residency::expect_locked(std::span<const int32_t> pieces) {
  for (int32_t piece : expected_) {
    Unit& old = unit(piece);
    if (old.kept && old.state == State::ready) append(piece);
    old.expected = old.kept = false;
    if (old.state != State::loading) old.failed = false;
  }
  expected_.assign(pieces.begin(), pieces.end());
  for (int32_t piece : expected_) unit(piece).expected = true;
  ahead_ = 0;
  kept_ = 0;
  advance();
}

void Residency::advance() {
  keep_ahead();
  if (!queue_.empty() || !drops_.empty()) work_.notify_all();
}

void Residency::keep_ahead() {
  for (; ahead_ < expected_.size(); ++ahead_) {
    const int32_t piece = expected_[ahead_];
    Unit& next = unit(piece);
    const int64_t memory = frames_of(piece).size;
    if (!next.expected || next.kept) continue;
    if (kept_ + memory > figures_.budget) return;
    if (next.state == State::absent) {
      // What is still being read for nobody cannot be dropped, but will be.
      if (!find_frame(piece)) return;
      load(piece);
    } else {
      if (next.state == State::ready) unlink(piece);
      ++figures_.found;
    }
    ++figures_.wanted;
    next.kept = true;
    kept_ += memory;
  }
}

size_t Residency::await(std::span<int32_t> pieces) {
  LATENTE_ASSERT(!pieces.empty());
  std::unique_lock lock(mutex_);
  const auto all = [&](auto&& holds) { return std::all_of(pieces.begin(), pieces.end(), holds); };
  if (!all([&](int32_t piece) { return unit(piece).expected; })) expect_locked(pieces);
  const auto start = std::chrono::steady_clock::now();
  for (bool waited = false;; waited = true) {
    const auto there = std::partition(pieces.begin(), pieces.end(), [&](int32_t piece) {
      return unit(piece).kept && unit(piece).state == State::ready;
    });
    if (there != pieces.begin()) {
      if (waited)
        figures_.waited += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      return static_cast<size_t>(there - pieces.begin());
    }
    if (std::any_of(pieces.begin(), pieces.end(),
                    [&](int32_t piece) { return unit(piece).failed && unit(piece).state == State::absent; }))
      fail("{}", failure_);
    // Somebody uses pieces in another order than expected, and those before them are in the way.
    if (loading_ == 0 && all([&](int32_t piece) { return !unit(piece).kept; })) {
      expect_locked(pieces);
      continue;
    }
    done_.wait(lock);
    advance();
  }
}

void Residency::release(std::span<const int32_t> pieces) {
  const std::lock_guard lock(mutex_);
  for (int32_t piece : pieces) {
    Unit& used = unit(piece);
    LATENTE_ASSERT(used.kept && used.state == State::ready);
    used.expected = used.kept = false;
    kept_ -= frames_of(piece).size;
    append(piece);
  }
  advance();
}

void Residency::read_chunk(int32_t piece, int32_t chunk) {
  const Unit& of = unit(piece);
  const int64_t all = stack_of(piece).bytes;
  // Chunks end where the file's do, so that all but the ends are whole blocks.
  const int64_t first = of.offset / chunk_bytes + chunk;
  const int64_t begin = std::max(first * chunk_bytes, of.offset) - of.offset;
  const int64_t end = std::min((first + 1) * chunk_bytes - of.offset, all);
  files_[static_cast<size_t>(of.file)]->read(of.offset + begin,
                                             {of.frame + of.lead + begin, static_cast<size_t>(end - begin)});
}

// Its last chunk is read.
void Residency::finish(int32_t piece) {
  Unit& read = unit(piece);
  --loading_;
  if (read.failed) {
    read.state = State::absent;
    drop_frame(piece);
  } else {
    read.state = State::ready;
    figures_.bytes_read += stack_of(piece).bytes;
    if (!read.kept) append(piece);
  }
  if (!drops_.empty()) work_.notify_all();
  done_.notify_all();
}

void Residency::serve() {
  std::unique_lock lock(mutex_);
  while (true) {
    // Memory is given back before any is taken.
    work_.wait(lock, [&] { return ending_ || !drops_.empty() || (!queue_.empty() && dropping_ == 0); });
    if (ending_) return;
    if (!drops_.empty()) {
      const Drop drop = drops_.front();
      drops_.pop_front();
      ++dropping_;
      lock.unlock();
      ::madvise(drop.frame, drop.size, MADV_DONTNEED);
      lock.lock();
      if (--dropping_ == 0 && drops_.empty()) work_.notify_all();
      continue;
    }
    const int32_t piece = queue_.front(), chunk = next_chunk_++;
    if (next_chunk_ == chunks_of(piece)) {
      queue_.pop_front();
      next_chunk_ = 0;
    }
    std::string failure;
    lock.unlock();
    try {
      read_chunk(piece, chunk);
    } catch (const std::exception& error) {
      failure = error.what();
    }
    lock.lock();
    if (!failure.empty()) {
      unit(piece).failed = true;
      failure_ = std::move(failure);
    }
    if (--unit(piece).missing == 0) finish(piece);
  }
}

Residency::Figures Residency::figures() const {
  const std::lock_guard lock(mutex_);
  return figures_;
}

Residency::Figures Residency::Figures::since(const Figures& before) const {
  Figures now = *this;
  now.wanted -= before.wanted;
  now.found -= before.found;
  now.bytes_read -= before.bytes_read;
  now.waited -= before.waited;
  return now;
}

bool Residency::holds(int32_t piece) const {
  const std::lock_guard lock(mutex_);
  return units_[static_cast<size_t>(piece)].state == State::ready;
}

}  // namespace latente
