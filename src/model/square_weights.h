// Weights in FP8 with a scale for squares of 128 × 128, as DeepSeek-V3 is released, kept so by a device that
// knows the form (Backend::quantised).
#pragma once

#include <functional>
#include <limits>

#include "checkpoint/tensor_source.h"
#include "model/transformer.h"

namespace latente {

// Whether the model's device keeps FP8 at all.
bool keeps_squares(const Backend& backend);

// Loads every parameter to the backend's device: matrices that are stored in such squares as they are; or
// with `quantise` all that a release has so, rounded where they are stored otherwise. That leaves out
// embeddings, head, routers, an MTP module's eh_proj, and the latent's up-projection, which absorbed
// attention reads along the other axis. The model's type must be bfloat16. Error where load_parameters has
// one, when a value to be rounded is not finite, and when weights take more than `memory`.
struct SquareOptions {
  bool quantise = false;
  int64_t memory = std::numeric_limits<int64_t>::max();
  std::function<void(int64_t done, int64_t total)> progress{};
};
void load_with_squares(Transformer& model, const TensorSource& checkpoint, Backend& backend,
                       const SquareOptions& options = {});

// Random weights, to see how fast a model of this shape would be.
void initialise_with_squares(Transformer& model, uint64_t seed, Backend& backend);

}  // namespace latente
