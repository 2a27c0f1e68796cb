// Products. On tensor cores (product_sm90.cu, product_mma.cuh) where operands are bfloat16 in rows of whole
// packs; else of any sizes, strides and types, in float32. Either way an element's sum runs over the depth in
// order, whatever tile it falls in.
#include "cuda/coded.h"
#include "cuda/few_rows.cuh"
#include "cuda/kernels.h"
#include "cuda/product.cuh"
#include "cuda/product_float.cuh"
#include "cuda/product_mma.cuh"
#include "cuda/product_sm90.h"
#include "cuda/split_linear.h"

namespace latente::cuda {
namespace {

template <class A>
bool fits_rows(const Product<A, float, float>& p) {
  auto aligned = [](const void* pointer, size_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
  };
  return p.columns <= most_row_columns && p.depth <= most_row_depth && p.depth % 4 == 0 && !p.offsets &&
         !p.bias && !p.accumulate && p.a_depth == 1 && p.b_depth == 1 && p.a_row % 4 == 0 &&
         p.b_row % 4 == 0 && aligned(p.a, 4 * sizeof(A)) && aligned(p.b, 16);
}

// `rows` of a and c in all, also where they are grouped.
template <class A, class B, class C>
void launch(const Product<A, B, C>& p, int64_t rows, int64_t batches, const char* name,
            const Context& context) {
  if (rows == 0 || p.columns == 0 || batches == 0) return;
  const bool grouped = p.offsets && !p.by_depth;
  auto grid_of = [&](int64_t tile_rows, int64_t tile_columns) {
    return dim3(static_cast<unsigned>(grouped ? most_tiles(rows, p.experts, tile_rows)
                                              : (rows + tile_rows - 1) / tile_rows),
                blocks_for(p.columns, tile_columns), static_cast<unsigned>(batches));
  };
  if constexpr (std::is_same_v<A, bf16> && std::is_same_v<B, bf16>) {
    if (mma::fits(p)) {
      if (few_rows(p, rows, batches, name, context)) return;
      const HopperProduct on_hopper = for_hopper(p, rows, batches);
      if (!mma::few_rows(p, rows) && fits_hopper(on_hopper, context)) {
        return hopper_product(on_hopper, name, context);
      }
      return mma::launch(p, rows, grid_of, name, context);
    }
  }
  if constexpr (std::is_same_v<B, float> && std::is_same_v<C, float>) {
    if (batches == 1 && p.part_depth == 0 && fits_rows(p)) {
      if (rows >= enough_row_tiles * row_tile) {
        const dim3 grid(blocks_for(rows, row_tile), blocks_for(p.columns, column_tile));
        return launch_early(many_rows_kernel<A>, grid, row_threads, 0, name, context, p);
      }
      constexpr int64_t few = 128;  // rows alone would leave multiprocessors idle
      const dim3 grid(static_cast<unsigned>(rows), rows <= few ? blocks_for(p.columns, row_warps) : 1);
      return launch_early(row_kernel<A>, grid, row_threads, static_cast<size_t>(p.depth) * sizeof(float),
                          name, context, p);
    }
  }
  const auto in_tiles_of = [&]<class K>(K) {
    product_kernel<K><<<grid_of(K::rows, K::columns), K::threads, 0, context.stream>>>(p);
    check_launch(name);
  };
  // Tiles of few rows where those of many would be mostly empty: gradients of routers' weights.
  if constexpr (std::is_same_v<A, float>) {
    if ((grouped ? rows / p.experts : rows) <= 64) return in_tiles_of(FloatTile<32, 1>{});
  }
  in_tiles_of(FloatTile<128, 2>{});
}

// `width` elements a thread.
template <int width>
__global__ __launch_bounds__(256) void sum_parts_kernel(const float* parts, int count, int64_t rows,
                                                        int64_t columns, float* out, int64_t out_stride,
                                                        bool accumulate) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x) * width;
  if (i >= rows * columns) return;
  float sum[width] = {};
#pragma unroll 4
  for (int part = 0; part < count; ++part) {
    float x[width];
    load<width>(parts + part * rows * columns + i, x);
#pragma unroll
    for (int j = 0; j < width; ++j) sum[j] += x[j];
  }
  put<width>(accumulate, sum, out + i / columns * out_stride + i % columns);
}

}  // namespace

void sum_parts(const float* parts, int count, int64_t rows, int64_t columns, float* out, int64_t out_row,
               bool accumulate, const char* name, const Context& context) {
  const bool packs = columns % 4 == 0 && out_row % 4 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const auto kernel = packs ? sum_parts_kernel<4> : sum_parts_kernel<1>;
  kernel<<<blocks_for(rows * columns, packs ? 1024 : 256), 256, 0, context.stream>>>(
      parts, count, rows, columns, out, out_row, accumulate);
  check_launch(name);
}

namespace {

// How many parts the depth of a product of few tiles is cut into, so that every multiprocessor has something
// to do; it follows from the shapes.
template <class A, class B, class C>
int64_t parts_of(const Product<A, B, C>& p, const Context& context) {
  constexpr int64_t enough_tiles = 264, least_depth = 512;
  const int64_t most =
      std::min(p.depth / least_depth, context.workspace_bytes / std::max<int64_t>(p.rows * p.columns * 4, 1));
  if constexpr (std::is_same_v<A, bf16> && std::is_same_v<B, bf16>) {
    const HopperProduct on_hopper = for_hopper(p, p.rows, 1);
    if (fits_hopper(on_hopper, context)) return best_parts(on_hopper, most, context);
  }
  const int64_t tiles = blocks_for(p.rows, 128) * int64_t{blocks_for(p.columns, 128)};
  return std::min(enough_tiles / std::max<int64_t>(tiles, 1), most);
}

// With its depth cut, if that pays.
template <class A, class B, class C>
void launch_deep(const Product<A, B, C>& p, const char* name, const Context& context) {
  if constexpr (std::is_same_v<C, float>) {
    if (const int64_t parts = parts_of(p, context); parts > 1) {
      Product<A, B, C> cut = p;
      cut.part_depth = (p.depth / parts + mma::step - 1) / mma::step * mma::step;
      const auto count = static_cast<int>((p.depth + cut.part_depth - 1) / cut.part_depth);
      cut.c = static_cast<float*>(context.workspace);
      cut.c_row = p.columns, cut.c_batch = p.rows * p.columns;
      cut.accumulate = false;
      launch(cut, p.rows, count, name, context);
      return sum_parts(cut.c, count, p.rows, p.columns, p.c, p.c_row, p.accumulate, name, context);
    }
  }
  launch(p, p.rows, 1, name, context);
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

// -- coded weights: a few rows read codes, for many rows they are widened first --

constexpr int64_t most_coded_rows = 32;  // beyond, reading them again and again costs more than widening

bool few_coded_rows(const View& x, const View& w, RowsProduct p, bool accumulate, const char* name,
                    const View& out, const Context& context) {
  if (x.dtype != DType::bf16 || w[-1] % mma::chunk != 0 || w[-2] % mma::chunk != 0 ||
      !in_packs(mma::chunk, {x})) {
    return false;
  }
  RowsLaunch launch;
  launch.depth = static_cast<int>(w[-1]);
  launch.accumulate = accumulate;
  launch.code = code_of(w);
  p.x = x.as<bf16>(), p.x_row = x.stride(0);
  p.w = rows_weights(w);
  p.out = out.data, p.out_row = out.stride(0);
  p.rows = static_cast<int>(out[0]), p.columns = static_cast<int>(w[-2]);
  launch.products[0] = p;
  return few_rows(launch, false, out.dtype == DType::f32, name, context);
}

void coded_linear(const View& x, const View& w, const View& bias, const Grad& out, const Context& context) {
  if (x[0] == 0) return;
  RowsProduct p;
  p.bias = bias.data, p.exact_bias = bias.dtype == DType::f32;
  if (x[0] <= most_coded_rows && few_coded_rows(x, w, p, out.accumulate, "linear", out.view, context)) return;
  const int64_t at_once = widened_rows(w, context);
  for (int64_t first = 0; first < w[0]; first += at_once) {
    const int64_t count = std::min(at_once, w[0] - first);
    Context rest;
    const View rows = widened(w, first, count, nullptr, context, rest);
    linear(x, rows, bias ? columns_of(bias, first, first + count) : View(),
           {columns_of(out.view, first, first + count), out.accumulate}, rest);
  }
}

void coded_head_linear(const View& x, const View& w, const View& out, const Context& context) {
  if (x[0] == 0) return;
  RowsProduct p;
  p.x_batch = x.stride(1), p.out_batch = out.stride(1), p.batches = static_cast<int>(x[1]);
  if (x[0] <= most_coded_rows && few_coded_rows(x, w, p, false, "head_linear", out, context)) return;
  Context rest;
  const View rows = widened(w, context, rest);
  head_linear(x, rows, false, out, rest);
}

void coded_grouped_linear(const View& x, const View& rows, const View& offsets, const View& w,
                          const View& out, const Context& context) {
  if (out[0] == 0) return;
  RowsProduct p;
  p.offsets = offsets.as<int32_t>(), p.gather = rows.as_or_null<int32_t>();
  p.experts = static_cast<int>(w[0]);
  if (out[0] <= tile_rows * w[0] && few_coded_rows(x, w, p, false, "grouped_linear", out, context)) return;
  const int64_t at_once = widened_matrices(w, context);
  if (at_once == 0)
    fail("grouped_linear: workspace: expected room for a matrix {}, found {} bytes", w.shape.str(),
         context.workspace_bytes);
  for (int64_t first = 0; first < w[0]; first += at_once) {
    const int64_t count = std::min(at_once, w[0] - first);
    int32_t* own = offsets.as<int32_t>() + first;
    Context rest;
    const View part = matrices_of(w, first, count);
    const View wide = widened(part, 0, w[1], own, context, rest);
    grouped_linear(x, rows, View(own, {count + 1}, DType::i32), wide, out, rest);
  }
}

}  // namespace

void linear(View x, View w, View bias, Grad out, const Context& context) {
  LATENTE_ASSERT(x[1] == w[1] && out.view[0] == x[0] && out.view[1] == w[0]);
  if (is_coded(w)) return coded_linear(x, w, bias, out, context);
  with_types(x, w, out.view, "linear", [&](auto& p) {
    p.a_row = x.stride(0), p.b_row = w.stride(0), p.c_row = out.view.stride(0);
    p.rows = x[0], p.columns = w[0], p.depth = x[1];
    p.accumulate = out.accumulate;
    p.bias = bias.data, p.exact_bias = bias.dtype == DType::f32;
    launch(p, p.rows, 1, "linear", context);
  });
}

void linear_backward_input(View d_out, View w, Grad d_x, const Context& context) {
  if (!d_x || split_linear_backward_input(d_out, w, d_x, context)) return;
  with_types(d_out, w, d_x.view, "linear_backward_input", [&](auto& p) {
    p.a_row = d_out.stride(0), p.b_row = 1, p.b_depth = w.stride(0), p.c_row = d_x.view.stride(0);
    p.rows = d_out[0], p.columns = w[1], p.depth = w[0];
    p.accumulate = d_x.accumulate;
    launch(p, p.rows, 1, "linear_backward_input", context);
  });
}

void linear_backward_weight(View d_out, View x, Grad d_w, const Context& context) {
  if (!d_w || split_linear_backward_weight(d_out, x, d_w, context)) return;
  with_types(d_out, x, d_w.view, "linear_backward_weight", [&](auto& p) {
    p.a_row = 1, p.a_depth = d_out.stride(0), p.b_row = 1, p.b_depth = x.stride(0);
    p.c_row = d_w.view.stride(0);
    p.rows = d_out[1], p.columns = x[1], p.depth = x[0];
    p.accumulate = d_w.accumulate;
    launch_deep(p, "linear_backward_weight", context);
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
  LATENTE_ASSERT(!(transpose && is_coded(w)));
  if (is_coded(w)) return coded_head_linear(x, w, out, context);
  with_types(x, w, out, "head_linear", [&](auto& p) {
    p.a_row = x.stride(0), p.c_row = out.stride(0);
    p.b_row = transpose ? 1 : w.stride(1), p.b_depth = transpose ? w.stride(1) : 1;
    p.rows = x[0], p.columns = out[2], p.depth = x[2];
    p.a_batch = x.stride(1), p.b_batch = w.stride(0), p.c_batch = out.stride(1);
    launch(p, p.rows, x[1], "head_linear", context);
  });
}

void grouped_linear(View x, View rows, View offsets, View w, View out, const Context& context) {
  LATENTE_ASSERT(offsets.count() == w[0] + 1 && x[1] == w[2] && out[1] == w[1]);
  LATENTE_ASSERT((rows ? rows.count() : x[0]) == out[0]);
  if (is_coded(w)) return coded_grouped_linear(x, rows, offsets, w, out, context);
  with_types(x, w, out, "grouped_linear", [&](auto& p) {
    p.a_row = x.stride(0), p.b_row = w.stride(1), p.b_batch = w.stride(0), p.c_row = out.stride(0);
    p.columns = w[1], p.depth = w[2], p.experts = static_cast<int>(w[0]);
    p.offsets = offsets.as<int32_t>(), p.gather = rows.as_or_null<int32_t>();
    launch(p, out[0], 1, "grouped_linear", context);
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
    launch(p, d_out[0], 1, "grouped_linear_backward_input", context);
  });
}

void grouped_linear_backward_weight(View d_out, View x, View rows, View offsets, Grad d_w,
                                    const Context& context) {
  if (!d_w) return;
  with_types(d_out, x, d_w.view, "grouped_linear_backward_weight", [&](auto& p) {
    p.a_row = 1, p.a_depth = d_out.stride(0), p.b_row = 1, p.b_depth = x.stride(0);
    p.c_row = d_w.view.stride(1), p.c_batch = d_w.view.stride(0);
    p.rows = d_out[1], p.columns = x[1], p.depth = d_out[0];
    p.offsets = offsets.as<int32_t>(), p.gather = rows.as_or_null<int32_t>();
    p.by_depth = true, p.experts = static_cast<int>(offsets.count() - 1);
    p.accumulate = d_w.accumulate;
    launch(p, p.rows, p.experts, "grouped_linear_backward_weight", context);
  });
}

}  // namespace latente::cuda
