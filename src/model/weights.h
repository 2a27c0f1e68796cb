// A model's parameters: memory, initial values, and Hugging Face checkpoints in and out. No table of names: a
// parameter's name is its path; stacks of routed experts are seen expert by expert.
#pragma once

#include <limits>

#include "base/random.h"
#include "base/threads.h"
#include "checkpoint/checkpoint.h"
#include "model/background_layout.h"
#include "model/transformer.h"

namespace latente {

// Zeroed memory for every parameter and every router's load.
void allocate_parameters(Transformer& model);

// The published initialisation: normal with standard deviation config.initializer_range for matrices and
// embeddings, ones for norms, zeros for biases. Each parameter draws from a stream of its own, named by its
// path.
void initialise(Transformer& model, uint64_t seed);
// Moves parameters and loads to the device's memory; nothing happens where that is the host's.
void move_parameters(Transformer& model, Backend& device);
// The same for the parameter of this path alone.
void initialise_parameter(const std::string& path, const Tensor& tensor, double deviation, uint64_t seed);
// To measure speed with: large matrices repeat a few numbers, so that billions take seconds.
void initialise_quickly(const std::string& path, const Tensor& tensor, double deviation, uint64_t seed);

// Error when the checkpoint holds a tensor that the model has no place for; returns how many it should hold.
int64_t check_names(Transformer& model, const TensorSource& checkpoint);

// Loads every parameter; types are converted. A parameter the checkpoint lacks, a shape that differs, or a
// tensor that the model has no place for is an Error naming it. Missing MTP modules are allowed when the
// config says so is wrong: `load_config` drops them first. With `map_where_possible`, parameters of the
// file's own type are used where they lie.
struct LoadOptions {
  bool map_where_possible = false;
  // Stacks of routed experts get no memory: somebody else binds them.
  bool without_experts = false;
  Backend* device = nullptr;  // where parameters go; null = they stay in the host's memory
  // Called after each parameter with the number done and the total, for progress; may be empty.
  std::function<void(int64_t done, int64_t total)> progress;
};
void load_parameters(Transformer& model, const TensorSource& checkpoint, const LoadOptions& options = {});
// One of them. `step`, which may be empty, is called after each of the tensors it is made of.
void load_parameter(const std::string& path, const Tensor& tensor, const TensorSource& checkpoint,
                    bool map_where_possible, ThreadPool& pool, const std::function<void()>& step = {});

// Packs the weights that only products read (Backend::pack), for running alone: they can be neither trained
// nor saved afterwards. Returns the bytes that took; 0 where the backend has no such form, or where it would
// take more than `most_bytes`: then they stay as they are.
int64_t pack_weights(Transformer& model, Backend& backend,
                     int64_t most_bytes = std::numeric_limits<int64_t>::max());
// The bytes that it would take.
int64_t packed_bytes(Transformer& model, Backend& backend);
// The same, but `later` is left what lies in the checkpoint's files in the type that it has here: stacks of
// experts need no memory of their own for it.
int64_t pack_weights(Transformer& model, Backend& backend, const TensorSource& checkpoint,
                     BackgroundLayout& later);

// The config beside a checkpoint, with num_mtp_layers reduced to the modules the checkpoint really holds
// (many conversions drop them).
Config load_config(const Checkpoint& checkpoint);

// "f32", "bf16", ... of a checkpoint's matrices: what a model that maps it should use. FP8 and quantised
// blocks give bf16.
DType stored_type(const TensorSource& checkpoint);

// Writes config.json and the weights in the released layout, atomically; other files of the directory are
// kept.
struct SaveOptions {
  DType weights = DType::f32;
  int64_t max_shard_bytes = 5'000'000'000;
  Backend* device = nullptr;  // where the parameters are; null = in the host's memory
  // (file name, contents) to write beside: tokenizer.json, generation_config.json, ...
  std::vector<std::pair<std::string, std::string>> files;
};
void save_model(Transformer& model, const std::string& directory, const SaveOptions& options);

// f(name, view) for every tensor as a checkpoint names it: expert by expert, MTP modules with their copies of
// the embedding and the head.
void for_each_stored(Transformer& model,
                     const std::function<void(const std::string& name, const View& view)>& f);

}  // namespace latente
