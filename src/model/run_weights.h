// A model for running alone: its weights in the form that runs fastest, from a checkpoint or at random.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "model/model_source.h"
#include "model/transformer.h"

namespace latente {

struct RunWeights {
  // "auto" (as stored, see load_as_stored for GGUF files; bf16 for random weights), "f32", "bf16", "f64";
  // "int8" and "int4" quantise (see model/quantised.h), and what they leave out is then as stored; "fp8"
  // keeps FP8 (model/fp8_weights.h), on a GPU also rounds to it (model/square_weights.h). A converted model
  // (model/converted.h) only runs as it is stored. "auto" keeps FP8 as FP8. On a GPU what meets quantised
  // weights is bfloat16.
  std::string type = "auto";
  int64_t group = 0;  // of int8 and int4; 0 = as stored, else default_group
  // Bytes that weights may take. When they are more, and lie in safetensors in the form that they run in,
  // routed experts are read when they are chosen (model/experts_on_demand.h). 0 = what is available, less a
  // margin for the cache, activations and others; then weights that cannot be held to it are loaded all the
  // same.
  int64_t memory = 0;
  // Weights are where they will stay when load_for_running returns, instead of being there at once and moving
  // there while the model runs (ConvertedOptions, model/background_layout.h): for much work, and to measure.
  bool copied = false;
};

// The type that quantised weights will have: q8 or q4; nothing for weights that are not, or in forms of their
// own (runs_as_stored). Error where a converted model is asked to be another.
std::optional<DType> quantised_type(const ModelSource& source, const RunWeights& weights);

// Whether the weights are run in the blocks that they are stored in.
bool runs_as_stored(const ModelSource& source, const RunWeights& weights);

// The type of what is neither quantised nor run as stored.
DType base_type(const ModelSource& source, const RunWeights& weights);

// The types of the matrices that products read, those with the most elements first: "bf16", "int4, int8".
std::string type_text(Transformer& model);

// Without source.tensors the weights are random: to see how fast a model of this shape would be. Error for
// other names of types, where loading has one, and when weights.memory is too little.
std::unique_ptr<Transformer> load_for_running(const ModelSource& source, const RunWeights& weights,
                                              Backend& backend);

}  // namespace latente
