// The two attentions that share one roof: multi-head latent attention, and MHA/GQA/MQA to compare with.
#pragma once

#include "model/layers.h"

namespace latente {

// Multi-head latent attention (DeepSeek-V3 report, section 2.1.1; DeepSeek-V2, section 2.1).
struct Mla {
  Linear q_proj;  // without query compression; else q_a_proj, q_a_layernorm, q_b_proj
  Linear q_a_proj;
  Norm q_a_layernorm;
  Linear q_b_proj;
  Linear kv_a_proj_with_mqa;  // [kv_lora_rank + rope, hidden]: W_DKV and W_KR
  Norm kv_a_layernorm;
  Linear kv_b_proj;  // [heads · (nope + v), kv_lora_rank]: W_UK and W_UV, head by head
  Linear o_proj;
  FIELDS(q_proj, q_a_proj, q_a_layernorm, q_b_proj, kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj, o_proj)

  // kv_b_proj a head, as absorbed attention reads it, where quantised weights (model/quantised.h) cannot be
  // read as both; else null. No parameters.
  Tensor w_uk;  // [heads, kv_lora_rank, nope]: transposed
  Tensor w_uv;  // [heads, v, kv_lora_rank]

  int64_t heads = 0, nope_dim = 0, rope_dim = 0, v_dim = 0, kv_rank = 0;
  double scale = 0;
  bool interleaved = true;

  Mla() = default;
  Mla(const Config& config, DType type);
  // Of the stream's norm [T, hidden]; cache may be null.
  Tensor operator()(Stream& stream, const Norm& norm, Step& at, const LayerCache* cache) const;

 private:
  Tensor query(const Tensor& x) const;  // [T, heads · (nope + rope)]
  // Absorbed attention over the cache in fused ops.
  Tensor fused(Stream& stream, const Norm& norm, const Step& at, const LayerCache& cache) const;
  Tensor expanded(const Tensor& q, const Tensor& c, const Tensor& k_rope,
                  const Step& at) const;                                            // [T, heads, v]
  Tensor absorbed(const Tensor& q, const Step& at, const LayerCache& cache) const;  // [T, heads, v]
  // w_uk and whether it is transposed, w_uv; or their places in kv_b_proj.
  struct UpProjections {
    Tensor k, v;
    bool transposed = false;
  };
  UpProjections up_projections() const;
};

// Grouped-query attention (Ainslie et al. 2023); as many key heads as query heads is MHA, one is MQA.
struct Gqa {
  Linear q_proj, k_proj, v_proj, o_proj;
  FIELDS(q_proj, k_proj, v_proj, o_proj)

  int64_t heads = 0, kv_heads = 0, dim = 0;
  double scale = 0;
  bool interleaved = false;

  Gqa() = default;
  Gqa(const Config& config, DType type);
  Tensor operator()(Stream& stream, const Norm& norm, Step& at, const LayerCache* cache) const;
};

}  // namespace latente
