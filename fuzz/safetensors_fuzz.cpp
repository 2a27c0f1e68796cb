// Whatever the bytes are, SafetensorsFile refuses them with Error, or every tensor can be read and lies in
// the data.
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>
#include <vector>

#include "base/error.h"
#include "checkpoint/safetensors.h"
#include "support.h"

namespace {

void check(const latente::SafetensorsFile& file, std::span<const std::byte> bytes) {
  uint64_t header_bytes;
  std::memcpy(&header_bytes, bytes.data(), 8);
  const char* header = reinterpret_cast<const char*>(bytes.data()) + 8;
  nlohmann::json json = nlohmann::json::parse(header, header + header_bytes);
  require(json.size() == file.entries().size() + json.contains("__metadata__"));

  const std::byte* at = bytes.data() + 8 + header_bytes;
  for (const latente::SafetensorsEntry& entry : file.entries()) {
    require(entry.data == at);
    at += entry.bytes;
    require(json.at(entry.name).at("shape") == entry.extents);
    require(file.find(entry.name) == &entry);
    if (!entry.dtype || entry.extents.size() > latente::max_rank) continue;
    latente::Shape shape = entry.shape();
    require(shape.count() * latente::size_of(*entry.dtype) == entry.bytes);
    latente::DType type = latente::is_floating(*entry.dtype) ? latente::DType::f32 : latente::DType::i64;
    std::vector<double> target(static_cast<size_t>(shape.count()));
    file.read(entry.name, latente::View(target.data(), shape, type));
    if (std::optional<latente::View> view = file.try_view(entry)) require(view->contiguous());
  }
  require(at == bytes.data() + bytes.size());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data), size);
  try {
    latente::SafetensorsFile file(bytes, "input");
    check(file, bytes);
  } catch (const latente::Error& error) {
    require(std::strchr(error.what(), '\n') == nullptr);
  }
  // The same header with a length that fits, so that mutations need not find it.
  std::vector<std::byte> framed(8 + size);
  size_t header = size;
  for (size_t i = size; i-- > 0;) {
    if (data[i] == '}') {
      header = i + 1;
      break;
    }
  }
  uint64_t length = header;
  std::memcpy(framed.data(), &length, 8);
  if (size > 0) std::memcpy(framed.data() + 8, data, size);
  try {
    latente::SafetensorsFile file(framed, "input");
    check(file, framed);
  } catch (const latente::Error& error) {
    require(std::strchr(error.what(), '\n') == nullptr);
  }
  return 0;
}
