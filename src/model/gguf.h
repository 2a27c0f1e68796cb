// llama.cpp's files of the architecture deepseek2, seen as a checkpoint in Hugging Face's names.
#pragma once

#include <functional>
#include <memory>
#include <unordered_map>

#include "checkpoint/tensor_source.h"
#include "model/gguf_config.h"

namespace latente {

// Whether the path is a file that begins as GGUF does or is named so.
bool is_gguf(const std::string& path);

// One file, or all of a split model when given the first (NAME-00001-of-00003.gguf). Parameters are decoded
// as they are read. The rows of queries and keys are in the order of the released checkpoints: llama.cpp's
// converter leaves rotary rows as they are for this architecture. kv_b_proj is as in old files, or put
// together from attn_k_b, which is transposed head by head, and attn_v_b; files that hold both are read as
// old ones.
class GgufCheckpoint final : public TensorSource {
 public:
  // Throws Error naming the file and the key or the tensor.
  explicit GgufCheckpoint(const std::string& path);
  // A file opened before; not the first of several.
  explicit GgufCheckpoint(GgufFile file);

  const Config& config() const { return config_; }
  // The first file, which has the keys.
  const GgufFile& file() const { return *files_[0]; }
  const std::vector<std::shared_ptr<GgufFile>>& files() const { return files_; }

  bool contains(std::string_view name) const override { return parts_.contains(std::string(name)); }
  std::vector<std::string> names() const override;
  const std::string& file_of(std::string_view name) const override;
  std::optional<DType> dtype_in_file(std::string_view name) const override;
  void read(const std::string& name, const View& target) const override;
  void read_rows(const std::string& name, int64_t rows, int64_t first, const View& target) const override;
  void release(std::string_view name) const override;
  std::optional<MappedTensor> map(std::string_view name) const override;
  std::optional<MappedBlocks> blocks(std::string_view name) const override;

 private:
  struct Stored {
    const GgufTensor* tensor;
    size_t file;
  };
  // A parameter: rows of one tensor, or of attn_k_b and (`values`) attn_v_b.
  struct Part {
    Stored stored, values{};
    int64_t first_row = 0;
    Shape shape;
  };

  void open_others();
  void read_descriptions();
  const GgufTensor* find(std::string_view gguf) const;
  void name_parts();
  void name_part(const Stored& stored);
  void add(const std::string& name, const Part& part);
  void name_experts(const std::string& stack, const Stored& stored);
  void name_latent_parts(const std::string& name, const Stored& keys, const Stored& values);
  const Part& part(std::string_view name) const;
  const Part& part_of_shape(const std::string& name, const Shape& shape) const;
  // From row `first` of the part on.
  void decode_rows(const Part& part, int64_t first, const View& target, const std::string& name) const;
  void decode_latent(const Part& part, int64_t first, const View& target) const;
  [[noreturn]] void wrong_shape(const Stored& stored, const std::string& expected) const;

  std::vector<std::shared_ptr<GgufFile>> files_;
  std::unordered_map<std::string_view, Stored> stored_;  // by their names in the files
  std::unordered_map<std::string, Part> parts_;
  // k_b_proj and v_b_proj, of what is also a part as kv_b_proj.
  std::unordered_map<std::string, Part> halves_;
  Config config_;
};

}  // namespace latente
