#include "model/attention.h"

namespace latente {

Gqa::Gqa(const Config& config, DType type)
    : q_proj(config.hidden_size, config.num_attention_heads * config.head_dim, type, config.attention_bias),
      k_proj(config.hidden_size, config.num_key_value_heads * config.head_dim, type, config.attention_bias),
      v_proj(config.hidden_size, config.num_key_value_heads * config.head_dim, type, config.attention_bias),
      o_proj(config.num_attention_heads * config.head_dim, config.hidden_size, type, config.attention_bias),
      heads(config.num_attention_heads),
      kv_heads(config.num_key_value_heads),
      dim(config.head_dim),
      scale(config.softmax_scale()),
      interleaved(config.rope.interleaved) {}

Tensor Gqa::operator()(Stream& stream, const Norm& norm, Step& at, const LayerCache* cache) const {
  const Tensor x = stream.normed(norm);
  const int64_t tokens = x[0];
  Tensor q = rope(q_proj(x).reshape({tokens, heads, dim}), at.positions, at.rope_table, interleaved);
  Tensor k = rope(k_proj(x).reshape({tokens, kv_heads, dim}), at.positions, at.rope_table, interleaved);
  Tensor v = v_proj(x).reshape({tokens, kv_heads, dim});
  if (cache) {
    Shape flat{cache->keys[0], cache->keys[1], kv_heads * dim};
    cache_store(k.reshape({tokens, kv_heads * dim}), at.slots, cache->keys.reshape(flat));
    cache_store(v.reshape({tokens, kv_heads * dim}), at.slots, cache->values.reshape(flat));
  }
  Tensor out;
  if (at.starts) {
    out = attention_expanded(q, k, {}, v, at.starts, scale, at.longest);
  } else {
    LATENTE_ASSERT(cache);
    out = attention_paged(q, cache->keys, cache->values, at.pages, scale);
  }
  return o_proj(out.reshape({tokens, heads * dim}));
}

}  // namespace latente
