// A checkpoint in Hugging Face's layout: a directory with model.safetensors, or with shards and
// model.safetensors.index.json, beside config.json.
#pragma once

#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "checkpoint/safetensors.h"
#include "checkpoint/tensor_source.h"
#include "tensor/view.h"

namespace latente {

// The weight_map of an index file, name → shard. Error for anything that is not an object of strings, and for
// shard names that are not plain file names ending in .safetensors.
std::map<std::string, std::string> parse_checkpoint_index(std::string_view text, const std::string& label);

// Reading. Everything is validated when the checkpoint is opened: each file by itself, and the index against
// the shards in both directions. All const functions may be called from several threads at once.
class Checkpoint final : public TensorSource {
 public:
  explicit Checkpoint(std::string directory);

  const std::string& directory() const { return directory_; }
  bool contains(std::string_view name) const override { return files_of_.contains(name); }
  // Sorted, without the block scales that belong to an FP8 weight.
  std::vector<std::string> names() const override;
  const SafetensorsEntry& entry(std::string_view name) const;  // Error when absent
  const std::string& file_of(std::string_view name) const override;
  std::optional<DType> dtype_in_file(std::string_view name) const override { return entry(name).dtype; }

  // Copies a tensor's value into the target's type: floating types among each other, integer types among each
  // other. FP8 weights with block scales are multiplied out (report, section 3.3.2); their codes are read
  // with map(). Error when shapes differ: "NAME: expected [2, 3], found [3, 2] in FILE".
  void read(const std::string& name, const View& target) const override;
  void read_rows(const std::string& name, int64_t rows, int64_t first, const View& target) const override;

  // The stored elements without a copy; nothing when the type is not ours, the data is not aligned, or the
  // rank is above 4. For an FP8 weight these are the codes, whose scales are map(*scale_name(name)).
  std::optional<MappedTensor> map(std::string_view name) const override;
  void release(std::string_view name) const override;

  // "x.weight_scale_inv" when x.weight is FP8 and has block scales.
  std::optional<std::string> scale_name(std::string_view name) const override;
  // Rows and columns that share a scale; Error when config.json does not say.
  std::pair<int64_t, int64_t> block_size() const;

  int64_t bytes() const;  // of all tensors

 private:
  void add(std::shared_ptr<const SafetensorsFile> file);
  void read_config();
  // The scales' name of FP8 codes that have some; Error for codes that lack theirs.
  std::optional<std::string> scales_of(const SafetensorsEntry& codes) const;
  // Rows [first, first + target[0]) of `rows`.
  void read_scaled(const SafetensorsEntry& codes, const std::string& scales, int64_t rows, int64_t first,
                   const View& target) const;

  std::string directory_;
  std::vector<std::shared_ptr<const SafetensorsFile>> files_;
  std::unordered_map<std::string_view, size_t> files_of_;  // keys lie in the files' entries
  bool quantized_ = false;
  std::pair<int64_t, int64_t> block_size_{0, 0};
};

struct CheckpointOptions {
  std::optional<DType> dtype;  // of floating tensors; by default each keeps the type of its spec
  int64_t max_shard_bytes = 5'000'000'000;
};

// Writes a whole checkpoint. Nothing shows under the directory's name before commit(); then everything does
// at once. An existing directory's other files (tokenizer, README, ...) are kept, its weights are replaced.
class CheckpointWriter {
 public:
  CheckpointWriter(const std::string& directory, std::vector<TensorSpec> specs,
                   const CheckpointOptions& options = {});

  // In any order; converts from the view's type.
  void write(const std::string& name, const View& view);
  // A file beside the weights: "config.json".
  void write_file(const std::string& name, std::string_view bytes);
  // Where files may be put by other means before commit().
  const std::string& partial() const { return directory_.partial(); }
  void commit();

 private:
  struct Shard {
    std::string name;
    std::vector<TensorSpec> specs;
    std::optional<SafetensorsWriter> writer;  // open while partly written
    bool done = false;
  };

  void keep_other_files();

  DirectoryWriter directory_;
  std::vector<Shard> shards_;
  std::unordered_map<std::string, size_t> shard_of_;
};

}  // namespace latente
