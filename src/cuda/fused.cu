// What decoding does in a row, for few rows of bfloat16: products that share a launch, and what follows them
// in their last step. Elements have the bits that the kernels one after the other give them.
#include "cuda/few_rows.cuh"
#include "cuda/kernels.h"

namespace latente::cuda {
namespace {

constexpr int64_t most_rows = tile_rows;
// Up to so many tokens, each choice of an expert is a product of its own, and nothing is sorted.
constexpr int64_t most_unsorted_tokens = 4;

// Rows of whole chunks, of bfloat16 or coded.
bool whole(std::initializer_list<View> views) {
  return std::all_of(views.begin(), views.end(), [](const View& view) {
    if (!view) return true;
    if (is_coded(view)) return view[-1] % mma::chunk == 0 && view[-2] % mma::chunk == 0;
    return view.dtype == DType::bf16 && in_packs(mma::chunk, {view});
  });
}

// Whether weights that share a launch are read alike.
bool alike(std::initializer_list<View> weights) {
  const View& first = *weights.begin();
  return std::all_of(weights.begin(), weights.end(),
                     [&](const View& w) { return !w || code_of(w) == code_of(first); });
}

RowsProduct product_of(const View& x, const View& w, const View& out) {
  RowsProduct p;
  p.x = x.as<bf16>(), p.x_row = x.stride(0);
  p.w = rows_weights(w);
  p.out = out.data, p.out_row = out.stride(0);
  p.rows = static_cast<int>(out[0]), p.columns = static_cast<int>(out[1]);
  return p;
}

RowsProduct gated_product_of(const View& x, const View& gate, const View& up, const View& out) {
  RowsProduct p = product_of(x, gate, out);
  p.up = rows_weights(up);
  return p;
}

// A product a head: w [H, N, K], or transposed.
RowsProduct head_product_of(const View& x, const View& w, bool transpose, const View& out) {
  RowsProduct p;
  p.x = x.as<bf16>(), p.x_row = x.stride(0), p.x_batch = x.stride(1);
  p.w = rows_weights(w);
  p.out = out.data, p.out_row = out.stride(0), p.out_batch = out.stride(1);
  p.rows = static_cast<int>(x[0]), p.batches = static_cast<int>(x[1]);
  p.columns = static_cast<int>(w[transpose ? 2 : 1]);
  return p;
}

RowsProduct gated_experts_of(const ExpertLayer& at) {
  RowsProduct p = gated_product_of(at.x, at.gate, at.up, at.inner);
  p.experts = static_cast<int>(at.gate[0]), p.top_k = static_cast<int>(at.experts[1]);
  return p;
}

}  // namespace

bool linear_both(View x, View w, View other_w, View out, View other_out, const Context& context) {
  if (x[0] > most_rows || !whole({x, w, other_w, out, other_out}) || !alike({w, other_w})) return false;
  RowsLaunch launch;
  launch.depth = static_cast<int>(x[1]);
  launch.count = 2;
  launch.code = code_of(w);
  launch.products[0] = product_of(x, w, out);
  launch.products[1] = product_of(x, other_w, other_out);
  return few_rows(launch, false, false, "linear_both", context);
}

bool normed_linear(const NormedRows& x, View w, View other_w, View out, View other_out,
                   const Context& context) {
  if (!whole({x.h, w, other_w, out, other_out}) || !alike({w, other_w})) return false;
  const auto norm = few_norms(x);
  if (!norm) return false;
  RowsLaunch launch;
  launch.depth = static_cast<int>(x.h[1]);
  launch.code = code_of(w);
  launch.norm = *norm;
  launch.norm.out = nullptr;  // nobody reads it
  launch.products[0] = product_of(x.h, w, out);
  if (other_w) {
    launch.count = 2;
    launch.products[1] = product_of(x.h, other_w, other_out);
  }
  return few_rows(launch, false, false, "normed_linear", context);
}

bool gated_few_rows(View x, View gate_weight, View up_weight, View out, const Context& context) {
  if (x[0] > most_rows || !whole({x, gate_weight, up_weight, out}) || !alike({gate_weight, up_weight}))
    return false;
  RowsLaunch launch;
  launch.code = code_of(gate_weight);
  launch.depth = static_cast<int>(x[1]);
  launch.products[0] = gated_product_of(x, gate_weight, up_weight, out);
  return few_rows(launch, false, false, "gated_linear", context);
}

namespace {

bool absorb(View q, View w, bool transpose, View positions, View table, bool interleaved, View out,
            const LatentRows& latents, const Context& context) {
  const int64_t nope = w[transpose ? 1 : 2], rank = w[transpose ? 2 : 1], rope = table[1];
  if (transpose == is_coded(w) || q[0] > most_rows || !positions.contiguous() ||
      !whole({columns_of(q, 0, nope), w, out})) {
    return false;
  }
  const View rotary = columns_of(q, nope, q[2]), copied = columns_of(out, rank, out[2]);
  RowsLaunch launch;
  launch.depth = static_cast<int>(nope);
  launch.code = code_of(w);
  launch.products[0] = head_product_of(columns_of(q, 0, nope), w, transpose, columns_of(out, 0, rank));
  Rotary& r = launch.rotary;
  r.x = rotary.as<bf16>(), r.x_row = rotary.stride(0), r.x_head = rotary.stride(1);
  r.out = copied.as<bf16>(), r.out_row = copied.stride(0), r.out_head = copied.stride(1);
  r.positions = positions.as<int32_t>();
  r.table = table.as<float>(), r.table_row = table.stride(0);
  r.heads = static_cast<int>(q[1]), r.half = static_cast<int>(rope / 2);
  r.count = static_cast<int>(q[0]) * r.heads * r.half;
  r.interleaved = interleaved;
  launch.latents = latents;
  return few_rows(launch, transpose, false, "absorb_rotated", context);
}

}  // namespace

bool absorb_rotated(View q, View w, bool transpose, View positions, View table, bool interleaved, View out,
                    const Context& context) {
  return absorb(q, w, transpose, positions, table, interleaved, out, {}, context);
}

bool absorb_beside_entries(const LatentEntries& e, View q, View w, bool transpose, View out,
                           const Context& context) {
  const auto latents = latent_rows(e);
  return latents && latents->latent.lanes == warp_size &&
         absorb(q, w, transpose, e.positions, e.table, e.interleaved, out, *latents, context);
}

bool expert_layer(const ExpertLayer& at, const Context& context) {
  const int64_t tokens = at.x[0];
  if (at.experts.count() > tile_rows * at.gate[0] && tokens > most_unsorted_tokens) return false;
  if (!whole({at.x, at.gate, at.up, at.down, at.shared_gate, at.shared_up, at.shared_down, at.out, at.inner,
              at.shared_inner}) ||
      !alike({at.gate, at.up, at.shared_gate, at.shared_up}) || !alike({at.down, at.shared_down}) ||
      !at.experts.contiguous() || !at.weights.contiguous()) {
    return false;
  }
  const bool sorted = tokens > most_unsorted_tokens;
  const bool together = at.shared_gate && tokens <= most_rows;
  RowsLaunch launch;
  launch.depth = static_cast<int>(at.x[1]);
  launch.count = together ? 2 : 1;
  launch.code = code_of(at.gate);
  RowsProduct& routed = launch.products[launch.count - 1];
  routed = gated_experts_of(at);
  if (together) {
    launch.products[0] = gated_product_of(at.x, at.shared_gate, at.shared_up, at.shared_inner);
  } else if (at.shared_gate) {
    linear(at.x, at.shared_gate, {}, {at.shared_gated, false}, context);
    linear(at.x, at.shared_up, {}, {at.shared_risen, false}, context);
    swiglu(at.shared_gated, at.shared_risen, at.shared_inner, context);
  }
  if (sorted) {
    routed.offsets = at.offsets.as<int32_t>(), routed.gather = at.rows.as<int32_t>();
    expert_order(at.experts, at.offsets, at.rows, at.slots, context);
  } else {
    routed.choices = at.experts.as<int32_t>();
  }
  if (!few_rows(launch, false, false, "expert_layer", context)) return false;
  if (!sorted) {
    ExpertsDown p;
    p.inner = at.inner.as<bf16>(), p.inner_row = at.inner.stride(0);
    p.experts = at.experts.as<int32_t>(), p.weights = at.weights.as<float>();
    p.w = rows_weights(at.down), p.code = code_of(at.down);
    p.depth = static_cast<int>(at.down[2]), p.top_k = static_cast<int>(at.experts[1]);
    if (at.shared_gate) {
      p.shared_inner = at.shared_inner.as<bf16>(), p.shared_row = at.shared_inner.stride(0);
      p.shared_w = rows_weights(at.shared_down);
      p.shared_depth = static_cast<int>(at.shared_down[1]);
    }
    p.out = at.out.as<bf16>(), p.out_row = at.out.stride(0);
    p.tokens = static_cast<int>(tokens), p.columns = static_cast<int>(at.out[1]);
    return experts_down(p, context);
  }
  grouped_linear(at.inner, {}, at.offsets, at.down, at.results, context);
  if (at.shared_gate) linear(at.shared_inner, at.shared_down, {}, {at.out, false}, context);
  combine(at.results, at.weights, at.slots, {at.out, static_cast<bool>(at.shared_gate)}, context);
  return true;
}

}  // namespace latente::cuda
