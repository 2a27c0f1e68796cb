#include "model/run_weights.h"

#include <algorithm>
#include <map>

#include "base/memory.h"
#include "model/converted.h"
#include "model/gguf.h"
#include "model/quantised.h"
#include "model/weights.h"
#include "tensor/quantise.h"

namespace latente {

std::optional<DType> quantised_type(const ModelSource& source, const RunWeights& weights) {
  std::optional<DType> asked;
  if (weights.type == "int8") asked = DType::q8;
  if (weights.type == "int4") asked = DType::q4;
  const ConvertedConfig& converted = source.config.converted;
  if (!converted) return asked;
  const DType stored = converted.bits == 8 ? DType::q8 : DType::q4;
  if (weights.type != "auto" && asked != stored)
    fail("weights: the model was converted to int{} and cannot be run as {}", converted.bits, weights.type);
  if (weights.group > 0 && weights.group != converted.group_size)
    fail("weights: the model was converted with groups of {}, and {} are asked for", converted.group_size,
         weights.group);
  return stored;
}

bool runs_as_stored(const ModelSource& source, const RunWeights& weights) {
  return weights.type == "auto" && dynamic_cast<const GgufCheckpoint*>(source.tensors.get());
}

DType base_type(const ModelSource& source, const RunWeights& weights) {
  if (runs_as_stored(source, weights)) return DType::f32;
  const DType stored = source.tensors ? stored_type(*source.tensors) : DType::bf16;
  // Activations that meet quantised weights are float32.
  if (quantised_type(source, weights)) return stored == DType::f64 ? DType::f32 : stored;
  if (weights.type == "auto") return stored;
  const std::optional<DType> type = dtype_from_name(weights.type);
  if (type != DType::f32 && type != DType::bf16 && type != DType::f64)
    fail("weights: expected auto, f32, bf16, f64, int8 or int4, found {}", weights.type);
  return *type;
}

std::string type_text(Transformer& model) {
  std::map<std::string, int64_t> elements;
  model.for_each([&](const std::string& path, const Tensor& tensor) {
    const bool looked_up = model.lm_head && path == "model.embed_tokens.weight";
    if (tensor.shape().rank() < 2 || looked_up || path.ends_with("mlp.gate.weight") ||
        path.ends_with("eh_proj.weight"))
      return;
    const DType type = tensor.dtype();
    const std::string_view name = type == DType::q8 ? "int8" : is_quantised(type) ? "int4" : name_of(type);
    elements[std::string(name)] += tensor.count();
  });
  std::vector<std::pair<int64_t, std::string>> sorted;
  for (const auto& [name, count] : elements) sorted.emplace_back(-count, name);
  std::sort(sorted.begin(), sorted.end());
  std::vector<std::string> names;
  for (const auto& [count, name] : sorted) names.push_back(name);
  return fmt::format("{}", fmt::join(names, ", "));
}

std::unique_ptr<Transformer> load_for_running(const ModelSource& source, const RunWeights& weights,
                                              Backend& backend) {
  constexpr uint64_t seed = 1;
  auto model = std::make_unique<Transformer>(source.config, base_type(source, weights));
  if (source.config.converted && source.tensors) {
    load_converted(*model, *source.tensors, backend, {.most_copied = available_memory() / 2});
    return model;
  }
  if (runs_as_stored(source, weights)) {
    load_as_stored(*model, *source.tensors, backend, available_memory() / 2);
    return model;
  }
  if (const auto type = quantised_type(source, weights)) {
    const QuantisedOptions how{
        .type = *type, .group = weights.group > 0 ? weights.group : default_group, .progress = {}};
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
