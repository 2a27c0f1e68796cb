#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "base/memory.h"
#include "cpu/cpu_backend.h"
#include "cpu/rows.h"
#include "tensor/tensor.h"

namespace latente {
namespace {

// Vectorised by the compiler: nothing but a comparison with the largest finite value.
template <class T>
bool row_is_finite(const T* row, int64_t count) {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    finite = finite & (std::abs(static_cast<Wide>(row[i])) <= std::numeric_limits<Wide>::max());
  }
  return finite;
}

template <class T>
bool is_finite(ThreadPool& pool, const View& x) {
  std::atomic<bool> finite{true};
  for_pieces(pool, split_rows({x}), piece_elements, [&](int64_t row, int64_t begin, int64_t end) {
    if (!row_is_finite(row_of<T>(x, row) + begin, end - begin)) finite.store(false);
  });
  return finite.load();
}

}  // namespace

CpuBackend::CpuBackend(ThreadOptions threads) : pool_(threads) {}

std::string CpuBackend::name() const { return "cpu"; }

int64_t CpuBackend::available_memory() const { return latente::available_memory(); }

std::shared_ptr<void> CpuBackend::allocate(int64_t bytes) { return aligned_memory(bytes); }

void CpuBackend::upload(const void* host, View device) {
  LATENTE_ASSERT(device.contiguous());
  if (device.count() > 0) std::memcpy(device.data, host, static_cast<size_t>(device.bytes()));
}

void CpuBackend::download(View device, void* host) {
  LATENTE_ASSERT(device.contiguous());
  if (device.count() > 0) std::memcpy(host, device.data, static_cast<size_t>(device.bytes()));
}

void CpuBackend::synchronize() {}

bool CpuBackend::all_finite(View x) {
  switch (x.dtype) {
    case DType::f64:
      return is_finite<double>(pool_, x);
    case DType::f32:
      return is_finite<float>(pool_, x);
    case DType::bf16:
      return is_finite<bf16>(pool_, x);
    case DType::f16:
      return is_finite<f16>(pool_, x);
    case DType::f8e4m3:
      return is_finite<f8e4m3>(pool_, x);
    case DType::i64:
    case DType::i32:
    case DType::u8:
    case DType::q8:
    case DType::q4:
    case DType::q4m:
      return true;
  }
  return true;
}

}  // namespace latente
