// A training run's saved states: one directory a step,
//   step-000123/model/                  a Hugging Face checkpoint, written by the caller
//   step-000123/optimizer.safetensors   named tensors
//   step-000123/state.json              step, data position, random counters, schedule: the caller's object
//   step-000123/manifest.json           size and XXH64 of every other file
// A state appears whole or not at all (base/file.h), so a kill at any moment leaves the previous ones as they
// were; the manifest finds what went bad afterwards.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "base/file.h"
#include "checkpoint/safetensors.h"

namespace latente {

class Backend;

class TrainingStateWriter {
 public:
  // Creates `directory` when it is missing, and clears away what interrupted saves left there. Tensors are in
  // the memory of `device`; null = in the host's.
  TrainingStateWriter(const std::string& directory, int64_t step, Backend* device = nullptr);

  // Stored in the view's type; the view must stay valid until commit().
  void tensor(std::string name, const View& view);
  // An object; "step" is added. Error for numbers that JSON cannot hold (NaN, infinity).
  void json(const nlohmann::json& state);
  // Calls `write` with an empty directory to fill, for instance by a CheckpointWriter of that directory.
  void model(const std::function<void(const std::string& directory)>& write);
  // Publishes the state, replacing one of the same step. Then removes all but the `keep_last` last saved
  // ones; 0 keeps all.
  void commit(int keep_last);

  // Where the state will be: "runs/x/step-000123".
  const std::string& target() const { return files_.target(); }

 private:
  std::string directory_;
  int64_t step_;
  Backend* device_;
  DirectoryWriter files_;
  std::vector<TensorSpec> specs_;
  std::vector<View> views_;
  std::string state_;
};

// One saved state. Error naming the damaged file when it is not complete.
class TrainingState {
 public:
  enum class Verify { checksums, sizes };
  explicit TrainingState(std::string directory, Verify verify = Verify::checksums);

  const std::string& directory() const { return directory_; }
  int64_t step() const { return step_; }
  // Counts saves in a run: the state saved last has the highest, whatever its step.
  int64_t serial() const { return serial_; }
  const nlohmann::json& json() const { return *json_; }
  const SafetensorsFile& tensors() const { return *tensors_; }
  std::string model_directory() const;

 private:
  std::string directory_;
  int64_t step_ = 0, serial_ = 0;
  std::shared_ptr<const nlohmann::json> json_;
  std::shared_ptr<const SafetensorsFile> tensors_;
};

struct LatestGood {
  std::optional<std::string> directory;  // none: nothing usable
  int64_t step = 0;
  std::vector<std::string> skipped;  // why newer ones were passed over, a line each
};

// The state saved last whose files all have their checksums. A directory that does not exist has none.
LatestGood latest_good(const std::string& directory);

}  // namespace latente
