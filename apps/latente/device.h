// The device that a command runs on, and what it can do at best.
#pragma once

#include <CLI/CLI.hpp>
#include <memory>
#include <string>

#include "cpu/cpu_backend.h"

namespace latente {

class Device {
 public:
  // "cpu", "cuda", "cuda:1", or "auto": a GPU where there is one. `threads` of the CPU. Error for
  // other names, in a build without CUDA, and on a machine without that GPU.
  explicit Device(const std::string& name, ThreadOptions threads = {});

  Backend& backend() { return *backend_; }
  // "8 threads", or the GPU's name.
  std::string describe() const;
  int threads() const { return cpu_ ? cpu_->threads().size() : 0; }  // 0 on a GPU

  // Bytes that this process has of the device's memory, on a GPU about: others may have come or gone.
  int64_t used_memory() const;
  // Bytes a second that the device reads from its memory (on a GPU: reads and writes in a copy).
  double measure_bandwidth();
  // Operations a second of products with such weights.
  double measure_peak(DType weights);

 private:
  std::unique_ptr<Backend> backend_;
  CpuBackend* cpu_ = nullptr;
  int64_t free_at_first_ = 0;  // of a GPU's memory
};

void add_device_option(CLI::App& command, std::string& device);

// What --version says: the version, and the devices of this build and this machine.
std::string version_text();

}  // namespace latente
