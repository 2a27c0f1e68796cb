// A checkpoint as llama.cpp's converter would write it, for tests: architecture deepseek2, float32. And what
// two forms of a model have in common.
#pragma once

#include <map>
#include <nlohmann/json.hpp>

#include "checkpoint/gguf_bytes.h"
#include "model/gguf_names.h"
#include "model/weights.h"

namespace latente::test {

struct GgufLayout {
  bool split_latent = true;   // attn_k_b and attn_v_b
  bool whole_latent = false;  // attn_kv_b
  bool folded = false;        // attn_k_b and attn_v_b with heads and rows in one axis
  bool fused = false;         // gates and ups of experts in one tensor
  bool trimmed = false;       // outer axes of one element left out, as llama.cpp's own programs do
};

// f(gguf name, shape with the outermost axis first, values)
using TensorSink = std::function<void(const std::string&, std::vector<int64_t>, const std::vector<float>&)>;

class GgufTensors {
 public:
  GgufTensors(const Config& config, const TensorSource& source, const GgufLayout& layout,
              const TensorSink& sink)
      : config_(config), source_(source), layout_(layout), sink_(sink) {}

  void write() {
    Transformer model(config_, DType::f32);
    model.for_each([&](const std::string& path, Tensor& tensor) {
      if (is_expert_stack(path)) return write_stack(path, tensor);
      std::vector<float> values = read(path, tensor.shape());
      if (path.ends_with("kv_b_proj.weight")) return write_latent(path, values);
      put(gguf_name_of(path), extents(tensor.shape()), values);
    });
  }

 private:
  static std::vector<int64_t> extents(const Shape& shape) {
    std::vector<int64_t> all;
    for (int axis = 0; axis < shape.rank(); ++axis) all.push_back(shape[axis]);
    return all;
  }

  std::vector<float> read(const std::string& name, const Shape& shape) const {
    std::vector<float> values(static_cast<size_t>(shape.count()));
    source_.read(name, View(values.data(), shape, DType::f32));
    return values;
  }

  void put(const std::string& name, std::vector<int64_t> shape, const std::vector<float>& values) {
    while (layout_.trimmed && shape.size() > 1 && shape[0] == 1) shape.erase(shape.begin());
    sink_(name, std::move(shape), values);
  }

  void write_stack(const std::string& path, const Tensor& tensor) {
    const bool gate = path.ends_with("gate_proj"), up = path.ends_with("up_proj");
    if (layout_.fused && up) return;  // with the gates
    std::vector<float> all;
    for (int64_t e = 0; e < tensor[0]; ++e) {
      for (const char* kind : {"gate_proj", "up_proj"}) {
        std::string stack = path;
        if (layout_.fused && gate) stack.replace(path.rfind('.') + 1, std::string::npos, kind);
        std::vector<float> one = read(expert_path(stack, e), {tensor[1], tensor[2]});
        all.insert(all.end(), one.begin(), one.end());
        if (!layout_.fused || !gate) break;
      }
    }
    std::string name = gguf_name_of(path);
    if (layout_.fused && gate) name.replace(name.find("gate_exps"), 9, "gate_up_exps");
    put(name, {tensor[0], static_cast<int64_t>(all.size()) / tensor[0] / tensor[2], tensor[2]}, all);
  }

  void write_latent(const std::string& path, const std::vector<float>& values) {
    const int64_t heads = config_.num_attention_heads, nope = config_.qk_nope_head_dim,
                  v = config_.v_head_dim, rank = config_.kv_lora_rank;
    std::string name = gguf_name_of(path);
    if (layout_.whole_latent) put(name, {heads * (nope + v), rank}, values);
    if (!layout_.split_latent) return;
    std::vector<float> k, of_v;
    for (int64_t h = 0; h < heads; ++h) {
      const float* head = values.data() + h * (nope + v) * rank;
      for (int64_t c = 0; c < rank; ++c) {
        for (int64_t i = 0; i < nope; ++i) k.push_back(head[i * rank + c]);
      }
      of_v.insert(of_v.end(), head + nope * rank, head + (nope + v) * rank);
    }
    const size_t at = name.find("attn_kv_b");
    std::vector<int64_t> k_shape{heads, rank, nope}, v_shape{heads, v, rank};
    if (layout_.folded) k_shape = {heads * rank, nope}, v_shape = {heads * v, rank};
    put(std::string(name).replace(at, 9, "attn_k_b"), k_shape, k);
    put(std::string(name).replace(at, 9, "attn_v_b"), v_shape, of_v);
  }

  const Config& config_;
  const TensorSource& source_;
  const GgufLayout& layout_;
  const TensorSink& sink_;
};

// The keys that the config says.
inline void write_keys(GgufBytes& file, const Config& config, const GgufLayout& layout = {}) {
  auto size = [&](const std::string& key, int64_t value) {
    file.set("deepseek2." + key, static_cast<uint32_t>(value));
  };
  auto real = [&](const std::string& key, double value) {
    file.set("deepseek2." + key, static_cast<float>(value));
  };
  file.set("general.architecture", "deepseek2").set("general.type", "model");
  size("vocab_size", config.vocab_size);
  size("block_count", config.num_hidden_layers + config.num_mtp_layers);
  if (config.num_mtp_layers > 0) size("nextn_predict_layers", config.num_mtp_layers);
  size("context_length", config.max_position_embeddings);
  size("embedding_length", config.hidden_size);
  size("feed_forward_length", config.intermediate_size);
  size("attention.head_count", config.num_attention_heads);
  if (config.q_lora_rank > 0) size("attention.q_lora_rank", config.q_lora_rank);
  size("attention.kv_lora_rank", config.kv_lora_rank);
  const bool absorbed = layout.split_latent && !layout.whole_latent;
  size("attention.head_count_kv", absorbed ? 1 : config.num_attention_heads);
  size("attention.key_length",
       absorbed ? config.kv_lora_rank + config.qk_rope_head_dim : config.qk_head_dim());
  size("attention.value_length", absorbed ? config.kv_lora_rank : config.v_head_dim);
  if (absorbed) {
    size("attention.key_length_mla", config.qk_head_dim());
    size("attention.value_length_mla", config.v_head_dim);
  }
  real("attention.layer_norm_rms_epsilon", config.rms_norm_eps);
  size("rope.dimension_count", config.qk_rope_head_dim);
  real("rope.freq_base", config.rope.theta);
  if (config.rope.type != "default") {
    file.set("deepseek2.rope.scaling.type", config.rope.type);
    real("rope.scaling.factor", config.rope.factor);
    size("rope.scaling.original_context_length", config.rope.original_max_position_embeddings);
    real("rope.scaling.yarn_log_multiplier", 0.1 * config.rope.mscale_all_dim);
  }
  size("leading_dense_block_count", config.first_k_dense_replace);
  size("expert_count", config.n_routed_experts);
  size("expert_used_count", config.num_experts_per_tok);
  size("expert_shared_count", config.n_shared_experts);
  size("expert_feed_forward_length", config.moe_intermediate_size);
  size("expert_group_count", config.n_group);
  size("expert_group_used_count", config.topk_group);
  real("expert_weights_scale", config.routed_scaling_factor);
  file.set("deepseek2.expert_weights_norm", config.norm_topk_prob);
  size("expert_gating_func", config.scoring_func == "sigmoid" ? 2 : 1);
  if (config.bos_token_id >= 0)
    file.set("tokenizer.ggml.bos_token_id", static_cast<uint32_t>(config.bos_token_id));
  if (!config.eos_token_ids.empty())
    file.set("tokenizer.ggml.eos_token_id", static_cast<uint32_t>(config.eos_token_ids[0]));
}

inline GgufBytes gguf_of(const Config& config, const TensorSource& source, const GgufLayout& layout = {}) {
  GgufBytes file;
  write_keys(file, config, layout);
  const TensorSink sink = [&](const std::string& name, std::vector<int64_t> shape,
                              const std::vector<float>& values) {
    file.floats(name, std::vector<uint64_t>(shape.rbegin(), shape.rend()), values);
  };
  GgufTensors(config, source, layout, sink).write();
  return file;
}

// What the file need not say: it concerns training.
inline nlohmann::json comparable(const Config& config) {
  nlohmann::json json = config.to_json(DType::f32);
  json.erase("initializer_range");
  return json;
}

inline void expect_same_parameters(const TensorSource& ours, const TensorSource& theirs,
                                   const Config& config) {
  Transformer a(config, DType::f32), b(config, DType::f32);
  load_parameters(a, ours);
  load_parameters(b, theirs);
  std::map<std::string, Tensor> loaded;
  b.for_each([&](const std::string& path, Tensor& tensor) { loaded.emplace(path, tensor); });
  a.for_each([&](const std::string& path, Tensor& tensor) {
    const View x = tensor.view(), y = loaded.at(path).view();
    EXPECT_EQ(std::memcmp(x.data, y.data, static_cast<size_t>(x.bytes())), 0) << path;
    if (x.shape.rank() != 2) return;
    for (int64_t first = 0; first < x[0]; first += 7) {  // some rows at a time
      const int64_t count = std::min<int64_t>(7, x[0] - first);
      std::vector<float> rows(static_cast<size_t>(count * x[1]));
      ours.read_rows(path, x[0], first, View(rows.data(), {count, x[1]}, DType::f32));
      EXPECT_EQ(std::memcmp(rows.data(), x.as<float>() + first * x[1], rows.size() * sizeof(float)), 0)
          << path;
    }
  });
}

}  // namespace latente::test
