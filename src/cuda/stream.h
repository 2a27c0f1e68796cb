// An ordered queue of work on the current CUDA device. Nothing here waits for the host but synchronize().
#pragma once

struct CUstream_st;

namespace latente::cuda {

using StreamHandle = CUstream_st*;  // CUDA's cudaStream_t

// How many devices this process can use; 0 without a driver.
int device_count();

class Stream {
 public:
  // urgent: its kernels' blocks come before those of other streams.
  explicit Stream(bool urgent = false);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  operator StreamHandle() const { return handle_; }
  // Waits for everything queued so far. Throws Error when a kernel failed.
  void synchronize() const;

 private:
  StreamHandle handle_ = nullptr;
};

}  // namespace latente::cuda
