// A DeepSeek-V3 of sizes that products of few rows take.
#pragma once

#include "model/config.h"

namespace latente {

inline Config small_config(bool compressed_queries) {
  Config config;
  config.model_type = "deepseek_v3";
  config.vocab_size = 520;
  config.hidden_size = 128;
  config.intermediate_size = 192;
  config.moe_intermediate_size = 64;
  config.num_hidden_layers = 3;
  config.num_mtp_layers = 1;
  config.num_attention_heads = config.num_key_value_heads = 4;
  config.n_shared_experts = 1;
  config.n_routed_experts = 8;
  config.num_experts_per_tok = 3;
  config.q_lora_rank = compressed_queries ? 96 : 0;
  config.kv_lora_rank = 192;
  config.qk_rope_head_dim = 32;
  config.qk_nope_head_dim = 64;
  config.v_head_dim = 64;
  config.first_k_dense_replace = 1;
  config.topk_method = "noaux_tc";
  return config;
}

}  // namespace latente
