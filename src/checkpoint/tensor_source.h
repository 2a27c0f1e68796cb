// Where a model's parameters come from: named as Hugging Face names them, however they are stored.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/gguf_blocks.h"
#include "tensor/view.h"

namespace latente {

class MappedFile;

// A tensor where it lies in a mapped file: read-only memory that lives as long as `owner`, as does `file`,
// which is null where the source has no file to read pieces of again.
struct MappedTensor {
  View view;
  std::shared_ptr<void> owner;
  const MappedFile* file = nullptr;
};

// A matrix in GGML's blocks where it lies in a mapped file: rows of shape[-1] values, without gaps.
struct MappedBlocks {
  GgmlType type = GgmlType::f32;
  Shape shape;
  std::span<const std::byte> bytes;
  std::shared_ptr<void> owner;
  const MappedFile* file = nullptr;  // as MappedTensor's
};

// All functions may be called from several threads at once.
class TensorSource {
 public:
  virtual ~TensorSource() = default;

  virtual bool contains(std::string_view name) const = 0;
  virtual std::vector<std::string> names() const = 0;                   // sorted
  virtual const std::string& file_of(std::string_view name) const = 0;  // Error when absent
  // The type of the stored elements where that is one of ours; Error when absent.
  virtual std::optional<DType> dtype_in_file(std::string_view name) const = 0;

  // Copies a tensor's value into the target's type. Error when shapes differ: "NAME: expected [2, 3], found
  // [3, 2] in FILE".
  virtual void read(const std::string& name, const View& target) const = 0;
  // The same for rows [first, first + target[0]) of a matrix of `rows` in all; target [., columns].
  virtual void read_rows(const std::string& name, int64_t rows, int64_t first, const View& target) const = 0;
  // The stored elements without a copy; nothing when their type is not ours or they do not lie as one
  // aligned tensor of rank 4 at most.
  virtual std::optional<MappedTensor> map(std::string_view name) const = 0;
  // A hint that what was mapped or read of this tensor need not stay in memory; it may be read again.
  virtual void release(std::string_view) const {}
  // The tensor whose values scale blocks of this one, whose elements are FP8 codes; nothing for others.
  virtual std::optional<std::string> scale_name(std::string_view) const { return std::nullopt; }
  // Nothing when the tensor is absent or not stored as rows of blocks that decode() knows. A kv_b_proj.weight
  // that is stored in two parts has none; they do, as k_b_proj.weight [heads · rank, nope] (transposed head
  // by head) and v_b_proj.weight [heads · v, rank], and their rows can be read and released.
  virtual std::optional<MappedBlocks> blocks(std::string_view) const { return std::nullopt; }
};

}  // namespace latente
