// A converted checkpoint seen as one of floating weights: what its codes and scales say, for comparing with
// other implementations.
#pragma once

#include <map>

#include "model/model_source.h"
#include "tensor/panels.h"

namespace latente {

// The names are those of the original; an MTP module's copies of embedding and head, which are not stored,
// are missing. Matrices are decoded as they are read and cannot be mapped.
class DecodedSource final : public TensorSource {
 public:
  // Of a converted model. Error where load_converted has one.
  DecodedSource(const Config& config, std::unique_ptr<TensorSource> converted, Backend& backend);

  bool contains(std::string_view name) const override;
  std::vector<std::string> names() const override;
  const std::string& file_of(std::string_view name) const override;
  std::optional<DType> dtype_in_file(std::string_view name) const override;
  void read(const std::string& name, const View& target) const override;
  void read_rows(const std::string& name, int64_t rows, int64_t first, const View& target) const override;
  std::optional<MappedTensor> map(std::string_view name) const override;
  void release(std::string_view name) const override;

 private:
  struct Panels {
    std::string name;  // in the file: of a stack
    std::shared_ptr<void> owner;
    const std::byte* data = nullptr;  // of this matrix
    Shape shape;
    quantised::Form form;
  };
  const Panels* find(std::string_view name) const;

  std::unique_ptr<TensorSource> converted_;
  std::map<std::string, Panels, std::less<>> panels_;
};

// As open_model, a converted model's weights decoded.
ModelSource open_decoded(const std::string& path, Backend& backend);

}  // namespace latente
