#include "model/convert.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "checkpoint/checksum.h"
#include "checkpoint/gguf_tokenizer.h"
#include "checkpoint/json.h"
#include "checkpoint/resumable.h"
#include "model/converted.h"
#include "model/figures.h"
#include "model/gguf.h"
#include "model/quantised_places.h"
#include "model/run_weights.h"
#include "model/weights.h"

namespace latente {

namespace fs = std::filesystem;

namespace {

using Json = nlohmann::json;

constexpr int64_t max_small_file = 256 << 20;

// Files beside the weights that belong to a model.
constexpr std::array companions = {"tokenizer.json",
                                   "tokenizer_config.json",
                                   "tiktoken.model",
                                   "tokenizer.model",
                                   "vocab.json",
                                   "merges.txt",
                                   "added_tokens.json",
                                   "special_tokens_map.json",
                                   "generation_config.json",
                                   "chat_template.jinja",
                                   "chat_template.json",
                                   "LICENSE",
                                   "README.md"};

// What tells one file from another without reading all of it: its size, and pieces spread evenly.
Json fingerprint_of(const std::string& path) {
  constexpr int64_t pieces = 16, piece = 1 << 16;
  const MappedFile file(path);
  const int64_t size = file.size();
  uint64_t sum = 0;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t begin = std::max<int64_t>(size - piece, 0) * i / (pieces - 1);
    sum = xxh64(
        file.bytes().subspan(static_cast<size_t>(begin), static_cast<size_t>(std::min(piece, size - begin))),
        sum);
  }
  return {{"bytes", size}, {"sample", fmt::format("{:016x}", sum)}};
}

std::string fingerprint_of(const Importance& importance) {
  uint64_t sum = 0;
  for (const auto& [name, columns] : importance) {
    sum = xxh64(std::as_bytes(std::span(name)), sum);
    sum = xxh64(std::as_bytes(std::span(columns)), sum);
  }
  return fmt::format("{:016x}", sum);
}

std::vector<std::string> files_of(const std::string& path, const ModelSource& source) {
  std::vector<std::string> files;
  if (const auto* gguf = dynamic_cast<const GgufCheckpoint*>(source.tensors.get())) {
    for (const auto& file : gguf->files()) files.push_back(file->path());
    return files;
  }
  for (const std::string& name : list_directory(path)) {
    if (name == "config.json" || name.ends_with(".safetensors"))
      files.push_back((fs::path(path) / name).string());
  }
  return files;
}

Json generation_config_of(const GgufFile& file) {
  Json json;
  const std::pair<const char*, const char*> keys[] = {
      {"general.sampling.temp", "temperature"},
      {"general.sampling.top_p", "top_p"},
      {"general.sampling.min_p", "min_p"},
      {"general.sampling.penalty_repeat", "repetition_penalty"}};
  for (const auto& [key, name] : keys) {
    if (const auto value = file.number(key)) json[name] = *value;
  }
  if (const auto value = file.integer("general.sampling.top_k")) json["top_k"] = *value;
  if (json.is_null()) return json;
  // Without a temperature the file leaves the most likely token as the default.
  json["do_sample"] = true;
  if (!json.contains("temperature")) json["temperature"] = 0.0;
  return json;
}

class Converting {
 public:
  Converting(const std::string& path, const std::string& out, Backend& backend, const ConvertOptions& options)
      : path_(path), out_(out), backend_(backend), options_(options), source_(open_model(path)) {
    if (source_.config.converted) fail("{}: is converted already; expected the original weights", path);
    std::error_code error;
    if (fs::exists(out, error) && fs::equivalent(path, out, error))
      fail("{}: expected another directory than the model's own", out);
    const RunWeights weights{options.weights.type == DType::q8 ? "int8" : "int4", options.weights.group};
    model_ = std::make_unique<Transformer>(source_.config, base_type(source_, weights));
    check_names(*model_, *source_.tensors);
    plan_ = quantised_places(*model_, backend, options.weights);
    if (plan_.places.empty()) fail("{}: has no matrix to quantise", path);
    for (const QuantisedPlace& place : plan_.places)
      places_.emplace(place.path + std::string(panels_suffix), &place);
    for (const auto& [name, tensor] : plan_.kept) kept_.emplace(name, tensor);
  }

  ConvertReport run() {
    ResumableCheckpoint result(out_, identity(), specs(), options_.max_shard_bytes,
                               [&](int64_t done, int64_t total) {
                                 show({ConvertProgress::Stage::checking, done, total, 0});
                               });
    ConvertReport report;
    for (const auto& shard : result.shards()) {
      report_total_ += shard.bytes();
      if (shard.done) report.resumed_bytes += shard.bytes();
    }
    resumed_ = done_ = report.resumed_bytes;
    copy_companions(result);
    CheckpointPanels panels(backend_, *source_.tensors, options_.importance);
    for (size_t i = 0; i < result.shards().size(); ++i) {
      const auto& shard = result.shards()[i];
      if (shard.done) continue;
      SafetensorsWriter writer = result.open(i);
      for (const TensorSpec& spec : shard.specs) write(spec, panels, writer);
      result.finish(i, std::move(writer));
    }
    result.commit(config().dump(2) + "\n");
    report.bytes = report_total_;
    report.shards = static_cast<int64_t>(result.shards().size());
    const ParameterCount count = count_parameters(source_.config);
    report.parameters = count.total + count.mtp_own;
    return report;
  }

 private:
  std::vector<TensorSpec> specs() const {
    std::vector<TensorSpec> specs;
    for (const QuantisedPlace& place : plan_.places)
      specs.push_back({place.path + std::string(panels_suffix), DType::u8, stored_shape(place, backend_)});
    for (const auto& [name, tensor] : plan_.kept) specs.push_back({name, tensor.dtype(), tensor.shape()});
    return specs;
  }

  Json identity() const {
    Json files = Json::object();
    for (const std::string& file : files_of(path_, source_))
      files[fs::path(file).filename().string()] = fingerprint_of(file);
    Json options = {{"bits", bits_of(options_.weights.type)},
                    {"mtp_bits", bits_of(mtp_type())},
                    {"group_size", options_.weights.group},
                    {"max_shard_bytes", options_.max_shard_bytes}};
    if (options_.importance) options["importance"] = fingerprint_of(*options_.importance);
    return {{"format", converted_version}, {"source", files}, {"options", options}};
  }

  static int bits_of(DType type) { return type == DType::q8 ? 8 : 4; }
  DType mtp_type() const { return options_.weights.type == DType::q8 ? DType::q8 : options_.weights.mtp; }

  void copy_companions(const ResumableCheckpoint& result) const {
    if (is_gguf(path_)) {
      const GgufFile file(path_);
      if (file.find("tokenizer.ggml.model")) {
        const GgufTokenizer texts = gguf_tokenizer(file);
        result.write_file("tokenizer.json", texts.tokenizer_json);
        if (!texts.config_json.empty()) result.write_file("tokenizer_config.json", texts.config_json);
      }
      const Json generation = generation_config_of(file);
      if (!generation.is_null()) result.write_file("generation_config.json", generation.dump(2) + "\n");
      return;
    }
    for (const char* name : companions) {
      const std::string from = (fs::path(path_) / name).string();
      std::error_code error;
      if (fs::is_regular_file(from, error)) result.write_file(name, read_file(from, max_small_file));
    }
  }

  // The original's, whose other keys stay.
  Json config() const {
    const bool gguf = is_gguf(path_);
    const std::string file = path_ + "/config.json";
    Json json =
        gguf ? source_.config.to_json(model_->weights()) : parse_json(read_file(file, max_small_file), file);
    json["quantization_config"] = {{"quant_method", "latente"},
                                   {"version", converted_version},
                                   {"bits", bits_of(options_.weights.type)},
                                   {"mtp_bits", bits_of(mtp_type())},
                                   {"group_size", options_.weights.group}};
    const char* type = model_->weights() == DType::bf16 ? "bfloat16" : "float32";
    json[json.contains("dtype") ? "dtype" : "torch_dtype"] = type;
    return json;
  }

  void write(const TensorSpec& spec, QuantisedPanels& panels, SafetensorsWriter& writer) {
    const auto found = places_.find(spec.name);
    if (found == places_.end()) return keep(spec, writer);
    const QuantisedPlace& place = *found->second;
    int64_t offset = 0;
    for (const QuantisedPiece& piece : pieces_of(place)) {
      const int64_t bytes = panels.bytes(place, piece);
      buffer_.resize(static_cast<size_t>(bytes));
      panels.make(place, piece, buffer_.data());
      writer.write_part(spec.name, offset, buffer_);
      offset += bytes;
      count(bytes);
    }
  }

  // What is not quantised, some rows at a time.
  void keep(const TensorSpec& spec, SafetensorsWriter& writer) {
    constexpr int64_t piece_bytes = 32 << 20;
    if (spec.shape.rank() != 2) {
      buffer_.resize(static_cast<size_t>(spec.bytes()));
      source_.tensors->read(spec.name, View(buffer_.data(), spec.shape, spec.dtype));
      writer.write_part(spec.name, 0, buffer_);
    } else {
      const int64_t row = spec.shape[1] * size_of(spec.dtype), n = spec.shape[0];
      const int64_t at_once = std::clamp<int64_t>(piece_bytes / row, 1, n);
      for (int64_t first = 0; first < n; first += at_once) {
        const int64_t rows = std::min(at_once, n - first);
        buffer_.resize(static_cast<size_t>(rows * row));
        source_.tensors->read_rows(spec.name, n, first,
                                   View(buffer_.data(), {rows, spec.shape[1]}, spec.dtype));
        writer.write_part(spec.name, first * row, buffer_);
      }
    }
    source_.tensors->release(spec.name);
    count(spec.bytes());
  }

  void count(int64_t bytes) {
    done_ += bytes;
    show({ConvertProgress::Stage::writing, done_, report_total_, resumed_});
  }

  void show(const ConvertProgress& progress) const {
    if (options_.progress) options_.progress(progress);
  }

  const std::string& path_;
  const std::string& out_;
  Backend& backend_;
  const ConvertOptions& options_;
  ModelSource source_;
  std::unique_ptr<Transformer> model_;
  QuantisedPlaces plan_;
  std::map<std::string, const QuantisedPlace*> places_;
  std::map<std::string, Tensor> kept_;
  std::vector<std::byte> buffer_;
  int64_t done_ = 0, resumed_ = 0, report_total_ = 0;
};

}  // namespace

ConvertReport convert_model(const std::string& path, const std::string& out, Backend& backend,
                            const ConvertOptions& options) {
  return Converting(path, out, backend, options).run();
}

}  // namespace latente
