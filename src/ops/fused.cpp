#include "ops/ops.h"

namespace latente {

std::pair<Tensor, Tensor> linear_both(const Tensor& x, const Tensor& w, const Tensor& other_w) {
  Plan& plan = *x.plan();
  if (!plan.fuses()) return {linear(x, w), linear(x, other_w)};
  LATENTE_ASSERT(w[1] == x[1] && other_w[1] == x[1]);
  Tensor out = plan.intermediate({x[0], w[0]}, x.dtype());
  Tensor other_out = plan.intermediate({x[0], other_w[0]}, x.dtype());
  plan.record("linear_both", {x, w, other_w}, {out, other_out}, [=](Backend& b) {
    b.linear_both(x.view(), w.view(), other_w.view(), out.view(), other_out.view());
  });
  return {out, other_out};
}

Tensor latent_entries(const Tensor& q, const Tensor& q_norm, double q_eps, const Tensor& kv,
                      const Tensor& kv_norm, double kv_eps, const Tensor& positions, const Tensor& table,
                      bool interleaved, const Tensor& slots, const Tensor& cache) {
  Plan& plan = *kv.plan();
  const int64_t rank = kv_norm[0], rope = table[1];
  LATENTE_ASSERT(kv[1] == rank + rope);
  Tensor q_out = q_norm ? plan.intermediate(q.shape(), q.dtype()) : Tensor();
  Tensor latent_out = plan.intermediate({kv[0], rank}, kv.dtype());
  Tensor latent = kv.columns(0, rank), rotary = kv.columns(rank, rank + rope).reshape({kv[0], 1, rope});
  plan.record("latent_entries", {q, q_norm, kv, kv_norm, positions, table, slots},
              {q_out, kv, latent_out, cache}, [=](Backend& b) {
                LatentEntries e;
                if (q_norm) e.q = q.view(), e.q_norm = q_norm.view(), e.q_out = q_out.view();
                e.latent = latent.view(), e.latent_norm = kv_norm.view(), e.latent_out = latent_out.view();
                e.rotary = rotary.view(), e.positions = positions.view(), e.table = table.view();
                e.q_eps = q_eps, e.latent_eps = kv_eps;
                e.interleaved = interleaved;
                e.slots = slots.view(), e.cache = cache.view();
                b.latent_entries(e);
              });
  return q_norm ? q_out : q;
}

Tensor absorb_rotated(const Tensor& q, const Tensor& w_uk, bool transpose, const Tensor& positions,
                      const Tensor& table, bool interleaved) {
  LATENTE_ASSERT(q.shape().rank() == 3 && w_uk.shape().rank() == 3 && w_uk[0] == q[1]);
  Plan& plan = *q.plan();
  const int64_t nope = w_uk[transpose ? 1 : 2], rank = w_uk[transpose ? 2 : 1];
  LATENTE_ASSERT(q[2] == nope + table[1]);
  Tensor out = plan.intermediate({q[0], q[1], rank + table[1]}, q.dtype());
  plan.record("absorb_rotated", {q, w_uk, positions, table}, {q, out}, [=](Backend& b) {
    b.absorb_rotated(q.view(), w_uk.view(), transpose, positions.view(), table.view(), interleaved,
                     out.view());
  });
  return out;
}

Tensor expert_layer(const Tensor& x, const Routed& routed, const ExpertWeights& w) {
  Plan& plan = *x.plan();
  const int64_t tokens = x[0], choices = routed.experts.count(), experts = w.gate[0], inner = w.gate[1];
  auto of = [&](int64_t rows, int64_t columns) { return plan.intermediate({rows, columns}, x.dtype()); };
  Tensor out = of(tokens, x[1]);
  Tensor offsets = plan.intermediate({experts + 1}, DType::i32),
         rows = plan.intermediate({choices}, DType::i32);
  Tensor slots = plan.intermediate(routed.experts.shape(), DType::i32);
  Tensor gated = of(choices, inner), risen = of(choices, inner), middle = of(choices, inner),
         results = of(choices, x[1]);
  Tensor shared[3];
  if (w.shared_gate) {
    for (Tensor& one : shared) one = of(tokens, w.shared_gate[0]);
  }
  plan.record(
      "expert_layer",
      {x, routed.experts, routed.weights, w.gate, w.up, w.down, w.shared_gate, w.shared_up, w.shared_down},
      {out, offsets, rows, slots, gated, risen, middle, results, shared[0], shared[1], shared[2]},
      [=, gated_shared = shared[0], risen_shared = shared[1], inner_shared = shared[2]](Backend& b) {
        ExpertLayer at;
        at.x = x.view(), at.experts = routed.experts.view(), at.weights = routed.weights.view();
        at.gate = w.gate.view(), at.up = w.up.view(), at.down = w.down.view();
        if (w.shared_gate) {
          at.shared_gate = w.shared_gate.view(), at.shared_up = w.shared_up.view();
          at.shared_down = w.shared_down.view();
          at.shared_gated = gated_shared.view(), at.shared_risen = risen_shared.view();
          at.shared_inner = inner_shared.view();
        }
        at.out = out.view();
        at.offsets = offsets.view(), at.rows = rows.view(), at.slots = slots.view();
        at.gated = gated.view(), at.risen = risen.view(), at.inner = middle.view();
        at.results = results.view();
        b.expert_layer(at);
      });
  return out;
}

}  // namespace latente
