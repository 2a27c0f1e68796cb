// GGUF, the model files of llama.cpp, versions 2 and 3, little-endian: a header, keys with typed values, the
// tensors' descriptions, and their data from an aligned place on.
// https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
#pragma once

#include <algorithm>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/file.h"
#include "checkpoint/gguf_blocks.h"
#include "tensor/view.h"

namespace latente {

enum class GgufType : uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };

// A value where it lies in the file; valid as long as the file is.
struct GgufValue {
  GgufType type = GgufType::u8;
  GgufType element = GgufType::u8;  // of an array
  uint64_t count = 1;               // an array's elements
  std::span<const std::byte>
      bytes;  // a number's, a string's, or all of an array's elements as the file has them

  // Nothing when the value is of another kind. Integers of any type that fit into int64; numbers are integers
  // and floating values; lists are arrays of them.
  std::optional<int64_t> integer() const;
  std::optional<double> number() const;
  std::optional<bool> boolean() const;
  std::optional<std::string_view> string() const;
  std::optional<std::vector<int64_t>> integers() const;
  std::optional<std::vector<double>> numbers() const;
  std::optional<std::vector<std::string_view>> strings() const;
  std::vector<GgufValue> elements() const;  // of an array of anything

  // For messages: "5", "\"llama\"", "an array of 3 strings".
  std::string describe() const;
};

struct GgufTensor {
  std::string name;
  GgmlType type = GgmlType::f32;
  Shape
      shape;  // outermost axis first, as everywhere here (the file has the innermost first); a scalar is [1]
  std::span<const std::byte> data;  // rows of whole blocks

  int64_t columns() const { return shape[-1]; }
  int64_t rows() const { return shape.count_from(0) / std::max<int64_t>(columns(), 1); }
  int64_t row_bytes() const { return columns() / block_of(type).values * block_of(type).bytes; }
};

// A validated, mapped file. The constructor refuses everything that is not exactly the format: other versions
// and byte orders; a file cut off anywhere; counts, lengths and sizes beyond the file; unknown types; empty,
// repeated or unprintable names; booleans other than 0 and 1; arrays nested deeper than 8; an alignment that
// is not a power of two from 8 on; tensors of more than 4 axes, of broken blocks, overlapping, with gaps
// beyond the alignment, or leaving data uncovered. Memory is a small multiple of the file's descriptions.
class GgufFile {
 public:
  explicit GgufFile(const std::string& path);
  // Bytes owned by the caller; `label` stands for the path in messages.
  GgufFile(std::span<const std::byte> bytes, std::string label);
  GgufFile(GgufFile&&) = default;
  GgufFile& operator=(GgufFile&&) = default;

  const std::string& path() const { return label_; }
  uint32_t version() const { return version_; }
  int64_t alignment() const { return alignment_; }
  const std::vector<std::pair<std::string_view, GgufValue>>& metadata() const { return metadata_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }  // in the order of their data
  const GgufTensor* find_tensor(std::string_view name) const;          // null when absent
  const MappedFile& file() const { return file_; }

  const GgufValue* find(std::string_view key) const;  // null when absent
  // Nothing when the key is absent; Error "FILE: KEY: expected an integer, found ..." for another type.
  std::optional<int64_t> integer(std::string_view key) const;
  std::optional<double> number(std::string_view key) const;
  std::optional<bool> boolean(std::string_view key) const;
  std::optional<std::string_view> string(std::string_view key) const;
  std::optional<std::vector<int64_t>> integers(std::string_view key) const;
  std::optional<std::vector<std::string_view>> strings(std::string_view key) const;
  // Error "FILE: no key KEY" when the key is absent.
  int64_t integer_at(std::string_view key) const;
  double number_at(std::string_view key) const;
  std::string_view string_at(std::string_view key) const;

 private:
  struct Piece {
    uint64_t offset, bytes, index;  // of a tensor in the order of their descriptions
  };
  void parse(std::span<const std::byte> bytes);
  void place(std::vector<Piece>& pieces, std::span<const std::byte> data);

  std::string label_;
  MappedFile file_;
  uint32_t version_ = 0;
  int64_t alignment_ = 32;
  std::vector<std::pair<std::string_view, GgufValue>> metadata_;
  std::unordered_map<std::string_view, size_t> keys_;
  std::vector<GgufTensor> tensors_;
  std::unordered_map<std::string_view, size_t> names_;
};

}  // namespace latente
