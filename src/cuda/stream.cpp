#include "cuda/stream.h"

#include "cuda/runtime.h"

namespace latente::cuda {

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

Stream::Stream(bool urgent) {
  int least = 0, greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "CUDA stream");
  // Not ordered with the legacy stream, which cannot be captured.
  check(cudaStreamCreateWithPriority(&handle_, cudaStreamNonBlocking, urgent ? greatest : least),
        "CUDA stream");
}

Stream::~Stream() { cudaStreamDestroy(handle_); }

void Stream::synchronize() const { check(cudaStreamSynchronize(handle_), "CUDA stream"); }

}  // namespace latente::cuda
