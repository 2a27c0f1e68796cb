// Device memory.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include "cuda/stream.h"
#include "tensor/view.h"

namespace latente::cuda {

// Zeroed memory of the current device, freed with the last owner. Errors name the size.
std::shared_ptr<void> allocate(int64_t bytes);

// In the stream's order; `device` must be contiguous. `host` may be reused, or read, on return: both wait.
void upload(const void* host, View device, StreamHandle stream);
void download(View device, void* host, StreamHandle stream);

// Small uploads that need not wait: they are copied to page-locked memory first.
class StagedUploads {
 public:
  explicit StagedUploads(StreamHandle stream);
  // As upload(). Waits for large copies, and each time that the staging memory has been used up.
  void upload(const void* host, View device);

 private:
  StreamHandle stream_;
  std::shared_ptr<void> staging_;
  int64_t used_ = 0;
};

// Small downloads by way of page-locked memory, which is quicker.
class StagedDownloads {
 public:
  explicit StagedDownloads(StreamHandle stream);
  // As download().
  void download(View device, void* host);
  // All of them, waiting once.
  void download_all(std::span<const std::pair<View, void*>> parts);

 private:
  StreamHandle stream_;
  std::shared_ptr<void> staging_;
};

}  // namespace latente::cuda
