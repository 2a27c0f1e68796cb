// Trainer: initial weights, saved states, the finished model.
#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/memory.h"
#include "checkpoint/training_state.h"
#include "model/weights.h"
#include "tensor/device.h"
#include "train/trainer.h"

namespace latente {
namespace {

namespace fs = std::filesystem;

// The files of a tokenizer's directory that a model directory carries on.
std::vector<std::pair<std::string, std::string>> tokenizer_files(const std::string& path) {
  const fs::path directory = fs::path(Tokenizer::file_of(path)).parent_path();
  std::vector<std::pair<std::string, std::string>> files;
  for (const char* name : {"tokenizer.json", "tiktoken.model", "tokenizer_config.json",
                           "special_tokens_map.json", "chat_template.jinja", "generation_config.json"}) {
    if (fs::exists(directory / name)) files.emplace_back(name, read_file((directory / name).string()));
  }
  return files;
}

int64_t count_of(const nlohmann::json& json, const char* key, const std::string& directory) {
  auto found = json.find(key);
  if (found == json.end() || !found->is_number_integer())
    fail("{}: state.json has no number {}", directory, key);
  return found->get<int64_t>();
}

}  // namespace

void Trainer::start(Start how) {
  LATENTE_ASSERT(lock_);
  const MemoryEstimate& memory = facts_.memory;
  if (memory.total() > facts_.available_memory) {
    fail(
        "the run needs {} of memory, and {} are available: shorten batch.sequences or batch.length "
        "(activations {}), "
        "or take a smaller model (weights, gradients and optimizer {})",
        bytes_text(static_cast<double>(memory.total())),
        bytes_text(static_cast<double>(facts_.available_memory)),
        bytes_text(static_cast<double>(memory.activations)),
        bytes_text(static_cast<double>(memory.weights + memory.gradients + memory.optimizer)));
  }
  std::string states = options_.out + "/checkpoints";
  if (how == Start::overwrite && fs::exists(states)) remove_directory(states);
  LatestGood latest = latest_good(states);
  if (how == Start::fresh && latest.directory) {
    fail("{}: holds a run that was saved at step {}; resume it, overwrite it, or choose another directory",
         options_.out, latest.step);
  }
  facts_.notes.insert(facts_.notes.end(), latest.skipped.begin(), latest.skipped.end());
  allocate_parameters(*model_);
  gradients_ = allocate_gradients(*backend_, *model_);
  allocate_fp8(*backend_, *model_);
  std::shared_ptr<void> arena = backend_->allocate(memory.activations);
  for (Pass* pass : {training_.get(), adding_.get(), validation_.get()}) {
    if (pass) pass->allocate(arena);
  }

  LoadOptions to_device;
  to_device.device = backend_;
  if (how == Start::resume && latest.directory) {
    TrainingState state(*latest.directory);
    if (std::string dtype = state.json().value("dtype", options_.model.dtype);
        dtype != options_.model.dtype) {
      fail("model.dtype: {} was trained as {}, found {}", options_.out, dtype, options_.model.dtype);
    }
    load_parameters(*model_, Checkpoint(state.model_directory()), to_device);
    optimizer_ = std::make_unique<Optimizer>(*backend_, *model_, gradients_, options_.optimizer);
    optimizer_->for_each_state([&](const std::string& name, const View& view) {
      HostWriter writer(*backend_, view);
      state.tensors().read(name, writer.view());
      writer.finish();
    });
    const nlohmann::json& json = state.json();
    step_ = saved_step_ = state.step();
    optimizer_->set_steps(count_of(json, "optimizer_steps", state.directory()));
    if (json.value("data", std::string()) != std::to_string(batches_->fingerprint())) {
      fail("{}: was trained on other data or sequences of another length than data and batch now say",
           options_.out);
    }
    int64_t sequences = count_of(json, "sequences", state.directory());
    if (sequences != facts_.sequences) {
      facts_.notes.push_back(
          fmt::format("micro-batches of {} sequences instead of {}: the rounding will differ",
                      facts_.sequences, sequences));
    }
    batches_->seek({count_of(json, "epoch", state.directory()), count_of(json, "window", state.directory())});
    return;
  }
  if (initial_) {
    load_parameters(*model_, *initial_, to_device);
  } else {
    initialise(*model_, static_cast<uint64_t>(options_.model.seed));
    move_parameters(*model_, *backend_);
  }
  optimizer_ = std::make_unique<Optimizer>(*backend_, *model_, gradients_, options_.optimizer);
}

void Trainer::save() {
  if (saved_step_ == step_) return;
  saved_step_ = step_;
  TrainingStateWriter writer(options_.out + "/checkpoints", step_, backend_);
  optimizer_->for_each_state([&](const std::string& name, const View& view) { writer.tensor(name, view); });
  nlohmann::json json;
  json["optimizer_steps"] = optimizer_->steps();
  json["sequences"] = facts_.sequences;
  json["dtype"] = options_.model.dtype;
  json["data"] = std::to_string(batches_->fingerprint());  // text: JSON readers round large numbers
  json["epoch"] = batches_->position().epoch;
  json["window"] = batches_->position().index;
  json["options"] = write_options(options_);
  writer.json(json);
  writer.model([&](const std::string& directory) { write_model(directory); });
  writer.commit(static_cast<int>(options_.save.keep));
  observer_->on_saved(step_, writer.target());
}

void Trainer::write_model(const std::string& directory) {
  SaveOptions how;
  how.weights = model_->weights();
  how.device = backend_;
  how.files = tokenizer_files(options_.model.tokenizer);
  save_model(*model_, directory, how);
}

}  // namespace latente
