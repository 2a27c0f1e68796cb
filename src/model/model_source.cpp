#include "model/model_source.h"

#include <filesystem>

#include "checkpoint/resumable.h"
#include "model/gguf.h"
#include "model/weights.h"

namespace latente {

ModelSource open_model(const std::string& path) {
  if (is_gguf(path)) {
    auto file = std::make_unique<GgufCheckpoint>(path);
    Config config = file->config();
    return {std::move(config), std::move(file)};
  }
  auto directory = std::make_unique<Checkpoint>(path);
  Config config = load_config(*directory);
  return {std::move(config), std::move(directory)};
}

Config config_of_model(const std::string& path) {
  if (is_gguf(path)) return GgufCheckpoint(path).config();
  if (!std::filesystem::is_directory(path)) return Config::from_file(path);
  check_finished(path);
  return Config::from_file(path + "/config.json");
}

}  // namespace latente
