// Launches of kernels that may begin before the one in front of them on the stream has ended (compute
// capability 9.0; earlier devices run them one after the other). Their start then costs nothing, and weights
// are on their way before what they are multiplied by is there.
#pragma once

#include "cuda/context.h"
#include "cuda/runtime.h"

namespace latente::cuda {

// Every block of such a kernel calls this before it reads what earlier kernels wrote, or writes anything: it
// waits for the end of the kernel in front, and lets the next one begin. So whatever ran before the kernel in
// front is done when a block begins; only that is safe to read before the call, and weights are (who changes
// them, an optimizer or a copy, is never just in front of a product).
__device__ inline void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

template <class... Parameters, class... Arguments>
void launch_early_in_clusters(void (*kernel)(Parameters...), dim3 grid, unsigned cluster, int threads,
                              size_t shared_bytes, const char* name, const Context& context,
                              const Arguments&... arguments) {
  // Up to 48 KiB are there unasked, in which what a kernel declares for itself, a few KiB, must fit as well.
  if (shared_bytes > 40 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = context.stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {cluster, 1, 1};
  config.attrs = attributes;
  config.numAttrs = context.compute_capability < 90 ? 0 : cluster > 1 ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

template <class... Parameters, class... Arguments>
void launch_early(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                  const char* name, const Context& context, const Arguments&... arguments) {
  launch_early_in_clusters(kernel, grid, 1, threads, shared_bytes, name, context, arguments...);
}

}  // namespace latente::cuda
