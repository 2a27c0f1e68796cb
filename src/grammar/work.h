// How much may be done for one schema, and for one text.
#pragma once

#include <cstdint>

#include "base/error.h"

namespace latente::grammar {

// A text needs more of something than there is for it: the grammar is too ambiguous, or nests too deep.
class TooMuch : public Error {
 public:
  using Error::Error;
};

// Steps take some 10 to 50 ns each: members that are copied, states and edges that are made.
class Work {
 public:
  static constexpr uint64_t most = uint64_t{1} << 23;

  // Error: it is too much.
  void spend(uint64_t steps) {
    if (steps > left_) fail("more than {} steps are needed to compile it", most);
    left_ -= steps;
  }

 private:
  uint64_t left_ = most;
};

}  // namespace latente::grammar
