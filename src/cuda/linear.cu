// Products of any sizes, strides and types, in float32: an element's sum runs over the depth in order,
// whatever tile it falls in.
#include "cuda/elements.cuh"
#include "cuda/kernels.h"

namespace latente::cuda {
namespace {

constexpr int side = 16, each = 4;  // threads: side × side, each with each × each elements, `side` apart
constexpr int tile = side * each, depth_step = side;
constexpr int pitch = tile + 2;  // of a tile in shared memory

// c[m, n] (+)= sum over k of a[m, k] · b[n, k] + bias[n]
template <class A, class B, class C>
struct Product {
  const A* a = nullptr;
  int64_t a_row = 0, a_depth = 1;  // strides
  const B* b = nullptr;
  int64_t b_row = 0, b_depth = 1;
  C* c = nullptr;
  int64_t c_row = 0;
  int64_t rows = 0, columns = 0, depth = 0;
  bool accumulate = false;
  const void* bias = nullptr;  // f32, or as B
  bool exact_bias = false;
  int64_t a_batch = 0, b_batch = 0, c_batch = 0;  // grid.z
  // Grouped: rows offsets[e] .. offsets[e + 1] of a and c meet b + e · b_batch (grid.x is tiles of all
  // experts), or with by_depth those are the depth that c + e · c_batch sums over (grid.z is e). `gather` is
  // the row of a, or with by_depth the depth of b, that stands for a sorted row.
  const int32_t* offsets = nullptr;
  const int32_t* gather = nullptr;
  bool by_depth = false;
  int experts = 0;
};

template <class A, class B, class C>
__global__ __launch_bounds__(side* side) void product_kernel(Product<A, B, C> p) {
  __shared__ float a_tile[depth_step][pitch], b_tile[depth_step][pitch];
  int64_t first_row = static_cast<int64_t>(blockIdx.x) * tile, end_row = p.rows;
  int64_t first_depth = 0, end_depth = p.depth;
  if (p.offsets && p.by_depth) {
    first_depth = p.offsets[blockIdx.z], end_depth = p.offsets[blockIdx.z + 1];
    p.c += blockIdx.z * p.c_batch;
  } else if (p.offsets) {
    int64_t before = 0;  // tiles of the experts before
    int e = 0;
    for (; e < p.experts; ++e) {
      const int64_t tiles = (p.offsets[e + 1] - p.offsets[e] + tile - 1) / tile;
      if (before + tiles > blockIdx.x) break;
      before += tiles;
    }
    if (e == p.experts) return;
    first_row = p.offsets[e] + (blockIdx.x - before) * tile, end_row = p.offsets[e + 1];
    p.b += e * p.b_batch;
  } else {
    p.a += blockIdx.z * p.a_batch, p.b += blockIdx.z * p.b_batch, p.c += blockIdx.z * p.c_batch;
  }
  const int thread = static_cast<int>(threadIdx.x), x = thread % side, y = thread / side;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * tile;
  float sums[each][each] = {};
  for (int64_t base = first_depth; base < end_depth; base += depth_step) {
    // Neighbouring threads read along the axis that is contiguous.
    for (int i = 0; i < each; ++i) {
      const int at = i * side * side + thread;
      const int a_i = p.a_depth == 1 ? at / depth_step : at % tile;
      const int a_k = p.a_depth == 1 ? at % depth_step : at / tile;
      const int64_t row = first_row + a_i;
      const bool a_inside = row < end_row && base + a_k < end_depth;
      const int64_t from = p.gather && !p.by_depth && a_inside ? p.gather[row] : row;
      a_tile[a_k][a_i] = a_inside ? widen(p.a[from * p.a_row + (base + a_k) * p.a_depth]) : 0.0f;
      const int b_i = p.b_depth == 1 ? at / depth_step : at % tile;
      const int b_k = p.b_depth == 1 ? at % depth_step : at / tile;
      const int64_t column = first_column + b_i;
      const bool b_inside = column < p.columns && base + b_k < end_depth;
      const int64_t k = p.gather && p.by_depth && b_inside ? p.gather[base + b_k] : base + b_k;
      b_tile[b_k][b_i] = b_inside ? widen(p.b[column * p.b_row + k * p.b_depth]) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < depth_step; ++d) {
      for (int i = 0; i < each; ++i) {
        for (int j = 0; j < each; ++j)
          sums[i][j] = fmaf(a_tile[d][y + i * side], b_tile[d][x + j * side], sums[i][j]);
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < each; ++i) {
    const int64_t row = first_row + y + i * side;
    if (row >= end_row) break;
    for (int j = 0; j < each; ++j) {
      const int64_t column = first_column + x + j * side;
      if (column >= p.columns) continue;
      float sum = sums[i][j];
      if (p.bias) {
        sum += p.exact_bias ? static_cast<const float*>(p.bias)[column]
                            : widen(static_cast<const B*>(p.bias)[column]);
      }
      C& to = p.c[row * p.c_row + column];
      to = narrow<C>(p.accumulate ? widen(to) + sum : sum);
    }
  }
}

template <class A, class B, class C>
void launch(const Product<A, B, C>& p, int64_t row_tiles, int64_t batches, const char* name,
            const Context& context) {
  if (row_tiles == 0 || p.columns == 0 || batches == 0) return;
  const dim3 grid(static_cast<unsigned>(row_tiles), blocks_for(p.columns, tile),
                  static_cast<unsigned>(batches));
  product_kernel<<<grid, side * side, 0, context.stream>>>(p);
  check_launch(name);
}

template <class F>
void with_types(const View& a, const View& b, const View& c, const char* name, F&& f) {
  with_type(a.dtype, name, [&]<class A>(A) {
    with_type(b.dtype, name, [&]<class B>(B) {
      with_type(c.dtype, name, [&]<class C>(C) {
        Product<A, B, C> p;
        p.a = a.as<A>(), p.b = b.as<B>(), p.c = c.as<C>();
        f(p);
      });
    });
  });
}

// The most tiles that any sizes of groups can need.
int64_t most_tiles(int64_t rows, int64_t experts) {
  return (rows + std::min(rows, experts) * (tile - 1)) / tile;
}

__global__ __launch_bounds__(256) void sum_rows_kernel(const void* x, bool narrow_x, int64_t stride,
                                                       int64_t rows, int64_t columns, float* out,
                                                       bool accumulate) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (column >= columns) return;
  float sum = 0;
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t at = t * stride + column;
    sum += narrow_x ? widen(static_cast<const bf16*>(x)[at]) : static_cast<const float*>(x)[at];
  }
  out[column] = accumulate ? out[column] + sum : sum;
}

}  // namespace

void linear(View x, View w, View bias, Grad out, const Context& context) {
  LATENTE_ASSERT(x[1] == w[1] && out.view[0] == x[0] && out.view[1] == w[0]);
  with_types(x, w, out.view, "linear", [&](auto& p) {
    p.a_row = x.stride(0), p.b_row = w.stride(0), p.c_row = out.view.stride(0);
    p.rows = x[0], p.columns = w[0], p.depth = x[1];
    p.accumulate = out.accumulate;
    p.bias = bias.data, p.exact_bias = bias.dtype == DType::f32;
    launch(p, blocks_for(p.rows, tile), 1, "linear", context);
  });
}

void linear_backward_input(View d_out, View w, Grad d_x, const Context& context) {
  if (!d_x) return;
  with_types(d_out, w, d_x.view, "linear_backward_input", [&](auto& p) {
    p.a_row = d_out.stride(0), p.b_row = 1, p.b_depth = w.stride(0), p.c_row = d_x.view.stride(0);
    p.rows = d_out[0], p.columns = w[1], p.depth = w[0];
    p.accumulate = d_x.accumulate;
    launch(p, blocks_for(p.rows, tile), 1, "linear_backward_input", context);
  });
}

void linear_backward_weight(View d_out, View x, Grad d_w, const Context& context) {
  if (!d_w) return;
  with_types(d_out, x, d_w.view, "linear_backward_weight", [&](auto& p) {
    p.a_row = 1, p.a_depth = d_out.stride(0), p.b_row = 1, p.b_depth = x.stride(0);
    p.c_row = d_w.view.stride(0);
    p.rows = d_out[1], p.columns = x[1], p.depth = x[0];
    p.accumulate = d_w.accumulate;
    launch(p, blocks_for(p.rows, tile), 1, "linear_backward_weight", context);
  });
}

void linear_backward_bias(View d_out, Grad d_bias, const Context& context) {
  if (!d_bias) return;
  sum_rows_kernel<<<blocks_for(d_out[1], 256), 256, 0, context.stream>>>(
      d_out.data, d_out.dtype == DType::bf16, d_out.stride(0), d_out[0], d_out[1], d_bias.view.as<float>(),
      d_bias.accumulate);
  check_launch("linear_backward_bias");
}

void head_linear(View x, View w, bool transpose, View out, const Context& context) {
  with_types(x, w, out, "head_linear", [&](auto& p) {
    p.a_row = x.stride(0), p.c_row = out.stride(0);
    p.b_row = transpose ? 1 : w.stride(1), p.b_depth = transpose ? w.stride(1) : 1;
    p.rows = x[0], p.columns = out[2], p.depth = x[2];
    p.a_batch = x.stride(1), p.b_batch = w.stride(0), p.c_batch = out.stride(1);
    launch(p, blocks_for(p.rows, tile), x[1], "head_linear", context);
  });
}

void grouped_linear(View x, View rows, View offsets, View w, View out, const Context& context) {
  LATENTE_ASSERT(offsets.count() == w[0] + 1 && x[1] == w[2] && out[1] == w[1]);
  LATENTE_ASSERT((rows ? rows.count() : x[0]) == out[0]);
  with_types(x, w, out, "grouped_linear", [&](auto& p) {
    p.a_row = x.stride(0), p.b_row = w.stride(1), p.b_batch = w.stride(0), p.c_row = out.stride(0);
    p.columns = w[1], p.depth = w[2], p.experts = static_cast<int>(w[0]);
    p.offsets = offsets.as<int32_t>(), p.gather = rows.as_or_null<int32_t>();
    launch(p, most_tiles(out[0], w[0]), 1, "grouped_linear", context);
  });
}

void grouped_linear_backward_input(View d_out, View offsets, View w, Grad d_x, const Context& context) {
  if (!d_x) return;
  with_types(d_out, w, d_x.view, "grouped_linear_backward_input", [&](auto& p) {
    p.a_row = d_out.stride(0), p.b_row = 1, p.b_depth = w.stride(1), p.b_batch = w.stride(0);
    p.c_row = d_x.view.stride(0);
    p.columns = w[2], p.depth = w[1], p.experts = static_cast<int>(w[0]);
    p.offsets = offsets.as<int32_t>();
    p.accumulate = d_x.accumulate;
    launch(p, most_tiles(d_out[0], w[0]), 1, "grouped_linear_backward_input", context);
  });
}

void grouped_linear_backward_weight(View d_out, View x, View rows, View offsets, Grad d_w,
                                    const Context& context) {
  if (!d_w) return;
  with_types(d_out, x, d_w.view, "grouped_linear_backward_weight", [&](auto& p) {
    p.a_row = 1, p.a_depth = d_out.stride(0), p.b_row = 1, p.b_depth = x.stride(0);
    p.c_row = d_w.view.stride(1), p.c_batch = d_w.view.stride(0);
    p.rows = d_out[1], p.columns = x[1];
    p.offsets = offsets.as<int32_t>(), p.gather = rows.as_or_null<int32_t>();
    p.by_depth = true, p.experts = static_cast<int>(offsets.count() - 1);
    p.accumulate = d_w.accumulate;
    launch(p, blocks_for(p.rows, tile), p.experts, "grouped_linear_backward_weight", context);
  });
}

}  // namespace latente::cuda
