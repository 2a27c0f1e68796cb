#include "model/converted.h"

#include <cstring>
#include <set>

#include "model/quantised_places.h"
#include "model/weights.h"
#include "tensor/panels.h"

namespace latente {
namespace {

constexpr int64_t line = 64;  // bytes: what panels are aligned to

int64_t aligned(int64_t bytes) { return (bytes + line - 1) / line * line; }

void copy_by_all(ThreadPool& pool, const void* from, void* to, int64_t bytes) {
  pool.parallel_for(bytes, int64_t{4} << 20, [&](int64_t begin, int64_t end) {
    std::memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin,
                static_cast<size_t>(end - begin));
  });
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
  int64_t bytes = 0, done = 0;
  const auto total = static_cast<int64_t>(plan.places.size() + plan.kept.size());
  const auto step = [&] {
    ++done;
    if (options.progress) options.progress(done, total);
  };
  std::vector<MappedTensor> stored;
  bool copied = false;
  for (const QuantisedPlace& place : plan.places) {
    stored.push_back(mapped_panels(place, checkpoint, backend));
    bytes += aligned(place.bytes);
    // Another program may have laid the file out.
    copied |= reinterpret_cast<uintptr_t>(stored.back().view.data) % line != 0;
  }
  copied |= bytes <= options.most_copied;
  ThreadPool pool;
  const std::shared_ptr<void> memory = copied ? backend.allocate(bytes) : nullptr;
  auto* at = static_cast<char*>(memory.get());
  for (size_t i = 0; i < plan.places.size(); ++i) {
    const QuantisedPlace& place = plan.places[i];
    View view = place.view;
    view.data = stored[i].view.data;
    if (copied) {
      copy_by_all(pool, view.data, at, place.bytes);
      checkpoint.release(place.path + std::string(panels_suffix));
      view.data = at;
      at += aligned(place.bytes);
    }
    bind_view(place.tensor, view, copied ? memory : stored[i].owner);
    step();
  }
  for (const auto& [path, tensor] : plan.kept) {
    load_parameter(path, tensor, checkpoint, true, pool);
    step();
  }
  for (auto& [path, gate] : model.gates()) allocate(gate->load);
  pack_weights(model, backend);
}

}  // namespace latente
