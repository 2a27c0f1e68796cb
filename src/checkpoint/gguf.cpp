#include "checkpoint/gguf.h"

#include <algorithm>
#include <bit>

#include "checkpoint/gguf_cursor.h"
#include "checkpoint/json.h"

namespace latente {

namespace {

constexpr std::string_view alignment_key = "general.alignment";
constexpr uint64_t longest_key = 65535, longest_name = 64;  // bytes, by the format's description
constexpr uint64_t least_key_bytes = 8 + 1 + 4 + 1, least_tensor_bytes = 8 + 1 + 4 + 4 + 8;

uint64_t aligned(uint64_t at, int64_t alignment) {
  uint64_t mask = static_cast<uint64_t>(alignment) - 1;
  return (at + mask) & ~mask;
}

std::string_view read_name(GgufCursor& cursor, uint64_t longest, std::string_view part) {
  std::string_view name = cursor.string(part);
  if (name.empty() || name.size() > longest)
    cursor.refuse("expected {} of 1 to {} bytes, found {}", part, longest, name.size());
  if (has_control_character(name)) cursor.refuse("{} {} has a control character", part, printable(name));
  return name;
}

uint32_t read_version(GgufCursor& cursor) {
  std::span<const std::byte> magic = cursor.take(4, "the magic \"GGUF\"");
  std::string_view text(reinterpret_cast<const char*>(magic.data()), magic.size());
  if (text != "GGUF") cursor.refuse("expected the magic \"GGUF\", found {}", printable(text));
  uint32_t version = cursor.read<uint32_t>("a version");
  bool swapped = version != 0 && (version & 0xffff) == 0;
  if (version != 2 && version != 3)
    cursor.refuse("expected version 2 or 3, found {}{}", version, swapped ? ", which is big-endian" : "");
  return version;
}

// The tensor's type and shape, which the file has innermost axis first. Returns its bytes.
uint64_t read_shape(GgufCursor& cursor, GgufTensor& tensor) {
  uint32_t axes = cursor.read<uint32_t>("a number of axes");
  if (axes > max_rank) cursor.refuse("expected at most {} axes, found {}", max_rank, axes);
  std::array<int64_t, max_rank> extents{1, 1, 1, 1};
  for (uint32_t axis = 0; axis < axes; ++axis) {
    extents[axis] = cursor.read<int64_t>("an extent");
    if (extents[axis] < 0) cursor.refuse("expected no negative extent, found {}", extents[axis]);
  }
  uint32_t number = cursor.read<uint32_t>("an element type");
  std::optional<GgmlType> type = ggml_type(number);
  if (!type) cursor.refuse("unknown element type {}", static_cast<int32_t>(number));
  tensor.type = *type;
  const GgmlBlock& block = block_of(*type);
  if (extents[0] % block.values != 0)
    cursor.refuse("expected rows of whole {} blocks of {} values, found {} values", block.name, block.values,
                  extents[0]);
  // Zero extents do not hide an overflow of the others, which strides would meet.
  int64_t bytes = block.bytes, values = 1;
  bool empty = false;
  for (size_t axis = 0; axis < max_rank; ++axis) {
    int64_t extent = std::max<int64_t>(extents[axis], 1);
    int64_t blocks = axis == 0 ? std::max<int64_t>(extent / block.values, 1) : extent;
    empty = empty || extents[axis] == 0;
    if (__builtin_mul_overflow(bytes, blocks, &bytes) || __builtin_mul_overflow(values, extent, &values))
      cursor.refuse("[{}] of {} is not a size in bytes",
                    fmt::join(extents.begin(), extents.begin() + axes, ", "), block.name);
  }
  std::reverse(extents.begin(), extents.begin() + std::max<uint32_t>(axes, 1));
  tensor.shape = Shape(std::span<const int64_t>(extents.data(), std::max<uint32_t>(axes, 1)));
  return empty ? 0 : static_cast<uint64_t>(bytes);
}

}  // namespace

GgufFile::GgufFile(const std::string& path) : label_(path), file_(path) { parse(file_.bytes()); }

GgufFile::GgufFile(std::span<const std::byte> bytes, std::string label) : label_(std::move(label)) {
  parse(bytes);
}

void GgufFile::parse(std::span<const std::byte> bytes) {
  GgufCursor cursor(bytes, label_);
  cursor.enter("header");
  version_ = read_version(cursor);
  uint64_t tensors = cursor.count(least_tensor_bytes, "tensors");
  uint64_t keys = cursor.count(least_key_bytes, "keys");

  metadata_.reserve(keys);
  keys_.reserve(keys);
  for (uint64_t i = 0; i < keys; ++i) {
    cursor.enter(fmt::format("key {} of {}", i + 1, keys));
    std::string_view key = read_name(cursor, longest_key, "a key");
    cursor.enter(fmt::format("key {}", printable(key)));
    if (!keys_.emplace(key, metadata_.size()).second) cursor.refuse("is there twice");
    metadata_.emplace_back(key, cursor.value(cursor.type()));
  }
  if (const GgufValue* value = find(alignment_key)) {
    if (value->type != GgufType::u32 || *value->integer() < 8 ||
        !std::has_single_bit(static_cast<uint64_t>(*value->integer())))
      fail("{}: {}: expected a power of two from 8 on as a 32-bit integer, found {}", label_, alignment_key,
           value->describe());
    alignment_ = *value->integer();
  }

  std::vector<Piece> pieces;
  pieces.reserve(tensors);
  tensors_.reserve(tensors);
  for (uint64_t i = 0; i < tensors; ++i) {
    cursor.enter(fmt::format("tensor {} of {}", i + 1, tensors));
    GgufTensor& tensor = tensors_.emplace_back();
    tensor.name = read_name(cursor, longest_name, "a name");
    cursor.enter(fmt::format("tensor {}", printable(tensor.name)));
    uint64_t size = read_shape(cursor, tensor);
    pieces.push_back({cursor.read<uint64_t>("an offset"), size, i});
  }
  uint64_t begin = aligned(cursor.at(), alignment_);
  place(pieces, begin < bytes.size() ? bytes.subspan(begin) : std::span<const std::byte>());
}

void GgufFile::place(std::vector<Piece>& pieces, std::span<const std::byte> data) {
  std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) {
    return std::pair(a.offset, a.bytes) < std::pair(b.offset, b.bytes);
  });
  std::vector<GgufTensor> described = std::move(tensors_);
  tensors_.clear();
  tensors_.reserve(described.size());
  names_.reserve(described.size());
  uint64_t covered = 0;
  for (const Piece& piece : pieces) {
    GgufTensor& tensor = described[piece.index];
    uint64_t expected = aligned(covered, alignment_);
    if (piece.offset != expected)
      fail("{}: tensor {}: expected data from byte {} on, found {} ({})", label_, printable(tensor.name),
           expected, piece.offset, piece.offset < expected ? "an overlap" : "a gap");
    if (piece.offset > data.size() || piece.bytes > data.size() - piece.offset)
      fail("{}: tensor {}: expected {} bytes of data from byte {} on, found {} in all", label_,
           printable(tensor.name), piece.bytes, piece.offset, data.size());
    tensor.data = data.subspan(piece.offset, piece.bytes);
    covered = piece.offset + piece.bytes;
    tensors_.push_back(std::move(tensor));
    if (!names_.emplace(tensors_.back().name, tensors_.size() - 1).second)
      fail("{}: duplicate tensor {}", label_, printable(tensors_.back().name));
  }
  if (data.size() > aligned(covered, alignment_))
    fail("{}: expected {} bytes of data, found {}", label_, covered, data.size());
}

const GgufTensor* GgufFile::find_tensor(std::string_view name) const {
  auto found = names_.find(name);
  return found == names_.end() ? nullptr : &tensors_[found->second];
}

const GgufValue* GgufFile::find(std::string_view key) const {
  auto found = keys_.find(key);
  return found == keys_.end() ? nullptr : &metadata_[found->second].second;
}

namespace {

// What `get` makes of the key's value; Error when it gives nothing.
template <class T>
std::optional<T> typed(const GgufFile& file, std::string_view key, std::optional<T> (GgufValue::*get)() const,
                       std::string_view expected) {
  const GgufValue* value = file.find(key);
  if (!value) return std::nullopt;
  std::optional<T> found = (value->*get)();
  if (!found) fail("{}: {}: expected {}, found {}", file.path(), key, expected, value->describe());
  return found;
}

template <class T>
T required(const GgufFile& file, std::string_view key, std::optional<T> found) {
  if (!found) fail("{}: no key {}", file.path(), key);
  return *found;
}

}  // namespace

std::optional<int64_t> GgufFile::integer(std::string_view key) const {
  return typed(*this, key, &GgufValue::integer, "an integer");
}

std::optional<double> GgufFile::number(std::string_view key) const {
  return typed(*this, key, &GgufValue::number, "a number");
}

std::optional<bool> GgufFile::boolean(std::string_view key) const {
  return typed(*this, key, &GgufValue::boolean, "true or false");
}

std::optional<std::string_view> GgufFile::string(std::string_view key) const {
  return typed(*this, key, &GgufValue::string, "a string");
}

std::optional<std::vector<int64_t>> GgufFile::integers(std::string_view key) const {
  return typed(*this, key, &GgufValue::integers, "an array of integers");
}

std::optional<std::vector<std::string_view>> GgufFile::strings(std::string_view key) const {
  return typed(*this, key, &GgufValue::strings, "an array of strings");
}

int64_t GgufFile::integer_at(std::string_view key) const { return required(*this, key, integer(key)); }

double GgufFile::number_at(std::string_view key) const { return required(*this, key, number(key)); }

std::string_view GgufFile::string_at(std::string_view key) const { return required(*this, key, string(key)); }

}  // namespace latente
