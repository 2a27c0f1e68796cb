// A model by its path, in whatever form it is stored.
#pragma once

#include <memory>
#include <string>

#include "checkpoint/tensor_source.h"
#include "model/config.h"

namespace latente {

struct ModelSource {
  Config config;
  std::unique_ptr<TensorSource> tensors;
};

// A directory in Hugging Face's layout, or a GGUF file. MTP modules that config.json announces and the
// weights lack are left out of the config.
ModelSource open_model(const std::string& path);

// Of the config alone: also a config.json, and a directory without weights.
Config config_of_model(const std::string& path);

}  // namespace latente
