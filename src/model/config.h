// Config: config.json of a Hugging Face model directory, in both of its spellings (as released: rope_theta
// and rope_scaling; transformers 5: rope_parameters).
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "tensor/backend.h"

namespace latente {

struct RopeConfig {
  double theta = 10000.0;
  std::string type = "default";  // default, linear, yarn or llama3
  double factor = 1.0;
  int64_t original_max_position_embeddings = 0;
  double beta_fast = 32, beta_slow = 1;
  double mscale = 0, mscale_all_dim = 0;  // 0 = not given
  double attention_factor = 0;            // 0 = not given
  double low_freq_factor = 1, high_freq_factor = 4;
  bool interleaved = true;  // pairs (2i, 2i+1), as released; false: (i, i + d/2)
};

// What `latente convert` made of the weights (model/converted.h).
struct ConvertedConfig {
  int64_t bits = 0;  // 8 or 4; 0 = weights are as others store them
  int64_t mtp_bits = 0, group_size = 0;
  explicit operator bool() const { return bits > 0; }
};
inline constexpr int64_t converted_version = 1;

struct Config {
  std::string model_type = "deepseek_v3";  // deepseek_v3, deepseek_v2, or llama for MHA/GQA/MQA
  int64_t vocab_size = 0, hidden_size = 0, intermediate_size = 0;
  int64_t num_hidden_layers = 0, num_attention_heads = 0, num_key_value_heads = 0;
  int64_t head_dim = 0;      // MHA, GQA, MQA
  int64_t q_lora_rank = 0;   // 0 = no query compression
  int64_t kv_lora_rank = 0;  // 0 = not MLA
  int64_t qk_nope_head_dim = 0, qk_rope_head_dim = 0, v_head_dim = 0;
  int64_t n_routed_experts = 0;  // 0 = dense
  int64_t n_shared_experts = 0, num_experts_per_tok = 0, moe_intermediate_size = 0;
  int64_t first_k_dense_replace = 0, moe_layer_freq = 1;
  int64_t n_group = 1, topk_group = 1;
  std::string topk_method = "noaux_tc";  // noaux_tc (V3), greedy, group_limited_greedy (V2)
  std::string scoring_func = "sigmoid";
  bool norm_topk_prob = true;
  double routed_scaling_factor = 1.0;
  double rms_norm_eps = 1e-6, initializer_range = 0.02;
  bool attention_bias = false, tie_word_embeddings = false;
  int64_t max_position_embeddings = 4096;
  int64_t num_mtp_layers = 0;  // num_nextn_predict_layers
  RopeConfig rope;
  int64_t bos_token_id = -1, pad_token_id = -1;
  std::vector<int64_t> eos_token_ids;
  std::vector<int64_t> weight_block_size;  // quantization_config: {128, 128} for FP8, empty otherwise
  ConvertedConfig converted;               // quantization_config of quant_method "latente"

  // Errors name `source` and the key.
  static Config from_json(const nlohmann::json& json, const std::string& source);
  static Config from_file(const std::string& path);
  // As released, so that every engine reads it.
  nlohmann::json to_json(DType weights) const;
  // Throws when sizes contradict each other; called by from_json.
  void validate(const std::string& source) const;

  bool is_mla() const { return kv_lora_rank > 0; }
  bool is_moe_layer(int64_t layer) const;
  int64_t qk_head_dim() const { return is_mla() ? qk_nope_head_dim + qk_rope_head_dim : head_dim; }
  int64_t rope_dim() const { return is_mla() ? qk_rope_head_dim : head_dim; }
  double softmax_scale() const;
  Routing routing() const;
};

}  // namespace latente
