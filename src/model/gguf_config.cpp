#include "model/gguf_config.h"

#include <charconv>
#include <cmath>

#include "base/error.h"
#include "checkpoint/json.h"

namespace latente {
namespace {

constexpr std::string_view architecture = "deepseek2";

// The keys of one architecture, with errors that name the file and the key.
class Keys {
 public:
  explicit Keys(const GgufFile& file) : file_(file) {}

  static std::string full(std::string_view key) { return fmt::format("{}.{}", architecture, key); }

  int64_t size(std::string_view key, int64_t otherwise) const {
    constexpr int64_t most = int64_t{1} << 31;
    std::optional<int64_t> value = file_.integer(full(key));
    if (value && (*value < 0 || *value >= most))
      fail("{}: {}: expected 0 to {}, found {}", file_.path(), full(key), most - 1, *value);
    return value.value_or(otherwise);
  }
  int64_t size(std::string_view key) const {
    file_.integer_at(full(key));
    int64_t value = size(key, 0);
    if (value == 0) fail("{}: {}: expected at least 1, found 0", file_.path(), full(key));
    return value;
  }
  // Finite. As a decimal number would be written that rounds to the file's float32: 1e-6, not 9.99999997e-7.
  double real(std::string_view key, double otherwise) const {
    const GgufValue* value = file_.find(full(key));
    if (!value) return otherwise;
    double number = *file_.number(full(key));
    if (!std::isfinite(number))
      fail("{}: {}: expected a finite number, found {}", file_.path(), full(key), number);
    if (value->type != GgufType::f32) return number;
    std::string text = fmt::format("{}", static_cast<float>(number));
    std::from_chars(text.data(), text.data() + text.size(), number);
    return number;
  }
  bool flag(std::string_view key, bool otherwise) const {
    return file_.boolean(full(key)).value_or(otherwise);
  }
  std::string text(std::string_view key, std::string_view otherwise) const {
    return std::string(file_.string(full(key)).value_or(otherwise));
  }
  template <class T>
  [[noreturn]] void expected(std::string_view key, std::string_view what, const T& found) const {
    fail("{}: {}: expected {}, found {}", file_.path(), full(key), what, found);
  }
  const GgufFile& file() const { return file_; }

 private:
  const GgufFile& file_;
};

void check_kind(const GgufFile& file) {
  std::string_view found = file.string_at("general.architecture");
  if (found != architecture)
    fail("{}: general.architecture: expected {}, found {}", file.path(), architecture, printable(found));
  std::string_view type = file.string("general.type").value_or("model");
  if (type != "model") fail("{}: general.type: expected a model, found {}", file.path(), printable(type));
}

void read_attention(const Keys& keys, Config& config) {
  config.num_attention_heads = keys.size("attention.head_count");
  config.num_key_value_heads = config.num_attention_heads;  // the file has 1, of absorbed attention
  config.q_lora_rank = keys.size("attention.q_lora_rank", 0);
  config.kv_lora_rank = keys.size("attention.kv_lora_rank");
  config.qk_rope_head_dim = keys.size("rope.dimension_count");
  // Since absorbed attention, key_length and value_length are those of the latent, and the heads' have names
  // of their own.
  bool absorbed = keys.file().find(Keys::full("attention.key_length_mla")) != nullptr;
  std::string_view key_length = absorbed ? "attention.key_length_mla" : "attention.key_length";
  int64_t key = keys.size(key_length);
  if (key <= config.qk_rope_head_dim)
    keys.expected(key_length, fmt::format("more than rope.dimension_count {}", config.qk_rope_head_dim), key);
  config.qk_nope_head_dim = key - config.qk_rope_head_dim;
  config.v_head_dim = keys.size(absorbed ? "attention.value_length_mla" : "attention.value_length");
  config.rms_norm_eps = keys.real("attention.layer_norm_rms_epsilon", -1);
  if (config.rms_norm_eps < 0) keys.file().number_at(Keys::full("attention.layer_norm_rms_epsilon"));
  // Of the same architecture in name, with an attention that is not ours.
  if (double scale = keys.real("attention.temperature_scale", 0); scale != 0)
    keys.expected("attention.temperature_scale", "none", scale);
  if (!keys.flag("attention.causal", true)) keys.expected("attention.causal", "true", "false");
}

void read_experts(const Keys& keys, bool with_bias, Config& config) {
  config.n_routed_experts = keys.size("expert_count", 0);
  if (config.n_routed_experts == 0) return;
  config.num_experts_per_tok = keys.size("expert_used_count");
  config.n_shared_experts = keys.size("expert_shared_count", 0);
  config.moe_intermediate_size = keys.size("expert_feed_forward_length");
  config.first_k_dense_replace = keys.size("leading_dense_block_count", 0);
  config.n_group = std::max<int64_t>(keys.size("expert_group_count", 1), 1);
  config.topk_group = keys.size("expert_group_used_count", config.n_group);
  if (config.n_group == 1) config.topk_group = 1;
  config.norm_topk_prob = keys.flag("expert_weights_norm", false);
  config.routed_scaling_factor = keys.real("expert_weights_scale", 1);
  if (config.routed_scaling_factor == 0) config.routed_scaling_factor = 1;  // 0 = not scaled
  int64_t gate = keys.size("expert_gating_func", 0);                        // 0 and absent: of DeepSeek V2
  if (gate > 2) keys.expected("expert_gating_func", "1 (softmax) or 2 (sigmoid)", gate);
  config.scoring_func = gate == 2 ? "sigmoid" : "softmax";
  bool limited = config.n_group > 1 && config.topk_group < config.n_group;
  config.topk_method = with_bias ? "noaux_tc" : limited ? "group_limited_greedy" : "greedy";
  config.model_type = with_bias || gate == 2 ? "deepseek_v3" : "deepseek_v2";
}

void read_rope(const Keys& keys, Config& config) {
  RopeConfig& rope = config.rope;
  rope.theta = keys.real("rope.freq_base", 10000);
  if (rope.theta <= 0) keys.expected("rope.freq_base", "a positive number", rope.theta);
  rope.original_max_position_embeddings =
      keys.size("rope.scaling.original_context_length", config.max_position_embeddings);
  rope.factor = keys.real("rope.scaling.factor", 1);
  if (rope.factor == 0) rope.factor = 1;
  if (rope.factor < 1) keys.expected("rope.scaling.factor", "at least 1", rope.factor);
  // A factor without a type is linear.
  std::string type = keys.text("rope.scaling.type", rope.factor > 1 ? "linear" : "none");
  if (type != "none" && type != "linear" && type != "yarn")
    keys.expected("rope.scaling.type", "none, linear or yarn", printable(type));
  rope.type = type == "none" || rope.factor == 1 ? "default" : type;
  if (rope.type != "yarn") return;
  rope.beta_fast = keys.real("rope.scaling.yarn_beta_fast", rope.beta_fast);
  rope.beta_slow = keys.real("rope.scaling.yarn_beta_slow", rope.beta_slow);
  if (rope.beta_fast <= 0) keys.expected("rope.scaling.yarn_beta_fast", "a positive number", rope.beta_fast);
  if (rope.beta_slow <= 0) keys.expected("rope.scaling.yarn_beta_slow", "a positive number", rope.beta_slow);
  if (double extrapolation = keys.real("rope.scaling.yarn_ext_factor", 1); extrapolation != 1)
    keys.expected("rope.scaling.yarn_ext_factor", "1", extrapolation);
  rope.attention_factor = keys.real("rope.scaling.yarn_attn_factor", 0);
  rope.mscale_all_dim = keys.real("rope.scaling.yarn_log_multiplier", 0) / 0.1;
  rope.mscale = rope.mscale_all_dim;
}

// Ids that end a text, and those of the beginning and the padding.
void read_tokens(const GgufFile& file, Config& config) {
  auto id = [&](std::string_view key) -> int64_t {
    std::optional<int64_t> value = file.integer(key);
    if (!value || *value == -1 || *value == 0xffffffff) return -1;  // both say: none
    if (*value < 0 || *value >= config.vocab_size)
      fail("{}: {}: expected 0 to {}, found {}", file.path(), key, config.vocab_size - 1, *value);
    return *value;
  };
  config.bos_token_id = id("tokenizer.ggml.bos_token_id");
  config.pad_token_id = id("tokenizer.ggml.padding_token_id");
  for (std::string_view key :
       {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"}) {
    int64_t end = id(key);
    if (end >= 0 && std::count(config.eos_token_ids.begin(), config.eos_token_ids.end(), end) == 0)
      config.eos_token_ids.push_back(end);
  }
}

}  // namespace

Config gguf_config(const GgufFile& file, const std::function<const GgufTensor*(std::string_view)>& find) {
  check_kind(file);
  Keys keys(file);
  Config config;
  const GgufTensor* embedding = find("token_embd.weight");
  if (!embedding) fail("{}: no tensor token_embd.weight", file.path());
  config.vocab_size = keys.size("vocab_size", embedding->rows());
  config.hidden_size = keys.size("embedding_length");
  config.intermediate_size = keys.size("feed_forward_length");
  config.max_position_embeddings = keys.size("context_length");
  config.tie_word_embeddings = find("output.weight") == nullptr;
  // MTP modules count as blocks.
  int64_t blocks = keys.size("block_count"), modules = keys.size("nextn_predict_layers", 0);
  if (modules >= blocks) keys.expected("nextn_predict_layers", "fewer than block_count", modules);
  config.num_hidden_layers = blocks - modules;
  auto of_block = [&](int64_t block, std::string_view name) {
    return find(fmt::format("blk.{}.{}", block, name)) != nullptr;
  };
  while (config.num_mtp_layers < modules &&
         of_block(config.num_hidden_layers + config.num_mtp_layers, "nextn.eh_proj.weight")) {
    ++config.num_mtp_layers;
  }
  read_attention(keys, config);
  config.attention_bias = of_block(0, "attn_output.bias");
  int64_t first_moe = keys.size("leading_dense_block_count", 0);
  read_experts(keys, of_block(first_moe, "exp_probs_b.bias"), config);
  read_rope(keys, config);
  read_tokens(file, config);
  config.validate(file.path());
  return config;
}

}  // namespace latente
