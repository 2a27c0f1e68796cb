#include "ops/ops.h"

namespace latente {

namespace {

// Where the norm's results go: sum (or h, if nothing is pending) and out.
struct NormResults {
  Tensor sum, out;

  explicit NormResults(const Unnormed& x)
      : sum(x.pending ? x.h.plan()->intermediate(x.h.shape(), x.h.dtype()) : Tensor()),
        out(x.h.plan()->intermediate(x.h.shape(), x.h.dtype())) {
    LATENTE_ASSERT(x.weight[0] == x.h[1] && (!x.pending || x.pending.shape() == x.h.shape()));
  }
  NormedRows rows(const Unnormed& x) const {
    return {x.h.view(), x.pending.view(), x.weight.view(), x.eps, sum.view(), out.view()};
  }
};

}  // namespace

NormedLinear normed_linear(const Unnormed& x, const Tensor& w, const Tensor& other_w) {
  Plan& plan = *x.h.plan();
  const NormResults norm(x);
  LATENTE_ASSERT(plan.fuses() && w[1] == x.h[1] && (!other_w || other_w[1] == x.h[1]));
  const auto result = [&](const Tensor& by) {
    return by ? plan.intermediate({x.h[0], by[0]}, x.h.dtype()) : Tensor();
  };
  const Tensor out = result(w), other = result(other_w);
  plan.record(
      "normed_linear", {x.h, x.pending, x.weight, w, other_w}, {norm.sum, norm.out, out, other},
      [=](Backend& b) { b.normed_linear(norm.rows(x), w.view(), other_w.view(), out.view(), other.view()); });
  return {x.pending ? norm.sum : x.h, out, other};
}

NormedRoute normed_route(const Unnormed& x, const Tensor& gate, const Tensor& bias, const Routing& routing) {
  Plan& plan = *x.h.plan();
  const NormResults norm(x);
  LATENTE_ASSERT(plan.fuses() && gate[1] == x.h[1]);
  const int64_t tokens = x.h[0];
  const DType exact = exact_type(x.h.dtype());
  const Tensor logits = plan.intermediate({tokens, gate[0]}, exact),
               scores = plan.intermediate({tokens, gate[0]}, exact),
               weights = plan.intermediate({tokens, routing.top_k}, exact),
               experts = plan.intermediate({tokens, routing.top_k}, DType::i32);
  plan.record("normed_route", {x.h, x.pending, x.weight, gate, bias},
              {norm.sum, norm.out, logits, scores, weights, experts}, [=](Backend& b) {
                b.normed_route(norm.rows(x), gate.view(), bias.view(), routing, logits.view(), scores.view(),
                               weights.view(), experts.view());
              });
  return {x.pending ? norm.sum : x.h, norm.out, {weights, experts, {}}};
}

Tensor attend_entries(const LatentsToCache& to, const Tensor& q, const Tensor& w_uk, bool transpose,
                      const Tensor& positions, const Tensor& table, bool interleaved, const Tensor& keys,
                      const PageTensors& pages, double scale, const Tensor& w_uv) {
  LATENTE_ASSERT(q.shape().rank() == 3 && w_uk.shape().rank() == 3 && w_uk[0] == q[1]);
  Plan& plan = *q.plan();
  const Tensor kv = to.kv;
  const int64_t nope = w_uk[transpose ? 1 : 2], rank = to.norm[0], rope = table[1];
  LATENTE_ASSERT(q[2] == nope + rope && kv[1] == rank + rope && rank == w_uk[transpose ? 2 : 1]);
  LATENTE_ASSERT(w_uv.shape().rank() == 3 && w_uv[0] == q[1] && w_uv[2] == rank);
  const auto of = [&](int64_t width) { return plan.intermediate({q[0], q[1], width}, q.dtype()); };
  Tensor latent_out = plan.intermediate({kv[0], rank}, kv.dtype());
  Tensor latent = kv.columns(0, rank), rotary = kv.columns(rank, rank + rope).reshape({kv[0], 1, rope});
  Tensor folded = of(rank + rope), attended = of(rank), out = of(w_uv[1]);
  plan.record("attend_entries",
              {q, w_uk, kv, to.norm, positions, table, to.slots, keys, pages.block_table, pages.sequence,
               pages.position, w_uv},
              {q, kv, latent_out, to.cache, folded, attended, out}, [=](Backend& b) {
                LatentEntries e;
                e.latent = latent.view(), e.latent_norm = to.norm.view(), e.latent_out = latent_out.view();
                e.rotary = rotary.view(), e.positions = positions.view(), e.table = table.view();
                e.latent_eps = to.eps;
                e.interleaved = interleaved;
                e.slots = to.slots.view(), e.cache = to.cache.view();
                const Pages at{pages.block_table.view(), pages.sequence.view(), pages.position.view()};
                b.attend_entries(e, q.view(), w_uk.view(), transpose, keys.view(), at, scale, w_uv.view(),
                                 folded.view(), attended.view(), out.view());
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
