// A gate's products and those beside it in one launch, where Hopper's kernels take them; each returns false,
// having done nothing, elsewhere. Views as in Backend::gated_linear and its sisters; with offsets, weights
// are stacks.
#include "cuda/kernels.h"
#include "cuda/product_mma.cuh"
#include "cuda/product_sm90.h"

namespace latente::cuda {
namespace {

constexpr int64_t enough_rows = 64;  // of x, or of an expert on average: fewer do not fill tiles

bool all_narrow(std::initializer_list<View> views) {
  return std::all_of(views.begin(), views.end(), [](const View& view) { return view.dtype == DType::bf16; });
}

// The first of two products as Hopper takes it, and where the second one's operands lie; null: the same.
template <class C>
HopperProduct pair_of(const Product<bf16, bf16, C>& p, Pair pair, const View& a, const View& b,
                      const View& c) {
  HopperProduct h = for_hopper(p, p.rows, 1);
  h.pair = pair;
  h.other_a = a.data, h.other_b = b.data, h.other_c = c.data;
  return h;
}

bool fits(const HopperProduct& h, int64_t rows, const Context& context) {
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return rows >= enough_rows && fits_hopper(h, context) && aligned(h.other_a) && aligned(h.other_b) &&
         aligned(h.other_c) && aligned(h.inner);
}

}  // namespace

bool gated_linear(View x, View rows, View offsets, View gate, View up, View gated, View risen, View inner,
                  const Context& context) {
  if (!all_narrow({x, gate, up, gated, risen, inner}) || gate.strides != up.strides ||
      gated.strides != risen.strides || gated.strides != inner.strides)
    return false;
  const int axis = offsets ? 1 : 0;
  Product<bf16, bf16, bf16> p;
  p.a = x.as<bf16>(), p.b = gate.as<bf16>(), p.c = gated.as<bf16>();
  p.a_row = x.stride(0), p.b_row = gate.stride(axis), p.c_row = gated.stride(0);
  p.rows = gated[0], p.columns = gate[axis], p.depth = gate[axis + 1];
  if (offsets) p.b_batch = gate.stride(0), p.experts = static_cast<int>(gate[0]);
  p.offsets = offsets.as_or_null<int32_t>(), p.gather = rows.as_or_null<int32_t>();
  HopperProduct h = pair_of(p, Pair::gated, {}, up, risen);
  h.inner = inner.data;
  if (!mma::fits(p) || !fits(h, offsets ? p.rows / p.experts : p.rows, context)) return false;
  hopper_product(h, "gated_linear", context);
  return true;
}

bool gated_linear_backward_input(View d_gated, View d_risen, View offsets, View gate, View up, Grad d_x,
                                 const Context& context) {
  if (!all_narrow({d_gated, d_risen, gate, up, d_x.view}) || gate.strides != up.strides ||
      d_gated.strides != d_risen.strides)
    return false;
  const int axis = offsets ? 1 : 0;
  Product<bf16, bf16, bf16> p;
  p.a = d_gated.as<bf16>(), p.b = gate.as<bf16>(), p.c = d_x.view.as<bf16>();
  p.a_row = d_gated.stride(0), p.b_row = 1, p.b_depth = gate.stride(axis), p.c_row = d_x.view.stride(0);
  p.rows = d_gated[0], p.columns = gate[axis + 1], p.depth = gate[axis];
  if (offsets) p.b_batch = gate.stride(0), p.experts = static_cast<int>(gate[0]);
  p.offsets = offsets.as_or_null<int32_t>();
  p.accumulate = d_x.accumulate;
  const HopperProduct h = pair_of(p, Pair::depths, d_risen, up, {});
  if (!mma::fits(p) || !fits(h, offsets ? p.rows / p.experts : p.rows, context)) return false;
  hopper_product(h, "gated_linear_backward_input", context);
  return true;
}

bool gated_linear_backward_weight(View d_gated, View d_risen, View x, View rows, View offsets, Grad d_gate,
                                  Grad d_up, const Context& context) {
  const View &to = d_gate.view, &other = d_up.view;
  if (!to || !other || to.data == other.data || to.strides != other.strides ||
      d_gate.accumulate != d_up.accumulate || d_gated.strides != d_risen.strides ||
      !all_narrow({d_gated, d_risen, x}) || to.dtype != DType::f32)
    return false;
  const int axis = offsets ? 1 : 0;
  Product<bf16, bf16, float> p;
  p.a = d_gated.as<bf16>(), p.b = x.as<bf16>(), p.c = to.as<float>();
  p.a_row = 1, p.a_depth = d_gated.stride(0), p.b_row = 1, p.b_depth = x.stride(0);
  p.c_row = to.stride(axis);
  p.rows = to[axis], p.columns = to[axis + 1], p.depth = d_gated[0];
  p.accumulate = d_gate.accumulate;
  p.offsets = offsets.as_or_null<int32_t>(), p.gather = rows.as_or_null<int32_t>();
  if (offsets) p.by_depth = true, p.c_batch = to.stride(0), p.experts = static_cast<int>(to[0]);
  HopperProduct h = pair_of(p, Pair::rows, d_risen, {}, other);
  if (!mma::fits(p) || !fits(h, offsets ? p.depth / p.experts : p.depth, context)) return false;
  constexpr int64_t least_depth = 512;
  const int64_t size = p.rows * p.columns;
  const int64_t most = std::min(p.depth / least_depth, context.workspace_bytes / (8 * size));
  const int64_t parts = offsets ? 1 : best_parts(h, most, context);
  if (parts > 1) {
    h.part_depth = (p.depth / parts + mma::step - 1) / mma::step * mma::step;
    const auto count = static_cast<int>((p.depth + h.part_depth - 1) / h.part_depth);
    auto* sums = static_cast<float*>(context.workspace);
    h.c = sums, h.other_c = sums + count * size;
    h.c_row = p.columns, h.c_batch = size;
    h.accumulate = false;
    hopper_product(h, "gated_linear_backward_weight", context);
    for (const auto& [from, grad] : {std::pair{h.c, to}, {h.other_c, other}}) {
      sum_parts(static_cast<const float*>(from), count, p.rows, p.columns, grad.as<float>(), p.c_row,
                p.accumulate, "gated_linear_backward_weight", context);
    }
    return true;
  }
  hopper_product(h, "gated_linear_backward_weight", context);
  return true;
}

}  // namespace latente::cuda
