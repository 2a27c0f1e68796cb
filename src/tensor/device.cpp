#include "tensor/device.h"

namespace latente {

void allocate(Backend& backend, const Tensor& tensor) {
  std::shared_ptr<void> memory = backend.allocate(tensor.count() * size_of(tensor.dtype()));
  void* data = memory.get();
  bind_memory(tensor, data, std::move(memory));
}

Tensor buffer(Backend& backend, Shape shape, DType dtype, std::string name) {
  Tensor tensor = parameter(shape, dtype, false);
  tensor.value().name = std::move(name);
  allocate(backend, tensor);
  return tensor;
}

void move_to(Backend& backend, const Tensor& tensor) {
  if (backend.is_host()) return;
  const View host = tensor.view();
  const std::shared_ptr<void> owner = tensor.value().owner;  // until it has been copied
  allocate(backend, tensor);
  backend.upload(host.data, tensor.view());
}

int64_t bytes_of_weight(const Backend& backend, const View& w) {
  if (w.layout == Layout::rows) return w.bytes();
  const auto form = backend.quantised(w.shape, w.dtype, w.group);
  return form ? form->bytes : w.bytes();
}

HostCopy on_host(Backend& backend, const View& device) {
  if (backend.is_host()) return {device, nullptr};
  HostCopy copy{device, aligned_memory(device.bytes())};
  backend.download(device, copy.memory.get());
  copy.view.data = copy.memory.get();
  return copy;
}

HostWriter::HostWriter(Backend& backend, const View& device)
    : backend_(&backend), device_(device), host_(device) {
  if (backend.is_host()) return;
  memory_ = aligned_memory(device.bytes());
  host_.data = memory_.get();
}

void HostWriter::finish() {
  if (memory_) backend_->upload(host_.data, device_);
}

}  // namespace latente
