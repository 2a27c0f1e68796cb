// Weights that lie in files row by row, laid out in panels while the model already runs.
#pragma once

#include <memory>
#include <span>
#include <thread>
#include <vector>

#include "base/file.h"
#include "tensor/backend.h"
#include "tensor/pending_panels.h"
#include "tensor/tensor.h"

namespace latente {

// Part of a mapped file, which lives as long as `owner`.
struct MappedBytes {
  std::span<const std::byte> bytes;
  std::shared_ptr<void> owner;
  const MappedFile* file = nullptr;

  void release() const;  // a hint: nobody reads it for now, nor what is beside it
};

// The matrices of one tensor: what their panels are made of.
class MatricesInFile : public PendingPanels {
 public:
  // A matrix is `panels` panels of `panel_bytes` each, and what finish() puts behind them.
  MatricesInFile(std::vector<MappedBytes> matrices, int64_t panels, int64_t panel_bytes)
      : PendingPanels(static_cast<int64_t>(matrices.size())),
        stored_(std::move(matrices)),
        panels_(panels),
        panel_bytes_(panel_bytes) {}

  const MappedBytes& stored(int64_t i) const { return stored_[static_cast<size_t>(i)]; }
  int64_t panels() const { return panels_; }
  int64_t panel_bytes() const { return panel_bytes_; }
  virtual void finish(int64_t /*i*/, std::byte* /*matrix*/) const {}

 private:
  std::vector<MappedBytes> stored_;
  int64_t panels_, panel_bytes_;
};

// Tensors whose products may begin at once: they make the panels that they need (PendingPanels), while a
// thread lays one matrix after another out where it will stay, and gives the file's pages back. What products
// have missed most often comes first, and faster than what nobody has missed. A matrix that cannot be laid
// out stays as it is, and products with it fail for the reason that it has.
class BackgroundLayout : public std::enable_shared_from_this<BackgroundLayout> {
 public:
  BackgroundLayout() = default;
  ~BackgroundLayout();  // stops
  BackgroundLayout(const BackgroundLayout&) = delete;
  BackgroundLayout& operator=(const BackgroundLayout&) = delete;

  // Gives the tensor a view of panels, whose data are where they will be, in `memory`. All are added before
  // the first step; this object and the memory then live as long as the tensors do.
  void add(const Tensor& tensor, View view, std::unique_ptr<MatricesInFile> matrices,
           std::shared_ptr<void> memory);

  // Either a thread does it all:
  void start();
  void wait();  // until it has
  // or each call lays out one matrix; false when there is none left.
  bool step();

 private:
  struct Place {
    std::unique_ptr<MatricesInFile> matrices;
    std::byte* to;
    int64_t stride;  // bytes from one matrix to the next
    std::vector<bool> tried;
  };
  bool choose();
  // Some panels; false when all are laid out.
  bool advance();

  std::vector<Place> places_;
  std::vector<std::shared_ptr<void>> memories_;
  // What is laid out next.
  Place* place_ = nullptr;
  int64_t matrix_ = 0, panel_ = 0;
  std::jthread thread_;  // first to go
};

}  // namespace latente
