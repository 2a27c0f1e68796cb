#include "model/run_weights.h"

#include "base/memory.h"
#include "model/quantised.h"
#include "model/weights.h"

namespace latente {
namespace {

DType base_type(const RunWeights& weights, const TensorSource* tensors) {
  const DType stored = tensors ? stored_type(*tensors) : DType::bf16;
  if (weights.type == "auto") return stored;
  // Activations that meet quantised weights are float32.
  if (weights.quantised()) return stored == DType::f64 ? DType::f32 : stored;
  const std::optional<DType> type = dtype_from_name(weights.type);
  if (type != DType::f32 && type != DType::bf16 && type != DType::f64)
    fail("weights: expected auto, f32, bf16, f64, int8 or int4, found {}", weights.type);
  return *type;
}

}  // namespace

std::optional<DType> RunWeights::quantised() const {
  if (type == "int8") return DType::q8;
  if (type == "int4") return DType::q4;
  return std::nullopt;
}

std::unique_ptr<Transformer> load_for_running(const ModelSource& source, const RunWeights& weights,
                                              Backend& backend) {
  constexpr uint64_t seed = 1;
  auto model = std::make_unique<Transformer>(source.config, base_type(weights, source.tensors.get()));
  if (const auto type = weights.quantised()) {
    const QuantisedOptions how{.type = *type, .group = weights.group, .progress = {}};
    if (source.tensors) {
      load_quantised(*model, *source.tensors, backend, how);
    } else {
      initialise_quantised(*model, seed, backend, how);
    }
    return model;
  }
  if (source.tensors) {
    LoadOptions how;
    how.map_where_possible = true;
    load_parameters(*model, *source.tensors, how);
  } else {
    allocate_parameters(*model);
    initialise(*model, seed);
  }
  pack_weights(*model, backend, available_memory() / 2);
  return model;
}

}  // namespace latente
