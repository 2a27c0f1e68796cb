// Coded weights (coded.h) in products of few rows: WeightStream (few_rows.cuh) over strips, whose pieces each
// lane copies and reads itself. A warp has two strips (a gate's and what it gates), or, where warps are few
// and wait for their own chain, one: half of the instruction's columns, two pieces of it at a time; gate and
// up are then neighbouring warps. What the loop does beside widening counts: all copies are addressed a step
// ahead, without branches, and FP8's scales are in registers.
#pragma once

#include "cuda/coded.cuh"
#include "cuda/few_rows.cuh"

namespace latente::cuda {

template <Code code, int stages, int strips>
struct CodedStream {
  static constexpr bool rotates = true;
  static constexpr int columns = strips * strip_rows, gated_warps = strips == 2 ? 1 : 2;
  static constexpr int blocks = strip_depth<code> / scale_depth;
  static constexpr int step_pieces = 2 / strips, step_depth = step_pieces * strip_depth<code>;
  static constexpr int scale_bytes = code == Code::f8 ? 0 : 2 * blocks * 16;  // FP8's stay in registers
  static constexpr int stage_bytes = 2 * strip_bytes + scale_bytes, bytes = stages * stage_bytes;

  unsigned ring = 0;               // in shared memory
  const char* codes[strips] = {};  // of the strips, a lane's; null = zeros
  const char* scales[strips] = {};
  int depth = 0, group_inverse = 0;
  // FP8's scales of a step's square, of the next and of the one after it, which takes as long to come.
  struct Squares {
    float now = 0, next = 0, after = 0;
  } squares[strips];

  static int ring_bytes(int) { return bytes; }
  __device__ int pieces() const { return (depth + strip_depth<code> - 1) / strip_depth<code>; }
  __device__ int steps() const { return (pieces() + step_pieces - 1) / step_pieces; }

  // The columns of the warp's strip `which` are `column` and the next 7.
  __device__ void point(int which, const RowsWeights& w, int64_t batch, int column) {
    const char* matrix = static_cast<const char*>(w.at) + batch * w.batch;
    const int strip = column / strip_rows;
    codes[which] = matrix + w.codes + static_cast<int64_t>(strip) * pieces() * strip_bytes +
                   threadIdx.x % warp_size * 16;
    scales[which] = matrix + (code == Code::f8 ? int64_t{column / 128} * w.groups * 4
                                               : int64_t{strip} * w.groups * strip_rows * 2);
    group_inverse = w.group_inverse;
  }

  __device__ void begin() {
    if constexpr (code == Code::f8) {
#pragma unroll
      for (int i = 0; i < strips; ++i) squares[i] = {scale_of(i, 0), scale_of(i, 1), scale_of(i, 2)};
    }
    Copies copies(*this);
#pragma unroll 1
    for (int at = 0; at < stages; ++at) copies.start(*this, ring + static_cast<unsigned>(at * stage_bytes));
  }

  // As WeightStream's; of one strip only the first half of the instruction's columns. The next codes are on
  // their way from shared memory while these are widened and multiplied.
  __device__ void multiply(unsigned x, int pitch, int rows, float (&sums)[4]) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size, count = steps();
    unsigned x_row = x + static_cast<unsigned>(min(lane % 8, rows - 1) * pitch + lane / 8 * 16);
    Copies copies(*this, stages);
    unsigned words[2][4];
    mma::wait<stages - 1>();
    read(ring, words);
    unsigned stage = 0;
#pragma unroll 2
    for (int at = 0; at < count; ++at, x_row += step_depth * 2) {
      const unsigned following = stage + stage_bytes == bytes ? 0 : stage + stage_bytes;
      unsigned next[2][4];
      mma::wait<stages - 2>();
      if constexpr (code != Code::f8) __syncwarp();  // scales are other lanes' copies
      read(ring + following, next);                  // behind the last step nobody's
#pragma unroll
      for (int block = 0; block < step_pieces * blocks; ++block) {  // two k16 at a time
        unsigned b[4];
        mma::load_matrices<false>(b, x_row + static_cast<unsigned>(block * 64));
        const auto scale = [&](int strip) {
          if constexpr (code == Code::f8) return squares[strip].now;
          return ring_scale(ring + stage, strip * blocks + block);
        };
        const Widener<code> widener(scale(0)), other(strips == 2 ? scale(strips - 1) : 0);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          unsigned w[4] = {};
          widener.four(words[strips == 2 ? 0 : block / blocks], block % blocks * 2 + i, w[0], w[2]);
          if constexpr (strips == 2) other.four(words[1], block * 2 + i, w[1], w[3]);
          mma::multiply(sums, w, b[i * 2], b[i * 2 + 1]);
          // What a lane reads of FP8 it has copied itself, and read before the first product.
          if (code == Code::f8 && block == 0 && i == 0) copies.start(*this, ring + stage);
        }
      }
      if constexpr (code != Code::f8) {
        __syncwarp();
        copies.start(*this, ring + stage);
      }
      if constexpr (code == Code::f8) advance_squares(at);
#pragma unroll
      for (int i = 0; i < 4; ++i) words[0][i] = next[0][i], words[1][i] = next[1][i];
      stage = following;
    }
  }

 private:
  // Where a lane's copies of a step come from, step after step.
  struct Copies {
    const char* from[strips];
    int at, pieces;  // at: the step's first piece

    __device__ Copies(const CodedStream& s, int step = 0) : at(step * step_pieces), pieces(s.pieces()) {
#pragma unroll
      for (int i = 0; i < strips; ++i) from[i] = s.codes[i] + at * strip_bytes;
    }
    __device__ void start(const CodedStream& s, unsigned stage) {
      const int lane = static_cast<int>(threadIdx.x) % warp_size;
      const bool one = at < pieces, two = strips == 2 ? one && s.codes[strips - 1] : at + 1 < pieces;
      const char* second = strips == 2 ? from[strips - 1] : from[0] + strip_bytes;
      mma::copy_async(stage + static_cast<unsigned>(lane * 16), from[0], one);
      mma::copy_async(stage + static_cast<unsigned>(strip_bytes + lane * 16), second, two);
      if constexpr (code != Code::f8) {
        if (lane < 2 * blocks) {
          const int of_strip = at * blocks + (strips == 2 ? lane % blocks : lane);
          const int block = min(of_strip, (s.depth - 1) / scale_depth);
          const int group = (block * s.group_inverse) >> 16;
          const bool other = strips == 2 && lane >= blocks && two;
          mma::copy_async(stage + static_cast<unsigned>(2 * strip_bytes + lane * 16),
                          (other ? s.scales[strips - 1] : s.scales[0]) + group * strip_rows * 2,
                          lane < blocks ? one : two);
        }
      }
      mma::commit();
      at += step_pieces;
#pragma unroll
      for (int i = 0; i < strips; ++i) from[i] += step_pieces * strip_bytes;
    }
  };
  __device__ float scale_of(int strip, int square) const {
    const char* from = scales[strip] ? scales[strip] : scales[0];
    return __ldg(reinterpret_cast<const float*>(from) + min(square, (depth - 1) / 128));
  }
  // Behind step `at`: squares are 128 deep, steps as much or half of it.
  __device__ void advance_squares(int at) {
    if (strips == 2 && at % 2 == 0) return;
#pragma unroll
    for (int i = 0; i < strips; ++i) {
      Squares& s = squares[i];
      s.now = s.next, s.next = s.after, s.after = scale_of(i, at / strips + 3);
    }
  }
  // A lane's own copies.
  __device__ static void read(unsigned stage, unsigned (&words)[2][4]) {
    const unsigned from = stage + threadIdx.x % warp_size * 16;
    load_shared(from, words[0]), load_shared(from + strip_bytes, words[1]);
  }
  __device__ static void load_shared(unsigned address, unsigned (&to)[4]) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
  }
  __device__ static float ring_scale(unsigned stage, int block) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    uint16_t bits;
    asm volatile("ld.shared.u16 %0, [%1];"
                 : "=h"(bits)
                 : "r"(stage + static_cast<unsigned>(2 * strip_bytes + block * 16 + lane / 4 * 2)));
    return __half2float(__ushort_as_half(bits));
  }
};

}  // namespace latente::cuda
