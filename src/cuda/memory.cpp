#include "cuda/memory.h"

#include <cstring>
#include <vector>

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

namespace {

constexpr int64_t staging_bytes = int64_t{8} << 20, largest_staged = staging_bytes / 8;

std::shared_ptr<void> allocate_staging() {
  void* memory = nullptr;
  check(cudaMallocHost(&memory, static_cast<size_t>(staging_bytes)), "page-locked memory");
  return {memory, [](void* pointer) { cudaFreeHost(pointer); }};
}

}  // namespace

StagedUploads::StagedUploads(StreamHandle stream) : stream_(stream), staging_(allocate_staging()) {}

void StagedUploads::upload(const void* host, View device) {
  LATENTE_ASSERT(device.contiguous());
  const int64_t bytes = device.bytes();
  if (bytes == 0) return;
  if (bytes > largest_staged) return cuda::upload(host, device, stream_);
  if (used_ + bytes > staging_bytes) {
    check(cudaStreamSynchronize(stream_), "upload");
    used_ = 0;
  }
  void* staged = static_cast<char*>(staging_.get()) + used_;
  used_ += (bytes + 63) / 64 * 64;
  std::memcpy(staged, host, static_cast<size_t>(bytes));
  check(cudaMemcpyAsync(device.data, staged, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream_),
        "upload");
}

StagedDownloads::StagedDownloads(StreamHandle stream) : stream_(stream), staging_(allocate_staging()) {}

void StagedDownloads::download(View device, void* host) {
  const std::pair<View, void*> part{device, host};
  download_all({&part, 1});
}

void StagedDownloads::download_all(std::span<const std::pair<View, void*>> parts) {
  struct Staged {
    void* host;
    const char* from;
    size_t bytes;
  };
  std::vector<Staged> waiting;
  int64_t used = 0;
  const auto land = [&] {
    if (waiting.empty()) return;
    check(cudaStreamSynchronize(stream_), "download");
    for (const Staged& part : waiting) std::memcpy(part.host, part.from, part.bytes);
    waiting.clear();
    used = 0;
  };
  for (const auto& [device, host] : parts) {
    LATENTE_ASSERT(device.contiguous());
    const int64_t bytes = device.bytes();
    if (bytes == 0) continue;
    if (bytes > largest_staged) {
      cuda::download(device, host, stream_);
      continue;
    }
    if (used + bytes > staging_bytes) land();
    char* staged = static_cast<char*>(staging_.get()) + used;
    used += (bytes + 63) / 64 * 64;
    check(cudaMemcpyAsync(staged, device.data, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, stream_),
          "download");
    waiting.push_back({host, staged, static_cast<size_t>(bytes)});
  }
  land();
}

}  // namespace latente::cuda
