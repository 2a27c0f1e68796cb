// The safetensors format: 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, the
// data. https://huggingface.co/docs/safetensors
#pragma once

#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/file.h"
#include "tensor/view.h"

namespace latente {

struct SafetensorsEntry {
  std::string name;
  std::string_view dtype_name;   // as in the file: "BF16"
  std::optional<DType> dtype;    // none for types of the format that this library does not compute with
  std::vector<int64_t> extents;  // as in the file; rank 0 to 8
  const std::byte* data = nullptr;
  int64_t bytes = 0;

  // A scalar has shape [1]. Error above rank 4.
  Shape shape() const;
};

// A validated, mapped file. The constructor refuses everything that is not exactly the format: a header that
// is cut off, over 100 MB, not UTF-8 or not the expected JSON; duplicate names or keys; unknown types;
// offsets that are negative, fractional, beyond the data, at odds with shape and type, overlapping or leaving
// bytes uncovered.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::string& path);
  // Bytes owned by the caller; `label` stands for the path in messages.
  SafetensorsFile(std::span<const std::byte> bytes, std::string label);
  SafetensorsFile(SafetensorsFile&&) = default;
  SafetensorsFile& operator=(SafetensorsFile&&) = default;

  const std::string& path() const { return label_; }
  // In the order of their data.
  const std::vector<SafetensorsEntry>& entries() const { return entries_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  bool contains(std::string_view name) const { return find(name) != nullptr; }
  const SafetensorsEntry* find(std::string_view name) const;  // null when absent
  const SafetensorsEntry& at(std::string_view name) const;    // Error when absent

  // The tensor where it lies in the file: read-only memory, valid as long as this object. Error for a type
  // that the library lacks, rank above 4, or data that is not aligned to its elements.
  View view(std::string_view name) const;
  // As view(), but nothing instead of an Error.
  std::optional<View> try_view(const SafetensorsEntry& entry) const;
  // Copies into the target, converting between floating types (through float32) and between integer types.
  // Error when the shapes differ: "NAME: expected [2, 3], found [3, 2] in FILE".
  void read(std::string_view name, const View& target) const;

  const MappedFile& file() const { return file_; }

 private:
  void parse(std::span<const std::byte> bytes);

  std::string label_;
  MappedFile file_;
  std::vector<SafetensorsEntry> entries_;
  std::unordered_map<std::string_view, size_t> index_;
  std::map<std::string, std::string> metadata_;
};

// Error unless the entry's shape is the target's. `file` is for the message.
void check_shape(const SafetensorsEntry& entry, const Shape& expected, const std::string& file);

struct TensorSpec {
  std::string name;
  DType dtype = DType::f32;
  Shape shape;

  int64_t bytes() const { return shape.count() * size_of(dtype); }
};

// by_element: by falling element size, then as given, so that every tensor is aligned.
enum class SafetensorsOrder { by_element, as_given };

// Writes one file, tensor by tensor in any order; the target only changes at commit(). Data begins on a
// 64-byte boundary.
class SafetensorsWriter {
 public:
  using Metadata = std::map<std::string, std::string>;

  SafetensorsWriter(const std::string& path, std::vector<TensorSpec> specs,
                    const Metadata& metadata = {{"format", "pt"}},
                    SafetensorsOrder order = SafetensorsOrder::by_element);

  // The view, of any strides, converted to the declared type. Error when the name is not declared, already
  // written, or the shapes differ.
  void write(const std::string& name, const View& view);
  // Bytes of the tensor as the file holds them, from byte `offset` of it on. Parts may come in any order,
  // each byte once. Error when they are more than the tensor has.
  void write_part(const std::string& name, int64_t offset, std::span<const std::byte> bytes);
  bool written(const std::string& name) const;
  bool complete() const { return remaining_ == 0; }
  // Error when a declared tensor was not written.
  void commit();

 private:
  struct Slot {
    int64_t offset = 0;
    size_t spec = 0;
    int64_t missing = 0;  // bytes
    bool written = false;
  };
  Slot& slot_of(const std::string& name);  // Error when it is not declared, or written

  std::vector<TensorSpec> specs_;
  FileWriter file_;
  std::unordered_map<std::string, Slot> slots_;
  size_t remaining_ = 0;
};

}  // namespace latente
