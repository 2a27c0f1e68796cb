#include "checkpoint/resumable.h"

#include <algorithm>
#include <filesystem>

#include "base/memory.h"
#include "checkpoint/checksum.h"
#include "checkpoint/json.h"

namespace latente {

namespace fs = std::filesystem;

namespace {

constexpr const char* manifest_name = "conversion.json";
constexpr const char* index_name = "model.safetensors.index.json";
constexpr int64_t max_manifest_bytes = 256 << 20;
constexpr int64_t header_room = 16 << 20;  // bytes of headers, index and tokenizer beside the tensors

bool exists(const std::string& path) {
  std::error_code error;
  return fs::exists(path, error);
}

bool is_weights(const std::string& name) {
  return name == index_name || (name.starts_with("model") && name.ends_with(".safetensors"));
}

// The whole file's, given back to the system as it is read.
uint64_t checksum_of(const std::string& path) {
  const MappedFile file(path);
  file.advise(MappedFile::Advice::sequential);
  return xxh64(file.bytes());
}

// "options.bits" and its two values, where two objects differ first.
struct Difference {
  std::string key, before, now;
};
std::optional<Difference> first_difference(const nlohmann::json& before, const nlohmann::json& now) {
  const nlohmann::json old_keys = before.flatten(), new_keys = now.flatten();
  const auto text = [](const nlohmann::json& keys, const std::string& key) {
    const auto found = keys.find(key);
    return found == keys.end() ? "nothing"
                               : found->dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
  };
  const auto compare = [&](const std::string& key) -> std::optional<Difference> {
    Difference difference{key.substr(key.starts_with('/') ? 1 : 0), text(old_keys, key), text(new_keys, key)};
    if (difference.before == difference.now) return std::nullopt;
    return difference;
  };
  for (const auto* keys : {&new_keys, &old_keys}) {
    for (const auto& [key, value] : keys->items()) {
      if (auto difference = compare(key)) return difference;
    }
  }
  return std::nullopt;
}

}  // namespace

void check_finished(const std::string& directory) {
  if (exists(join_path(directory, manifest_name))) {
    fail("{}: a conversion that is not finished ({}): run the same latente convert again to go on", directory,
         manifest_name);
  }
}

int64_t ResumableCheckpoint::Shard::bytes() const {
  int64_t sum = 0;
  for (const TensorSpec& spec : specs) sum += spec.bytes();
  return sum;
}

ResumableCheckpoint::ResumableCheckpoint(const std::string& directory, const nlohmann::json& identity,
                                         std::vector<TensorSpec> specs, int64_t max_shard_bytes,
                                         const Checking& checking)
    : directory_(directory), lock_(directory) {
  plan(std::move(specs), max_shard_bytes);
  nlohmann::json names = nlohmann::json::array();
  for (const Shard& shard : shards_) {
    for (const TensorSpec& spec : shard.specs)
      names.push_back({shard.name, spec.name, name_of(spec.dtype), spec.shape.str()});
  }
  const std::string text = names.dump();
  manifest_ = {{"identity", identity},
               {"tensors", fmt::format("{:016x}", xxh64(std::as_bytes(std::span(text.data(), text.size()))))},
               {"shards", nlohmann::json::object()}};
  recover_directory(directory_);
  if (exists(path(manifest_name))) {
    check_identity();
    keep_whole_shards(checking);
  } else {
    for (const std::string& name : list_directory(directory_)) {
      if (name != "lock")
        fail("{}: expected a new or empty directory, or a conversion to go on with; found {} in it",
             directory_, printable(name));
    }
  }
  check_space();
  save();
  remove_other_weights();
}

std::string ResumableCheckpoint::path(const std::string& name) const { return join_path(directory_, name); }

void ResumableCheckpoint::plan(std::vector<TensorSpec> specs, int64_t max_shard_bytes) {
  if (max_shard_bytes <= 0)
    fail("shard size: expected a positive number of bytes, found {}", max_shard_bytes);
  int64_t filled = 0;
  for (TensorSpec& spec : specs) {
    if (shards_.empty() || (filled > 0 && filled + spec.bytes() > max_shard_bytes)) {
      shards_.emplace_back();
      filled = 0;
    }
    filled += spec.bytes();
    shards_.back().specs.push_back(std::move(spec));
  }
  if (shards_.empty()) fail("{}: a checkpoint has at least one tensor", directory_);
  for (size_t i = 0; i < shards_.size(); ++i) {
    shards_[i].name = fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards_.size());
    // Wide pieces of bytes first, each a multiple of the alignment, then falling elements.
    std::stable_sort(shards_[i].specs.begin(), shards_[i].specs.end(),
                     [](const TensorSpec& a, const TensorSpec& b) {
                       const auto rank = [](const TensorSpec& spec) {
                         const bool wide = size_of(spec.dtype) == 1 && spec.bytes() % 64 == 0;
                         return wide ? 16 : size_of(spec.dtype);
                       };
                       return rank(a) > rank(b);
                     });
  }
}

void ResumableCheckpoint::check_identity() const {
  const std::string label = path(manifest_name);
  const nlohmann::json found = parse_json(read_file(label, max_manifest_bytes), label);
  if (!found.is_object() || !found.contains("identity")) fail("{}: expected a conversion's record", label);
  if (const auto difference = first_difference(found["identity"], manifest_["identity"])) {
    fail("{}: was begun with {} = {}, now it is {}: give another directory, or remove this one", directory_,
         printable(difference->key), difference->before, difference->now);
  }
  if (found.value("tensors", nlohmann::json()) != manifest_["tensors"])
    fail("{}: was begun with other tensors: give another directory, or remove this one", directory_);
}

void ResumableCheckpoint::keep_whole_shards(const Checking& checking) {
  const std::string label = path(manifest_name);
  const nlohmann::json found = parse_json(read_file(label, max_manifest_bytes), label);
  const auto recorded = found.find("shards");
  if (recorded == found.end() || !recorded->is_object()) fail("{}: expected an object of shards", label);
  struct Claim {
    Shard* shard;
    nlohmann::json record;
    int64_t bytes;
  };
  std::vector<Claim> claims;
  int64_t total = 0, done = 0;
  for (Shard& shard : shards_) {
    const auto record = recorded->find(shard.name);
    std::error_code error;
    const auto size = fs::file_size(path(shard.name), error);
    if (record == recorded->end() || error || !record->is_object()) continue;
    if (record->value("bytes", nlohmann::json()) != nlohmann::json(size)) continue;
    claims.push_back({&shard, *record, static_cast<int64_t>(size)});
    total += claims.back().bytes;
  }
  for (const Claim& claim : claims) {
    const std::string sum = fmt::format("{:016x}", checksum_of(path(claim.shard->name)));
    done += claim.bytes;
    if (checking) checking(done, total);
    if (claim.record.value("xxh64", nlohmann::json()) != sum) continue;
    claim.shard->done = true;
    manifest_["shards"][claim.shard->name] = claim.record;
  }
}

void ResumableCheckpoint::remove_other_weights() const {
  for (const std::string& name : list_directory(directory_)) {
    if (!is_weights(name) || manifest_["shards"].contains(name)) continue;
    std::error_code error;
    fs::remove(path(name), error);
    if (error) fail("{}: cannot remove: {}", path(name), error.message());
  }
}

void ResumableCheckpoint::check_space() const {
  int64_t needed = header_room;
  for (const Shard& shard : shards_) needed += shard.done ? 0 : shard.bytes();
  std::error_code error;
  const fs::space_info space = fs::space(directory_, error);
  if (error) return;  // a file system that does not say
  int64_t free = static_cast<int64_t>(space.available);
  for (const std::string& name : list_directory(directory_)) {  // what will be removed
    if (is_weights(name) && !manifest_["shards"].contains(name))
      free += static_cast<int64_t>(fs::file_size(path(name), error));
  }
  if (free < needed)
    fail("{}: needs {} more, and the disk has {} free", directory_, bytes_text(static_cast<double>(needed)),
         bytes_text(static_cast<double>(free)));
}

void ResumableCheckpoint::save() const { write_file(manifest_name, manifest_.dump(2) + "\n"); }

SafetensorsWriter ResumableCheckpoint::open(size_t shard) const {
  const Shard& found = shards_[shard];
  LATENTE_ASSERT(!found.done);
  return {path(found.name), found.specs, {{"format", "pt"}}, SafetensorsOrder::as_given};
}

void ResumableCheckpoint::finish(size_t shard, SafetensorsWriter writer) {
  Shard& found = shards_[shard];
  writer.commit();
  const std::string file = path(found.name);
  manifest_["shards"][found.name] = {{"bytes", fs::file_size(file)},
                                     {"xxh64", fmt::format("{:016x}", checksum_of(file))}};
  found.done = true;
  save();
}

void ResumableCheckpoint::write_file(const std::string& name, std::string_view bytes) const {
  write_file_atomically(path(name), bytes);
}

void ResumableCheckpoint::commit(std::string_view config) {
  nlohmann::json weight_map = nlohmann::json::object();
  int64_t total = 0;
  for (const Shard& shard : shards_) {
    if (!shard.done) fail("{}: {} is not written", directory_, shard.name);
    for (const TensorSpec& spec : shard.specs) weight_map[spec.name] = shard.name;
    total += shard.bytes();
  }
  const nlohmann::json index = {{"metadata", {{"total_size", total}}}, {"weight_map", std::move(weight_map)}};
  write_file(index_name, index.dump(2) + "\n");
  write_file("config.json", config);
  std::error_code error;
  fs::remove(path(manifest_name), error);
  if (error) fail("{}: cannot remove: {}", path(manifest_name), error.message());
}

}  // namespace latente
