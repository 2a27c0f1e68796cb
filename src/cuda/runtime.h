// Errors of the CUDA runtime; the only header here that includes CUDA's own.
#pragma once

#include <cuda_runtime.h>

namespace latente::cuda {

// Throws Error naming `what` unless the call succeeded.
void check(cudaError_t error, const char* what);

// After a launch: bad configurations show here, faults inside a kernel at the next wait.
inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

}  // namespace latente::cuda
