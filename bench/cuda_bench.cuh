// What the benchmarks of CUDA kernels share: random numbers on the device, and the time of a call.
#pragma once

#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <vector>

#include "cuda/context.h"
#include "cuda/graph.h"
#include "cuda/memory.h"
#include "cuda/runtime.h"

namespace latente::cuda {

// Uniform in (-2, 2), as bfloat16.
static __global__ void fill_kernel(uint16_t* to, int64_t count, uint32_t seed) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u ^ seed;
    x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu, x ^= x >> 16;
    const float value = static_cast<float>(static_cast<int32_t>(x)) * (2.0f / 2147483648.0f);
    to[i] = static_cast<uint16_t>(__float_as_uint(value) >> 16);
  }
}

struct CudaBench {
  explicit CudaBench(int64_t workspace_bytes)
      : workspace(allocate(workspace_bytes)), taken(allocate(2 * sizeof(int))) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, 0), "CUDA device");
    context = {stream,
               workspace.get(),
               workspace_bytes,
               static_cast<int*>(taken.get()),
               properties.multiProcessorCount,
               10 * properties.major + properties.minor,
               static_cast<int>(properties.sharedMemPerBlockOptin)};
    std::printf("%s, %d multiprocessors\n", properties.name, properties.multiProcessorCount);
  }
  // Elements of bfloat16.
  std::shared_ptr<void> random(int64_t count) {
    std::shared_ptr<void> data = allocate(2 * count);
    fill_kernel<<<1024, 256, 0, stream>>>(static_cast<uint16_t*>(data.get()), count, seed++);
    check_launch("fill");
    return data;
  }
  // Microseconds of one of `calls` calls, call(0), call(1), ...: the median of recorded runs.
  double time(int calls, const std::function<void(int)>& call) {
    call(0);  // sets kernels up
    stream.synchronize();
    const Graph graph(stream, [&] {
      for (int i = 0; i < calls; ++i) call(i);
    });
    cudaEvent_t start, stop;
    check(cudaEventCreate(&start), "event");
    check(cudaEventCreate(&stop), "event");
    graph.launch(stream);
    std::vector<double> times;
    double total = 0;
    while (times.size() < 5 || (times.size() < 15 && total < 60e3)) {
      check(cudaEventRecord(start, stream), "event");
      graph.launch(stream);
      check(cudaEventRecord(stop, stream), "event");
      check(cudaEventSynchronize(stop), "event");
      float milliseconds = 0;
      check(cudaEventElapsedTime(&milliseconds, start, stop), "event");
      times.push_back(1e3 * static_cast<double>(milliseconds) / calls);
      total += 1e3 * static_cast<double>(milliseconds);
    }
    cudaEventDestroy(start);
    cudaEventDestroy(stop);
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
  }

  Stream stream;
  std::shared_ptr<void> workspace, taken;
  Context context;
  uint32_t seed = 1;
};

}  // namespace latente::cuda
