#include "model/config.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file.h"
#include "checkpoint/json.h"

namespace latente {
namespace {

using Json = nlohmann::json;

// A value for a message: as JSON, which escapes control characters, shortened.
std::string shown(const Json& value) {
  constexpr size_t most = 100;
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  if (text.size() > most) text = text.substr(0, most) + "...";
  return text;
}

// Typed access to one JSON object with errors that name the file and the key.
class Reader {
 public:
  Reader(const Json& json, std::string source) : json_(json), source_(std::move(source)) {
    if (!json_.is_object()) fail("{}: expected a JSON object", source_);
  }

  const Json* find(const char* key) const {
    auto found = json_.find(key);
    return found == json_.end() || found->is_null() ? nullptr : &*found;
  }
  void read(const char* key, int64_t& value) const {
    const Json* json = find(key);
    if (!json) return;
    if (!json->is_number_integer()) fail("{}: {}: expected an integer, found {}", source_, key, shown(*json));
    value = json->get<int64_t>();
    if (value < -1 || value > (int64_t{1} << 40))
      fail("{}: {}: out of range: {}", source_, key, shown(*json));
  }
  void read(const char* key, double& value) const {
    const Json* json = find(key);
    if (!json) return;
    if (!json->is_number()) fail("{}: {}: expected a number, found {}", source_, key, shown(*json));
    value = json->get<double>();
    if (!std::isfinite(value)) fail("{}: {}: not finite", source_, key);
  }
  void read(const char* key, bool& value) const {
    const Json* json = find(key);
    if (!json) return;
    if (!json->is_boolean()) fail("{}: {}: expected true or false, found {}", source_, key, shown(*json));
    value = json->get<bool>();
  }
  void read(const char* key, std::string& value) const {
    const Json* json = find(key);
    if (!json) return;
    if (!json->is_string()) fail("{}: {}: expected a string, found {}", source_, key, shown(*json));
    value = json->get<std::string>();
  }
  void require(const char* key, int64_t& value) const {
    if (!find(key)) fail("{}: missing key {}", source_, key);
    read(key, value);
    if (value <= 0) fail("{}: {}: expected a positive integer, found {}", source_, key, value);
  }
  void read_list(const char* key, std::vector<int64_t>& values) const {
    const Json* json = find(key);
    if (!json) return;
    values.clear();
    auto push = [&](const Json& item) {
      if (!item.is_number_integer()) fail("{}: {}: expected integers, found {}", source_, key, shown(*json));
      values.push_back(item.get<int64_t>());
    };
    if (!json->is_array()) return push(*json);
    for (const Json& item : *json) push(item);
  }

 private:
  const Json& json_;
  std::string source_;
};

void read_rope(const Reader& top, const std::string& source, Config& config) {
  RopeConfig& rope = config.rope;
  top.read("rope_theta", rope.theta);
  double turned = 1;  // the part of the rotary dimensions that turns
  top.read("partial_rotary_factor", turned);
  if (config.is_mla()) top.read("rope_interleave", rope.interleaved);
  const Json* scaling = top.find("rope_parameters");
  if (!scaling) scaling = top.find("rope_scaling");
  if (scaling) {
    Reader reader(*scaling, source + ": rope_scaling");
    reader.read("rope_theta", rope.theta);
    reader.read("partial_rotary_factor", turned);
    reader.read("type", rope.type);
    reader.read("rope_type", rope.type);
    reader.read("factor", rope.factor);
    reader.read("original_max_position_embeddings", rope.original_max_position_embeddings);
    reader.read("beta_fast", rope.beta_fast);
    reader.read("beta_slow", rope.beta_slow);
    reader.read("mscale", rope.mscale);
    reader.read("mscale_all_dim", rope.mscale_all_dim);
    reader.read("attention_factor", rope.attention_factor);
    reader.read("low_freq_factor", rope.low_freq_factor);
    reader.read("high_freq_factor", rope.high_freq_factor);
  }
  if (rope.type != "default" && rope.type != "linear" && rope.type != "yarn" && rope.type != "llama3") {
    fail("{}: rope_scaling: unknown type {} (known: default, linear, yarn, llama3)", source,
         printable(rope.type));
  }
  if (turned != 1) fail("{}: partial_rotary_factor {} is not supported (1)", source, turned);
  if (rope.theta <= 0 || rope.factor < 1)
    fail("{}: rope_theta must be positive and rope_scaling.factor at least 1", source);
  if (rope.original_max_position_embeddings <= 0)
    rope.original_max_position_embeddings = config.max_position_embeddings;
}

// transformers' other spelling of first_k_dense_replace: a word a layer.
void read_layer_types(const Reader& reader, const std::string& source, Config& config) {
  const Json* types = reader.find("mlp_layer_types");
  if (!types) return;
  int64_t dense = 0;
  bool good = types->is_array() && static_cast<int64_t>(types->size()) == config.num_hidden_layers;
  for (size_t layer = 0; good && layer < types->size(); ++layer) {
    const Json& type = (*types)[layer];
    if (type == "dense" && dense == static_cast<int64_t>(layer)) {
      ++dense;
    } else {
      good = type == "sparse";
    }
  }
  if (!good) fail("{}: mlp_layer_types: expected a word a layer, dense ones before sparse ones", source);
  config.first_k_dense_replace = dense;
}

void read_experts(const Reader& reader, const std::string& source, Config& config) {
  if (config.model_type == "deepseek_v2") {
    config.topk_method = "greedy";
    config.scoring_func = "softmax";
    config.norm_topk_prob = false;
  }
  reader.read("n_routed_experts", config.n_routed_experts);
  reader.read("n_shared_experts", config.n_shared_experts);
  config.n_shared_experts = std::max<int64_t>(config.n_shared_experts, 0);
  reader.read("num_experts_per_tok", config.num_experts_per_tok);
  reader.read("moe_intermediate_size", config.moe_intermediate_size);
  reader.read("first_k_dense_replace", config.first_k_dense_replace);
  read_layer_types(reader, source, config);
  reader.read("moe_layer_freq", config.moe_layer_freq);
  reader.read("n_group", config.n_group);
  reader.read("topk_group", config.topk_group);
  reader.read("topk_method", config.topk_method);
  reader.read("scoring_func", config.scoring_func);
  reader.read("norm_topk_prob", config.norm_topk_prob);
  reader.read("routed_scaling_factor", config.routed_scaling_factor);
}

double yarn_mscale(double factor, double mscale) {
  return factor <= 1 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

void read_converted(const Reader& reader, const std::string& source, Config& config) {
  const auto expect = [&](bool good, const char* key, const char* what, int64_t found) {
    if (!good) fail("{}: quantization_config: {}: expected {}, found {}", source, key, what, found);
  };
  int64_t version = 0;
  ConvertedConfig& converted = config.converted;
  reader.require("version", version);
  expect(version == converted_version, "version", "1, the one this program knows", version);
  reader.require("bits", converted.bits);
  reader.require("mtp_bits", converted.mtp_bits);
  reader.require("group_size", converted.group_size);
  expect(converted.bits == 8 || converted.bits == 4, "bits", "8 or 4", converted.bits);
  expect(converted.mtp_bits == 8 || converted.mtp_bits == 4, "mtp_bits", "8 or 4", converted.mtp_bits);
  expect(converted.group_size % 32 == 0 && converted.group_size >= 32 && converted.group_size <= 256,
         "group_size", "a multiple of 32 from 32 to 256", converted.group_size);
}

}  // namespace

Config Config::from_json(const Json& json, const std::string& source) {
  Reader reader(json, source);
  Config config;
  if (!reader.find("model_type")) fail("{}: missing key model_type", source);
  reader.read("model_type", config.model_type);
  // The same equations and names under other ones: Kimi K2 and GLM-4.7-Flash.
  if (config.model_type == "kimi_k2" || config.model_type == "glm4_moe_lite")
    config.model_type = "deepseek_v3";
  bool mla = config.model_type == "deepseek_v3" || config.model_type == "deepseek_v2";
  if (!mla && config.model_type != "llama") {
    fail("{}: model_type {} is not supported (deepseek_v3, deepseek_v2, kimi_k2, glm4_moe_lite, llama)",
         source, printable(config.model_type));
  }
  reader.require("vocab_size", config.vocab_size);
  reader.require("hidden_size", config.hidden_size);
  reader.require("intermediate_size", config.intermediate_size);
  reader.require("num_hidden_layers", config.num_hidden_layers);
  reader.require("num_attention_heads", config.num_attention_heads);
  config.num_key_value_heads = config.num_attention_heads;
  reader.read("num_key_value_heads", config.num_key_value_heads);
  if (mla) {
    reader.read("q_lora_rank", config.q_lora_rank);
    reader.require("kv_lora_rank", config.kv_lora_rank);
    reader.require("qk_nope_head_dim", config.qk_nope_head_dim);
    reader.require("qk_rope_head_dim", config.qk_rope_head_dim);
    reader.require("v_head_dim", config.v_head_dim);
    config.q_lora_rank = std::max<int64_t>(config.q_lora_rank, 0);
    config.num_key_value_heads = config.num_attention_heads;
    read_experts(reader, source, config);
  } else {
    config.head_dim = config.hidden_size / config.num_attention_heads;
    if (!reader.find("head_dim") && config.hidden_size % config.num_attention_heads != 0) {
      fail("{}: hidden_size {} is not a multiple of num_attention_heads {}, and head_dim is missing", source,
           config.hidden_size, config.num_attention_heads);
    }
    reader.read("head_dim", config.head_dim);
    config.rope.interleaved = false;
    bool mlp_bias = false;
    reader.read("mlp_bias", mlp_bias);
    if (mlp_bias) fail("{}: mlp_bias true is not supported", source);
  }
  std::string activation = "silu";
  reader.read("hidden_act", activation);
  if (activation != "silu") fail("{}: hidden_act {} is not supported (silu)", source, printable(activation));
  reader.read("rms_norm_eps", config.rms_norm_eps);
  reader.read("initializer_range", config.initializer_range);
  reader.read("attention_bias", config.attention_bias);
  reader.read("tie_word_embeddings", config.tie_word_embeddings);
  reader.read("max_position_embeddings", config.max_position_embeddings);
  reader.read("num_mtp_layers", config.num_mtp_layers);
  reader.read("num_nextn_predict_layers", config.num_mtp_layers);
  reader.read("bos_token_id", config.bos_token_id);
  reader.read("pad_token_id", config.pad_token_id);
  reader.read_list("eos_token_id", config.eos_token_ids);
  read_rope(reader, source, config);
  if (const Json* quantization = reader.find("quantization_config")) {
    Reader inner(*quantization, source + ": quantization_config");
    std::string method;
    inner.read("quant_method", method);
    if (method == "latente") {
      read_converted(inner, source, config);
    } else {
      if (method != "fp8")
        fail("{}: quant_method {} is not supported (fp8, latente)", source, printable(method));
      config.weight_block_size = {128, 128};
      inner.read_list("weight_block_size", config.weight_block_size);
      if (config.weight_block_size.size() != 2) fail("{}: weight_block_size: expected two sizes", source);
    }
  }
  config.validate(source);
  return config;
}

Config Config::from_file(const std::string& path) {
  constexpr int64_t most_bytes = 16 << 20;
  Json json = parse_json(read_file(path, most_bytes), path);
  return from_json(json, path);
}

void Config::validate(const std::string& source) const {
  auto check = [&](bool good, std::string_view message) {
    if (!good) fail("{}: {}", source, message);
  };
  constexpr int64_t limit = int64_t{1} << 31;
  check(vocab_size > 0 && vocab_size < limit && hidden_size > 0 && hidden_size < limit &&
            intermediate_size > 0 && intermediate_size < limit,
        "sizes must be positive and below 2^31");
  check(num_hidden_layers > 0 && num_hidden_layers <= 10000, "num_hidden_layers must be 1 to 10000");
  check(num_attention_heads > 0 && num_attention_heads <= 65536, "num_attention_heads must be 1 to 65536");
  check(num_key_value_heads > 0 && num_attention_heads % num_key_value_heads == 0,
        "num_attention_heads must be a multiple of num_key_value_heads");
  check(rope_dim() > 0 && rope_dim() % 2 == 0, "the rotary dimension must be positive and even");
  check(qk_head_dim() < (1 << 16) && v_head_dim < (1 << 16) && kv_lora_rank < (1 << 20) &&
            q_lora_rank < (1 << 20),
        "head dimensions or ranks are out of range");
  check(max_position_embeddings > 0, "max_position_embeddings must be positive");
  check(rms_norm_eps >= 0, "rms_norm_eps must not be negative");
  check(num_mtp_layers >= 0 && num_mtp_layers <= 64, "num_nextn_predict_layers must be 0 to 64");
  check(num_mtp_layers == 0 || is_mla(),
        "num_nextn_predict_layers needs model_type deepseek_v3 or deepseek_v2");
  for (int64_t id : eos_token_ids)
    check(id >= -1 && id < vocab_size, "eos_token_id lies outside the vocabulary");
  for (int64_t size : weight_block_size) check(size > 0, "weight_block_size must be positive");
  if (n_routed_experts == 0) return;
  check(n_routed_experts > 0 && n_routed_experts <= 65536, "n_routed_experts must be 0 to 65536");
  check(num_experts_per_tok > 0 && num_experts_per_tok <= n_routed_experts,
        "num_experts_per_tok must be between 1 and n_routed_experts");
  check(moe_intermediate_size > 0 && moe_intermediate_size < limit, "moe_intermediate_size must be positive");
  check(moe_layer_freq > 0, "moe_layer_freq must be positive");
  check(first_k_dense_replace >= 0, "first_k_dense_replace must not be negative");
  check(topk_method == "noaux_tc" || topk_method == "greedy" || topk_method == "group_limited_greedy",
        "topk_method must be noaux_tc, greedy or group_limited_greedy");
  check(scoring_func == "sigmoid" || scoring_func == "softmax", "scoring_func must be sigmoid or softmax");
  if (topk_method == "greedy") return;
  check(n_group > 0 && n_routed_experts % n_group == 0, "n_routed_experts must be a multiple of n_group");
  check(topk_group > 0 && topk_group <= n_group, "topk_group must be between 1 and n_group");
  if (routing().group_score == GroupScore::none) return;
  check(topk_method != "noaux_tc" || n_routed_experts / n_group >= 2, "a group needs at least two experts");
  check(num_experts_per_tok <= topk_group * (n_routed_experts / n_group),
        "num_experts_per_tok exceeds the experts of topk_group groups");
}

bool Config::is_moe_layer(int64_t layer) const {
  if (n_routed_experts == 0) return false;
  // MTP modules are MoE layers (report, section 2.2), whatever the pattern below them.
  return layer >= num_hidden_layers || (layer >= first_k_dense_replace && layer % moe_layer_freq == 0);
}

double Config::softmax_scale() const {
  double scale = 1.0 / std::sqrt(static_cast<double>(qk_head_dim()));
  if (is_mla() && rope.type == "yarn" && rope.mscale_all_dim != 0) {
    double mscale = yarn_mscale(rope.factor, rope.mscale_all_dim);
    scale *= mscale * mscale;
  }
  return scale;
}

Routing Config::routing() const {
  Routing routing;
  routing.top_k = static_cast<int>(num_experts_per_tok);
  routing.score = scoring_func == "softmax" ? GateScore::softmax : GateScore::sigmoid;
  routing.groups = static_cast<int>(n_group);
  routing.top_groups = static_cast<int>(topk_group);
  bool limited = n_group > 1 && topk_group < n_group;
  if (limited && topk_method == "noaux_tc") routing.group_score = GroupScore::top2_sum;
  if (limited && topk_method == "group_limited_greedy") routing.group_score = GroupScore::max;
  routing.normalise = norm_topk_prob;
  routing.scale = routed_scaling_factor;
  return routing;
}

Json Config::to_json(DType weights) const {
  Json json;
  bool v3 = model_type == "deepseek_v3";
  json["model_type"] = model_type;
  json["architectures"] = {v3         ? "DeepseekV3ForCausalLM"
                           : is_mla() ? "DeepseekV2ForCausalLM"
                                      : "LlamaForCausalLM"};
  json["vocab_size"] = vocab_size;
  json["hidden_size"] = hidden_size;
  json["intermediate_size"] = intermediate_size;
  json["num_hidden_layers"] = num_hidden_layers;
  json["num_attention_heads"] = num_attention_heads;
  json["num_key_value_heads"] = num_key_value_heads;
  if (is_mla()) {
    json["q_lora_rank"] = q_lora_rank > 0 ? Json(q_lora_rank) : Json(nullptr);
    json["kv_lora_rank"] = kv_lora_rank;
    json["qk_nope_head_dim"] = qk_nope_head_dim;
    json["qk_rope_head_dim"] = qk_rope_head_dim;
    json["v_head_dim"] = v_head_dim;
    json["rope_interleave"] = rope.interleaved;
    json["num_nextn_predict_layers"] = num_mtp_layers;
    json["n_routed_experts"] = n_routed_experts;
    json["n_shared_experts"] = n_shared_experts;
    json["num_experts_per_tok"] = num_experts_per_tok;
    json["moe_intermediate_size"] = moe_intermediate_size;
    json["first_k_dense_replace"] = n_routed_experts > 0 ? first_k_dense_replace : num_hidden_layers;
    json["moe_layer_freq"] = moe_layer_freq;
    json["n_group"] = n_group;
    json["topk_group"] = topk_group;
    json["topk_method"] = topk_method;
    json["scoring_func"] = scoring_func;
    json["norm_topk_prob"] = norm_topk_prob;
    json["routed_scaling_factor"] = routed_scaling_factor;
  } else {
    json["head_dim"] = head_dim;
  }
  json["hidden_act"] = "silu";
  json["rms_norm_eps"] = rms_norm_eps;
  json["initializer_range"] = initializer_range;
  json["attention_bias"] = attention_bias;
  json["tie_word_embeddings"] = tie_word_embeddings;
  json["max_position_embeddings"] = max_position_embeddings;
  json["rope_theta"] = rope.theta;
  if (rope.type != "default") {
    Json scaling = {{"type", rope.type},
                    {"rope_type", rope.type},
                    {"factor", rope.factor},
                    {"original_max_position_embeddings", rope.original_max_position_embeddings}};
    if (rope.type == "yarn") {
      scaling["beta_fast"] = rope.beta_fast;
      scaling["beta_slow"] = rope.beta_slow;
      if (rope.mscale != 0) scaling["mscale"] = rope.mscale;
      if (rope.mscale_all_dim != 0) scaling["mscale_all_dim"] = rope.mscale_all_dim;
      if (rope.attention_factor != 0) scaling["attention_factor"] = rope.attention_factor;
    } else if (rope.type == "llama3") {
      scaling["low_freq_factor"] = rope.low_freq_factor;
      scaling["high_freq_factor"] = rope.high_freq_factor;
    }
    json["rope_scaling"] = scaling;
  }
  if (bos_token_id >= 0) json["bos_token_id"] = bos_token_id;
  if (pad_token_id >= 0) json["pad_token_id"] = pad_token_id;
  if (eos_token_ids.size() == 1) json["eos_token_id"] = eos_token_ids[0];
  if (eos_token_ids.size() > 1) json["eos_token_id"] = eos_token_ids;
  json["torch_dtype"] = weights == DType::bf16 ? "bfloat16" : weights == DType::f16 ? "float16" : "float32";
  return json;
}

}  // namespace latente
