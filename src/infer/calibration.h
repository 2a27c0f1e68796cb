// Which columns of each matrix matter: the mean square of what they are multiplied with, over a text.
#pragma once

#include <functional>
#include <span>

#include "model/importance.h"
#include "model/transformer.h"

namespace latente {

struct CalibrationOptions {
  int64_t context = 512;  // tokens read at once, without a cache
  // Called after each reading with the number of tokens done and the total; may be empty.
  std::function<void(int64_t done, int64_t total)> progress{};
};

// Of the main model's matrices, experts one by one; those that no token met are left out. The model must not
// be quantised. Error for a text shorter than one reading.
Importance calibrate(Backend& backend, const Transformer& model, std::span<const int32_t> tokens,
                     const CalibrationOptions& options = {});

}  // namespace latente
