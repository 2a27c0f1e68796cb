#include "model/run_weights.h"

#include <algorithm>
#include <map>

#include "base/memory.h"
#include "model/background_layout.h"
#include "model/converted.h"
#include "model/experts_on_demand.h"
#include "model/figures.h"
#include "model/fp8_weights.h"
#include "model/gguf.h"
#include "model/quantised.h"
#include "model/quantised_places.h"
#include "model/square_weights.h"
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
  if (weights.type == "fp8") return DType::bf16;  // of what is not
  const std::optional<DType> type = dtype_from_name(weights.type);
  if (type != DType::f32 && type != DType::bf16 && type != DType::f64)
    fail("weights: expected auto, f32, bf16, f64, fp8, int8 or int4, found {}", weights.type);
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
    const std::string_view name = type == DType::q8       ? "int8"
                                  : is_quantised(type)    ? "int4"
                                  : type == DType::f8e4m3 ? "fp8"
                                                          : name_of(type);
    elements[std::string(name)] += tensor.count();
  });
  std::vector<std::pair<int64_t, std::string>> sorted;
  for (const auto& [name, count] : elements) sorted.emplace_back(-count, name);
  std::sort(sorted.begin(), sorted.end());
  std::vector<std::string> names;
  for (const auto& [count, name] : sorted) names.push_back(name);
  return fmt::format("{}", fmt::join(names, ", "));
}

namespace {

int64_t default_memory(const Backend& backend) {
  const int64_t available = backend.available_memory();
  return available - std::min(std::max(available / 8, int64_t{1} << 30), available / 2);
}

// Bytes that copies of weights may take beside these: what is mapped or freed then makes room again, and one
// row reads bfloat16 as it lies at little more than half the speed.
int64_t most_to_pack() { return available_memory() / 4 * 3; }

// Weights that have to be in memory as a whole.
void check_whole(const RunWeights& weights, int64_t bytes) {
  if (weights.memory == 0 || bytes <= weights.memory) return;
  fail(
      "memory: expected at least {} for these weights, found {}; experts of a model that latente convert "
      "wrote "
      "are read as they are needed",
      bytes_text(static_cast<double>(bytes)), bytes_text(static_cast<double>(weights.memory)));
}

// Smaller models are laid out within some tenths of a second, and products that make panels themselves would
// lose more than that.
bool worth_laying_out_later(const Config& config, const Backend& backend) {
  constexpr int64_t parameters = int64_t{1} << 28;
  return backend.is_host() && count_parameters(config).total >= parameters;
}

// The stacks of a model's routed experts where they can be read as they lie; nothing where they cannot.
std::vector<ExpertStack> stacks_in(Transformer& model, const TensorSource& checkpoint) {
  std::vector<ExpertStack> stacks;
  bool all = true;
  model.for_each([&](const std::string& path, Tensor& tensor) {
    if (!is_expert_stack(path)) return;
    ExpertStack stack{path, tensor, tensor.view(), tensor[1] * tensor[2] * size_of(tensor.dtype()), {}};
    for (int64_t e = 0; all && e < tensor[0]; ++e) {
      const std::string name = expert_path(path, e);
      const std::optional<MappedTensor> mapped =
          checkpoint.contains(name) ? checkpoint.map(name) : std::nullopt;
      all = mapped && mapped->file && mapped->view.dtype == tensor.dtype() &&
            mapped->view.shape == Shape{tensor[1], tensor[2]};
      if (all) stack.pieces.push_back(piece_of(*mapped));
    }
    stacks.push_back(std::move(stack));
  });
  if (!all) stacks.clear();
  return stacks;
}

// later: or null.
void load_floating(Transformer& model, const TensorSource& checkpoint, const RunWeights& weights,
                   Backend& backend, BackgroundLayout* later) {
  LoadOptions how;
  how.map_where_possible = true;
  how.device = &backend;
  const int64_t memory = weights.memory > 0 ? weights.memory : default_memory(backend);
  int64_t all = 0;
  model.for_each(
      [&](const std::string&, Tensor& tensor) { all += tensor.count() * size_of(tensor.dtype()); });
  const std::vector<ExpertStack> stacks =
      all > memory && backend.is_host() ? stacks_in(model, checkpoint) : std::vector<ExpertStack>();
  if (stacks.empty()) {
    check_whole(weights, all);
    if (later && packed_bytes(model, backend) <= most_to_pack()) {
      how.without_experts = !stacks_in(model, checkpoint).empty();
      load_parameters(model, checkpoint, how);
      pack_weights(model, backend, checkpoint, *later);
      return later->start();
    }
    load_parameters(model, checkpoint, how);
    pack_weights(model, backend, most_to_pack());
    return;
  }
  int64_t every_token = all;
  for (const ExpertStack& stack : stacks) every_token -= stack.tensor[0] * stack.bytes;
  check_memory(memory, every_token, least_expert_memory(stacks, model.config().num_experts_per_tok));
  how = {};
  how.without_experts = true;
  load_parameters(model, checkpoint, how);
  read_on_demand(stacks, memory - every_token);
  pack_weights(model, backend);
}

}  // namespace

std::unique_ptr<Transformer> load_for_running(const ModelSource& source, const RunWeights& weights,
                                              Backend& backend) {
  constexpr uint64_t seed = 1;
  if (!backend.is_host() && runs_as_stored(source, weights)) {
    RunWeights decoded = weights;
    decoded.type = "bf16";
    return load_for_running(source, decoded, backend);
  }
  std::shared_ptr<BackgroundLayout> later;
  if (!weights.copied && worth_laying_out_later(source.config, backend))
    later = std::make_shared<BackgroundLayout>();
  const bool narrow = quantised_type(source, weights).has_value();
  const DType type = narrow && !backend.is_host() ? DType::bf16 : base_type(source, weights);
  auto model = std::make_unique<Transformer>(source.config, type);
  if (source.config.converted && source.tensors) {
    ConvertedOptions how;
    how.memory = weights.memory > 0 ? weights.memory : default_memory(backend);
    how.else_mapped = weights.memory == 0;
    how.copied = weights.copied;
    load_converted(*model, *source.tensors, backend, how);
    return model;
  }
  if (runs_as_stored(source, weights)) {
    if (weights.memory > 0) check_whole(weights, stored_places(*model, backend, *source.tensors).bytes());
    load_as_stored(*model, *source.tensors, backend, most_to_pack(), later.get());
    if (later) later->start();
    return model;
  }
  if (const auto codes = quantised_type(source, weights)) {
    const QuantisedOptions how{
        .type = *codes, .group = weights.group > 0 ? weights.group : default_group, .progress = {}};
    if (weights.memory > 0) check_whole(weights, quantised_places(*model, backend, how).bytes());
    if (source.tensors) {
      load_quantised(*model, *source.tensors, backend, how);
    } else {
      initialise_quantised(*model, seed, backend, how);
    }
    return model;
  }
  const bool fp8 = weights.type == "fp8", as_stored = weights.type == "auto";
  if (fp8 && !source.tensors) {
    keeps_squares(backend) ? initialise_with_squares(*model, seed, backend)
                           : initialise_fp8(*model, seed, backend);
    return model;
  }
  if (source.tensors && keeps_squares(backend) && (fp8 || (as_stored && type == DType::bf16))) {
    SquareOptions how;
    how.quantise = fp8;
    how.memory = weights.memory > 0 ? weights.memory : default_memory(backend);
    load_with_squares(*model, *source.tensors, backend, how);
    return model;
  }
  if (source.tensors && (fp8 || as_stored) && runs_fp8(*source.tensors, backend)) {
    if (weights.memory > 0) check_whole(weights, fp8_bytes(*model, *source.tensors, backend));
    load_fp8(*model, *source.tensors, backend, later.get());
    if (later) later->start();
    return model;
  }
  if (fp8)
    fail("weights: {} runs FP8 with a scale for each 128 rows and columns as it is stored, and here is none",
         backend.name());
  if (source.tensors) {
    load_floating(*model, *source.tensors, weights, backend, later.get());
    return model;
  }
  allocate_parameters(*model);
  const double deviation = source.config.initializer_range;
  model->for_each(
      [&](const std::string& path, Tensor& tensor) { initialise_quickly(path, tensor, deviation, seed); });
  move_parameters(*model, backend);
  pack_weights(*model, backend, most_to_pack());
  return model;
}

}  // namespace latente
