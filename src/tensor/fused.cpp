// What each fused call of a backend stands for.
#include "tensor/backend.h"

namespace latente {
namespace {

void take_norm(Backend& to, const NormedRows& x) {
  x.pending ? to.rms_norm_add(x.h, x.pending, x.weight, x.eps, x.sum, x.out, {})
            : to.rms_norm(x.h, x.weight, x.eps, x.out, {});
}

}  // namespace

void Backend::linear_of_many(View x, View w, View out) { linear(x, w, {}, {out, false}); }

void Backend::linear_both(View x, View w, View other_w, View out, View other_out) {
  linear(x, w, {}, {out, false});
  linear(x, other_w, {}, {other_out, false});
}

void Backend::normed_linear(const NormedRows& x, View w, View other_w, View out, View other_out) {
  take_norm(*this, x);
  if (other_w) return linear_both(x.out, w, other_w, out, other_out);
  linear(x.out, w, {}, {out, false});
}

void Backend::normed_route(const NormedRows& x, View gate, View bias, const Routing& routing, View logits,
                           View scores, View weights, View experts) {
  take_norm(*this, x);
  linear(x.out, gate, {}, {logits, false});
  route(logits, bias, {}, routing, scores, weights, experts, {}, {});
}

void Backend::latent_entries(const LatentEntries& e) {
  rms_norm(e.latent, e.latent_norm, e.latent_eps, e.latent_out, {});
  rope(e.rotary, e.positions, e.table, e.interleaved, false);
  View rotary = e.rotary;  // [T, rope]
  rotary.shape = {e.rotary[0], e.rotary[2]};
  rotary.strides = {e.rotary.stride(0), 1};
  const int64_t rank = e.latent[1];
  if (is_narrow_cache(e.cache.dtype)) return cache_store_narrow(e.latent_out, rotary, e.slots, e.cache);
  cache_store(e.latent_out, e.slots, columns_of(e.cache, 0, rank));
  cache_store(rotary, e.slots, columns_of(e.cache, rank, e.cache[2]));
}

void Backend::absorb_rotated(View q, View w, bool transpose, View positions, View table, bool interleaved,
                             View out) {
  const int64_t nope = w[transpose ? 1 : 2], rank = w[transpose ? 2 : 1];
  const View rotary = columns_of(q, nope, q[2]);
  rope(rotary, positions, table, interleaved, false);
  head_linear(columns_of(q, 0, nope), w, transpose, columns_of(out, 0, rank));
  copy(rotary, {columns_of(out, rank, out[2]), false});
}

void Backend::absorb_beside_entries(const LatentEntries& e, View q, View w, bool transpose, View out) {
  latent_entries(e);
  absorb_rotated(q, w, transpose, e.positions, e.table, e.interleaved, out);
}

void Backend::attend_entries(const LatentEntries& e, View q, View w_uk, bool transpose, View keys,
                             const Pages& pages, double scale, View w_uv, View folded, View attended,
                             View out) {
  absorb_beside_entries(e, q, w_uk, transpose, folded);
  attention_paged(folded, keys, columns_of(keys, 0, attended[2]), pages, scale, attended);
  head_linear(attended, w_uv, false, out);
}

void Backend::expert_layer(const ExpertLayer& at) {
  expert_order(at.experts, at.offsets, at.rows, at.slots);
  grouped_gated_linear(at.x, at.rows, at.offsets, at.gate, at.up, at.gated, at.risen, at.inner);
  grouped_linear(at.inner, {}, at.offsets, at.down, at.results);
  if (at.shared_gate) {
    gated_linear(at.x, at.shared_gate, at.shared_up, at.shared_gated, at.shared_risen, at.shared_inner,
                 false);
    linear(at.shared_inner, at.shared_down, {}, {at.out, false});
  }
  combine(at.results, at.weights, at.slots, {at.out, static_cast<bool>(at.shared_gate)});
}

}  // namespace latente
