#include "model/quantised.h"

#include <algorithm>

#include "base/random.h"
#include "model/quantised_places.h"
#include "model/weights.h"

namespace latente {
namespace {

// Codes drawn once and used again and again, from another place for each few rows.
class RandomPanels final : public QuantisedPanels {
 public:
  RandomPanels(Backend& backend, const Transformer& model, uint64_t seed)
      : QuantisedPanels(backend), seed_(seed), deviation_(model.config().initializer_range), codes_(1 << 16) {
    Random random(seed);
    for (int8_t& code : codes_) code = static_cast<int8_t>(std::clamp(random.normal() * 40, -127.0, 127.0));
    for (int8_t code : codes_) short_codes_.push_back(static_cast<int8_t>(code / 16));
  }

 private:
  void make_rows(const QuantisedPlace& place, int64_t matrix, int64_t row, int64_t rows, const View& to,
                 int64_t index, int64_t to_row) override {
    thread_local std::vector<int8_t> codes;
    thread_local std::vector<float> scales;
    const std::vector<int8_t>& drawn = to.dtype == DType::q8 ? codes_ : short_codes_;
    const int64_t k = place.columns(), count = rows * k;
    Random random(seed_, std::hash<std::string>()(place.path));
    random.seek(static_cast<uint64_t>(matrix * place.rows() + row) * 64);
    codes.resize(static_cast<size_t>(count));
    for (int64_t at = 0; at < count;) {
      const int64_t begin = static_cast<int64_t>(random.below(1024));
      const int64_t piece = std::min<int64_t>(count - at, static_cast<int64_t>(drawn.size()) - begin);
      std::copy_n(drawn.begin() + begin, piece, codes.begin() + at);
      at += piece;
    }
    const double step = deviation_ / 40 * (to.dtype == DType::q8 ? 1 : 16);
    scales.assign(static_cast<size_t>(rows * groups_of(k, to.group)), static_cast<float>(step));
    backend().pack_quantised(codes.data(), scales.data(), to, index, to_row, rows);
  }

  uint64_t seed_;
  double deviation_;
  std::vector<int8_t> codes_, short_codes_;
};

template <class Keep>
void load(Transformer& model, Backend& backend, const QuantisedOptions& options, QuantisedPanels& panels,
          const Keep& keep) {
  const QuantisedPlaces plan = quantised_places(model, backend, options);
  const auto total = static_cast<int64_t>(plan.places.size() + plan.kept.size());
  int64_t bytes = 0, done = 0;
  const auto step = [&] {
    ++done;
    if (options.progress) options.progress(done, total);
  };
  const auto aligned = [](int64_t size) { return (size + 63) / 64 * 64; };
  for (const QuantisedPlace& place : plan.places) bytes += aligned(place.bytes);
  // One piece of memory, so that it may lie in large pages.
  const std::shared_ptr<void> memory = backend.allocate(bytes);
  auto* at = static_cast<char*>(memory.get());
  for (const QuantisedPlace& place : plan.places) {
    View view = place.view;
    view.data = at;
    panels.make(place, at);
    bind_view(place.tensor, view, memory);
    at += aligned(place.bytes);
    step();
  }
  for (const auto& [path, tensor] : plan.kept) {
    keep(path, tensor);
    step();
  }
  for (auto& [path, gate] : model.gates()) allocate(gate->load);
  pack_weights(model, backend);
}

}  // namespace

void load_quantised(Transformer& model, const TensorSource& checkpoint, Backend& backend,
                    const QuantisedOptions& options) {
  check_names(model, checkpoint);
  CheckpointPanels panels(backend, checkpoint);
  ThreadPool pool;
  load(model, backend, options, panels, [&](const std::string& path, const Tensor& tensor) {
    load_parameter(path, tensor, checkpoint, true, pool);
  });
}

void initialise_quantised(Transformer& model, uint64_t seed, Backend& backend,
                          const QuantisedOptions& options) {
  RandomPanels panels(backend, model, seed);
  const double deviation = model.config().initializer_range;
  load(model, backend, options, panels, [&](const std::string& path, const Tensor& tensor) {
    allocate(tensor);
    initialise_parameter(path, tensor, deviation, seed);
  });
}

}  // namespace latente
