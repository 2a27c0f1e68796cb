// Every op the model is written in: shape rule, recording and gradient. One file a family, as in cpu/ and
// cuda/. T = tokens, H = heads, E = experts, K = experts a token. Shapes of arguments and results as in
// tensor/backend.h, where each kernel is specified; what is said here is what differs.
#pragma once

#include "tensor/plan.h"

namespace latente {

// -- elementwise.cpp
Tensor add(const Tensor& a, const Tensor& b);
Tensor swiglu(const Tensor& gate, const Tensor& up);

// -- embedding.cpp
Tensor embedding(const Tensor& ids, const Tensor& table);
// rows of x: out[i] = x[rows[i]].
Tensor select_rows(const Tensor& x, const Tensor& rows);

// -- norm.cpp
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps);
struct SumAndNorm {
  Tensor sum, out;
};
SumAndNorm rms_norm_add(const Tensor& h, const Tensor& x, const Tensor& weight, double eps);

// -- rope.cpp
// Rotates the last columns [D - rope, D) of x [T, H, D] in place and returns x as it is then; rope is the
// table's width.
Tensor rope(const Tensor& x, const Tensor& positions, const Tensor& table, bool interleaved);

// -- linear.cpp
// Of x's type; of the exact type where the weight is and x is not (routers).
Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias = {});
// x · weightᵀ in the exact type whatever x's is: logits. Without gradient.
Tensor linear_exact(const Tensor& x, const Tensor& weight);
// base + x · weightᵀ, in base's memory: base must not be read afterwards.
Tensor linear_onto(const Tensor& base, const Tensor& x, const Tensor& weight);
// Without gradient.
Tensor head_linear(const Tensor& x, const Tensor& w, bool transpose);

// -- experts.cpp
struct Routed {
  Tensor weights;       // [T, K]
  Tensor experts;       // [T, K] i32
  Tensor balance_loss;  // [1], or null when routing.balance has none; its gradient is part of the plan's
};
Routed route(const Tensor& logits, const Tensor& bias, const Tensor& token_mask, const Routing& routing,
             const Tensor& load);
struct ExpertOrder {
  Tensor offsets, rows, slots;
};
ExpertOrder expert_order(const Tensor& experts, int64_t expert_count);
// Where the experts' weights are in memory on demand, asks for those that were chosen, and returns true.
// Without gradient.
bool expert_read(const ExpertOrder& order, const Tensor& gate, const Tensor& up, const Tensor& down);
// x [T, D] gathered by expert: swiglu of its products with two stacked weights, [T·K, F]; times the weights
// [T, K] of its rows' choices, if there are any, which is for FP8 alone.
Tensor expert_gated_linear(const Tensor& x, const ExpertOrder& order, const Tensor& gate, const Tensor& up,
                           const Tensor& weights = {});
Tensor expert_linear(const Tensor& x, const ExpertOrder& order, const Tensor& weight);
// combine() of expert_linear(). In FP8 weights are null: they are in x already.
Tensor combined_expert_linear(const Tensor& x, const ExpertOrder& order, const Tensor& weight,
                              const Tensor& weights, const Tensor& base = {});
// sum_k weights[t, k] · y[slots[t, k]], added onto `base` [T, D] (in its memory) when there is one.
Tensor combine(const Tensor& y, const Tensor& weights, const ExpertOrder& order, const Tensor& base = {});

// -- attention.cpp
Tensor attention_expanded(const Tensor& q, const Tensor& k, const Tensor& k_rope, const Tensor& v,
                          const Tensor& starts, double scale, int64_t longest = 0);
// MLA's query over the latent: q_nope folded through W_UK, the rotary part beside it (report, section 2.1.1).
// q [T, H, N + rope], w_uk [H, N, R], or [H, R, N] without `transpose` → [T, H, R + rope]. Without gradient.
Tensor absorb_query(const Tensor& q, const Tensor& w_uk, bool transpose = true);
struct PageTensors {
  Tensor block_table, sequence, position;
};
// Without gradient.
Tensor attention_paged(const Tensor& q, const Tensor& keys, const Tensor& values, const PageTensors& pages,
                       double scale);
// The same for MLA's cache [pages, page, 1, R + rope] by expanding it through kv_b [H · (N + dv), R]; q [T,
// H, N
// + rope]. Without gradient.
Tensor attention_paged_expanded(const Tensor& q, const Tensor& cache, const Tensor& kv_b,
                                const PageTensors& pages, double scale);
// Into a narrow latent cache [pages, page, bytes] (Backend::cache_store_narrow).
void cache_store_narrow(const Tensor& latent, const Tensor& rotary, const Tensor& slots, const Tensor& cache);
void cache_store(const Tensor& x, const Tensor& slots, const Tensor& cache);

// -- sample.cpp: without gradient
// Into chosen [T] i32.
void choose(const Tensor& logits, const Tensor& choices, const Tensor& chosen);
Tensor take_chosen(const Tensor& ids, const Tensor& from, const Tensor& chosen);

// -- fused.cpp: without gradients, as one call (Backend's fused.cpp); gated_linear where plan.fuses(), the
// others only there.
Tensor gated_linear(const Tensor& x, const Tensor& gate, const Tensor& up);
// A norm that what reads it takes itself: of h + pending, or of h where there is none.
struct Unnormed {
  Tensor h, pending, weight;
  double eps = 0;
};
struct NormedLinear {
  Tensor sum;         // h + pending, or h
  Tensor out, other;  // linear() of the norm by w and other_w
};
NormedLinear normed_linear(const Unnormed& x, const Tensor& w, const Tensor& other_w);
struct NormedRoute {
  Tensor sum, out;  // out: the norm
  Routed routed;
};
NormedRoute normed_route(const Unnormed& x, const Tensor& gate, const Tensor& bias, const Routing& routing);
// The norm of the latent in kv [T, rank + rope] goes to `cache` [pages, page, …] with the rotated key.
struct LatentsToCache {
  Tensor kv, norm;
  double eps = 0;
  Tensor slots, cache;
};
// These entries, rope and absorb_query, attention_paged over `keys`, whose entries they are, and head_linear
// by w_uv. Neither q nor kv may be read afterwards.
Tensor attend_entries(const LatentsToCache& entries, const Tensor& q, const Tensor& w_uk, bool transpose,
                      const Tensor& positions, const Tensor& table, bool interleaved, const Tensor& keys,
                      const PageTensors& pages, double scale, const Tensor& w_uv);
struct ExpertWeights {
  Tensor gate, up, down;                       // stacked
  Tensor shared_gate, shared_up, shared_down;  // or null
};
Tensor expert_layer(const Tensor& x, const Routed& routed, const ExpertWeights& weights);

// -- loss.cpp
struct CrossEntropy {
  Tensor loss;       // [1]: sum over tokens of token_weights · nll
  Tensor nll;        // [T]
  Tensor predicted;  // [T] i32
};
CrossEntropy linear_cross_entropy(const Tensor& h, const Tensor& weight, const Tensor& targets,
                                  const Tensor& token_weights);

}  // namespace latente
