#include "model/figures.h"

#include <algorithm>

namespace latente {
namespace {

enum Part {
  embedding_part,
  attention_part,
  dense_part,
  router_part,
  routed_part,
  shared_part,
  norm_part,
  head_part
};

Part part_of(const std::string& path) {
  auto has = [&](std::string_view piece) { return path.find(piece) != std::string::npos; };
  if (has("embed_tokens")) return embedding_part;
  if (has("lm_head")) return head_part;
  if (has(".self_attn.")) return attention_part;
  if (has(".mlp.gate.")) return router_part;
  if (has(".mlp.experts.")) return routed_part;
  if (has(".mlp.shared_experts.")) return shared_part;
  if (has(".mlp.") || has("eh_proj")) return dense_part;
  return norm_part;
}

}  // namespace

ParameterCount count_parameters(const Config& config) {
  Transformer model(config, DType::bf16);
  ParameterCount count;
  for (const char* name : {"input embedding", "attention", "dense feed-forward", "routers", "routed experts",
                           "shared experts", "norms", "output head"}) {
    count.parts.push_back({name, 0, 0});
  }
  auto add = [&](const std::string& path, const Tensor& tensor) {
    Part part = part_of(path);
    auto& entry = count.parts[part];
    entry.total += tensor.count();
    if (part == embedding_part || path.ends_with("e_score_correction_bias")) return;
    entry.active += part == routed_part
                        ? tensor.count() / config.n_routed_experts * config.num_experts_per_tok
                        : tensor.count();
  };
  for_each_parameter(model.model, "model", add);
  for_each_parameter(model.lm_head, "lm_head", add);
  if (config.tie_word_embeddings) count.parts[head_part].active = model.head().count();
  for (const auto& part : count.parts) {
    count.total += part.total;
    count.active += part.active;
  }
  for (MtpModule& module : model.mtp) {
    for_each_parameter(module, "",
                       [&](const std::string&, const Tensor& tensor) { count.mtp_own += tensor.count(); });
  }
  if (count.mtp_own > 0) {
    count.mtp_with_shared = count.mtp_own + model.model.embed_tokens.weight.count();
    if (model.lm_head) count.mtp_with_shared += model.lm_head.weight.count();
  }
  return count;
}

CacheFigures cache_figures(const Config& config) {
  int64_t layers = config.num_hidden_layers, heads = config.num_attention_heads;
  int64_t key = config.qk_head_dim(), value = config.is_mla() ? config.v_head_dim : config.head_dim;
  if (config.is_mla()) key = value = config.v_head_dim;  // what MHA or GQA of these heads would cache
  CacheFigures figures;
  figures.mha = layers * heads * (key + value);
  figures.gqa8 = layers * std::min<int64_t>(heads, 8) * (key + value);
  figures.mqa = layers * (key + value);
  figures.own = config.is_mla() ? layers * (config.kv_lora_rank + config.qk_rope_head_dim)
                                : layers * config.num_key_value_heads * (key + value);
  return figures;
}

namespace {

// Of one layer's attention proper, per token of context.
double attention_flops(const Config& config, bool absorbed) {
  double per_token =
      static_cast<double>(config.qk_head_dim() + (config.is_mla() ? config.v_head_dim : config.head_dim));
  if (config.is_mla() && absorbed)
    per_token = static_cast<double>(2 * config.kv_lora_rank + config.qk_rope_head_dim);
  return 2.0 * static_cast<double>(config.num_attention_heads) * per_token;
}

}  // namespace

double forward_flops(const Config& config, int64_t context, bool absorbed) {
  double weights = 2.0 * static_cast<double>(count_parameters(config).active);
  return weights +
         attention_flops(config, absorbed) * static_cast<double>(config.num_hidden_layers * context);
}

double training_flops(const Config& config, int64_t length) {
  const int64_t context = length / 2;  // on average
  double forward = forward_flops(config, context, false);
  if (config.num_mtp_layers > 0) {
    ParameterCount count = count_parameters(config);
    int64_t idle = 0;  // experts not chosen
    int64_t expert = 3 * config.hidden_size * config.moe_intermediate_size;
    if (config.is_moe_layer(config.num_hidden_layers))
      idle = config.num_mtp_layers * (config.n_routed_experts - config.num_experts_per_tok) * expert;
    int64_t heads = config.num_mtp_layers * config.vocab_size * config.hidden_size;
    forward += 2.0 * static_cast<double>(count.mtp_own - idle + heads);
    forward += attention_flops(config, false) * static_cast<double>(config.num_mtp_layers * context);
  }
  return 3.0 * forward;
}

double decode_bytes(const Config& config, int64_t context, double bytes_per_weight,
                    double bytes_per_cache_value) {
  return static_cast<double>(count_parameters(config).active) * bytes_per_weight +
         static_cast<double>(cache_figures(config).own * context) * bytes_per_cache_value;
}

}  // namespace latente
