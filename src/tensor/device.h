// Tensors in the memory of a backend's device, and what the host sees of them.
#pragma once

#include <string>

#include "tensor/backend.h"
#include "tensor/tensor.h"

namespace latente {

// Persistent memory of the device, zeroed.
void allocate(Backend& backend, const Tensor& tensor);
// A persistent tensor outside any plan.
Tensor buffer(Backend& backend, Shape shape, DType dtype, std::string name = {});
// Moves a tensor's values from the host's memory to the device's; where that is the same, nothing happens.
void move_to(Backend& backend, const Tensor& tensor);

// What a weight takes, in rows or quantised.
int64_t bytes_of_weight(const Backend& backend, const View& w);

// What a contiguous view of the device holds, where the host can read it: the memory itself where the device
// shares it with the host, else a copy.
struct HostCopy {
  View view;
  std::shared_ptr<void> memory;  // null when nothing was copied
};
HostCopy on_host(Backend& backend, const View& device);

// A tensor's next contents: written by the host into view(), and there for the device after finish().
class HostWriter {
 public:
  HostWriter(Backend& backend, const View& device);
  const View& view() const { return host_; }
  void finish();

 private:
  Backend* backend_;
  View device_, host_;
  std::shared_ptr<void> memory_;
};

}  // namespace latente
