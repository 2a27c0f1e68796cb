// Coded weights (coded.h) in products of few rows: WeightStream (few_rows.cuh) over strips, whose pieces each
// lane copies and reads itself.
#pragma once

#include "cuda/coded.cuh"
#include "cuda/few_rows.cuh"

namespace latente::cuda {

template <Code code, int stages>
struct CodedStream {
  static constexpr bool rotates = true;
  static constexpr int step_depth = strip_depth<code>, blocks = step_depth / scale_depth;
  static constexpr int scale_bytes = code == Code::f8 ? 16 : 2 * blocks * 16;
  static constexpr int stage_bytes = 2 * strip_bytes + scale_bytes, bytes = stages * stage_bytes;

  unsigned ring = 0;           // in shared memory
  const char* codes[2] = {};   // strips of columns 0-7 and 8-15; null = zeros
  const char* scales[2] = {};  // of these, from the first group on
  int depth = 0, group_inverse = 0;

  __device__ int steps() const { return (depth + step_depth - 1) / step_depth; }

  // `half` of the warp's columns are `column` and the next 7.
  __device__ void point(int half, const RowsWeights& w, int64_t batch, int column) {
    const char* matrix = static_cast<const char*>(w.at) + batch * w.batch;
    const int strip = column / strip_rows;
    codes[half] = matrix + w.codes + static_cast<int64_t>(strip) * steps() * strip_bytes;
    scales[half] = matrix + (code == Code::f8 ? int64_t{column / 128} * w.groups * 4
                                              : int64_t{strip} * w.groups * strip_rows * 2);
    group_inverse = w.group_inverse;
  }

  __device__ void load(int at) const {
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    const unsigned stage = ring + static_cast<unsigned>(at % stages * stage_bytes);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool inside = codes[half];
      const char* from = inside ? codes[half] + at * strip_bytes + lane * 16 : codes[0];
      mma::copy_async(stage + static_cast<unsigned>(half * strip_bytes + lane * 16), from, inside);
    }
    if constexpr (code == Code::f8) {
      if (lane < 2) {
        const char* from = lane == 0 ? scales[0] : scales[1];
        mma::copy_word_async(stage + static_cast<unsigned>(2 * strip_bytes + lane * 4),
                             from ? from + at * step_depth / 128 * 4 : scales[0], from);
      }
    } else if (lane < 2 * blocks) {
      const char* from = lane < blocks ? scales[0] : scales[1];
      const int block = min(at * blocks + lane % blocks, (depth - 1) / scale_depth);
      const int group = (block * group_inverse) >> 16;
      mma::copy_async(stage + static_cast<unsigned>(2 * strip_bytes + lane * 16),
                      from ? from + group * strip_rows * 2 : scales[0], from);
    }
    mma::commit();
  }
  __device__ void begin() const {
#pragma unroll 1
    for (int at = 0; at < stages; ++at) at < steps() ? load(at) : mma::commit();
  }

  // As WeightStream's.
  __device__ void multiply(unsigned x, int pitch, int rows, float (&sums)[4]) const {
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    const unsigned x_row = x + static_cast<unsigned>(min(lane % 8, rows - 1) * pitch + lane / 8 * 16);
    for (int at = 0; at < steps(); ++at) {
      mma::wait<stages - 1>();
      __syncwarp();  // scales are other lanes' copies
      const unsigned stage = ring + static_cast<unsigned>(at % stages * stage_bytes);
      unsigned words[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        load_shared(stage + static_cast<unsigned>(half * strip_bytes + lane * 16), words[half]);
#pragma unroll
      for (int block = 0; block < blocks; ++block) {  // two k16 at a time
        const Widener<code> upper(scale(stage, 0, block)), lower(scale(stage, 1, block));
        unsigned b[4];
        mma::load_matrices<false>(b, x_row + static_cast<unsigned>(at * step_depth * 2 + block * 64));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          unsigned w[4];
          upper.four(words[0], block * 2 + i, w[0], w[2]);
          lower.four(words[1], block * 2 + i, w[1], w[3]);
          mma::multiply(sums, w, b[i * 2], b[i * 2 + 1]);
        }
      }
      __syncwarp();
      at + stages < steps() ? load(at + stages) : mma::commit();
    }
  }

 private:
  __device__ static void load_shared(unsigned address, unsigned (&to)[4]) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
  }
  __device__ static float scale(unsigned stage, int half, int block) {
    const unsigned from = stage + 2 * strip_bytes;
    if constexpr (code == Code::f8) {
      float value;
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(from + static_cast<unsigned>(half * 4)));
      return value;
    } else {
      const int lane = static_cast<int>(threadIdx.x) % warp_size;
      uint16_t bits;
      asm volatile("ld.shared.u16 %0, [%1];"
                   : "=h"(bits)
                   : "r"(from + static_cast<unsigned>((half * blocks + block) * 16 + lane / 4 * 2)));
      return __half2float(__ushort_as_half(bits));
    }
  }
};

}  // namespace latente::cuda
