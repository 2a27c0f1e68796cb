// What every kernel's launch is given: where to queue, where partial results may go, what the device is.
#pragma once

#include <cstdint>

#include "cuda/stream.h"

namespace latente::cuda {

struct Context {
  StreamHandle stream = nullptr;
  // Scratch that kernels of one stream share, each for the time of its own call; allocated once.
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
  int* taken = nullptr;  // HopperProduct::taken
  int multiprocessors = 0;
  int compute_capability = 0;  // 90 for Hopper
  int shared_bytes = 0;        // that a block can have at most
};

}  // namespace latente::cuda
