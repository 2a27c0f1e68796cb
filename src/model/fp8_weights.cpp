#include "model/fp8_weights.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/random.h"
#include "checkpoint/checkpoint.h"
#include "model/weights.h"

namespace latente {
namespace {

constexpr int64_t block = 128;
constexpr float most_scale = 128;
int64_t blocks(int64_t count) { return (count + block - 1) / block; }

// Matrices that products alone read.
bool is_for_products(const std::string& path, const Tensor& tensor) {
  return tensor.shape().rank() >= 2 && path.ends_with("_proj.weight") &&
         !path.ends_with("kv_b_proj.weight") && !path.ends_with("eh_proj.weight");
}
bool is_matrix(const std::string& path, const Tensor& tensor) {
  return is_expert_stack(path) || is_for_products(path, tensor);
}

bool is_stored(const TensorSource& source, const std::string& path, const Tensor& tensor) {
  if (!is_matrix(path, tensor)) return false;
  for (int64_t i = 0; i < matrices_of(tensor); ++i) {
    const std::string name = matrix_path(path, i);
    if (!source.contains(name) || !source.scale_name(name) || !source.map(name)) return false;
  }
  return true;
}

struct Place {
  std::string path;
  Tensor tensor;
  View view;  // without data
  int64_t offset;
};

struct Places {
  std::vector<Place> places;
  std::vector<std::pair<std::string, Tensor>> others;
  int64_t bytes = 0;  // of the places
};

template <class Wanted>
Places plan(Transformer& model, const Backend& backend, const Wanted& wanted) {
  Places plan;
  model.for_each([&](const std::string& path, Tensor& tensor) {
    const auto packed = wanted(path, tensor) ? backend.packed(View(nullptr, tensor.shape(), DType::f8e4m3))
                                             : std::optional<Backend::Packed>();
    if (!packed) {
      plan.others.emplace_back(path, tensor);
      return;
    }
    plan.places.push_back({path, tensor, packed->view, plan.bytes});
    plan.bytes += (packed->bytes + 63) / 64 * 64;
  });
  return plan;
}

Places plan_stored(Transformer& model, const TensorSource& source, const Backend& backend) {
  return plan(model, backend,
              [&](const std::string& path, const Tensor& tensor) { return is_stored(source, path, tensor); });
}

// Calls fill(place, memory) for each; it says whether it did, and nobody else will. Then keep(path, tensor)
// for what is not in FP8.
template <class Fill, class Keep>
void load(Transformer& model, Backend& backend, Places plan, const Fill& fill, const Keep& keep) {
  // One piece of memory, so that it may lie in large pages.
  const std::shared_ptr<void> memory = backend.allocate(plan.bytes);
  for (Place& place : plan.places) {
    place.view.data = static_cast<char*>(memory.get()) + place.offset;
    if (fill(place, memory)) bind_view(place.tensor, place.view, memory);
  }
  for (const auto& [path, tensor] : plan.others) keep(path, tensor);
  for (auto& [path, gate] : model.gates()) allocate(gate->load);
}

// A matrix as it is stored.
struct Stored {
  std::string name, file;
  MappedTensor codes;
  std::vector<float> scales;
};

Stored stored(const TensorSource& source, const Place& place, int64_t index) {
  const std::string name = matrix_path(place.path, index);
  Stored matrix{name, source.file_of(name), *source.map(name), {}};
  const Shape shape{place.view[-2], place.view[-1]}, &found = matrix.codes.view.shape;
  if (found != shape) fail("{}: expected {}, found {} in {}", name, shape.str(), found.str(), matrix.file);
  matrix.scales.resize(static_cast<size_t>(blocks(shape[0]) * blocks(shape[1])));
  source.read(*source.scale_name(name),
              View(matrix.scales.data(), {blocks(shape[0]), blocks(shape[1])}, DType::f32));
  return matrix;
}

[[noreturn]] void refuse(const Stored& matrix) {
  fail("{}: {}: expected FP8 codes that are numbers, and scales from 0 to 128", matrix.file, matrix.name);
}

class MatricesInFp8 final : public MatricesInFile {
 public:
  MatricesInFp8(const View& view, std::vector<MappedBytes> bytes, std::vector<Stored> matrices,
                Backend& backend)
      : MatricesInFile(std::move(bytes), (view[-2] + view.stride(-1) - 1) / view.stride(-1),
                       view.stride(-2) * view.stride(-1)),
        panel_(backend.packed(View(nullptr, {view.stride(-1), view[-1]}, DType::f8e4m3))->view),
        rows_(view[-2]),
        matrices_(std::move(matrices)),
        backend_(backend) {}

  // A panel at a time: the backend's threads are at work elsewhere.
  void make(int64_t i, int64_t first, int64_t count, std::byte* to) const override {
    const Stored& matrix = matrices_[static_cast<size_t>(i)];
    const int64_t width = panel_[0], k = panel_[1];
    auto* codes = static_cast<std::byte*>(matrix.codes.view.data);
    for (int64_t row = first * width; count > 0; --count, row += width, to += panel_bytes()) {
      View panel = panel_;
      panel.data = to;
      const View rows(codes + row * k, {std::min(width, rows_ - row), k}, DType::f8e4m3);
      panel.shape = rows.shape;
      if (!backend_.pack_fp8(rows, nullptr, panel, 0)) refuse(matrix);
    }
  }
  const float* scales(int64_t i) const override { return matrices_[static_cast<size_t>(i)].scales.data(); }
  void finish(int64_t i, std::byte* matrix) const override {
    const std::vector<float>& scales = matrices_[static_cast<size_t>(i)].scales;
    std::memcpy(matrix + panels() * panel_bytes(), scales.data(), scales.size() * sizeof(float));
  }

 private:
  View panel_;
  int64_t rows_;
  std::vector<Stored> matrices_;
  Backend& backend_;
};

std::unique_ptr<MatricesInFile> matrices_in_fp8(const TensorSource& source, const Place& place,
                                                Backend& backend) {
  std::vector<MappedBytes> bytes;
  std::vector<Stored> matrices;
  for (int64_t i = 0; i < matrices_of(place.tensor); ++i) {
    matrices.push_back(stored(source, place, i));
    const MappedTensor& codes = matrices.back().codes;
    bytes.push_back(
        {{static_cast<const std::byte*>(codes.view.data), static_cast<size_t>(codes.view.bytes())},
         codes.owner,
         codes.file});
    for (float scale : matrices.back().scales) {
      if (!(scale >= 0 && scale <= most_scale)) refuse(matrices.back());
    }
  }
  return std::make_unique<MatricesInFp8>(place.view, std::move(bytes), std::move(matrices), backend);
}

}  // namespace

bool runs_fp8(const TensorSource& source, const Backend& backend) {
  const auto* checkpoint = dynamic_cast<const Checkpoint*>(&source);
  if (!checkpoint || !backend.packed(View(nullptr, {block, block}, DType::f8e4m3))) return false;
  const std::vector<std::string> names = checkpoint->names();
  const bool any = std::any_of(names.begin(), names.end(),
                               [&](const std::string& name) { return checkpoint->scale_name(name); });
  return any && checkpoint->block_size() == std::pair(block, block);
}

int64_t fp8_bytes(Transformer& model, const TensorSource& source, const Backend& backend) {
  const Places plan = plan_stored(model, source, backend);
  int64_t bytes = plan.bytes;
  for (const auto& [path, tensor] : plan.others) bytes += tensor.count() * size_of(tensor.dtype());
  return bytes;
}

void load_fp8(Transformer& model, const TensorSource& source, Backend& backend, BackgroundLayout* later) {
  check_names(model, source);
  ThreadPool pool;
  load(
      model, backend, plan_stored(model, source, backend),
      [&](const Place& place, const std::shared_ptr<void>& memory) {
        if (later) {
          later->add(place.tensor, place.view, matrices_in_fp8(source, place, backend), memory);
          return false;
        }
        for (int64_t i = 0; i < matrices_of(place.tensor); ++i) {
          const Stored matrix = stored(source, place, i);
          if (!backend.pack_fp8(matrix.codes.view, matrix.scales.data(), place.view, i)) refuse(matrix);
          source.release(matrix.name);
        }
        return true;
      },
      [&](const std::string& path, const Tensor& tensor) {
        load_parameter(path, tensor, source, true, pool);
      });
  later ? pack_weights(model, backend, source, *later) : pack_weights(model, backend);
}

void initialise_fp8(Transformer& model, uint64_t seed, Backend& backend) {
  // Some codes drawn once, and used from another place each time.
  constexpr int64_t drawn = 1 << 22, step = 999'983;
  constexpr double spread = 100;  // of codes, in which the largest few reach e4m3's 448
  std::vector<float> values(drawn);
  fill_normal(values, seed, 1, 0, 0, spread);
  std::vector<uint8_t> codes(drawn);
  convert(DType::f32, values.data(), DType::f8e4m3, codes.data(), drawn);
  const auto deviation = static_cast<float>(model.config().initializer_range);
  std::vector<uint8_t> matrix;
  int64_t from = 0;
  Places places = plan(model, backend, is_matrix);
  if (places.places.empty()) fail("{} cannot run weights of FP8", backend.name());
  load(
      model, backend, std::move(places),
      [&](const Place& place, const std::shared_ptr<void>&) {
        const int64_t n = place.view[-2], k = place.view[-1];
        matrix.resize(static_cast<size_t>(n * k));
        const std::vector<float> scales(static_cast<size_t>(blocks(n) * blocks(k)),
                                        deviation / static_cast<float>(spread));
        for (int64_t i = 0; i < matrices_of(place.tensor); ++i) {
          for (int64_t done = 0; done < n * k;) {
            const int64_t count = std::min(drawn - from, n * k - done);
            std::memcpy(matrix.data() + done, codes.data() + from, static_cast<size_t>(count));
            done += count, from = (from + count + step) % drawn;
          }
          const bool packed =
              backend.pack_fp8(View(matrix.data(), {n, k}, DType::f8e4m3), scales.data(), place.view, i);
          LATENTE_ASSERT(packed);
        }
        return true;
      },
      [&](const std::string& path, const Tensor& tensor) {
        allocate(tensor);
        initialise_parameter(path, tensor, deviation, seed);
      });
  pack_weights(model, backend);
}

}  // namespace latente
