#include "cuda/memory.h"

#include "base/error.h"
#include "cuda/runtime.h"

namespace latente::cuda {

std::shared_ptr<void> allocate(int64_t bytes) {
  void* memory = nullptr;
  const size_t size = static_cast<size_t>(bytes > 0 ? bytes : 1);
  if (cudaError_t error = cudaMalloc(&memory, size); error != cudaSuccess) {
    cudaGetLastError();
    fail("CUDA memory: expected {} free bytes, found {}", bytes, cudaGetErrorString(error));
  }
  std::shared_ptr<void> owner(memory, [](void* pointer) { cudaFree(pointer); });
  check(cudaMemset(memory, 0, size), "CUDA memory");
  check(cudaStreamSynchronize(cudaStreamLegacy), "CUDA memory");
  return owner;
}

void upload(const void* host, View device, StreamHandle stream) {
  LATENTE_ASSERT(device.contiguous());
  if (device.count() == 0) return;
  check(
      cudaMemcpyAsync(device.data, host, static_cast<size_t>(device.bytes()), cudaMemcpyHostToDevice, stream),
      "upload");
  check(cudaStreamSynchronize(stream), "upload");
}

void download(View device, void* host, StreamHandle stream) {
  LATENTE_ASSERT(device.contiguous());
  if (device.count() == 0) return;
  check(
      cudaMemcpyAsync(host, device.data, static_cast<size_t>(device.bytes()), cudaMemcpyDeviceToHost, stream),
      "download");
  check(cudaStreamSynchronize(stream), "download");
}

}  // namespace latente::cuda
