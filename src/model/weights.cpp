#include "model/weights.h"

#include <array>
#include <nlohmann/json.hpp>
#include <set>

#include "tensor/device.h"

namespace latente {
namespace {

View expert_view(const View& stack, int64_t expert) {
  LATENTE_ASSERT(!stack.residency);
  Shape shape{stack[1], stack[2]};
  char* data =
      stack.data ? static_cast<char*>(stack.data) + expert * shape.count() * size_of(stack.dtype) : nullptr;
  return {data, shape, stack.dtype};
}

constexpr int64_t worth_threads = 1 << 18;     // elements
constexpr int64_t elements_at_once = 1 << 16;  // read at once

uint64_t hash_of(const std::string& text) {  // FNV-1a
  uint64_t hash = 0xcbf29ce484222325ull;
  for (char c : text) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001b3ull;
  return hash;
}

bool is_norm(const std::string& path) {
  return path.ends_with("norm.weight") || path.ends_with("layernorm.weight");
}

// As in memory where no other type is asked for. Routing biases stay float32 whatever the weights are stored
// as: steps of 0.001 vanish in bfloat16.
DType stored_as(const std::string& name, DType in_memory, DType model, DType asked) {
  if (asked == model) return in_memory;
  return name.ends_with("e_score_correction_bias") && asked != DType::f64 ? DType::f32 : asked;
}

// A tensor of an MTP module that the checkpoint holds and the config does not ask for.
bool of_unused_module(const Transformer& model, const TensorSource& checkpoint, const std::string& name) {
  for (int64_t k = model.config().num_mtp_layers;; ++k) {
    std::string path = model.mtp_path(k) + ".";
    if (!checkpoint.contains(path + "eh_proj.weight")) return false;
    if (name.starts_with(path)) return true;
  }
}

// Reads a matrix by all threads, a few rows at a time: what is stored in another type takes decoding.
void read_by_all(ThreadPool& pool, const TensorSource& checkpoint, const std::string& name,
                 const View& target) {
  if (target.shape.rank() != 2 || target.count() < worth_threads) return checkpoint.read(name, target);
  const int64_t columns = target[1], bytes = target.stride(0) * size_of(target.dtype);
  pool.parallel_for(
      target[0], std::max<int64_t>(elements_at_once / columns, 1), [&](int64_t row, int64_t end) {
        const View rows(static_cast<char*>(target.data) + row * bytes, {end - row, columns}, target.dtype);
        checkpoint.read_rows(name, target[0], row, rows);
      });
}

// Numbers drawn once, from random places on.
void fill_again_and_again(const View& view, uint64_t seed, double deviation) {
  constexpr int64_t drawn = 1 << 18, piece = 1 << 14;
  std::vector<float> values(drawn);
  fill_normal(values, seed, 1, 0, 0, deviation);
  ThreadPool().parallel_for(view.count(), piece, [&](int64_t begin, int64_t end) {
    Random random(seed, 2);
    random.seek(static_cast<uint64_t>(begin));
    const auto first = static_cast<int64_t>(random.below(drawn - piece));
    convert(DType::f32, values.data() + first, view.dtype,
            static_cast<char*>(view.data) + begin * size_of(view.dtype), end - begin);
  });
}

}  // namespace

void allocate_parameters(Transformer& model) {
  model.for_each([](const std::string&, Tensor& tensor) { allocate(tensor); });
  for (auto& [path, gate] : model.gates()) allocate(gate->load);
}

void initialise_parameter(const std::string& path, const Tensor& tensor, double deviation, uint64_t seed) {
  View view = tensor.view();
  bool ones = is_norm(path);
  bool zeros = path.ends_with(".bias") || path.ends_with("e_score_correction_bias");
  constexpr int64_t piece = 4096;
  const auto fill = [&](int64_t begin, int64_t end) {
    std::array<double, piece> values;
    Random random(seed, hash_of(path));
    random.seek(static_cast<uint64_t>(begin) * 4);  // words a normal number takes
    for (int64_t i = begin; i < end; ++i)
      values[static_cast<size_t>(i - begin)] = ones ? 1.0 : zeros ? 0.0 : deviation * random.normal();
    convert(DType::f64, values.data(), view.dtype,
            static_cast<char*>(view.data) + begin * size_of(view.dtype), end - begin);
  };
  if (view.count() >= worth_threads) return ThreadPool().parallel_for(view.count(), piece, fill);
  for (int64_t at = 0; at < view.count(); at += piece) fill(at, std::min(at + piece, view.count()));
}

void initialise(Transformer& model, uint64_t seed) {
  double deviation = model.config().initializer_range;
  model.for_each(
      [&](const std::string& path, Tensor& tensor) { initialise_parameter(path, tensor, deviation, seed); });
}

void initialise_quickly(const std::string& path, const Tensor& tensor, double deviation, uint64_t seed) {
  constexpr int64_t worth_repeating = 1 << 22;  // elements
  if (tensor.count() < worth_repeating) return initialise_parameter(path, tensor, deviation, seed);
  fill_again_and_again(tensor.view(), seed ^ hash_of(path), deviation);
}

void move_parameters(Transformer& model, Backend& device) {
  model.for_each([&](const std::string&, Tensor& tensor) { move_to(device, tensor); });
  for (auto& [path, gate] : model.gates()) move_to(device, gate->load);
}

void for_each_stored(Transformer& model, const std::function<void(const std::string&, const View&)>& f) {
  model.for_each([&](const std::string& path, Tensor& tensor) {
    if (!is_expert_stack(path)) return f(path, tensor.view());
    for (int64_t e = 0; e < tensor[0]; ++e) f(expert_path(path, e), expert_view(tensor.view(), e));
  });
  for (size_t k = 0; k < model.mtp.size(); ++k) {
    std::string path = model.mtp_path(static_cast<int64_t>(k));
    f(path + ".embed_tokens.weight", model.model.embed_tokens.weight.view());
    f(path + ".shared_head.head.weight", model.head().view());
  }
}

int64_t check_names(Transformer& model, const TensorSource& checkpoint) {
  if (model.config().converted)
    fail("{}: weights of {} bits can be run, and nothing else: expected the model that they were made of",
         checkpoint.names().empty() ? "checkpoint" : checkpoint.file_of(checkpoint.names().front()),
         model.config().converted.bits);
  std::set<std::string> expected;
  for_each_stored(model, [&](const std::string& name, const View&) { expected.insert(name); });
  for (const std::string& name : checkpoint.names()) {
    bool elsewhere = name.ends_with("rotary_emb.inv_freq") || (name == "lm_head.weight" && !model.lm_head) ||
                     of_unused_module(model, checkpoint, name);
    if (!expected.contains(name) && !elsewhere) {
      fail("{}: the model has no parameter {}", checkpoint.file_of(name), name);
    }
  }
  return static_cast<int64_t>(expected.size());
}

void load_parameter(const std::string& path, const Tensor& tensor, const TensorSource& checkpoint,
                    bool map_where_possible, ThreadPool& pool, const std::function<void()>& step) {
  if (is_expert_stack(path)) {
    allocate(tensor);
    for (int64_t e = 0; e < tensor[0]; ++e) {
      read_by_all(pool, checkpoint, expert_path(path, e), expert_view(tensor.view(), e));
      if (step) step();
    }
    return;
  }
  std::optional<MappedTensor> mapped;
  if (map_where_possible) mapped = checkpoint.map(path);
  if (mapped && mapped->view.dtype == tensor.dtype() && mapped->view.shape == tensor.shape()) {
    bind_memory(tensor, mapped->view.data, mapped->owner);
  } else {
    allocate(tensor);
    read_by_all(pool, checkpoint, path, tensor.view());
  }
  if (step) step();
}

void load_parameters(Transformer& model, const TensorSource& checkpoint, const LoadOptions& options) {
  int64_t total = check_names(model, checkpoint), done = 0;
  ThreadPool pool;
  auto step = [&] {
    ++done;
    if (options.progress) options.progress(done, total);
  };
  model.for_each([&](const std::string& path, Tensor& tensor) {
    if (options.without_experts && is_expert_stack(path)) return;
    load_parameter(path, tensor, checkpoint, options.map_where_possible, pool, step);
    if (options.device) move_to(*options.device, tensor);
  });
  for (auto& [path, gate] : model.gates()) {
    options.device ? allocate(*options.device, gate->load) : allocate(gate->load);
  }
}

namespace {

struct PackedPlace {
  std::string path;
  Tensor tensor;
  View view;  // without data
  int64_t offset;
};

struct PackedPlaces {
  std::vector<PackedPlace> places;
  int64_t bytes = 0;
};

PackedPlaces places_to_pack(Transformer& model, Backend& backend) {
  PackedPlaces plan;
  model.for_each([&](const std::string& path, Tensor& tensor) {
    // Embeddings are looked up; the latent's up-projection is also read head by head, transposed (absorbed
    // attention).
    if (path.ends_with("embed_tokens.weight") || path.ends_with("kv_b_proj.weight")) return;
    if (tensor.view().residency) return;
    if (const auto packed = backend.packed(tensor.view())) {
      plan.places.push_back({path, tensor, packed->view, plan.bytes});
      plan.bytes += (packed->bytes + 63) / 64 * 64;
    }
  });
  return plan;
}

// Rows of floats.
class MatricesInRows final : public MatricesInFile {
 public:
  MatricesInRows(const View& view, std::vector<MappedBytes> matrices, Backend& backend)
      : MatricesInFile(std::move(matrices), (view[-2] + view.stride(-1) - 1) / view.stride(-1),
                       view.stride(-2) * view.stride(-1) * size_of(view.dtype)),
        view_(view),
        backend_(backend) {}

  const void* rows(int64_t i) const override { return stored(i).bytes.data(); }
  // A panel at a time: the backend's threads are at work elsewhere.
  void make(int64_t i, int64_t first, int64_t count, std::byte* to) const override {
    const int64_t width = view_.stride(-1), k = view_[-1];
    auto* data = const_cast<std::byte*>(stored(i).bytes.data());
    for (int64_t row = first * width; count > 0; --count, row += width, to += panel_bytes()) {
      const View from(data + row * k * size_of(view_.dtype), {std::min(width, view_[-2] - row), k},
                      view_.dtype);
      View panel = backend_.packed(from)->view;
      panel.data = to;
      backend_.pack(from, panel);
    }
  }

 private:
  View view_;
  Backend& backend_;
};

// The matrices of a parameter where they lie; nothing where some do not.
std::vector<MappedBytes> matrices_in_file(const std::string& path, const Tensor& tensor,
                                          const TensorSource& checkpoint) {
  std::vector<MappedBytes> matrices;
  const Shape shape = tensor.shape(), matrix{shape[-2], shape[-1]};
  for (int64_t i = 0; i < matrices_of(tensor); ++i) {
    const std::string name = matrix_path(path, i);
    if (!checkpoint.contains(name)) return {};
    const std::optional<MappedTensor> mapped = checkpoint.map(name);
    if (!mapped || mapped->view.dtype != tensor.dtype() || mapped->view.shape != matrix) return {};
    matrices.push_back(
        {{static_cast<const std::byte*>(mapped->view.data), static_cast<size_t>(mapped->view.bytes())},
         mapped->owner,
         mapped->file});
  }
  return matrices;
}

int64_t pack(const PackedPlaces& plan, Backend& backend, const TensorSource* checkpoint,
             BackgroundLayout* later) {
  if (plan.places.empty()) return 0;
  // One piece of memory, so that it may lie in large pages: decoding reads all of it for each token.
  const std::shared_ptr<void> memory = backend.allocate(plan.bytes);
  for (const PackedPlace& place : plan.places) {
    View view = place.view;
    view.data = static_cast<char*>(memory.get()) + place.offset;
    std::vector<MappedBytes> matrices;
    // Of an MTP module's projection products take halves of the columns, which a pending view cannot give.
    if (later && !place.path.ends_with("eh_proj.weight"))
      matrices = matrices_in_file(place.path, place.tensor, *checkpoint);
    if (!matrices.empty()) {
      later->add(place.tensor, view, std::make_unique<MatricesInRows>(view, std::move(matrices), backend),
                 memory);
    } else {
      backend.pack(place.tensor.view(), view);
      bind_view(place.tensor, view, memory);
    }
  }
  return plan.bytes;
}

}  // namespace

int64_t packed_bytes(Transformer& model, Backend& backend) { return places_to_pack(model, backend).bytes; }

int64_t pack_weights(Transformer& model, Backend& backend, int64_t most_bytes) {
  const PackedPlaces plan = places_to_pack(model, backend);
  return plan.bytes > most_bytes ? 0 : pack(plan, backend, nullptr, nullptr);
}

int64_t pack_weights(Transformer& model, Backend& backend, const TensorSource& checkpoint,
                     BackgroundLayout& later) {
  return pack(places_to_pack(model, backend), backend, &checkpoint, &later);
}

Config load_config(const Checkpoint& checkpoint) {
  Config config = Config::from_file(checkpoint.directory() + "/config.json");
  int64_t held = 0;
  while (held < config.num_mtp_layers &&
         checkpoint.contains("model.layers." + std::to_string(config.num_hidden_layers + held) +
                             ".eh_proj.weight")) {
    ++held;
  }
  config.num_mtp_layers = held;
  return config;
}

DType stored_type(const TensorSource& checkpoint) {
  std::optional<DType> type = checkpoint.dtype_in_file("model.embed_tokens.weight");
  if (type == DType::f32 || type == DType::f64) return *type;
  return DType::bf16;
}

void save_model(Transformer& model, const std::string& directory, const SaveOptions& options) {
  std::vector<TensorSpec> specs;
  for_each_stored(model, [&](const std::string& name, const View& view) {
    specs.push_back({name, stored_as(name, view.dtype, model.weights(), options.weights), view.shape});
  });
  CheckpointOptions how;
  how.max_shard_bytes = options.max_shard_bytes;
  CheckpointWriter writer(directory, std::move(specs), how);
  for_each_stored(model, [&](const std::string& name, const View& view) {
    writer.write(name, options.device ? on_host(*options.device, view).view : view);
  });
  writer.write_file("config.json", model.config().to_json(options.weights).dump(2) + "\n");
  for (const auto& [name, contents] : options.files) writer.write_file(name, contents);
  writer.commit();
}

}  // namespace latente
