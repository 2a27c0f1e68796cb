#include "model/converted_source.h"

#include <algorithm>

#include "checkpoint/copy.h"
#include "model/converted.h"
#include "model/quantised_places.h"

namespace latente {

DecodedSource::DecodedSource(const Config& config, std::unique_ptr<TensorSource> converted, Backend& backend)
    : converted_(std::move(converted)) {
  Transformer model(config, DType::f32);
  const QuantisedPlaces plan = quantised_places(model, backend, options_of(config.converted));
  check_converted_names(plan, *converted_);
  for (const QuantisedPlace& place : plan.places) {
    if (place.stride > 0) continue;  // kv_b_proj holds the same
    const MappedTensor stored = mapped_panels(place, *converted_, backend);
    const quantised::Form form{place.view.dtype == DType::q8 ? 8 : 4, place.view.group};
    const int64_t matrix = quantised::bytes(form, place.rows(), place.columns());
    LATENTE_ASSERT(matrix * place.matrices() == place.bytes);
    for (int64_t i = 0; i < place.matrices(); ++i) {
      panels_.emplace(place.source_of(i), Panels{place.path + std::string(panels_suffix), stored.owner,
                                                 static_cast<const std::byte*>(stored.view.data) + i * matrix,
                                                 Shape{place.rows(), place.columns()}, form});
    }
  }
}

const DecodedSource::Panels* DecodedSource::find(std::string_view name) const {
  const auto found = panels_.find(name);
  return found == panels_.end() ? nullptr : &found->second;
}

bool DecodedSource::contains(std::string_view name) const { return find(name) || converted_->contains(name); }

std::vector<std::string> DecodedSource::names() const {
  std::vector<std::string> names;
  for (const auto& [name, panels] : panels_) names.push_back(name);
  for (const std::string& name : converted_->names()) {
    if (!name.ends_with(panels_suffix)) names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

const std::string& DecodedSource::file_of(std::string_view name) const {
  const Panels* panels = find(name);
  return converted_->file_of(panels ? panels->name : name);
}

std::optional<DType> DecodedSource::dtype_in_file(std::string_view name) const {
  if (find(name)) return std::nullopt;
  return converted_->dtype_in_file(name);
}

void DecodedSource::read(const std::string& name, const View& target) const {
  if (!find(name)) return converted_->read(name, target);
  LATENTE_ASSERT(target.shape.rank() == 2);
  read_rows(name, target[0], 0, target);
}

void DecodedSource::read_rows(const std::string& name, int64_t rows, int64_t first,
                              const View& target) const {
  const Panels* panels = find(name);
  if (!panels) return converted_->read_rows(name, rows, first, target);
  const int64_t k = target[1];
  if (panels->shape != Shape{rows, k})
    fail("{}: expected {}, found {} in {}", name, Shape{rows, k}.str(), panels->shape.str(), file_of(name));
  std::vector<float> values(static_cast<size_t>(target[0] * k));
  quantised::unpack(panels->form, panels->data, k, first, target[0], values.data());
  copy_into(DType::f32, reinterpret_cast<const std::byte*>(values.data()), target, name);
}

std::optional<MappedTensor> DecodedSource::map(std::string_view name) const {
  if (find(name)) return std::nullopt;
  return converted_->map(name);
}

void DecodedSource::release(std::string_view name) const {
  const Panels* panels = find(name);
  converted_->release(panels ? panels->name : name);
}

ModelSource open_decoded(const std::string& path, Backend& backend) {
  ModelSource source = open_model(path);
  if (!source.config.converted) return source;
  source.tensors = std::make_unique<DecodedSource>(source.config, std::move(source.tensors), backend);
  source.config.converted = {};
  return source;
}

}  // namespace latente
