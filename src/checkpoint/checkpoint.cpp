#include "checkpoint/checkpoint.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "checkpoint/copy.h"
#include "checkpoint/json.h"
#include "checkpoint/resumable.h"

namespace latente {

namespace fs = std::filesystem;

namespace {

constexpr const char* single_name = "model.safetensors";
constexpr const char* index_name = "model.safetensors.index.json";
constexpr int64_t max_json_bytes = 256 << 20;

void check_shard_name(const std::string& shard, const std::string& label) {
  bool plain = shard.find_first_of("/\\") == shard.npos && shard.ends_with(".safetensors") &&
               !has_control_character(shard);
  if (!plain)
    fail("{}: expected the name of a .safetensors file beside it, found {}", label, printable(shard));
}

}  // namespace

std::map<std::string, std::string> parse_checkpoint_index(std::string_view text, const std::string& label) {
  nlohmann::json index = parse_json(text, label);
  if (!index.is_object()) fail("{}: expected an object, found {}", label, index.type_name());
  auto found = index.find("weight_map");
  if (found == index.end()) fail("{}: no weight_map", label);
  if (!found->is_object()) fail("{}: weight_map: expected an object, found {}", label, found->type_name());
  std::map<std::string, std::string> shards;
  for (auto& [name, shard] : found->get_ref<nlohmann::json::object_t&>()) {
    if (!shard.is_string())
      fail("{}: weight_map: {}: expected a file name, found {}", label, printable(name), shard.type_name());
    check_shard_name(shard.get_ref<const std::string&>(), label);
    shards.emplace(name, std::move(shard.get_ref<std::string&>()));
  }
  if (shards.empty()) fail("{}: weight_map is empty", label);
  return shards;
}

Checkpoint::Checkpoint(std::string directory) : directory_(std::move(directory)) {
  std::error_code error;
  if (!fs::is_directory(directory_, error))
    fail("{}: expected a checkpoint directory, found none", directory_);
  check_finished(directory_);
  read_config();
  std::string single = join_path(directory_, single_name), index_path = join_path(directory_, index_name);
  if (fs::exists(single, error)) {
    add(std::make_shared<const SafetensorsFile>(single));
    return;
  }
  if (!fs::exists(index_path, error))
    fail("{}: expected {} or {}, found neither", directory_, single_name, index_name);

  std::map<std::string, std::string> index =
      parse_checkpoint_index(read_file(index_path, max_json_bytes), index_path);
  std::map<std::string, const SafetensorsFile*> opened;
  for (const auto& [name, shard] : index) {
    auto [place, added] = opened.emplace(shard, nullptr);
    if (added) {
      std::string path = join_path(directory_, shard);
      if (!fs::exists(path, error))
        fail("{}: {} is missing, which {} names for {}", directory_, shard, index_name, printable(name));
      files_.push_back(std::make_shared<const SafetensorsFile>(path));
      place->second = files_.back().get();
    }
    if (!place->second->contains(name))
      fail("{}: no tensor {}, which {} places there", place->second->path(), printable(name), index_name);
  }
  for (const auto& [shard, file] : opened) {
    for (const SafetensorsEntry& each : file->entries()) {
      auto found = index.find(each.name);
      if (found == index.end())
        fail("{}: tensor {} is not in {}", file->path(), printable(each.name), index_name);
      if (found->second != shard)
        fail("{}: tensor {} should be in {} by {}", file->path(), printable(each.name), found->second,
             index_name);
    }
  }
  std::vector<std::shared_ptr<const SafetensorsFile>> files = std::move(files_);
  files_.clear();
  for (std::shared_ptr<const SafetensorsFile>& file : files) add(std::move(file));
}

void Checkpoint::add(std::shared_ptr<const SafetensorsFile> file) {
  for (const SafetensorsEntry& each : file->entries()) files_of_.emplace(each.name, files_.size());
  files_.push_back(std::move(file));
}

void Checkpoint::read_config() {
  std::string path = join_path(directory_, "config.json");
  std::error_code error;
  if (!fs::exists(path, error)) return;
  nlohmann::json config = parse_json(read_file(path, max_json_bytes), path);
  if (!config.is_object()) fail("{}: expected an object, found {}", path, config.type_name());
  auto quantization = config.find("quantization_config");
  if (quantization == config.end() || quantization->is_null()) return;
  if (!quantization->is_object())
    fail("{}: quantization_config: expected an object, found {}", path, quantization->type_name());
  auto block = quantization->find("weight_block_size");
  if (block == quantization->end() || block->is_null()) return;
  constexpr int64_t largest = 1 << 20;
  bool good = block->is_array() && block->size() == 2;
  for (size_t i = 0; good && i < 2; ++i) {
    const nlohmann::json& extent = (*block)[i];
    good = extent.is_number_unsigned() && extent.get<uint64_t>() >= 1 && extent.get<uint64_t>() <= largest;
  }
  if (!good)
    fail("{}: quantization_config.weight_block_size: expected two positive integers, found {}", path,
         printable(block->dump(-1, ' ', true, nlohmann::json::error_handler_t::replace)));
  block_size_ = {(*block)[0].get<int64_t>(), (*block)[1].get<int64_t>()};
  quantized_ = true;
}

std::vector<std::string> Checkpoint::names() const {
  constexpr std::string_view suffix = "_scale_inv";
  std::vector<std::string> names;
  names.reserve(files_of_.size());
  for (const auto& [name, file_index] : files_of_) {
    bool scale = name.ends_with(suffix) && scale_name(name.substr(0, name.size() - suffix.size()));
    if (!scale) names.emplace_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

const SafetensorsEntry& Checkpoint::entry(std::string_view name) const {
  auto found = files_of_.find(name);
  if (found == files_of_.end()) fail("{}: no tensor {}", directory_, printable(name));
  return files_[found->second]->at(name);
}

const std::string& Checkpoint::file_of(std::string_view name) const {
  entry(name);
  return files_[files_of_.at(name)]->path();
}

std::optional<std::string> Checkpoint::scale_name(std::string_view name) const {
  auto found = files_of_.find(name);
  if (found == files_of_.end() || files_[found->second]->at(name).dtype != DType::f8e4m3) return std::nullopt;
  std::string scales = std::string(name) + "_scale_inv";
  if (!contains(scales)) return std::nullopt;
  return scales;
}

std::pair<int64_t, int64_t> Checkpoint::block_size() const {
  if (!quantized_)
    fail("{}: expected quantization_config.weight_block_size for FP8 weights, found none",
         join_path(directory_, "config.json"));
  return block_size_;
}

int64_t Checkpoint::bytes() const {
  int64_t total = 0;
  for (const auto& file : files_) {
    for (const SafetensorsEntry& each : file->entries()) total += each.bytes;
  }
  return total;
}

std::optional<MappedTensor> Checkpoint::map(std::string_view name) const {
  const SafetensorsEntry& found = entry(name);
  const std::shared_ptr<const SafetensorsFile>& file = files_[files_of_.at(name)];
  std::optional<View> view = file->try_view(found);
  if (!view) return std::nullopt;
  return MappedTensor{*view, std::const_pointer_cast<SafetensorsFile>(file), &file->file()};
}

void Checkpoint::release(std::string_view name) const {
  const SafetensorsEntry& found = entry(name);
  const MappedFile& file = files_[files_of_.at(name)]->file();
  file.advise(MappedFile::Advice::dont_need, static_cast<size_t>(found.data - file.bytes().data()),
              static_cast<size_t>(found.bytes));
}

std::optional<std::string> Checkpoint::scales_of(const SafetensorsEntry& codes) const {
  if (codes.dtype != DType::f8e4m3) return std::nullopt;
  const std::string& name = codes.name;
  if (std::optional<std::string> scales = scale_name(name)) return scales;
  if (contains(name + "_scale"))
    fail("{}: FP8 with {}_scale is not supported: expected {}_scale_inv", file_of(name), name, name);
  if (quantized_ && name.ends_with(".weight"))
    fail("{}: no {}_scale_inv for an FP8 weight", file_of(name), name);
  return std::nullopt;
}

void Checkpoint::read(const std::string& name, const View& target) const {
  const SafetensorsEntry& found = entry(name);
  if (const auto scales = scales_of(found)) {
    check_shape(found, target.shape, file_of(name));
    return read_scaled(found, *scales, target[0], 0, target);
  }
  files_[files_of_.at(name)]->read(name, target);
}

void Checkpoint::read_rows(const std::string& name, int64_t rows, int64_t first, const View& target) const {
  LATENTE_ASSERT(target.shape.rank() == 2 && first >= 0 && first + target[0] <= rows);
  const SafetensorsEntry& found = entry(name);
  check_shape(found, {rows, target[1]}, file_of(name));
  if (const auto scales = scales_of(found)) return read_scaled(found, *scales, rows, first, target);
  if (!found.dtype) fail("{}: {}: cannot use elements of type {}", file_of(name), name, found.dtype_name);
  copy_into(*found.dtype, found.data + first * target[1] * size_of(*found.dtype), target, name);
}

void Checkpoint::read_scaled(const SafetensorsEntry& codes, const std::string& scales, int64_t rows,
                             int64_t first, const View& target) const {
  if (codes.extents.size() != 2)
    fail("{}: expected 2 axes for FP8 with block scales, found {}", codes.name, codes.extents.size());
  if (!is_floating(target.dtype) || target.dtype == DType::f8e4m3)
    fail("{}: cannot multiply out FP8 with block scales into {}", codes.name, name_of(target.dtype));
  auto [block_rows, block_columns] = block_size();
  Shape blocks{(rows + block_rows - 1) / block_rows, (target[1] + block_columns - 1) / block_columns};
  const SafetensorsEntry& found = entry(scales);
  check_shape(found, blocks, file_of(scales));
  if (found.dtype != DType::f32 && found.dtype != DType::bf16)
    fail("{}: expected scales in F32 or BF16, found {}", scales, found.dtype_name);
  const int64_t begin = first / block_rows,
                end = std::max(begin, (first + target[0] + block_rows - 1) / block_rows);
  std::vector<float> values(static_cast<size_t>((end - begin) * blocks[1]));
  copy_into(*found.dtype, found.data + begin * blocks[1] * size_of(*found.dtype),
            View(values.data(), {end - begin, blocks[1]}, DType::f32), scales);
  dequantize_into(codes.data + first * target[1],
                  {values, block_rows, block_columns, first - begin * block_rows}, target);
}

CheckpointWriter::CheckpointWriter(const std::string& directory, std::vector<TensorSpec> specs,
                                   const CheckpointOptions& options)
    : directory_(directory) {
  if (options.max_shard_bytes <= 0)
    fail("max_shard_bytes: expected a positive number, found {}", options.max_shard_bytes);
  int64_t filled = 0;
  for (TensorSpec& spec : specs) {
    if (options.dtype && is_floating(spec.dtype)) spec.dtype = *options.dtype;
    if (shards_.empty() || (filled > 0 && filled + spec.bytes() > options.max_shard_bytes)) {
      shards_.emplace_back();
      filled = 0;
    }
    filled += spec.bytes();
    if (!shard_of_.emplace(spec.name, shards_.size() - 1).second)
      fail("{}: duplicate tensor {}", directory, printable(spec.name));
    shards_.back().specs.push_back(std::move(spec));
  }
  if (shards_.empty()) fail("{}: a checkpoint has at least one tensor", directory);
  if (shards_.size() == 1) {
    shards_[0].name = single_name;
    return;
  }
  nlohmann::json weight_map = nlohmann::json::object();
  int64_t total = 0;
  for (size_t i = 0; i < shards_.size(); ++i) {
    shards_[i].name = fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards_.size());
    for (const TensorSpec& spec : shards_[i].specs) {
      weight_map[spec.name] = shards_[i].name;
      total += spec.bytes();
    }
  }
  nlohmann::json index = {{"metadata", {{"total_size", total}}}, {"weight_map", std::move(weight_map)}};
  write_file(index_name, index.dump(2) + "\n");
}

void CheckpointWriter::write(const std::string& name, const View& view) {
  auto found = shard_of_.find(name);
  if (found == shard_of_.end()) fail("{}: tensor {} was not declared", directory_.target(), printable(name));
  Shard& shard = shards_[found->second];
  if (shard.done) fail("{}: tensor {} is written twice", directory_.target(), name);
  if (!shard.writer) shard.writer.emplace(join_path(partial(), shard.name), shard.specs);
  shard.writer->write(name, view);
  if (!shard.writer->complete()) return;
  shard.writer->commit();
  shard.writer.reset();
  shard.done = true;
}

void CheckpointWriter::write_file(const std::string& name, std::string_view bytes) {
  write_file_atomically(join_path(partial(), name), bytes);
}

void CheckpointWriter::keep_other_files() {
  std::error_code error;
  const std::string& old = directory_.target();
  if (!fs::is_directory(old, error)) return;
  for (const std::string& name : list_directory(old)) {
    bool weights = name == index_name || (name.starts_with("model") && name.ends_with(".safetensors"));
    std::string from = join_path(old, name), to = join_path(partial(), name);
    if (weights || fs::exists(fs::symlink_status(to, error))) continue;
    fs::copy(
        from, to,
        fs::copy_options::recursive | fs::copy_options::copy_symlinks | fs::copy_options::create_hard_links,
        error);
    if (error)
      fs::copy(from, to,
               fs::copy_options::recursive | fs::copy_options::copy_symlinks |
                   fs::copy_options::overwrite_existing,
               error);
    if (error) fail("{}: cannot keep {}: {}", old, from, error.message());
  }
}

void CheckpointWriter::commit() {
  for (const Shard& shard : shards_) {
    if (shard.done) continue;
    for (const TensorSpec& spec : shard.specs) {
      if (!shard.writer || !shard.writer->written(spec.name))
        fail("{}: tensor {} was declared but not written", directory_.target(), spec.name);
    }
  }
  keep_other_files();
  directory_.commit();
}

}  // namespace latente
