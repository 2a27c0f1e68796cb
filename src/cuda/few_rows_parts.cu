// Products of few rows with coded weights (coded.h) of few columns, where a multiprocessor has few warps and
// each waits for its own chain of products. Two warps have a strip, every other part of its depth each: while
// one multiplies, the other widens, and what is left in a row is products alone. All codes are in shared
// memory, and the first parts' are widened, before the rows are there.
#include "cuda/coded.cuh"
#include "cuda/few_rows.cuh"
#include "cuda/hopper.cuh"

namespace latente::cuda {
namespace {

constexpr int most_warps = 4, sharing = 2;  // warps of a strip

template <Code code>
struct CodedParts {
  static constexpr int step_depth = strip_depth<code>;
  static constexpr int part_depth = 512, pieces_of_part = part_depth / step_depth;
  static constexpr int steps = part_depth / 16, steps_of_piece = step_depth / 16;
  static constexpr int scale_steps = code == Code::f8 ? 8 : 2;  // that share one
  static constexpr int scales_of_part = steps / scale_steps, scale_bytes = code == Code::f8 ? 4 : 16;
  static constexpr int part_bytes = pieces_of_part * strip_bytes + scales_of_part * 16;

  unsigned ring = 0;  // in shared memory, of the warp's parts
  int depth = 0;
  int part = 0;  // the warp's first

  __host__ __device__ static int parts(int depth) { return (depth + part_depth - 1) / part_depth; }

  __device__ void point(const RowsWeights& w, int column) {
    const char* matrix = static_cast<const char*>(w.at);
    const int lane = static_cast<int>(threadIdx.x) % warp_size, strip = column / strip_rows;
    codes =
        matrix + w.codes + int64_t{strip} * ((depth + step_depth - 1) / step_depth) * strip_bytes + lane * 16;
    scales = matrix + (code == Code::f8 ? int64_t{column / 128} * w.groups * 4
                                        : int64_t{strip} * w.groups * strip_rows * 2);
    group_inverse = w.group_inverse;
  }
  __device__ void begin() const {
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    unsigned to = ring;
    for (int p = part; p < parts(depth); p += sharing, to += part_bytes) {
      const int count = pieces(p * part_depth, depth);
      const char* from = codes + static_cast<int64_t>(p) * pieces_of_part * strip_bytes;
#pragma unroll
      for (int i = 0; i < pieces_of_part; ++i) {
        if (i < count)
          mma::copy_async(to + static_cast<unsigned>(i * strip_bytes + lane * 16), from + i * strip_bytes,
                          true);
      }
      if (lane >= scales_of_part) continue;
      const int at =
          min(p * part_depth + lane * scale_steps * 16, depth - 1);  // those behind it are widened, too
      const unsigned its = to + static_cast<unsigned>(pieces_of_part * strip_bytes + lane * scale_bytes);
      if constexpr (code == Code::f8) {
        mma::copy_word_async(its, scales + at / 128 * 4, true);
      } else {
        mma::copy_async(its, scales + ((at / scale_depth * group_inverse) >> 16) * strip_rows * 2, true);
      }
    }
    mma::commit();
  }

  // The operands of the warp's i-th part.
  __device__ void widen(int i, const char* memory) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size,
              count = pieces((part + i * sharing) * part_depth, depth);
    const char* from = memory + i * part_bytes;
    const char* scale_from = from + pieces_of_part * strip_bytes;
    const auto* codes_from = reinterpret_cast<const uint4*>(from) + lane;
    uint4 four = codes_from[0];
    float scale[scales_of_part];
#pragma unroll
    for (int k = 0; k < scales_of_part; ++k) {
      if constexpr (code == Code::f8) {
        scale[k] = reinterpret_cast<const float*>(scale_from)[k];
      } else {
        scale[k] = __half2float(reinterpret_cast<const __half*>(scale_from)[k * strip_rows + lane / 4]);
      }
    }
#pragma unroll
    for (int piece = 0; piece < pieces_of_part; ++piece) {
      if (piece >= count) break;
      const unsigned words[4] = {four.x, four.y, four.z, four.w};
      four = codes_from[min(piece + 1, pieces_of_part - 1) * warp_size];
#pragma unroll
      for (int s = 0; s < steps_of_piece; ++s) {
        const int step = piece * steps_of_piece + s;
        const Widener<code> widener(scale[step / scale_steps]);
        widener.four(words, s, low[step], high[step]);
      }
    }
  }

  // Multiplies the p-th part of the depth, as WeightStream's multiply(); the first half of the
  // instruction's columns. receive(sums) is called in front of the first product.
  template <class Receive>
  __device__ void multiply(int p, unsigned x, int pitch, int rows, float (&sums)[4],
                           const Receive& receive) const {
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    const int count = pieces(p * part_depth, depth) * (steps_of_piece / 2);  // pairs of steps
    const unsigned x_row =
        x + static_cast<unsigned>(min(lane % 8, rows - 1) * pitch + lane / 8 * 16 + p * part_depth * 2);
    constexpr int ahead = 3;  // of pairs of steps
    unsigned b[ahead][4];
#pragma unroll
    for (int j = 0; j < ahead; ++j)
      mma::load_matrices<false>(b[j], x_row + static_cast<unsigned>(min(j, count - 1) * 64));
    receive(sums);
#pragma unroll
    for (int j = 0; j < steps / 2; ++j) {
      if (j % 2 == 0 && j >= count) break;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const unsigned w[4] = {low[2 * j + k], 0, high[2 * j + k], 0};
        mma::multiply(sums, w, b[j % ahead][2 * k], b[j % ahead][2 * k + 1]);
      }
      if (j + ahead < steps / 2)
        mma::load_matrices<false>(b[j % ahead],
                                  x_row + static_cast<unsigned>(min(j + ahead, count - 1) * 64));
    }
  }

 private:
  // From a depth on, of a part at most.
  __device__ static int pieces(int from, int depth) {
    return min((depth - from + step_depth - 1) / step_depth, pieces_of_part);
  }
  const char *codes = nullptr, *scales = nullptr;
  int group_inverse = 0;
  unsigned low[steps], high[steps];
};

// What a warp hands on with its part's sums.
struct Handed {
  float4 sums[most_warps][warp_size];  // to each warp

  __device__ void put(int warp, const float (&s)[4]) {
    sums[warp][threadIdx.x % warp_size] = {s[0], s[1], s[2], s[3]};
  }
  __device__ void get(int warp, float (&s)[4]) const {
    const float4 x = sums[warp][threadIdx.x % warp_size];
    s[0] = x.x, s[1] = x.y, s[2] = x.z, s[3] = x.w;
  }
};

template <Code code, class Out>
__global__ __launch_bounds__(most_warps* warp_size,
                             4) void parts_kernel(const __grid_constant__ RowsLaunch p) {
  using Parts = CodedParts<code>;
  extern __shared__ __align__(128) char memory[];
  __shared__ Handed handed;
  const int lane = static_cast<int>(threadIdx.x) % warp_size,
            warp = static_cast<int>(threadIdx.x) / warp_size, block = static_cast<int>(blockIdx.x);
  const RowsProduct& product = p.products[p.count > 1 && block >= p.products[1].first_block ? 1 : 0];
  const int local = block - product.first_block, first = local / product.column_blocks * tile_rows;
  const int column = (local % product.column_blocks * (p.warps / sharing) + warp / sharing) * strip_rows;
  const bool inside = warp < p.warps && column < product.columns;
  const int rows = min(product.rows - first, tile_rows), pitch = row_pitch(p.depth, Parts::step_depth);
  char* x = memory + p.warps * p.ring;

  Parts parts;
  parts.ring = mma::shared_address(memory) + static_cast<unsigned>(warp * p.ring);
  parts.depth = p.depth;
  parts.part = warp % sharing;
  if (inside) {
    parts.point(product.w, column);
    parts.begin();
  }
  FewNorms::Weights norm_weights{};
  if (p.norm.lanes > 0) norm_weights = p.norm.weights(p.norm.own_part(), p.depth);
  mma::wait<0>();
  __syncwarp();
  float sums[4] = {};
  const int all = Parts::parts(p.depth);
#pragma unroll 1
  for (int i = 0, part = warp % sharing; i == 0 || part < all; ++i, part += sharing) {
    if (inside) parts.widen(i, memory + warp * p.ring);
    if (i == 0) {
      wait_for_earlier_kernels();
      if (p.norm.lanes > 0) {
        p.norm.take(x, pitch, rows, p.depth, norm_weights, block == 0);
      } else {
        load_rows(x, rows, p.depth, Parts::step_depth, warp, p.warps,
                  [&](int row) { return product.x + (first + row) * product.x_row; });
      }
      __syncthreads();
      if (!inside) return;
    }
    parts.multiply(part, mma::shared_address(x), pitch, rows, sums, [&](float(&so_far)[4]) {
      if (part == 0) return;
      sync_threads(1 + warp, 2 * warp_size);
      handed.get(warp, so_far);
    });
    if (part + 1 == all) break;
    const int next = warp ^ 1;
    handed.put(next, sums);
    arrive_threads(1 + next, 2 * warp_size);
    if (part + sharing >= all) return;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int row = lane % 4 * 2 + j, own = column + lane / 4;
    if (row >= rows) continue;
    float one[1] = {sums[j]};
    if (product.bias) {
      one[0] += product.exact_bias ? static_cast<const float*>(product.bias)[own]
                                   : latente::cuda::widen(static_cast<const bf16*>(product.bias)[own]);
    }
    put<1>(p.accumulate, one, static_cast<Out*>(product.out) + (first + row) * product.out_row + own);
  }
}

template <Code code>
bool run(RowsLaunch p, bool exact_out, const char* name, const Context& context) {
  using Parts = CodedParts<code>;
  int most_rows = 0, blocks = 0;
  p.warps = most_warps;
  p.ring = (Parts::parts(p.depth) + sharing - 1) / sharing * Parts::part_bytes;
  for (int i = 0; i < p.count; ++i) most_rows = std::max(most_rows, std::min(p.products[i].rows, tile_rows));
  const int x_bytes = most_rows * row_pitch(p.depth, Parts::step_depth);
  constexpr int own = 3 * 1024;  // at most, what the kernel has beside: what is handed on, sums of norms
  while (p.warps > sharing && p.warps * p.ring + x_bytes + own > context.shared_bytes) p.warps /= 2;
  const int bytes = p.warps * p.ring + x_bytes;
  if (Parts::parts(p.depth) < sharing || bytes + own > context.shared_bytes) return false;
  for (int i = 0; i < p.count; ++i) {
    RowsProduct& one = p.products[i];
    const int of_block = p.warps / sharing * strip_rows;
    one.first_block = blocks;
    one.column_blocks = (one.columns + of_block - 1) / of_block;
    one.row_tiles = (one.rows + tile_rows - 1) / tile_rows;
    blocks += one.column_blocks * one.row_tiles;
  }
  launch_early(exact_out ? parts_kernel<code, float> : parts_kernel<code, bf16>,
               static_cast<unsigned>(blocks), (p.norm.lanes > 0 ? most_warps : p.warps) * warp_size,
               static_cast<size_t>(bytes), name, context, p);
  return true;
}

}  // namespace

bool few_rows_in_parts(const RowsLaunch& p, bool exact_out, const char* name, const Context& context) {
  for (int i = 0; i < p.count; ++i) {
    const RowsProduct& one = p.products[i];
    if (one.batches > 1 || one.up.at || one.offsets || one.choices || one.gather || p.rotary.count > 0)
      return false;
  }
  switch (*p.code) {
    case Code::q8:
      return run<Code::q8>(p, exact_out, name, context);
    case Code::q4:
      return run<Code::q4>(p, exact_out, name, context);
    case Code::f8:
      return run<Code::f8>(p, exact_out, name, context);
  }
  return false;
}

}  // namespace latente::cuda
