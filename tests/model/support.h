// Tiny models with random weights, large enough in deviation that every path matters.
#pragma once

#include <cmath>
#include <nlohmann/json.hpp>

#include "base/random.h"
#include "model/weights.h"

namespace latente::test {

struct Tiny {
  std::string family = "deepseek_v3";  // or deepseek_v2, llama
  int64_t mtp = 0, layers = 2, vocabulary = 64, hidden = 32;
  bool tied = false, compressed = true, bias = false;
};

inline Config tiny_config(const Tiny& tiny) {
  nlohmann::json json{{"model_type", tiny.family},        {"vocab_size", tiny.vocabulary},
                      {"hidden_size", tiny.hidden},       {"intermediate_size", 40},
                      {"num_hidden_layers", tiny.layers}, {"num_attention_heads", 4},
                      {"tie_word_embeddings", tiny.tied}, {"attention_bias", tiny.bias},
                      {"max_position_embeddings", 512}};
  if (tiny.family == "llama") {
    json["num_key_value_heads"] = 2;
  } else {
    json.update({{"kv_lora_rank", 16},
                 {"qk_nope_head_dim", 12},
                 {"qk_rope_head_dim", 8},
                 {"v_head_dim", 10},
                 {"n_routed_experts", 8},
                 {"n_shared_experts", 1},
                 {"num_experts_per_tok", 3},
                 {"moe_intermediate_size", 8},
                 {"first_k_dense_replace", 1},
                 {"n_group", 4},
                 {"topk_group", 2},
                 {"num_nextn_predict_layers", tiny.mtp}});
    if (tiny.compressed) json["q_lora_rank"] = 24;
  }
  return Config::from_json(json, "tiny");
}

// Norms and routing biases are random too: ones and zeros would hide their absence. `sharpness` scales the
// embedding and the head: higher is more certain of the next token.
inline void randomise(Transformer& model, uint64_t seed, double sharpness = 1.0) {
  allocate_parameters(model);
  uint64_t stream = 0;
  model.for_each([&](const std::string& path, Tensor& tensor) {
    Random random(seed, stream++);
    double scale = 1.5 / std::sqrt(static_cast<double>(tensor[tensor.shape().rank() - 1])), mean = 0;
    if (path.ends_with("norm.weight") || path.ends_with("layernorm.weight")) mean = 1, scale = 0.2;
    if (path.ends_with(".bias") || path.ends_with("correction_bias")) scale = 0.2;
    if (path.ends_with("embed_tokens.weight")) scale = 1;
    if (path.ends_with("lm_head.weight")) scale *= sharpness;
    View view = tensor.view();
    for (int64_t i = 0; i < view.count(); ++i) {
      double value = mean + scale * random.normal();
      // Held wider than the weights, but stored as they are.
      if (path.ends_with(".bias") && model.weights() == DType::bf16)
        value = static_cast<double>(static_cast<float>(bf16(static_cast<float>(value))));
      convert(DType::f64, &value, view.dtype, static_cast<char*>(view.data) + i * size_of(view.dtype), 1);
    }
  });
}

}  // namespace latente::test
