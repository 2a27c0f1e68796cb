#include "cuda/runtime.h"

#include "base/error.h"

namespace latente::cuda {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the error is reported here; later calls must not find it again
  fail("{}: {} ({})", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

}  // namespace latente::cuda
