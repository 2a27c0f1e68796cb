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
// The workspace that it is best given for q, k and v where no token attends to more than `longest`; 0 if more
// than there is is of no use.
int64_t attention_kept_bytes(const Shape& q, const Shape& k, const Shape& v, int64_t longest,
                             const Context& context);

// Keys and values of heads [first_head, first_head + heads) of some sequences, expanded from a cache's
// latents: keys [sequence, head, count, nope], values [sequence, head, count, value], rope [sequence, count,
// rope]; up to the next multiple of 128 entries after a sequence's last one they are finite.
struct ExpandedCache {
  __nv_bfloat16 *keys = nullptr, *values = nullptr, *rope = nullptr;
  int first_sequence = 0, sequences = 0, first_head = 0, heads = 0, count = 0, nope = 0;
};
// Attention over them, for the rows of these sequences; widths 128+64/128 and 64+32/64.
void attend_expanded_cache_sm90(const Paged<__nv_bfloat16>& a, const ExpandedCache& cache,
                                const Context& context);
// attention_paged_expanded over a bfloat16 cache; the same widths.
bool attention_paged_expanded_sm90(const View& q, const View& cache, const View& kv_b, const Pages& pages,
                                   double scale, const View& out, const Context& context);

// Absorbed MLA over a bfloat16 cache: widths 576/512 and 224/192.
bool attention_paged_sm90(const Paged<__nv_bfloat16>& a, const View& q, const View& keys, const View& values,
                          const Pages& pages, const Context& context);
// The same for few tokens where block tables name no more than one piece's entries; false otherwise.
bool attention_paged_short_sm90(const Paged<__nv_bfloat16>& a, const View& keys, const Pages& pages,
                                const Context& context);
// And where they name no more than 16 pieces' entries.
bool attention_paged_pieces_sm90(const Paged<__nv_bfloat16>& a, const View& keys, const Pages& pages,
                                 const Context& context);
// Backend::short_table for these two.
int64_t short_table_sm90(int64_t tokens, int64_t heads, const View& keys, int64_t entries,
                         const Context& context);

}  // namespace latente::cuda
