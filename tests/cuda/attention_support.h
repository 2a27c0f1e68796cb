// What the tests of attention on a device share: tensors there with their values on the host, errors.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "base/random.h"
#include "cuda/kernels.h"
#include "cuda/memory.h"
#include "cuda/runtime.h"
#include "cuda/stream.h"

namespace latente {

inline constexpr double nan = std::numeric_limits<double>::quiet_NaN();

struct Device {
  explicit Device(int64_t workspace_bytes = int64_t{64} << 20)
      : workspace(cuda::allocate(workspace_bytes)),
        taken(cuda::allocate(2 * sizeof(int))),
        context{stream, workspace.get(), workspace_bytes, static_cast<int*>(taken.get())} {
    cudaDeviceProp properties;
    cuda::check(cudaGetDeviceProperties(&properties, 0), "CUDA device");
    context.multiprocessors = properties.multiProcessorCount;
    context.compute_capability = 10 * properties.major + properties.minor;
    context.shared_bytes = static_cast<int>(properties.sharedMemPerBlockOptin);
  }
  cuda::Stream stream;
  std::shared_ptr<void> workspace, taken;
  cuda::Context context;
};

// A tensor on the device whose last axis stands as columns of wider rows, with NaN around it, and its values.
struct DeviceTensor {
  DeviceTensor(Device& device_, Shape shape, DType type, int64_t left = 0, int64_t right = 0)
      : device(&device_), values(static_cast<size_t>(shape.count()), nan), offset(left) {
    row = left + shape[-1] + right;
    rows = shape.count() / std::max<int64_t>(shape[-1], 1);
    memory = cuda::allocate(rows * row * size_of(type));
    view = View(static_cast<char*>(memory.get()) + left * size_of(type), shape, type);
    int64_t stride = row;
    for (int axis = shape.rank() - 2; axis >= 0; --axis) {
      view.strides[static_cast<size_t>(axis)] = stride;
      stride *= shape[axis];
    }
    upload();
  }

  // Values as the device's type holds them.
  void set(const std::function<double()>& value) {
    for (double& x : values) x = rounded(value());
    upload();
  }
  void randomise(Random& random) {
    set([&] { return random.normal(); });
  }
  double rounded(double x) const {
    float wide = static_cast<float>(x);
    bf16 half(wide);
    return view.dtype == DType::bf16 ? static_cast<double>(static_cast<float>(half))
                                     : static_cast<double>(wide);
  }
  void upload() {
    std::vector<float> all(static_cast<size_t>(rows * row), std::numeric_limits<float>::quiet_NaN());
    const int64_t width = view.shape[-1];
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < width; ++i)
        all[static_cast<size_t>(r * row + offset + i)] =
            static_cast<float>(values[static_cast<size_t>(r * width + i)]);
    std::vector<char> bytes(static_cast<size_t>(rows * row * size_of(view.dtype)));
    convert(DType::f32, all.data(), view.dtype, bytes.data(), rows * row);
    cuda::upload(bytes.data(), View(memory.get(), {rows * row}, view.dtype), device->stream);
  }
  // The device's values; counts elements around the view that are no longer NaN.
  const std::vector<double>& read() {
    std::vector<char> bytes(static_cast<size_t>(rows * row * size_of(view.dtype)));
    cuda::download(View(memory.get(), {rows * row}, view.dtype), bytes.data(), device->stream);
    std::vector<float> all(static_cast<size_t>(rows * row));
    convert(view.dtype, bytes.data(), DType::f32, all.data(), rows * row);
    const int64_t width = view.shape[-1];
    written_outside = 0;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < row; ++i) {
        const float x = all[static_cast<size_t>(r * row + i)];
        if (i >= offset && i < offset + width) {
          values[static_cast<size_t>(r * width + i - offset)] = static_cast<double>(x);
        } else {
          written_outside += !std::isnan(x);
        }
      }
    }
    return values;
  }
  double& at(int64_t i, int64_t j, int64_t k) {
    return values[static_cast<size_t>((i * view.shape[1] + j) * view.shape[-1] + k)];
  }
  double at(int64_t i, int64_t j, int64_t k) const {
    return values[static_cast<size_t>((i * view.shape[1] + j) * view.shape[-1] + k)];
  }

  Device* device;
  std::vector<double> values;
  int64_t offset, row = 0, rows = 0;
  int64_t written_outside = 0;
  std::shared_ptr<void> memory;
  View view;
};

struct DeviceIndices {
  DeviceIndices(Device& device, const std::vector<int32_t>& values, Shape shape)
      : memory(cuda::allocate(static_cast<int64_t>(values.size() * 4))),
        view(memory.get(), shape, DType::i32) {
    cuda::upload(values.data(), view, device.stream);
  }
  DeviceIndices(Device& device, const std::vector<int32_t>& values)
      : DeviceIndices(device, values, {static_cast<int64_t>(values.size())}) {}
  std::shared_ptr<void> memory;
  View view;
};

// ‖a - b‖ / ‖b‖, or relative to elements of 0.1 if those of b are smaller; infinite if an element of a is
// not finite.
inline double distance(const std::vector<double>& a, const std::vector<double>& b, double shift = 0) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    difference += (a[i] - b[i] - shift) * (a[i] - b[i] - shift);
    norm += b[i] * b[i];
  }
  return std::isfinite(difference)
             ? std::sqrt(difference / std::max(norm, 1e-2 * static_cast<double>(b.size())))
             : std::numeric_limits<double>::infinity();
}

// body(i) for i in [0, count), on all cores.
inline void in_parallel(int64_t count, const std::function<void(int64_t)>& body) {
  const int64_t workers = std::clamp<int64_t>(std::thread::hardware_concurrency(), 1, 16);
  std::vector<std::thread> threads;
  for (int64_t w = 0; w < workers; ++w) {
    threads.emplace_back([&, w] {
      for (int64_t i = w; i < count; i += workers) body(i);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Packed documents of random lengths.
inline std::vector<int32_t> packed_starts(Random& random, int64_t tokens, int64_t longest) {
  std::vector<int32_t> starts;
  while (static_cast<int64_t>(starts.size()) < tokens) {
    const auto begin = static_cast<int32_t>(starts.size());
    const int64_t length = random.between(1, std::min(longest, tokens - begin));
    starts.insert(starts.end(), static_cast<size_t>(length), begin);
  }
  return starts;
}

}  // namespace latente
