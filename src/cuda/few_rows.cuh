// Products of few rows, bound by the reading of their weights. A warp has 16 columns of the result (or eight
// of a gate and the same eight of what it gates), streams their weights through a ring of its own in shared
// memory, and multiplies them by tiles of eight rows that the block shares. Weights are the m16n8k16
// instruction's first operand here and its second in product_mma.cuh; an element is the same chain of steps
// in rising depth, so it has the same bits in either.
#pragma once

#include <climits>

#include "cuda/coded.h"
#include "cuda/launch.cuh"
#include "cuda/norm.cuh"
#include "cuda/product_mma.cuh"

namespace latente::cuda {

constexpr int warp_columns = 16, tile_rows = 8;  // of a warp, of an instruction

// A matrix of weights, or a batch of them (of experts): lines of bfloat16 (columns, or depths); coded ones
// (coded.h) with bytes from one to the next, and to their codes.
struct RowsWeights {
  const void* at = nullptr;
  int64_t line = 0, batch = 0, codes = 0;
  int groups = 0, group_inverse = 0;  // of a line; 2^16 / (a group's length / scale_depth), rounded up
};

// The weights of a warp's columns: lines are columns, or with by_columns depths. Whole: all of them are in
// shared memory at once.
template <bool ByColumns, int stages, bool Whole = false>
struct WeightStream {
  static constexpr bool by_columns = ByColumns, rotates = ByColumns && !Whole;
  static constexpr int columns = warp_columns, gated_warps = 1;
  static constexpr int step_depth = mma::step;
  static constexpr int stage_bytes = warp_columns * mma::step * 2, bytes = stages * stage_bytes;

  unsigned ring = 0;         // in shared memory
  const bf16* half[2] = {};  // columns 0-7 and 8-15; null = zeros
  int64_t line = 0;          // from one line to the next
  int depth = 0;

  __device__ int steps() const { return (depth + mma::step - 1) / mma::step; }
  // Of a warp: no more stages than there are steps.
  static int ring_bytes(int depth) {
    const int steps = (depth + mma::step - 1) / mma::step;
    return (Whole ? steps : std::min(steps, stages)) * stage_bytes;
  }

  // `which` half of the warp's columns are `column` and the next 7.
  __device__ void point(int which, const RowsWeights& w, int64_t batch, int column) {
    line = w.line;
    half[which] = static_cast<const bf16*>(w.at) + batch * w.batch + column * (by_columns ? 1 : line);
  }

  // Eight rows of a matrix lie in different banks.
  __device__ static unsigned offset(int line, int at) {
    if constexpr (by_columns) return static_cast<unsigned>((line * 2 + (at ^ (line >> 2 & 1))) * 16);
    return static_cast<unsigned>((line * 8 + (at ^ (line & 7))) * 16);
  }

  // The j-th of the four pieces of 16 bytes that a lane copies in a step.
  struct Piece {
    int half, line, k;  // whose columns; which line of them; from which depth of the step
    unsigned to;        // in a stage

    __device__ explicit Piece(int j) {
      const int i = j * warp_size + static_cast<int>(threadIdx.x) % warp_size;
      const int l = by_columns ? i / 2 : i / 8, at = by_columns ? i % 2 : i % 8;
      half = by_columns ? at : j / 2;
      line = by_columns ? l : l % 8;
      k = by_columns ? l : at * mma::chunk;
      to = offset(l, at);
    }
  };
  __device__ void begin() const {
    Copies copies(*this, 0);
    const int all = steps();
#pragma unroll 1
    for (int step = 0; step < (Whole ? all : stages); ++step) {
      if (step < all) {
#pragma unroll
        for (int j = 0; j < 4; ++j) copies.start(*this, j, ring + static_cast<unsigned>(step * stage_bytes));
        copies.advance(*this);
      }
      if (!Whole) mma::commit();
    }
    if (Whole) mma::commit();
  }

  // sums: columns lane / 4 and 8 more, of rows lane % 4 · 2 and the next. `x` is the shared address of rows
  // of `pitch` bytes, zeros from the depth to the next whole step. Each product waits for the one before;
  // what fills the time between is the reading of the next step's operands and the copying of later ones.
  __device__ void multiply(unsigned x, int pitch, int rows, float (&sums)[4]) const {
    const int lane = static_cast<int>(threadIdx.x) % warp_size, count = steps();
    const unsigned x_row = x + static_cast<unsigned>(min(lane % 8, rows - 1) * pitch + lane / 8 * 16);
    Operands now, next;
    if constexpr (Whole) {
      mma::wait<0>();
      __syncwarp();
      now.read(ring, x_row);
#pragma unroll 4
      for (int step = 0; step < count; ++step) {
        const int following = min(step + 1, count - 1);
        next.read(ring + static_cast<unsigned>(following * stage_bytes),
                  x_row + static_cast<unsigned>(following * mma::step * 2));
#pragma unroll
        for (int i = 0; i < 4; ++i)
          mma::multiply(sums, now.w[i], now.x[i / 2][i % 2 * 2], now.x[i / 2][i % 2 * 2 + 1]);
        now = next;
      }
    } else {
      Copies copies(*this, stages);
      mma::wait<stages - 1>();
      __syncwarp();
      now.read(ring, x_row);
      unsigned stage = 0, following = stage_bytes;
#pragma unroll 2
      for (int step = 0; step < count; ++step) {
        mma::wait<stages - 2>();
        __syncwarp();  // all lanes have read this step's weights
        if (step + 1 < count)
          next.read(ring + following, x_row + static_cast<unsigned>((step + 1) * mma::step * 2));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          mma::multiply(sums, now.w[i], now.x[i / 2][i % 2 * 2], now.x[i / 2][i % 2 * 2 + 1]);
          if (step + stages < count) copies.start(*this, i, ring + stage);
        }
        mma::commit();
        copies.advance(*this);
        now = next;
        stage = following;
        following = following + stage_bytes == bytes ? 0 : following + stage_bytes;
      }
    }
  }

 private:
  // Of a step: four k16 of weights, and of x in pairs.
  struct Operands {
    unsigned w[4][4], x[2][4];

    __device__ void read(unsigned stage, unsigned x_row) {
      const int matrix = static_cast<int>(threadIdx.x) % warp_size / 8, r = static_cast<int>(threadIdx.x) % 8;
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // matrices: columns 0-7 and 8-15, then the next 8 of the depth
        const int l = by_columns ? k * 16 + matrix / 2 * 8 + r : matrix % 2 * 8 + r;
        const int at = by_columns ? matrix % 2 : k * 2 + matrix / 2;
        mma::load_matrices<by_columns>(w[k], stage + offset(l, at));
      }
#pragma unroll
      for (int pair = 0; pair < 2; ++pair)
        mma::load_matrices<false>(x[pair], x_row + static_cast<unsigned>(pair * 64));
    }
  };
  // Where a lane's four copies of a step come from, step after step.
  struct Copies {
    const bf16* from[4];
    int k[4];  // beyond the depth: nothing is there

    __device__ Copies(const WeightStream& s, int step) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Piece piece(j);
        const bf16* columns = s.half[piece.half];
        k[j] = columns ? step * mma::step + piece.k : INT_MAX / 2;
        from[j] = columns + piece.line * s.line +
                  (by_columns ? step * mma::step * s.line : step * mma::step + piece.k);
      }
    }
    __device__ void start(const WeightStream& s, int j, unsigned stage) const {
      const bool inside = k[j] < s.depth;
      mma::copy_async(stage + Piece(j).to, inside ? from[j] : s.half[0], inside);
    }
    __device__ void advance(const WeightStream& s) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        k[j] += mma::step;
        from[j] += by_columns ? mma::step * s.line : mma::step;
      }
    }
  };
};

// Bytes of a row in shared memory: whole steps, and 16 more so that rows begin in different banks.
__host__ __device__ constexpr int row_pitch(int depth, int step) {
  return (depth + step - 1) / step * step * 2 + 16;
}

// Rows of x to shared memory, zeros from the depth to the next whole step. row_of(i) points to row i. Warps
// share the rows, or the chunks of a row where there are more of them.
template <class RowOf>
__device__ void load_rows(char* to, int rows, int depth, int step, int warp, int warps, const RowOf& row_of) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int pitch = row_pitch(depth, step), chunks = pitch / 16 - 1, whole = depth / mma::chunk;
  const int of_row = rows < warps ? warps / rows : 1;
  for (int row = warp / of_row; row < rows; row += warps / of_row) {
    const auto* from = reinterpret_cast<const uint4*>(row_of(row));
#pragma unroll 8
    for (int at = warp % of_row * warp_size + lane; at < chunks; at += of_row * warp_size) {
      const uint4 x = at < whole ? from[at] : uint4{};
      *reinterpret_cast<uint4*>(to + row * pitch + at * 16) = x;
    }
  }
}

// A product that shares a launch with others of the same depth.
struct RowsProduct {
  const bf16* x = nullptr;
  int64_t x_row = 0, x_batch = 0;
  RowsWeights w;
  RowsWeights up;  // gated: silu(x · w) · (x · up)
  void* out = nullptr;
  int64_t out_row = 0, out_batch = 0;
  const void* bias = nullptr;  // f32, or as w
  bool exact_bias = false;
  // Grouped by expert: as in Product. With `choices` instead, row r of out is x[r / top_k] times the weight
  // of expert choices[r].
  const int32_t *offsets = nullptr, *gather = nullptr, *choices = nullptr;
  int experts = 0, top_k = 1;
  int rows = 0, columns = 0, batches = 1;  // rows of out
  // The launch's.
  int first_block = 0, column_blocks = 0, row_tiles = 0;
};

// Rotates and copies heads' rotary columns beside a product over the others (absorbed queries).
struct Rotary {
  const bf16* x = nullptr;
  int64_t x_row = 0, x_head = 0;
  bf16* out = nullptr;
  int64_t out_row = 0, out_head = 0;
  const int32_t* positions = nullptr;
  const float* table = nullptr;
  int64_t table_row = 0;
  int heads = 0, half = 0, count = 0;  // count: pairs in all
  bool interleaved = false;
};

struct RowsLaunch {
  RowsProduct products[2];
  int count = 1, depth = 0;
  bool accumulate = false;
  std::optional<Code> code;  // of all weights
  FewNorms norm;             // instead of products' x: the rows' norms
  Rotary rotary;
  LatentRows latents;  // beside, where there is a rotary part
  // The launch's.
  int warps = 0;  // of a block that multiply; others help with norms
  int ring = 0;   // bytes of a warp's
  int latent_blocks = 0;
};

// A token's chosen experts' last products, weighed and added onto the shared expert's, if there is one.
struct ExpertsDown {
  const bf16* inner = nullptr;  // [T · K, depth], by choice
  int64_t inner_row = 0;
  const int32_t* experts = nullptr;
  const float* weights = nullptr;  // [T, K]
  RowsWeights w;
  int depth = 0, top_k = 0;
  const bf16* shared_inner = nullptr;  // [T, shared_depth]
  int64_t shared_row = 0;
  RowsWeights shared_w;
  int shared_depth = 0;
  std::optional<Code> code;  // of all weights
  bf16* out = nullptr;
  int64_t out_row = 0;
  int tokens = 0, columns = 0;
};

// Each returns false, having done nothing, for what takes more shared memory than there is. Pointers and
// strides are multiples of 16 bytes, depths and columns of 8. More than tile_rows rows (of an expert) cost
// more than in tiles made for them.
bool few_rows(const RowsLaunch& launch, bool by_columns, bool exact_out, const char* name,
              const Context& context);
// Of coded weights with few columns, depths of several parts (few_rows_parts.cu): neither gated nor grouped.
bool few_rows_in_parts(const RowsLaunch& launch, bool exact_out, const char* name, const Context& context);
bool experts_down(const ExpertsDown& down, const Context& context);

// The same for any product that product_mma.cuh takes; false for many rows, too.
template <class C>
bool few_rows(const Product<bf16, bf16, C>& p, int64_t rows, int64_t batches, const char* name,
              const Context& context);

// A matrix, or a stack, coded or of bfloat16 in rows.
RowsWeights rows_weights(const View& w);
std::optional<Code> code_of(const View& w);

}  // namespace latente::cuda
