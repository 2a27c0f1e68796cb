#include "model/attention.h"

namespace latente {

Mla::Mla(const Config& config, DType type)
    : kv_a_proj_with_mqa(config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim, type,
                         config.attention_bias),
      kv_a_layernorm(config.kv_lora_rank, 1e-6, type),
      kv_b_proj(config.kv_lora_rank,
                config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim), type),
      o_proj(config.num_attention_heads * config.v_head_dim, config.hidden_size, type, config.attention_bias),
      heads(config.num_attention_heads),
      nope_dim(config.qk_nope_head_dim),
      rope_dim(config.qk_rope_head_dim),
      v_dim(config.v_head_dim),
      kv_rank(config.kv_lora_rank),
      scale(config.softmax_scale()),
      interleaved(config.rope.interleaved) {
  int64_t width = heads * (nope_dim + rope_dim);
  if (config.q_lora_rank == 0) {
    q_proj = Linear(config.hidden_size, width, type);
  } else {
    q_a_proj = Linear(config.hidden_size, config.q_lora_rank, type, config.attention_bias);
    q_a_layernorm = Norm(config.q_lora_rank, 1e-6, type);
    q_b_proj = Linear(config.q_lora_rank, width, type);
  }
}

Tensor Mla::query(const Tensor& x) const { return q_proj ? q_proj(x) : q_b_proj(q_a_layernorm(q_a_proj(x))); }

Tensor Mla::operator()(Stream& stream, const Norm& norm, Step& at, const LayerCache* cache) const {
  if (cache && !at.starts && !at.expand_cache && stream.h.plan()->fuses() && !q_b_proj.bias)
    return fused(stream, norm, at, *cache);
  const Tensor x = stream.normed(norm);
  const int64_t tokens = x[0];
  Tensor q =
      rope(query(x).reshape({tokens, heads, nope_dim + rope_dim}), at.positions, at.rope_table, interleaved);

  Tensor kv_a = kv_a_proj_with_mqa(x);                  // [T, kv_rank + rope]
  Tensor c = kv_a_layernorm(kv_a.columns(0, kv_rank));  // [T, kv_rank]: the latent that is cached
  Tensor k_rope = kv_a.columns(kv_rank, kv_rank + rope_dim).reshape({tokens, 1, rope_dim});
  k_rope = rope(k_rope, at.positions, at.rope_table, interleaved).reshape({tokens, rope_dim});

  if (cache) {
    Tensor entries = cache->keys.reshape({cache->keys[0], cache->keys[1], cache->keys[3]});
    if (Backend::is_narrow_cache(entries.dtype())) {
      cache_store_narrow(c, k_rope, at.slots, entries);
    } else {
      cache_store(c, at.slots, entries.columns(0, kv_rank));
      cache_store(k_rope, at.slots, entries.columns(kv_rank, kv_rank + rope_dim));
    }
  }
  Tensor out = at.starts         ? expanded(q, c, k_rope, at)
               : at.expand_cache ? attention_paged_expanded(q, cache->keys, kv_b_proj.weight, at.pages, scale)
                                 : absorbed(q, at, *cache);
  return o_proj(out.reshape({tokens, heads * v_dim}));
}

Tensor Mla::expanded(const Tensor& q, const Tensor& c, const Tensor& k_rope, const Step& at) const {
  Tensor kv = kv_b_proj(c).reshape({c[0], heads, nope_dim + v_dim});
  Tensor k = kv.columns(0, nope_dim);
  Tensor v = kv.columns(nope_dim, nope_dim + v_dim);
  return attention_expanded(q, k, k_rope, v, at.starts, scale, at.longest);
}

Mla::UpProjections Mla::up_projections() const {
  if (w_uk) return {w_uk, w_uv, true};
  Tensor w = kv_b_proj.weight.reshape({heads, nope_dim + v_dim, kv_rank});
  return {w.slice(1, 0, nope_dim), w.slice(1, nope_dim, nope_dim + v_dim), false};
}

Tensor Mla::absorbed(const Tensor& q, const Step& at, const LayerCache& cache) const {
  const UpProjections up = up_projections();
  Tensor folded = absorb_query(q, up.k, !up.transposed);
  Tensor attended = attention_paged(folded, cache.keys, cache.keys.columns(0, kv_rank), at.pages, scale);
  return head_linear(attended, up.v, false);
}

Tensor Mla::fused(Stream& stream, const Norm& norm, const Step& at, const LayerCache& cache) const {
  const int64_t tokens = stream.h[0];
  const Linear& first = q_proj ? q_proj : q_a_proj;
  Tensor q, kv_a;
  if (first.bias || kv_a_proj_with_mqa.bias) {
    const Tensor x = stream.normed(norm);
    q = first(x), kv_a = kv_a_proj_with_mqa(x);
  } else {
    const NormedLinear both = normed_linear(stream.unnormed(norm), first.weight, kv_a_proj_with_mqa.weight);
    stream.keep(both.sum);
    q = both.out, kv_a = both.other;
  }
  if (!q_proj) q = normed_linear({q, {}, q_a_layernorm.weight, q_a_layernorm.eps}, q_b_proj.weight, {}).out;
  const UpProjections up = up_projections();
  Tensor out = attend_entries({kv_a, kv_a_layernorm.weight, kv_a_layernorm.eps, at.slots,
                               cache.keys.reshape({cache.keys[0], cache.keys[1], cache.keys[3]})},
                              q.reshape({tokens, heads, nope_dim + rope_dim}), up.k, !up.transposed,
                              at.positions, at.rope_table, interleaved, cache.keys, at.pages, scale, up.v);
  return o_proj(out.reshape({tokens, heads * v_dim}));
}

}  // namespace latente
