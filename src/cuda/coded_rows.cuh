// Coded weights (coded.h) in products of few rows: WeightStream (few_rows.cuh) over strips, whose pieces each
// lane copies and reads itself. Widening takes longer than multiplying, so a warp has one strip, half of the
// instruction's columns, and two pieces of it at a time; gate and up are neighbouring warps.
#pragma once

#include "cuda/coded.cuh"
#include "cuda/few_rows.cuh"

namespace latente::cuda {

template <Code code, int stages>
struct CodedStream {
  static constexpr bool rotates = true;
  static constexpr int columns = strip_rows, gated_warps = 2;
  static constexpr int blocks = strip_depth<code> / scale_depth, step_depth = 2 * strip_depth<code>;
  static constexpr int scale_bytes = code == Code::f8 ? 16 : 2 * blocks * 16;
  static constexpr int stage_bytes = 2 * strip_bytes + scale_bytes, bytes = stages * stage_bytes;

  unsigned ring = 0;            // in shared memory
  const char* codes = nullptr;  // of the strip
  const char* scales = nullptr;
  int depth = 0, group_inverse = 0;

  __device__ int pieces() const { return (depth + strip_depth<code> - 1) / strip_depth<code>; }
  __device__ int steps() const { return (pieces() + 1) / 2; }

  // The warp's columns are `column` and the next 7.
  __device__ void point(const RowsWeights& w, int64_t batch, int column) {
    const char* matrix = static_cast<const char*>(w.at) + batch * w.batch;
    const int strip = column / strip_rows;
    codes = matrix + w.codes + static_cast<int64_t>(strip) * pieces() * strip_bytes;
    scales = matrix + (code == Code::f8 ? int64_t{column / 128} * w.groups * 4
                                        : int64_t{strip} * w.groups * strip_rows * 2);
    group_inverse = w.group_inverse;
  }

  __device__ void load(int at) const {
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    const unsigned stage = ring + static_cast<unsigned>(at % stages * stage_bytes);
    const bool two = at * 2 + 1 < pieces();  // else the second is zeros
    const char* from = codes + at * (2 * strip_bytes) + lane * 16;
    mma::copy_async(stage + static_cast<unsigned>(lane * 16), from, true);
    mma::copy_async(stage + static_cast<unsigned>(strip_bytes + lane * 16), two ? from + strip_bytes : from,
                    two);
    if constexpr (code == Code::f8) {
      if (lane < 2)
        mma::copy_word_async(stage + static_cast<unsigned>(2 * strip_bytes + lane * 4), scales + at * 4,
                             lane == 0 || two);
    } else if (lane < 2 * blocks) {
      const int block = min(at * 2 * blocks + lane, (depth - 1) / scale_depth);
      const int group = (block * group_inverse) >> 16;
      mma::copy_async(stage + static_cast<unsigned>(2 * strip_bytes + lane * 16),
                      scales + group * strip_rows * 2, lane < blocks || two);
    }
    mma::commit();
  }
  __device__ void begin() const {
#pragma unroll 1
    for (int at = 0; at < stages; ++at) at < steps() ? load(at) : mma::commit();
  }

  // As WeightStream's; only the first half of the instruction's columns. The next pieces are on their way
  // from shared memory while these are widened and multiplied.
  __device__ void multiply(unsigned x, int pitch, int rows, float (&sums)[4]) const {
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    unsigned x_row = x + static_cast<unsigned>(min(lane % 8, rows - 1) * pitch + lane / 8 * 16);
    unsigned words[2][4];
    mma::wait<stages - 1>();
    read(0, words);
#pragma unroll 1
    for (int at = 0; at < steps(); ++at, x_row += step_depth * 2) {
      unsigned next[2][4] = {};
      mma::wait<stages - 2>();
      __syncwarp();  // scales are other lanes' copies
      if (at + 1 < steps()) read(at + 1, next);
      const unsigned stage = ring + static_cast<unsigned>(at % stages * stage_bytes);
#pragma unroll
      for (int block = 0; block < 2 * blocks; ++block) {  // two k16 at a time
        const Widener<code> widener(scale(stage, block));
        unsigned b[4];
        mma::load_matrices<false>(b, x_row + static_cast<unsigned>(block * 64));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          unsigned w[4] = {};
          widener.four(words[block / blocks], block % blocks * 2 + i, w[0], w[2]);
          mma::multiply(sums, w, b[i * 2], b[i * 2 + 1]);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) words[0][i] = next[0][i], words[1][i] = next[1][i];
      __syncwarp();
      at + stages < steps() ? load(at + stages) : mma::commit();
    }
  }

 private:
  // A lane's own copies.
  __device__ void read(int at, unsigned (&words)[2][4]) const {
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    const unsigned from = ring + static_cast<unsigned>(at % stages * stage_bytes + lane * 16);
    load_shared(from, words[0]), load_shared(from + strip_bytes, words[1]);
  }
  __device__ static void load_shared(unsigned address, unsigned (&to)[4]) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
  }
  __device__ static float scale(unsigned stage, int block) {
    const unsigned from = stage + 2 * strip_bytes;
    if constexpr (code == Code::f8) {
      float value;
      asm volatile("ld.shared.f32 %0, [%1];"
                   : "=f"(value)
                   : "r"(from + static_cast<unsigned>(block / blocks * 4)));
      return value;
    } else {
      const int lane = static_cast<int>(threadIdx.x) % warp_size;
      uint16_t bits;
      asm volatile("ld.shared.u16 %0, [%1];"
                   : "=h"(bits)
                   : "r"(from + static_cast<unsigned>(block * 16 + lane / 4 * 2)));
      return __half2float(__ushort_as_half(bits));
    }
  }
};

}  // namespace latente::cuda
