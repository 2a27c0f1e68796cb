// Hopper's own instructions (sm_90a): barriers in shared memory, copies of tiles by the tensor memory
// accelerator, products of warpgroups. Tiles in shared memory are [rows, 64] of bfloat16 with the 128-byte
// swizzle: the 16-byte piece c of row r stands at r · 128 + ((c ^ r % 8) · 16), from multiples of 1024 bytes.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "base/error.h"
#include "cuda/runtime.h"
#include "cuda/wgmma.cuh"

namespace latente::cuda {

inline constexpr int tile_columns = 64;

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// -- barriers --

// By address in shared memory, for loops that keep it in a register.
__device__ inline void arrive_at(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Until the phase of this parity has ended.
__device__ inline void wait_at(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done;\n"
      "bra again;\n"
      "done:\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

struct Barrier {
  uint64_t bits;

  __device__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals));
  }
  __device__ void arrive() { arrive_at(shared_address(this)); }
  // Arrives, and expects so many bytes more before the phase ends.
  __device__ void expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)),
                 "r"(bytes)
                 : "memory");
  }
  // Arrives when the thread's own copies (cp.async) so far have been written.
  __device__ void arrive_after_copies() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(this))
                 : "memory");
  }
  __device__ void wait(int parity) { wait_at(shared_address(this), parity); }
};

__device__ inline void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Makes writes of this thread to shared memory visible to copies and products that others start after a
// barrier.
__device__ inline void fence_shared_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Named barriers among some warps of a block.
__device__ inline void sync_threads(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void arrive_threads(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int registers>
__device__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// -- copies --

// A box of a tensor to shared memory, in its swizzle; its bytes count toward the barrier's phase.
__device__ inline void copy_tile(void* to, const CUtensorMap* map, Barrier& done, int column, int row,
                                 int outer) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(&done)), "r"(column), "r"(row), "r"(outer)
      : "memory");
}

// Bytes in a row, in sixteens from multiples of 16, the same way.
__device__ inline void copy_row(void* to, const void* from, int bytes, Barrier& done) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(from)), "r"(bytes), "r"(shared_address(&done))
      : "memory");
}

// A box from shared memory to a tensor, but for what lies beyond its edges; or added to what is there,
// float32 by float32. The thread's copies since the last commit are a group.
__device__ inline void store_tile(const CUtensorMap* map, const void* from, int column, int row, int outer) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
                   reinterpret_cast<uint64_t>(map)),
               "r"(shared_address(from)), "r"(column), "r"(row), "r"(outer)
               : "memory");
}
__device__ inline void add_tile(const CUtensorMap* map, const void* from, int column, int row, int outer) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
          reinterpret_cast<uint64_t>(map)),
      "r"(shared_address(from)), "r"(column), "r"(row), "r"(outer)
      : "memory");
}
__device__ inline void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until the thread's stores have read shared memory.
__device__ inline void stores_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

__device__ inline void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

// Boxes of 128 bytes and box_rows rows of a tensor [outer, rows, columns] in bfloat16 (64 columns) or float32
// (32), with strides in elements; what lies beyond its edges is read as zeros.
inline CUtensorMap tile_map(const void* data, int64_t columns, int64_t rows, int64_t row_stride,
                            int64_t outer, int64_t outer_stride, int box_rows, bool narrow = true) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                           &found),
          "CUDA driver: cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) fail("CUDA driver: cuTensorMapEncodeTiled not found");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                              static_cast<cuuint64_t>(outer)};
  const int64_t element = narrow ? 2 : 4;
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(element * row_stride),
                                static_cast<cuuint64_t>(element * outer_stride)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(128 / element), static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t steps[] = {1, 1, 1};
  const auto type = narrow ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const CUresult result = encode(&map, type, 3, const_cast<void*>(data), sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    fail("CUDA tensor map of [{}, {}, {}], strides {} and {}: error {}", outer, rows, columns, outer_stride,
         row_stride, static_cast<int>(result));
  }
  return map;
}

// Whether tile_map can describe a tensor.
inline bool copies_tiles(const void* data, int64_t row_stride, int64_t outer_stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride % 8 == 0 && outer_stride % 8 == 0 &&
         row_stride > 0 && outer_stride > 0;
}

// -- products --

// An operand whose k runs along the 64 columns of its tiles: rows are the product's.
__device__ inline uint64_t rows_operand(const void* tile) {
  return ((shared_address(tile) >> 4) & 0x3fff) | uint64_t{1} << 16 | uint64_t{64} << 32 | uint64_t{1} << 62;
}
// An operand whose k runs along the rows of its tiles: the product's columns are theirs, of tiles that lie
// tile_bytes apart.
__device__ inline uint64_t columns_operand(const void* tile, int tile_bytes) {
  return ((shared_address(tile) >> 4) & 0x3fff) | static_cast<uint64_t>(tile_bytes >> 4) << 16 |
         uint64_t{64} << 32 | uint64_t{1} << 62;
}
// Sixteen k further on.
inline constexpr uint64_t rows_step = 32 >> 4, columns_step = 16 * 128 >> 4;

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most this many committed groups are not done.
template <int groups>
__device__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
}

__device__ inline uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ inline uint32_t pack_half(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace latente::cuda
