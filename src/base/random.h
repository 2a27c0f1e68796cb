// Random numbers from a counter: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy
// as 1, 2, 3", SC 2011). A number is a pure function of (seed, stream, position), so that any part of a
// sequence can be made anywhere, in any order, on any number of threads, and a generator's whole state is
// three integers.
//
// Integers and uniforms are the same on every platform. Normals go through the C library's log, sin and cos
// in double precision: the same on one machine, and equal up to the last bit of a double between machines.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <utility>

#include "base/fields.h"

namespace latente {

// One block: ten rounds over a 128-bit counter with a 64-bit key.
std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

// Where a generator stands. The position counts the 32-bit words drawn so far.
struct RandomState {
  uint64_t seed = 0;
  uint64_t stream = 0;
  uint64_t position = 0;

  FIELDS(seed, stream, position)
  bool operator==(const RandomState&) const = default;
};

// A sequence of its own for every (seed, stream). Also a UniformRandomBitGenerator.
class Random {
 public:
  explicit Random(uint64_t seed, uint64_t stream = 0) : Random(RandomState{seed, stream, 0}) {}
  explicit Random(const RandomState& state) : state_(state) {}

  const RandomState& state() const { return state_; }
  void seek(uint64_t position) { state_.position = position; }

  uint32_t next_u32();
  uint64_t next_u64();  // two words

  double uniform();                                // [0, 1), a multiple of 2^-53; two words
  double uniform(double low, double high);         // [low, high)
  double normal();                                 // mean 0, deviation 1; four words
  uint64_t below(uint64_t bound);                  // [0, bound), every value equally likely; bound > 0
  int64_t between(int64_t low, int64_t high);      // [low, high], both included
  bool chance(double p) { return uniform() < p; }  // true with probability p

  template <class T>
  void shuffle(std::span<T> items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(i)]);
  }

  using result_type = uint64_t;
  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return ~uint64_t{0}; }
  uint64_t operator()() { return next_u64(); }

 private:
  RandomState state_;
  uint64_t cached_block_ = ~uint64_t{0};  // the block whose words stand in words_
  std::array<uint32_t, 4> words_{};
};

// Elements first, first + 1, ... of the (seed, stream) sequences of independent numbers: however the range is
// cut into calls, element i has the same value.
void fill_normal(std::span<float> out, uint64_t seed, uint64_t stream, uint64_t first = 0, double mean = 0,
                 double deviation = 1);
void fill_uniform(std::span<float> out, uint64_t seed, uint64_t stream, uint64_t first = 0, double low = 0,
                  double high = 1);

}  // namespace latente
