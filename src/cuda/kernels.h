// Kernels of the contract in tensor/backend.h, which says what each computes. They queue work on the
// context's stream and return; grids follow from shapes alone, so that a captured launch is right whatever
// the tensors hold.
#pragma once

#include "cuda/context.h"
#include "tensor/backend.h"

namespace latente::cuda {

// elementwise.cu
void fill(View x, double value, const Context& context);
void copy(View from, Grad to, const Context& context);
void add(View a, View b, View out, const Context& context);
void swiglu(View gate, View up, View out, const Context& context);
void swiglu_backward(View d_out, View gate, View up, Grad d_gate, Grad d_up, const Context& context);
// flag [1] i32 becomes 0 when an element of x is not finite, and stays as it is otherwise.
void clear_unless_finite(View x, View flag, const Context& context);

// embedding.cu
void embedding(View ids, View table, View out, const Context& context);
void embedding_backward(View ids, View d_out, Grad d_table, const Context& context);

// norm.cu
void rms_norm(View x, View weight, double eps, View out, View rstd, const Context& context);
void rms_norm_add(View h, View x, View weight, double eps, View sum, View out, View rstd,
                  const Context& context);
void rms_norm_backward(View d_out, View x, View weight, View rstd, Grad d_x, Grad d_weight,
                       const Context& context);

// rope.cu
void rope(View x, View positions, View table, bool interleaved, bool inverse, const Context& context);

// route.cu
void route(View logits, View bias, View token_mask, const Routing& routing, View scores, View weights,
           View experts, View load, View balance_loss, const Context& context);
void route_backward(View d_weights, View scores, View weights, View experts, View token_mask,
                    const Routing& routing, Grad d_logits, const Context& context);

// experts.cu
void expert_order(View experts, View offsets, View rows, View slots, const Context& context);
void combine(View y, View weights, View slots, Grad out, const Context& context);
void combine_backward(View d_out, View y, View weights, View slots, Grad d_y, Grad d_weights,
                      const Context& context);

// loss.cu
void linear_cross_entropy(View h, View w, View targets, View token_weights, View scratch, View nll,
                          View predicted, View loss, const Context& context);
void linear_cross_entropy_with_gradient(View h, View w, View targets, View token_weights, View scratch,
                                        View nll, View predicted, View loss, Grad d_h, Grad d_w,
                                        const Context& context);

// optimizer.cu
void add_sum_of_squares(View x, View result, const Context& context);
void adamw(View parameter, View master, View gradient, View m, View v, View scalars, const AdamW& options,
           const Context& context);
void update_routing_bias(View load, View bias, double rate, const Context& context);

// linear.cu; w may be coded (coded.h) where nothing is transposed
void linear(View x, View w, View bias, Grad out, const Context& context);
void linear_backward_input(View d_out, View w, Grad d_x, const Context& context);
void linear_backward_weight(View d_out, View x, Grad d_w, const Context& context);
void linear_backward_bias(View d_out, Grad d_bias, const Context& context);
void head_linear(View x, View w, bool transpose, View out, const Context& context);

// linear.cu: of experts
void grouped_linear(View x, View rows, View offsets, View w, View out, const Context& context);
void grouped_linear_backward_input(View d_out, View offsets, View w, Grad d_x, const Context& context);
void grouped_linear_backward_weight(View d_out, View x, View rows, View offsets, Grad d_w,
                                    const Context& context);

// gated_linear.cu: of all rows, or with offsets of experts. Each returns false, having done nothing, for what
// it has no kernel for.
bool gated_linear(View x, View rows, View offsets, View gate, View up, View gated, View risen, View inner,
                  const Context& context);
bool gated_linear_backward_input(View d_gated, View d_risen, View offsets, View gate, View up, Grad d_x,
                                 const Context& context);
bool gated_linear_backward_weight(View d_gated, View d_risen, View x, View rows, View offsets, Grad d_gate,
                                  Grad d_up, const Context& context);

// fp8.cu, for Hopper
void quantise_fp8(View x, View rows, View offsets, const Fp8Operand& out, const Context& context);
void quantise_fp8_weight(View w, const Fp8Operand& out, const Context& context);
void sort_weights(View weights, View slots, View factors, const Context& context);
void swiglu_backward_fp8(View d_out, View gated, View risen, View factors, View slots, View offsets,
                         const Fp8Operand& d_gated, const Fp8Operand& d_risen, Grad d_weights,
                         const Context& context);
void linear_fp8(const Fp8Matrix& x, const Fp8Matrix& w, View offsets, View bias, Grad out,
                const Context& context);
void gated_linear_fp8(const Fp8Matrix& x, const Fp8Matrix& gate, const Fp8Matrix& up, View offsets,
                      View factors, View gated, View risen, View out, const Context& context);
void gated_linear_fp8_backward_input(const Fp8Matrix& d_gated, const Fp8Matrix& d_risen,
                                     const Fp8Matrix& gate_across, const Fp8Matrix& up_across, View offsets,
                                     Grad d_x, const Context& context);
void linear_fp8_backward_weight(const Fp8Matrix& d_out_across, const Fp8Matrix& x_across, View offsets,
                                Grad d_w, const Context& context);
void gated_linear_fp8_backward_weight(const Fp8Matrix& d_gated_across, const Fp8Matrix& d_risen_across,
                                      const Fp8Matrix& x_across, View offsets, Grad d_gate, Grad d_up,
                                      const Context& context);

// attention_expanded.cu, attention_backward.cu: q, k, v, out in float32 or bfloat16; lse and delta in
// float32; gradients in either. Deterministic.
void attention_expanded(View q, View k, View k_rope, View v, View starts, double scale, View out, View lse,
                        const Context& context);
void attention_expanded_backward(View d_out, View q, View k, View k_rope, View v, View starts, double scale,
                                 View out, View lse, const AttentionScratch& scratch, Grad d_q, Grad d_k,
                                 Grad d_k_rope, Grad d_v, const Context& context);
int64_t attention_scratch_bytes(const Shape& q, const Shape& k, const Shape& v, int64_t longest,
                                const Context& context);
// attention_paged.cu, attention_paged_expanded.cu: q and out in float32 or bfloat16; caches in either or
// narrow; kv_b in either, as rows, or coded.
void attention_paged(View q, View keys, View values, const Pages& pages, double scale, View out,
                     const Context& context);
int64_t attention_short_table(int64_t tokens, int64_t heads, const View& keys, const View& values,
                              int64_t entries, const Context& context);
void attention_paged_expanded(View q, View cache, View kv_b, const Pages& pages, double scale, View out,
                              const Context& context);
// cache.cu: x, latent and rotary in float32 or bfloat16.
void cache_store_narrow(View latent, View rotary, View slots, View cache, const Context& context);
void cache_store(View x, View slots, View cache, const Context& context);

// sample.cu
void choose(View logits, View choices, View out, const Context& context);
void take_chosen(View ids, View from, View chosen, View out, const Context& context);

// norm.cu, route.cu, fused.cu: what decoding does in a row. Each returns false, having done nothing, for what
// it has no kernel for: other types than bfloat16, many rows.
bool latent_entries(const LatentEntries& entries, const Context& context);
bool linear_both(View x, View w, View other_w, View out, View other_out, const Context& context);
bool normed_linear(const NormedRows& x, View w, View other_w, View out, View other_out,
                   const Context& context);
bool normed_route(const NormedRows& x, View gate, View bias, const Routing& routing, View scores,
                  View weights, View experts, const Context& context);
bool absorb_beside_entries(const LatentEntries& entries, View q, View w, bool transpose, View out,
                           const Context& context);
bool attend_entries(const LatentEntries& entries, View q, View w_uk, bool transpose, View keys,
                    const Pages& pages, double scale, View w_uv, View folded, View attended, View out,
                    const Context& context);
bool gated_few_rows(View x, View gate_weight, View up_weight, View out, const Context& context);
bool absorb_rotated(View q, View w, bool transpose, View positions, View table, bool interleaved, View out,
                    const Context& context);
bool expert_layer(const ExpertLayer& layer, const Context& context);

}  // namespace latente::cuda
