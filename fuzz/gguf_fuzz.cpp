// Whatever the bytes are, GgufFile refuses them with Error, or its keys and tensors lie in the file, apart
// from each other, and can be read.
#include <algorithm>
#include <cstring>
#include <vector>

#include "base/error.h"
#include "checkpoint/gguf.h"
#include "support.h"

namespace {

void read_all(const latente::GgufValue& value) {
  require(!value.describe().empty());
  int kinds = value.integer() || value.number() ? 1 : 0;
  kinds += value.boolean().has_value() + value.string().has_value();
  require(kinds == (value.type != latente::GgufType::array));
  if (std::optional<std::vector<std::string_view>> strings = value.strings()) {
    size_t bytes = 0;
    for (std::string_view each : *strings) bytes += 8 + each.size();
    require(bytes == value.bytes.size());
  }
  if (value.integers()) require(value.integers()->size() == value.count);
  if (value.numbers()) require(value.numbers()->size() == value.count);
  for (const latente::GgufValue& element : value.elements()) read_all(element);
}

void check(const latente::GgufFile& file, std::span<const std::byte> bytes) {
  auto within = [&](std::span<const std::byte> part) {
    return part.empty() ||
           (part.data() >= bytes.data() && part.data() + part.size() <= bytes.data() + bytes.size());
  };
  for (const auto& [key, value] : file.metadata()) {
    require(file.find(key) == &value && within(value.bytes));
    read_all(value);
  }
  const std::byte* end = bytes.data();
  for (const latente::GgufTensor& tensor : file.tensors()) {
    require(file.find_tensor(tensor.name) == &tensor && within(tensor.data));
    require(static_cast<int64_t>(tensor.data.size()) == tensor.rows() * tensor.row_bytes());
    if (!tensor.data.empty()) {
      require(tensor.data.data() >= end);
      end = tensor.data.data() + tensor.data.size();
    }
    if (!latente::can_decode(tensor.type)) continue;
    std::vector<float> row(static_cast<size_t>(tensor.data.empty() ? 0 : tensor.columns()));
    for (int64_t r = 0; !tensor.data.empty() && r < tensor.rows(); ++r)
      latente::decode(tensor.type, tensor.data.data() + r * tensor.row_bytes(), tensor.columns(), row.data());
  }
}

void try_bytes(std::span<const std::byte> bytes) {
  try {
    latente::GgufFile file(bytes, "input");
    check(file, bytes);
  } catch (const latente::Error& error) {
    require(std::strchr(error.what(), '\n') == nullptr);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try_bytes({reinterpret_cast<const std::byte*>(data), size});
  if (size < 2) return 0;
  // The same behind a header that fits, so that mutations need not find it: the first byte counts tensors,
  // the second keys.
  std::vector<std::byte> framed(24 + size - 2);
  std::memcpy(framed.data(), "GGUF\3", 5);
  framed[8] = static_cast<std::byte>(data[0] % 8);
  framed[16] = static_cast<std::byte>(data[1] % 8);
  if (size > 2) std::memcpy(framed.data() + 24, data + 2, size - 2);
  try_bytes(framed);
  return 0;
}
