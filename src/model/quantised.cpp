#include "model/quantised.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <tuple>

#include "base/random.h"
#include "model/quantised_places.h"
#include "model/weights.h"
#include "tensor/device.h"
#include "tensor/panels.h"

namespace latente {
namespace {

// Some rows drawn and packed once for each width and form, and used again and again, from another place each
// time.
class RandomPanels final : public QuantisedPanels {
 public:
  RandomPanels(Backend& backend, const Transformer& model, uint64_t seed)
      : QuantisedPanels(backend), seed_(seed), deviation_(model.config().initializer_range) {}

 private:
  static constexpr int64_t drawn_rows = 1024;

  struct Drawn {
    std::shared_ptr<void> panels;
    int64_t row_bytes = 0;  // of 16 rows, by 16
  };

  const Drawn& drawn(const View& to) {
    const std::lock_guard lock(mutex_);
    Drawn& drawn = drawn_[{to[-1], to.dtype, to.group}];
    if (drawn.panels) return drawn;
    const int64_t k = to[-1];
    const auto form = backend().quantised({drawn_rows, k}, to.dtype, to.group);
    std::vector<int8_t> codes(static_cast<size_t>(drawn_rows * k));
    Random random(seed_);
    const double largest = to.dtype == DType::q8 ? 127 : 7, spread = largest / 3;
    for (int8_t& code : codes)
      code = static_cast<int8_t>(std::clamp(random.normal() * spread, -largest, largest));
    const std::vector<float> scales(static_cast<size_t>(drawn_rows * groups_of(k, to.group)),
                                    static_cast<float>(deviation_ / spread));
    drawn.panels = aligned_memory(form->bytes);
    drawn.row_bytes = form->bytes / drawn_rows;
    View view = form->view;
    view.data = drawn.panels.get();
    backend().pack_quantised(codes.data(), scales.data(), view, 0, 0, drawn_rows);
    return drawn;
  }

  void make_rows(const QuantisedPlace& place, int64_t matrix, int64_t row, int64_t rows, const View& to,
                 int64_t index, int64_t to_row) override {
    constexpr int64_t panel_rows = quantised::panel_rows;
    const Drawn& from = drawn(to);
    const int64_t matrix_rows = (to[-2] + panel_rows - 1) / panel_rows * panel_rows;
    auto* at = static_cast<char*>(to.data) + (index * matrix_rows + to_row) * from.row_bytes;
    Random random(seed_, std::hash<std::string>()(place.path));
    random.seek(static_cast<uint64_t>(matrix * place.rows() + row) * 64);
    for (int64_t done = 0; done < rows;) {
      const int64_t first = static_cast<int64_t>(random.below(drawn_rows / panel_rows)) * panel_rows;
      const int64_t count =
          std::min(drawn_rows - first, (rows - done + panel_rows - 1) / panel_rows * panel_rows);
      std::memcpy(at + done * from.row_bytes,
                  static_cast<const char*>(from.panels.get()) + first * from.row_bytes,
                  static_cast<size_t>(count * from.row_bytes));
      done += count;
    }
  }

  uint64_t seed_;
  double deviation_;
  std::mutex mutex_;
  std::map<std::tuple<int64_t, DType, int32_t>, Drawn> drawn_;
};

// leave(place, view, memory): whether somebody else gives the place its panels.
template <class Keep, class Leave>
void load(Transformer& model, Backend& backend, const QuantisedPlaces& plan, QuantisedPanels& panels,
          const Keep& keep, const Leave& leave, int64_t most_packed,
          const std::function<void(int64_t, int64_t)>& progress) {
  const auto total = static_cast<int64_t>(plan.places.size() + plan.kept.size());
  int64_t bytes = 0, done = 0;
  const auto step = [&] {
    ++done;
    if (progress) progress(done, total);
  };
  if (!backend.is_host()) {
    for (const QuantisedPlace& place : plan.places) {
      const std::shared_ptr<void> host = aligned_memory(place.bytes);
      panels.make(place, host.get());
      take_panels(place, host.get(), backend);
      step();
    }
    for (const auto& [path, tensor] : plan.kept) {
      keep(path, tensor);
      move_to(backend, tensor);
      step();
    }
    for (auto& [path, gate] : model.gates()) allocate(backend, gate->load);
    return;
  }
  const auto aligned = [](int64_t size) { return (size + 63) / 64 * 64; };
  for (const QuantisedPlace& place : plan.places) bytes += aligned(place.bytes);
  // One piece of memory, so that it may lie in large pages.
  const std::shared_ptr<void> memory = backend.allocate(bytes);
  auto* at = static_cast<char*>(memory.get());
  for (const QuantisedPlace& place : plan.places) {
    View view = place.view;
    view.data = at;
    if (!leave(place, view, memory)) {
      panels.make(place, at);
      bind_view(place.tensor, view, memory);
    }
    at += aligned(place.bytes);
    step();
  }
  for (const auto& [path, tensor] : plan.kept) {
    keep(path, tensor);
    step();
  }
  for (auto& [path, gate] : model.gates()) allocate(gate->load);
  pack_weights(model, backend, most_packed);
}

constexpr auto leave_none = [](const QuantisedPlace&, const View&, const std::shared_ptr<void>&) {
  return false;
};
constexpr int64_t no_limit = std::numeric_limits<int64_t>::max();

template <class Leave>
void load(Transformer& model, const TensorSource& checkpoint, Backend& backend, const QuantisedPlaces& plan,
          const Leave& leave, int64_t most_packed, const std::function<void(int64_t, int64_t)>& progress) {
  CheckpointPanels panels(backend, checkpoint);
  ThreadPool pool;
  const auto keep = [&](const std::string& path, const Tensor& tensor) {
    load_parameter(path, tensor, checkpoint, true, pool);
  };
  load(model, backend, plan, panels, keep, leave, most_packed, progress);
}

}  // namespace

void load_quantised(Transformer& model, const TensorSource& checkpoint, Backend& backend,
                    const QuantisedOptions& options) {
  check_names(model, checkpoint);
  load(model, checkpoint, backend, quantised_places(model, backend, options), leave_none, no_limit,
       options.progress);
}

void load_as_stored(Transformer& model, const TensorSource& checkpoint, Backend& backend, int64_t most_bytes,
                    BackgroundLayout* later, const std::function<void(int64_t, int64_t)>& progress) {
  LATENTE_ASSERT(model.weights() == DType::f32);
  check_names(model, checkpoint);
  const auto leave = [&](const QuantisedPlace& place, const View& view, const std::shared_ptr<void>& memory) {
    std::unique_ptr<MatricesInFile> matrices =
        later ? matrices_in_blocks(place, checkpoint, backend) : nullptr;
    if (!matrices) return false;
    later->add(place.tensor, view, std::move(matrices), memory);
    return true;
  };
  load(model, checkpoint, backend, stored_places(model, backend, checkpoint), leave, most_bytes, progress);
}

void initialise_quantised(Transformer& model, uint64_t seed, Backend& backend,
                          const QuantisedOptions& options) {
  RandomPanels panels(backend, model, seed);
  const double deviation = model.config().initializer_range;
  const auto keep = [&](const std::string& path, const Tensor& tensor) {
    allocate(tensor);
    initialise_quickly(path, tensor, deviation, seed);
  };
  load(model, backend, quantised_places(model, backend, options), panels, keep, leave_none, no_limit,
       options.progress);
}

}  // namespace latente
