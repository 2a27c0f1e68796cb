#include "train/metrics.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file.h"

namespace latente {

namespace {

namespace fs = std::filesystem;

double seconds_since_1970() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

void make_directories(const fs::path& directory) {
  std::error_code error;
  if (!directory.empty()) fs::create_directories(directory, error);
  if (error) fail("{}: cannot create the directory: {}", directory.string(), error.message());
}

// The step of a line, or none where there is none.
std::optional<int64_t> step_of(std::string_view line) {
  const auto object = nlohmann::json::parse(line, nullptr, false);
  if (!object.is_object() || !object.contains("step") || !object["step"].is_number_integer())
    return std::nullopt;
  return object["step"].get<int64_t>();
}

// Removes what a resumed run will write again, and a last line without an end.
std::string prepared(std::string path, std::optional<int64_t> resumed_at) {
  make_directories(fs::path(path).parent_path());
  if (!fs::exists(path)) return path;
  const std::string text = read_file(path);
  std::string kept;
  for (size_t at = 0, end; (end = text.find('\n', at)) != text.npos; at = end + 1) {
    const std::string_view line(text.data() + at, end - at);
    if (resumed_at && step_of(line).value_or(*resumed_at - 1) >= *resumed_at) continue;
    kept.append(text, at, end + 1 - at);
  }
  if (kept.size() != text.size()) write_file_atomically(path, kept);
  return path;
}

constexpr std::array<uint32_t, 256> crc_table = [] {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t value = i;
    for (int bit = 0; bit < 8; ++bit) value = value & 1 ? value >> 1 ^ 0x82F63B78 : value >> 1;
    table[i] = value;
  }
  return table;
}();

}  // namespace

uint32_t crc32c(std::string_view bytes) {
  uint32_t crc = ~uint32_t{0};
  for (const char c : bytes) crc = crc_table[(crc ^ static_cast<unsigned char>(c)) & 0xFF] ^ crc >> 8;
  return ~crc;
}

uint32_t masked_crc32c(std::string_view bytes) { return std::rotr(crc32c(bytes), 15) + 0xA282EAD8; }

AppendedFile::AppendedFile(std::string path) : path_(std::move(path)) {
  do {
    fd_ = ::open(path_.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
  } while (fd_ < 0 && errno == EINTR);
  if (fd_ < 0) fail("{}: cannot open for writing: {}", path_, std::strerror(errno));
}

AppendedFile::~AppendedFile() { ::close(fd_); }

void AppendedFile::append(std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t put = ::write(fd_, bytes.data(), bytes.size());
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) fail("{}: cannot write: {}", path_, std::strerror(errno));
    bytes.remove_prefix(static_cast<size_t>(put));
  }
}

JsonlWriter::JsonlWriter(std::string path, std::optional<int64_t> resumed_at)
    : file_(prepared(std::move(path), resumed_at)) {}

void JsonlWriter::write(const Metrics& metrics) {
  nlohmann::ordered_json object;
  object["step"] = metrics.step;
  object["time"] = seconds_since_1970();
  for (const auto& [name, value] : metrics.values) {
    if (const double* number = std::get_if<double>(&value); number && !std::isfinite(*number)) {
      object[name] = std::isnan(*number) ? "nan" : *number > 0 ? "inf" : "-inf";
    } else {
      std::visit([&, &key = name](const auto& held) { object[key] = held; }, value);
    }
  }
  using Json = nlohmann::ordered_json;
  file_.append(object.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n");
}

}  // namespace latente
