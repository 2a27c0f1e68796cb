// Hash tables for things that are kept once and known by number.
#pragma once

#include <cstdint>
#include <vector>

namespace latente::grammar {

inline uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9E3779B97F4A7C15;
  return hash ^ hash >> 32;
}

// Numbers by the hash of what they stand for.
class InternTable {
 public:
  // The number for which `same` holds, else the one that `add` returns.
  template <class Same, class Add>
  uint32_t find(uint64_t hash, Same same, Add add) {
    if (entries_ * 2 >= slots_.size()) grow();
    size_t at = hash & (slots_.size() - 1);
    for (; slots_[at].number != free_slot; at = (at + 1) & (slots_.size() - 1)) {
      if (slots_[at].hash == hash && same(slots_[at].number)) return slots_[at].number;
    }
    const uint32_t number = add();
    slots_[at] = {hash, number};
    ++entries_;
    return number;
  }
  void clear() {
    slots_.clear();
    entries_ = 0;
  }
  size_t memory_bytes() const { return slots_.size() * sizeof(Slot); }

 private:
  static constexpr uint32_t free_slot = 0xFFFFFFFF;
  struct Slot {
    uint64_t hash = 0;
    uint32_t number = free_slot;
  };
  void grow() {
    std::vector<Slot> old(slots_.empty() ? 64 : slots_.size() * 2);
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.number == free_slot) continue;
      size_t at = slot.hash & (slots_.size() - 1);
      while (slots_[at].number != free_slot) at = (at + 1) & (slots_.size() - 1);
      slots_[at] = slot;
    }
  }
  std::vector<Slot> slots_;  // a power of two
  size_t entries_ = 0;
};

// Triples seen since the last clear(), which takes no time.
class FrameSet {
 public:
  void clear() {
    ++round_;
    entries_ = 0;
  }
  // False if it was there.
  bool insert(uint32_t a, uint32_t b, uint32_t c) {
    if (entries_ * 2 >= slots_.size()) grow();
    Slot* slot = place(a, b, c);
    if (slot->round == round_) return false;
    *slot = {a, b, c, round_};
    ++entries_;
    return true;
  }
  size_t memory_bytes() const { return slots_.size() * sizeof(Slot); }

 private:
  struct Slot {
    uint32_t a = 0, b = 0, c = 0;
    uint64_t round = 0;
  };
  Slot* place(uint32_t a, uint32_t b, uint32_t c) {
    size_t at = mix(mix(mix(0, a), b), c) & (slots_.size() - 1);
    while (slots_[at].round == round_ && !(slots_[at].a == a && slots_[at].b == b && slots_[at].c == c))
      at = (at + 1) & (slots_.size() - 1);
    return &slots_[at];
  }
  void grow() {
    std::vector<Slot> old(slots_.empty() ? 64 : slots_.size() * 2);
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.round == round_) *place(slot.a, slot.b, slot.c) = slot;
    }
  }
  std::vector<Slot> slots_;
  uint64_t round_ = 1;
  size_t entries_ = 0;
};

}  // namespace latente::grammar
