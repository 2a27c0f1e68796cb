#include "model/converted.h"

#include <cstring>
#include <set>

#include "base/large_pages.h"
#include "base/memory.h"
#include "model/experts_on_demand.h"
#include "model/quantised_places.h"
#include "model/weights.h"
#include "tensor/device.h"
#include "tensor/panels.h"

namespace latente {
namespace {

constexpr int64_t line = 64;  // bytes: what panels are aligned to

int64_t aligned(int64_t bytes) { return (bytes + line - 1) / line * line; }

// Mapped files, whose pages become large ones while the model runs.
struct MovingFiles {
  explicit MovingFiles(const std::vector<MappedTensor>& tensors) {
    std::set<const MappedFile*> files;
    std::vector<std::span<const std::byte>> ranges;
    for (const MappedTensor& tensor : tensors) {
      if (!tensor.file || !files.insert(tensor.file).second) continue;
      tensor.file->keep_pages();
      owners.push_back(tensor.owner);
      ranges.push_back(tensor.file->bytes());
    }
    pages.emplace(std::move(ranges));
  }

  std::vector<std::shared_ptr<void>> owners;
  std::optional<LargePages> pages;  // first to go
};

void copy_by_all(ThreadPool& pool, const void* from, void* to, int64_t bytes) {
  pool.parallel_for(bytes, int64_t{4} << 20, [&](int64_t begin, int64_t end) {
    std::memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin,
                static_cast<size_t>(end - begin));
  });
}

ExpertStack stack_of(const QuantisedPlace& place, const MappedTensor& stored) {
  ExpertStack stack{place.path, place.tensor, place.view, place.bytes / place.matrices(), {}};
  for (int64_t e = 0; e < place.matrices(); ++e) stack.pieces.push_back(piece_of(stored, e * stack.bytes));
  return stack;
}

}  // namespace

void check_converted_names(const QuantisedPlaces& plan, const TensorSource& checkpoint) {
  std::set<std::string> expected;
  for (const QuantisedPlace& place : plan.places) expected.insert(place.path + std::string(panels_suffix));
  for (const auto& [path, tensor] : plan.kept) expected.insert(path);
  for (const std::string& name : checkpoint.names()) {
    if (!expected.contains(name))
      fail("{}: the converted model has no tensor {}", checkpoint.file_of(name), name);
  }
}

MappedTensor mapped_panels(const QuantisedPlace& place, const TensorSource& checkpoint, Backend& backend) {
  const std::string name = place.path + std::string(panels_suffix);
  const Shape expected = stored_shape(place, backend);
  const std::optional<MappedTensor> mapped = checkpoint.map(name);
  if (!mapped || mapped->view.dtype != DType::u8 || mapped->view.shape != expected) {
    fail("{}: expected U8 {}, found {} in {}", name, expected.str(),
         mapped ? fmt::format("{} {}", name_of(mapped->view.dtype), mapped->view.shape.str())
                : "another type or rank",
         checkpoint.file_of(name));
  }
  return *mapped;
}

QuantisedOptions options_of(const ConvertedConfig& converted) {
  LATENTE_ASSERT(converted);
  QuantisedOptions options;
  options.type = converted.bits == 8 ? DType::q8 : DType::q4;
  options.mtp = converted.mtp_bits == 8 ? DType::q8 : DType::q4;
  options.group = converted.group_size;
  return options;
}

Shape stored_shape(const QuantisedPlace& place, Backend& backend) {
  const View& view = place.view;
  const int64_t panel =
      backend.quantised({quantised::panel_rows, place.columns()}, view.dtype, view.group)->bytes;
  const int64_t panels = (place.rows() + quantised::panel_rows - 1) / quantised::panel_rows;
  LATENTE_ASSERT(place.matrices() * panels * panel == place.bytes);
  if (view.shape.rank() == 2) return {panels, panel};
  return {place.matrices(), panels, panel};
}

void load_converted(Transformer& model, const TensorSource& checkpoint, Backend& backend,
                    const ConvertedOptions& options) {
  const QuantisedPlaces plan = quantised_places(model, backend, options_of(model.config().converted));
  check_converted_names(plan, checkpoint);
  int64_t done = 0;
  const auto total = static_cast<int64_t>(plan.places.size() + plan.kept.size());
  const auto step = [&] {
    ++done;
    if (options.progress) options.progress(done, total);
  };
  ThreadPool pool;
  if (!backend.is_host()) {
    if (plan.bytes() > options.memory) {
      fail("memory: expected at least {} for these weights on {}, found {}",
           bytes_text(static_cast<double>(plan.bytes())), backend.name(),
           bytes_text(static_cast<double>(options.memory)));
    }
    for (const QuantisedPlace& place : plan.places) {
      take_panels(place, mapped_panels(place, checkpoint, backend).view.data, backend);
      checkpoint.release(place.path + std::string(panels_suffix));
      step();
    }
    for (const auto& [path, tensor] : plan.kept) {
      load_parameter(path, tensor, checkpoint, true, pool);
      move_to(backend, tensor);
      step();
    }
    for (auto& [path, gate] : model.gates()) allocate(backend, gate->load);
    return;
  }
  std::vector<MappedTensor> stored;
  std::vector<ExpertStack> stacks;
  bool is_aligned = true;  // unless another program laid the file out
  int64_t of_experts = 0, of_others = 0;
  for (const QuantisedPlace& place : plan.places) {
    stored.push_back(mapped_panels(place, checkpoint, backend));
    is_aligned &= reinterpret_cast<uintptr_t>(stored.back().view.data) % line == 0;
    const bool experts = is_expert_stack(place.path) && stored.back().file;
    (experts ? of_experts : of_others) += aligned(place.bytes);
    if (experts) stacks.push_back(stack_of(place, stored.back()));
  }
  for (const auto& [path, tensor] : plan.kept) of_others += tensor.count() * size_of(tensor.dtype());

  bool fits = true, on_demand = false;
  if (of_others + of_experts > options.memory) {
    const int64_t least = least_expert_memory(stacks, model.config().num_experts_per_tok);
    on_demand = !stacks.empty() && of_others + least <= options.memory;
    fits = on_demand || !options.else_mapped || !is_aligned;
    if (!on_demand && !options.else_mapped) check_memory(options.memory, of_others, least);
  }
  const bool copied = !is_aligned || on_demand || (fits && options.copied);
  std::shared_ptr<MovingFiles> moving;
  if (!copied && fits) moving = std::make_shared<MovingFiles>(stored);
  if (on_demand) read_on_demand(stacks, options.memory - of_others);

  int64_t bytes = 0;
  const auto is_copied = [&](const QuantisedPlace& place) {
    return copied && !place.tensor.view().residency;
  };
  for (const QuantisedPlace& place : plan.places) bytes += is_copied(place) ? aligned(place.bytes) : 0;
  const std::shared_ptr<void> memory = bytes > 0 ? backend.allocate(bytes) : nullptr;
  auto* at = static_cast<char*>(memory.get());
  for (size_t i = 0; i < plan.places.size(); ++i, step()) {
    const QuantisedPlace& place = plan.places[i];
    if (place.tensor.view().residency) continue;
    View view = place.view;
    view.data = stored[i].view.data;
    if (copied) {
      copy_by_all(pool, view.data, at, place.bytes);
      checkpoint.release(place.path + std::string(panels_suffix));
      view.data = at;
      at += aligned(place.bytes);
    }
    bind_view(place.tensor, view, copied ? memory : moving ? moving : stored[i].owner);
  }
  for (const auto& [path, tensor] : plan.kept) {
    load_parameter(path, tensor, checkpoint, !on_demand, pool);
    step();
  }
  for (auto& [path, gate] : model.gates()) allocate(gate->load);
  pack_weights(model, backend);
}

}  // namespace latente
