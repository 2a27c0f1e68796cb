#include "model/transformer.h"

#include "tensor/device.h"

namespace latente {

Layer::Layer(const Config& config, int64_t index, DType type)
    : input_layernorm(config.hidden_size, config.rms_norm_eps, type),
      post_attention_layernorm(config.hidden_size, config.rms_norm_eps, type) {
  if (config.is_mla()) {
    self_attn = Mla(config, type);
  } else {
    self_attn = Gqa(config, type);
  }
  if (config.is_moe_layer(index)) {
    mlp = Moe(config, type);
  } else {
    mlp = Mlp(config.hidden_size, config.intermediate_size, type);
  }
}

void Layer::operator()(Stream& stream, Step& at, const LayerCache* cache) const {
  Plan* plan = stream.h.plan();
  {
    Plan::Scope scope(plan, "self_attn");
    Tensor out = std::visit(
        [&](const auto& attention) { return attention(stream, input_layernorm, at, cache); }, self_attn);
    at.residuals.push_back(stream.h);
    stream.pending = out;
  }
  Plan::Scope scope(plan, "mlp");
  stream.pending = std::visit(
      [&](const auto& feed_forward) { return feed_forward(stream, post_attention_layernorm, at); }, mlp);
}

MtpModule::MtpModule(const Config& config, int64_t index, DType type)
    : enorm(config.hidden_size, config.rms_norm_eps, type),
      hnorm(config.hidden_size, config.rms_norm_eps, type),
      eh_proj(2 * config.hidden_size, config.hidden_size, type),
      layer(config, index, type),
      shared_head{Norm(config.hidden_size, config.rms_norm_eps, type)} {}

Tensor MtpModule::operator()(const Tensor& hidden, const Tensor& embedded, Step& at,
                             const LayerCache* cache) const {
  int64_t width = hidden[1];
  Tensor mixed = linear(enorm(embedded), eh_proj.weight.columns(0, width));
  Stream stream{linear_onto(mixed, hnorm(hidden), eh_proj.weight.columns(width, 2 * width)), {}};
  layer(stream, at, cache);
  return stream.normed(shared_head.norm);
}

Transformer::Transformer(const Config& config, DType weights) : config_(config), weights_(weights) {
  model.embed_tokens = Embedding(config.vocab_size, config.hidden_size, weights);
  for (int64_t i = 0; i < config.num_hidden_layers; ++i) model.layers.emplace_back(config, i, weights);
  model.norm = Norm(config.hidden_size, config.rms_norm_eps, weights);
  if (!config.tie_word_embeddings) lm_head = Linear(config.hidden_size, config.vocab_size, weights);
  for (int64_t k = 0; k < config.num_mtp_layers; ++k) {
    mtp.emplace_back(config, config.num_hidden_layers + k, weights);
  }
  for_each([](const std::string& path, Tensor& tensor) { tensor.value().name = path; });
}

const LayerCache* Transformer::cache_of(const Step& at, int64_t layer) const {
  return at.slots ? &at.caches[static_cast<size_t>(layer)] : nullptr;
}

Tensor Transformer::hidden(const Tensor& ids, Step& at) const {
  Plan* plan = ids.plan();
  Plan::Scope scope(plan, "model");
  Stream stream{model.embed_tokens(ids), {}};
  for (size_t i = 0; i < model.layers.size(); ++i) {
    Plan::Scope layer_scope(plan, "layers." + std::to_string(i));
    model.layers[i](stream, at, cache_of(at, static_cast<int64_t>(i)));
  }
  Tensor out = stream.normed(model.norm);
  at.residuals.push_back(stream.h);
  return out;
}

Tensor Transformer::predict(int64_t k, const Tensor& hidden, const Tensor& later_ids, Step& at) const {
  Plan::Scope scope(later_ids.plan(), mtp_path(k));
  return mtp[static_cast<size_t>(k)](hidden, model.embed_tokens(later_ids), at,
                                     cache_of(at, config_.num_hidden_layers + k));
}

std::vector<std::pair<std::string, Gate*>> Transformer::gates() {
  std::vector<std::pair<std::string, Gate*>> found;
  for (size_t i = 0; i < model.layers.size(); ++i) {
    if (Moe* moe = model.layers[i].moe())
      found.emplace_back("model.layers." + std::to_string(i) + ".mlp.gate", &moe->gate);
  }
  for (size_t k = 0; k < mtp.size(); ++k) {
    if (Moe* moe = mtp[k].layer.moe())
      found.emplace_back(mtp_path(static_cast<int64_t>(k)) + ".mlp.gate", &moe->gate);
  }
  return found;
}

std::vector<LayerCache> Transformer::make_caches(Backend& backend, int64_t pages, int64_t page_size,
                                                 DType type) const {
  std::vector<LayerCache> caches;
  const bool narrow = Backend::is_narrow_cache(type);
  if (narrow && !config_.is_mla())
    fail("a cache of 8 bits is for MLA's latents; {} has none", config_.model_type);
  for (int64_t i = 0; i < config_.num_hidden_layers + config_.num_mtp_layers; ++i) {
    std::string name = "cache of layer " + std::to_string(i);
    if (config_.is_mla()) {
      const int64_t rank = config_.kv_lora_rank, rope = config_.qk_rope_head_dim;
      const int64_t width = narrow ? Backend::narrow_entry_bytes(rank, rope) : rank + rope;
      caches.push_back({buffer(backend, {pages, page_size, 1, width}, type, name), {}});
    } else {
      Shape shape{pages, page_size, config_.num_key_value_heads, config_.head_dim};
      caches.push_back({buffer(backend, shape, type, name), buffer(backend, shape, type, name)});
    }
  }
  return caches;
}

int64_t Transformer::cache_values_per_token() const {
  int64_t layers = config_.num_hidden_layers + config_.num_mtp_layers;
  int64_t width = config_.is_mla() ? config_.kv_lora_rank + config_.qk_rope_head_dim
                                   : 2 * config_.num_key_value_heads * config_.head_dim;
  return layers * width;
}

}  // namespace latente
