// Products of float32 by bfloat16 on Hopper's tensor cores, as routers' in training. A float32 is the sum of
// three bfloat16, up to what float32 rounds itself; the products of each are exact and summed in float32.
#include "cuda/split_linear.h"

#include "cuda/product_sm90.h"

namespace latente::cuda {
namespace {

constexpr int threads = 256, parts = 3;
constexpr int64_t enough_rows = 1024;  // fewer take no time elsewhere

// Which part of an element stands in each of three blocks.
struct Blocks {
  int part[parts];
};

// Block b of `to`, block_stride after the one before it, holds a part of each element of x [rows, columns].
__global__ __launch_bounds__(threads) void split_kernel(const float* x, int64_t stride, int64_t rows,
                                                        int64_t columns, Blocks blocks, bf16* to,
                                                        int64_t to_stride, int64_t block_stride) {
  const int64_t packs = columns / 4, index = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  const int64_t row = index / packs, column = index % packs * 4;
  if (row >= rows) return;
  float rest[4];
  load<4>(x + row * stride + column, rest);
  float part[parts][4];
#pragma unroll
  for (int p = 0; p < parts; ++p) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      part[p][i] = widen(narrow<bf16>(rest[i]));
      rest[i] -= part[p][i];
    }
  }
#pragma unroll
  for (int b = 0; b < parts; ++b) {
    float chosen[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      chosen[i] = blocks.part[b] == 0 ? part[0][i] : blocks.part[b] == 1 ? part[1][i] : part[2][i];
    store<4>(chosen, to + row * to_stride + b * block_stride + column);
  }
}

void split(const View& x, Blocks blocks, bf16* to, int64_t to_stride, int64_t block_stride,
           const Context& context) {
  const unsigned count = blocks_for(x[0] * (x[1] / 4), threads);
  split_kernel<<<count, threads, 0, context.stream>>>(x.as<float>(), x.stride(0), x[0], x[1], blocks, to,
                                                      to_stride, block_stride);
  check_launch("split");
}

// out [rows, columns] = the sum of the three blocks of x [rows, 3 · columns]
__global__ __launch_bounds__(threads) void sum_blocks_kernel(const float* x, int64_t rows, int64_t columns,
                                                             float* out, int64_t stride) {
  const int64_t packs = columns / 4, index = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  const int64_t row = index / packs, column = index % packs * 4;
  if (row >= rows) return;
  float sum[4] = {};
#pragma unroll
  for (int b = parts - 1; b >= 0; --b) {  // the smallest first
    float term[4];
    load<4>(x + (row * parts + b) * columns + column, term);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += term[i];
  }
  store<4>(sum, out + row * stride + column);
}

// What lies in the workspace, piece after piece.
struct Room {
  char* at;
  int64_t left;
  explicit Room(const Context& context)
      : at(static_cast<char*>(context.workspace)), left(context.workspace_bytes) {}
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(at);
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    at += bytes, left -= bytes;
    return taken;
  }
};

bool fits(const View& exact, const View& narrow, int64_t rows) {
  return exact.dtype == DType::f32 && narrow.dtype == DType::bf16 && rows >= enough_rows &&
         in_packs(4, {exact}) && in_packs(8, {narrow});
}

}  // namespace

bool split_linear(View x, View w, View out, const Context& context) {
  const int64_t experts = w[0], tokens = x[0], depth = x[1];
  if (!fits(w, x, tokens) || out.dtype != DType::f32 || !in_packs(4, {out})) return false;
  Room room(context);
  HopperProduct p;
  bf16* split_w = room.take<bf16>(parts * experts * depth);
  float* sums = room.take<float>(tokens * parts * experts);
  p.a = x.data, p.b = split_w, p.c = sums;
  p.a_line = x.stride(0), p.b_line = depth, p.c_row = parts * experts;
  p.rows = tokens, p.columns = parts * experts, p.depth = depth;
  if (room.left < 0 || !fits_hopper(p, context)) return false;
  split(w, {0, 1, 2}, split_w, depth, experts * depth, context);
  hopper_product(p, "linear", context);
  sum_blocks_kernel<<<blocks_for(tokens * (experts / 4), threads), threads, 0, context.stream>>>(
      sums, tokens, experts, out.as<float>(), out.stride(0));
  check_launch("linear");
  return true;
}

// Rounded to bfloat16, what is small beside each other's first parts does not show.
bool split_linear_backward_input(View d_out, View w, Grad d_x, const Context& context) {
  const int64_t experts = w[0], tokens = d_out[0], columns = w[1];
  if (!fits(d_out, d_x.view, tokens) || w.dtype != DType::f32 || !in_packs(4, {w})) return false;
  Room room(context);
  bf16* split_d = room.take<bf16>(tokens * parts * experts);
  bf16* split_w = room.take<bf16>(parts * experts * columns);
  HopperProduct p;
  p.a = split_d, p.b = split_w, p.c = d_x.view.data;
  p.b_by_depth = false;
  p.a_line = parts * experts, p.b_line = columns, p.c_row = d_x.view.stride(0);
  p.rows = tokens, p.columns = columns, p.depth = parts * experts;
  p.narrow = true, p.accumulate = d_x.accumulate;
  if (room.left < 0 || !fits_hopper(p, context)) return false;
  split(d_out, {0, 1, 0}, split_d, parts * experts, experts, context);
  split(w, {0, 0, 1}, split_w, columns, experts * columns, context);
  hopper_product(p, "linear_backward_input", context);
  return true;
}

bool split_linear_backward_weight(View d_out, View x, Grad d_w, const Context& context) {
  const char* name = "linear_backward_weight";
  const int64_t experts = d_out[1], tokens = x[0], columns = x[1];
  if (!fits(d_out, x, tokens)) return false;
  Room room(context);
  bf16* split_d = room.take<bf16>(tokens * parts * experts);
  HopperProduct p;
  p.a = split_d, p.b = x.data;
  p.a_by_depth = p.b_by_depth = false;
  p.a_line = parts * experts, p.b_line = x.stride(0), p.c_row = columns;
  p.rows = parts * experts, p.columns = columns, p.depth = tokens;
  const int64_t size = p.rows * columns;
  p.c = room.at, p.c_batch = size;
  constexpr int64_t least_depth = 512, step = 64;
  const int64_t most = std::min(tokens / least_depth, room.left / (4 * size));
  if (most < 1 || !fits_hopper(p, context)) return false;
  const int64_t cut = best_parts(p, most, context);
  p.part_depth = (tokens / cut + step - 1) / step * step;
  const auto count = static_cast<int>((tokens + p.part_depth - 1) / p.part_depth);
  float* sums = room.take<float>(count * size);
  if (room.left < 0) return false;
  split(d_out, {0, 1, 2}, split_d, parts * experts, experts, context);
  hopper_product(p, name, context);
  sum_parts(sums, count * parts, experts, columns, d_w.view.as<float>(), d_w.view.stride(0), d_w.accumulate,
            name, context);
  return true;
}

}  // namespace latente::cuda
