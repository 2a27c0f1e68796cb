// Kernels of the contract in tensor/backend.h, which says what each computes. They queue work on a stream and
// return; grids follow from shapes alone, so that a captured launch is right whatever the tensors hold.
#pragma once

#include "cuda/context.h"
#include "cuda/stream.h"
#include "tensor/backend.h"

namespace latente::cuda {

// experts.cu
void expert_order(View experts, View offsets, View rows, View slots, StreamHandle stream);
void combine(View y, View weights, View slots, Grad out, StreamHandle stream);

// grouped_linear.cu
void grouped_linear(View x, View rows, View offsets, View w, View out, StreamHandle stream);

// attention_expanded.cu, attention_backward.cu: q, k, v, out in float32 or bfloat16; lse and delta in
// float32; gradients in either. Deterministic.
void attention_expanded(View q, View k, View k_rope, View v, View starts, double scale, View out, View lse,
                        const Context& context);
void attention_expanded_backward(View d_out, View q, View k, View k_rope, View v, View starts, double scale,
                                 View out, View lse, View delta, Grad d_q, Grad d_k, Grad d_k_rope, Grad d_v,
                                 const Context& context);
// attention_paged.cu, attention_paged_expanded.cu: q and out in float32 or bfloat16; caches in either or
// narrow; kv_b in either, as rows.
void attention_paged(View q, View keys, View values, const Pages& pages, double scale, View out,
                     const Context& context);
void attention_paged_expanded(View q, View cache, View kv_b, const Pages& pages, double scale, View out,
                              const Context& context);
// cache.cu: x, latent and rotary in float32 or bfloat16.
void cache_store_narrow(View latent, View rotary, View slots, View cache, const Context& context);
void cache_store(View x, View slots, View cache, const Context& context);

}  // namespace latente::cuda
