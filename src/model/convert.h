// A checkpoint in 8 or 4 bits on disk (model/converted.h), made in little memory and resumable.
#pragma once

#include "model/importance.h"
#include "model/model_source.h"
#include "model/quantised.h"

namespace latente {

struct ConvertProgress {
  enum class Stage { checking, writing } stage = Stage::writing;  // checking: shards of an earlier run
  int64_t bytes = 0, total_bytes = 0;                             // of the stage, in the result
  int64_t resumed_bytes = 0;                                      // of `bytes`: written by an earlier run
};

struct ConvertOptions {
  QuantisedOptions weights;
  int64_t max_shard_bytes = 5'000'000'000;
  const Importance* importance = nullptr;  // of columns, for 4 bits; null = alike
  std::function<void(const ConvertProgress&)> progress{};
};

struct ConvertReport {
  int64_t bytes = 0, resumed_bytes = 0, shards = 0;
  int64_t parameters = 0;  // MTP modules' own among them
};

// Converts a model (a path as open_model takes it) into the directory `out`, which is refused by loaders
// until it is whole. Killed and called again it goes on after the last whole shard. Tokenizer and generation
// defaults come along, from a GGUF file's keys too. Holds a few tens of megabytes, and of the source what is
// being read. Error where load_quantised and ResumableCheckpoint have one.
ConvertReport convert_model(const std::string& path, const std::string& out, Backend& backend,
                            const ConvertOptions& options = {});

}  // namespace latente
