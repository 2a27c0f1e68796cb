// Attention on Hopper's tensor cores. Each function returns false, having done nothing, for what it has no
// kernel for.
#pragma once

#include "cuda/attention_backward.cuh"
#include "cuda/attention_paged.cuh"

namespace latente::cuda {

// Whether tiles of these tensors can be copied: their alignment.
bool copies_heads(const Expanded<__nv_bfloat16>& a);

// Widths of keys and values 192/128, 128/128, 128/64, 96/64 and 64/64, rotary parts after whole tiles of 64.
bool attention_expanded_sm90(const Expanded<__nv_bfloat16>& a, const Context& context);
// The same; delta is there already.
bool attention_backward_sm90(const Backward<__nv_bfloat16>& b, const GradRows& d_k_rope,
                             const Context& context);

// Absorbed MLA over a bfloat16 cache: widths 576/512 and 224/192.
bool attention_paged_sm90(const Paged<__nv_bfloat16>& a, const View& q, const View& keys, const View& values,
                          const Pages& pages, const Context& context);

}  // namespace latente::cuda
