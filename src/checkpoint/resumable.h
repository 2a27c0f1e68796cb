// A checkpoint whose writing takes hours: shard by shard, and a later process goes on where one was killed.
//   OUT/conversion.json                      what is being written, and size and XXH64 of each whole shard
//   OUT/model-00001-of-00003.safetensors     a shard, renamed into place when it is whole
//   OUT/model.safetensors.index.json         in the end
//   OUT/config.json                          after that; then conversion.json goes
// Checkpoint refuses a directory with a conversion.json: it is not finished.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "base/directory_lock.h"
#include "checkpoint/safetensors.h"

namespace latente {

// Error when a directory's conversion is not finished.
void check_finished(const std::string& directory);

class ResumableCheckpoint {
 public:
  struct Shard {
    std::string name;
    std::vector<TensorSpec> specs;  // in the order of their data
    bool done = false;
    int64_t bytes() const;
  };
  // Called with the bytes checked and those to check, while finished shards are read again.
  using Checking = std::function<void(int64_t done, int64_t total)>;

  // Opens a directory that is new, empty, or holds such a checkpoint unfinished. `identity` says what is
  // written: one that differs is an Error naming the first difference, as are other specs. Whole shards whose
  // checksums are right count as done; what else is there of weights is removed. Error when the disk lacks
  // the space for the rest.
  ResumableCheckpoint(const std::string& directory, const nlohmann::json& identity,
                      std::vector<TensorSpec> specs, int64_t max_shard_bytes, const Checking& checking = {});

  const std::vector<Shard>& shards() const { return shards_; }
  // Of a shard that is not done; finish() takes it when it is complete.
  SafetensorsWriter open(size_t shard) const;
  void finish(size_t shard, SafetensorsWriter writer);
  // A file beside the weights, at once.
  void write_file(const std::string& name, std::string_view bytes) const;
  // Error unless every shard is done.
  void commit(std::string_view config);

 private:
  std::string path(const std::string& name) const;
  void plan(std::vector<TensorSpec> specs, int64_t max_shard_bytes);
  void check_identity() const;
  void keep_whole_shards(const Checking& checking);
  void remove_other_weights() const;
  void check_space() const;
  void save() const;

  std::string directory_;
  DirectoryLock lock_;
  std::vector<Shard> shards_;
  nlohmann::json manifest_;  // {"identity": {...}, "tensors": "…", "shards": {name: {"bytes", "xxh64"}}}
};

}  // namespace latente
