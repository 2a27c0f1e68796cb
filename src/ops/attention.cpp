#include "ops/ops.h"

namespace latente {

Tensor attention_expanded(const Tensor& q, const Tensor& k, const Tensor& k_rope, const Tensor& v,
                          const Tensor& starts, double scale, int64_t longest) {
  LATENTE_ASSERT(q.shape().rank() == 3 && k.shape().rank() == 3 && v.shape().rank() == 3);
  LATENTE_ASSERT(q[2] == k[2] + (k_rope ? k_rope[1] : 0) && k[1] == v[1] && q[1] % k[1] == 0);
  Plan& plan = *q.plan();
  Tensor out = plan.intermediate({q[0], q[1], v[2]}, q.dtype());
  Tensor lse = plan.intermediate({q[0], q[1]}, exact_type(q.dtype()));
  plan.record(
      "attention_expanded", {q, k, k_rope, v, starts}, {out, lse},
      [=](Backend& b) {
        b.attention_expanded(q.view(), k.view(), k_rope.view(), v.view(), starts.view(), scale, out.view(),
                             lse.view());
      },
      [=](Gradients& g) {
        Tensor d_out = g.of(out);
        auto d_q = g.slot(q), d_k = g.slot(k), d_k_rope = g.slot(k_rope), d_v = g.slot(v);
        Tensor delta = g.plan().intermediate(lse.shape(), lse.dtype()), memory;
        const int64_t bytes = q.dtype() == DType::bf16 ? g.plan().backend().attention_scratch_bytes(
                                                             q.shape(), k.shape(), v.shape(), longest)
                                                       : 0;
        if (bytes > 0) memory = g.plan().intermediate({bytes}, DType::u8);
        g.plan().record("attention_expanded_backward", {d_out, q, k, k_rope, v, starts, out, lse},
                        {delta, memory, d_q.tensor, d_k.tensor, d_k_rope.tensor, d_v.tensor},
                        [=](Backend& b) {
                          b.attention_expanded_backward(d_out.view(), q.view(), k.view(), k_rope.view(),
                                                        v.view(), starts.view(), scale, out.view(),
                                                        lse.view(), {delta.view(), memory.view(), longest},
                                                        d_q.view(), d_k.view(), d_k_rope.view(), d_v.view());
                        });
      });
  plan.checkpoint(out), plan.checkpoint(lse);
  return out;
}

Tensor absorb_query(const Tensor& q, const Tensor& w_uk, bool transpose) {
  LATENTE_ASSERT(q.shape().rank() == 3 && w_uk.shape().rank() == 3 && w_uk[0] == q[1]);
  Plan& plan = *q.plan();
  int64_t nope = w_uk[transpose ? 1 : 2], rank = w_uk[transpose ? 2 : 1], rope = q[2] - nope;
  LATENTE_ASSERT(nope < q[2]);
  Tensor out = plan.intermediate({q[0], q[1], rank + rope}, q.dtype());
  Tensor q_nope = q.columns(0, nope), q_rope = q.columns(nope, q[2]);
  Tensor folded = out.columns(0, rank), copied = out.columns(rank, rank + rope);
  plan.record("absorb_query", {q, w_uk}, {out}, [=](Backend& b) {
    b.head_linear(q_nope.view(), w_uk.view(), transpose, folded.view());
    b.copy(q_rope.view(), {copied.view(), false});
  });
  return out;
}

Tensor attention_paged(const Tensor& q, const Tensor& keys, const Tensor& values, const PageTensors& pages,
                       double scale) {
  Plan& plan = *q.plan();
  Tensor out = plan.intermediate({q[0], q[1], values[3]}, q.dtype());
  plan.record("attention_paged", {q, keys, values, pages.block_table, pages.sequence, pages.position}, {out},
              [=](Backend& b) {
                Pages at{pages.block_table.view(), pages.sequence.view(), pages.position.view()};
                b.attention_paged(q.view(), keys.view(), values.view(), at, scale, out.view());
              });
  return out;
}

Tensor attention_paged_expanded(const Tensor& q, const Tensor& cache, const Tensor& kv_b,
                                const PageTensors& pages, double scale) {
  const int64_t rank = kv_b[1];
  const int64_t rope = Backend::rotary_width(cache.dtype(), cache[3], rank);
  const int64_t nope = q[2] - rope;
  LATENTE_ASSERT(cache[2] == 1 && kv_b[0] % q[1] == 0 && nope > 0);
  Plan& plan = *q.plan();
  Tensor out = plan.intermediate({q[0], q[1], kv_b[0] / q[1] - nope}, q.dtype());
  plan.record("attention_paged_expanded", {q, cache, kv_b, pages.block_table, pages.sequence, pages.position},
              {out}, [=](Backend& b) {
                Pages at{pages.block_table.view(), pages.sequence.view(), pages.position.view()};
                b.attention_paged_expanded(q.view(), cache.view(), kv_b.view(), at, scale, out.view());
              });
  return out;
}

void cache_store_narrow(const Tensor& latent, const Tensor& rotary, const Tensor& slots,
                        const Tensor& cache) {
  latent.plan()->record("cache_store_narrow", {latent, rotary, slots}, {cache}, [=](Backend& b) {
    b.cache_store_narrow(latent.view(), rotary.view(), slots.view(), cache.view());
  });
}

void cache_store(const Tensor& x, const Tensor& slots, const Tensor& cache) {
  x.plan()->record("cache_store", {x, slots}, {cache},
                   [=](Backend& b) { b.cache_store(x.view(), slots.view(), cache.view()); });
}

}  // namespace latente
