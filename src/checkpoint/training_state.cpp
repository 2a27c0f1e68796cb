#include "checkpoint/training_state.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "checkpoint/checksum.h"
#include "checkpoint/json.h"
#include "tensor/device.h"

namespace latente {

namespace fs = std::filesystem;
using Json = nlohmann::json;

namespace {

constexpr const char* manifest_name = "manifest.json";
constexpr const char* state_name = "state.json";
constexpr const char* optimizer_name = "optimizer.safetensors";
constexpr int64_t max_json_bytes = 64 << 20;

struct FileRecord {
  int64_t bytes = 0;
  std::string checksum;
};

struct Manifest {
  int64_t step = 0, serial = 0;
  std::map<std::string, FileRecord> files;  // by path relative to the state's directory
};

std::string checksum_of(std::span<const std::byte> bytes) { return fmt::format("{:016x}", xxh64(bytes)); }

std::string checksum_of(const Json& json) {
  std::string text = json.dump();
  return checksum_of(std::as_bytes(std::span(text.data(), text.size())));
}

std::string manifest_text(const Manifest& manifest) {
  Json files = Json::object();
  for (const auto& [name, record] : manifest.files)
    files[name] = {{"bytes", record.bytes}, {"xxh64", record.checksum}};
  Json json = {
      {"version", 1}, {"step", manifest.step}, {"serial", manifest.serial}, {"files", std::move(files)}};
  json["xxh64"] = checksum_of(json);
  return json.dump(2) + "\n";
}

Manifest read_manifest(const std::string& directory) {
  std::string path = join_path(directory, manifest_name);
  Json json = parse_json(read_file(path, max_json_bytes), path);
  auto bad = [&](const std::string& what) {
    fail("{}: expected a training state's manifest, found {}", path, what);
  };
  if (!json.is_object() || !json.contains("xxh64") || !json["xxh64"].is_string()) bad("other JSON");
  std::string checksum = json["xxh64"];
  json.erase("xxh64");
  if (checksum != checksum_of(json)) fail("{}: checksum mismatch", path);
  Manifest manifest;
  try {
    if (json.at("version") != 1) bad("another version");
    manifest.step = json.at("step");
    manifest.serial = json.at("serial");
    for (const auto& [name, record] : json.at("files").items())
      manifest.files[name] = {record.at("bytes"), record.at("xxh64")};
  } catch (const Json::exception&) {
    bad("missing or mistyped keys");
  }
  for (const auto& [name, record] : manifest.files) {
    fs::path relative(name);
    if (relative.is_absolute() || std::find(relative.begin(), relative.end(), "..") != relative.end())
      fail("{}: expected files inside the directory, found {}", path, printable(name));
  }
  for (const char* needed : {state_name, optimizer_name}) {
    if (!manifest.files.contains(needed)) bad(fmt::format("no {}", needed));
  }
  return manifest;
}

void verify_files(const std::string& directory, const Manifest& manifest, TrainingState::Verify verify) {
  for (const auto& [name, record] : manifest.files) {
    MappedFile file(join_path(directory, name));
    if (file.size() != record.bytes)
      fail("{}: expected {} bytes, found {}", file.path(), record.bytes, file.size());
    if (verify == TrainingState::Verify::sizes) continue;
    file.advise(MappedFile::Advice::sequential);
    if (std::string found = checksum_of(file.bytes()); found != record.checksum)
      fail("{}: expected checksum {}, found {}", file.path(), record.checksum, found);
  }
}

// The step of "step-000123", also when an interrupted replacement put it aside.
std::optional<int64_t> step_of(std::string_view name) {
  constexpr std::string_view prefix = "step-";
  if (std::string_view original = replaced_name(name); !original.empty()) name = original;
  if (!name.starts_with(prefix)) return std::nullopt;
  name.remove_prefix(prefix.size());
  if (name.empty() || name.size() > 18 || name.find_first_not_of("0123456789") != name.npos)
    return std::nullopt;
  return std::stoll(std::string(name));
}

struct Candidate {
  std::string directory;
  int64_t step = 0;
  std::optional<Manifest> manifest;
  std::string damage;  // when there is no manifest
};

// The states of a run, the last saved first; those without a readable manifest come by step, before all
// others.
std::vector<Candidate> candidates(const std::string& directory) {
  std::vector<Candidate> found;
  std::vector<std::string> names = list_directory(directory);
  for (const std::string& name : names) {
    std::optional<int64_t> step = step_of(name);
    if (!step) continue;
    std::string_view original = replaced_name(name);
    if (!original.empty() && std::binary_search(names.begin(), names.end(), original)) continue;
    Candidate candidate{join_path(directory, name), *step, std::nullopt, {}};
    try {
      candidate.manifest = read_manifest(candidate.directory);
    } catch (const Error& error) {
      candidate.damage = error.what();
    }
    found.push_back(std::move(candidate));
  }
  std::sort(found.begin(), found.end(), [](const Candidate& a, const Candidate& b) {
    if (a.manifest && b.manifest)
      return std::pair(a.manifest->serial, a.step) > std::pair(b.manifest->serial, b.step);
    return a.manifest || b.manifest ? !a.manifest : a.step > b.step;
  });
  return found;
}

void check_finite(const Json& json, const std::string& path) {
  if (json.is_number_float() && !std::isfinite(json.get<double>()))
    fail("training state: {} is {}, which JSON cannot hold", path, json.get<double>());
  if (!json.is_structured()) return;
  for (const auto& [key, value] : json.items()) check_finite(value, fmt::format("{}/{}", path, key));
}

}  // namespace

TrainingStateWriter::TrainingStateWriter(const std::string& directory, int64_t step, Backend* device)
    : directory_(directory),
      step_(step),
      device_(device),
      files_(join_path(directory, fmt::format("step-{:06}", step))) {
  LATENTE_ASSERT(step >= 0);
  recover_directory(directory_);
}

void TrainingStateWriter::tensor(std::string name, const View& view) {
  specs_.push_back({std::move(name), view.dtype, view.shape});
  views_.push_back(view);
}

void TrainingStateWriter::json(const Json& state) {
  LATENTE_ASSERT(state.is_object());
  check_finite(state, "");
  Json with_step = state;
  with_step["step"] = step_;
  state_ = with_step.dump(2) + "\n";
}

void TrainingStateWriter::model(const std::function<void(const std::string&)>& write) {
  std::string path = join_path(files_.partial(), "model");
  std::error_code error;
  fs::create_directory(path, error);
  if (error) fail("{}: cannot create: {}", path, error.message());
  write(path);
}

void TrainingStateWriter::commit(int keep_last) {
  SafetensorsWriter optimizer(join_path(files_.partial(), optimizer_name), specs_);
  for (size_t i = 0; i < specs_.size(); ++i)
    optimizer.write(specs_[i].name, device_ ? on_host(*device_, views_[i]).view : views_[i]);
  optimizer.commit();
  if (state_.empty()) json(Json::object());
  write_file_atomically(join_path(files_.partial(), state_name), state_);

  Manifest manifest;
  manifest.step = step_;
  for (const Candidate& other : candidates(directory_)) {
    if (other.manifest) manifest.serial = std::max(manifest.serial, other.manifest->serial + 1);
  }
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(files_.partial())) {
    if (!entry.is_regular_file()) continue;
    MappedFile file(entry.path().string());
    manifest.files[entry.path().lexically_relative(files_.partial()).generic_string()] = {
        file.size(), checksum_of(file.bytes())};
  }
  write_file_atomically(join_path(files_.partial(), manifest_name), manifest_text(manifest));
  files_.commit();

  if (keep_last <= 0) return;
  // States without a readable manifest stay: what is not recognised is not ours to remove.
  for (const Candidate& other : candidates(directory_)) {
    if (other.manifest && keep_last-- <= 0) remove_directory(other.directory);
  }
}

TrainingState::TrainingState(std::string directory, Verify verify) : directory_(std::move(directory)) {
  Manifest manifest = read_manifest(directory_);
  verify_files(directory_, manifest, verify);
  step_ = manifest.step;
  serial_ = manifest.serial;
  std::string path = join_path(directory_, state_name);
  json_ = std::make_shared<const Json>(parse_json(read_file(path, max_json_bytes), path));
  tensors_ = std::make_shared<const SafetensorsFile>(join_path(directory_, optimizer_name));
}

std::string TrainingState::model_directory() const { return join_path(directory_, "model"); }

LatestGood latest_good(const std::string& directory) {
  LatestGood latest;
  std::error_code error;
  if (!fs::exists(directory, error)) return latest;
  std::vector<Candidate> found = candidates(directory);
  std::vector<std::pair<int64_t, std::string>> unreadable;
  for (const Candidate& candidate : found) {
    try {
      if (!candidate.manifest) {
        unreadable.emplace_back(candidate.step, candidate.damage);
        continue;
      }
      verify_files(candidate.directory, *candidate.manifest, TrainingState::Verify::checksums);
    } catch (const Error& damage) {
      latest.skipped.push_back(damage.what());
      continue;
    }
    latest.directory = candidate.directory;
    latest.step = candidate.step;
    break;
  }
  for (const auto& [step, damage] : unreadable) {
    if (!latest.directory || step > latest.step) latest.skipped.push_back(damage);
  }
  return latest;
}

}  // namespace latente
