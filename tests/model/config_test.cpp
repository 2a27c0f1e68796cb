#include "model/config.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "model/figures.h"

namespace latente {
namespace {

using Json = nlohmann::json;

Json v3() {
  return Json::parse(R"({"model_type": "deepseek_v3", "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 40, "moe_intermediate_size": 8, "num_hidden_layers": 3, "num_nextn_predict_layers": 1,
    "num_attention_heads": 3, "num_key_value_heads": 3, "n_shared_experts": 1, "n_routed_experts": 8,
    "routed_scaling_factor": 2.5, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12, "v_head_dim": 10, "topk_method": "noaux_tc", "n_group": 4, "topk_group": 2,
    "num_experts_per_tok": 3, "first_k_dense_replace": 1, "rope_theta": 10000, "eos_token_id": [1, 5],
    "bos_token_id": 0, "max_position_embeddings": 256, "rope_scaling": {"type": "yarn", "factor": 4,
    "original_max_position_embeddings": 64, "mscale": 0.707, "mscale_all_dim": 1.0}})");
}

Json llama() {
  return Json::parse(R"({"model_type": "llama", "vocab_size": 64, "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "eos_token_id": 2, "max_position_embeddings": 512, "rope_scaling": {"rope_type":
    "llama3", "factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 4.5,
    "original_max_position_embeddings": 64}})");
}

Json with(Json json, const Json& changes) {
  json.merge_patch(changes);
  return json;
}

std::string message_of(const Json& json) {
  try {
    Config::from_json(json, "here/config.json");
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

// Everything a config says, as one text.
std::string text_of(const Config& c) {
  const RopeConfig& r = c.rope;
  return fmt::format(
      "{} {} {} {} | {} {} {} {} | {} {} | {} {} {} | {} {} {} {} | {} {} | {} {} {} {} {} {} | {} {} {} {} "
      "{} {} | "
      "{} {} {} {} {} {} {} {} {} {} {} {} | {} {} {}",
      c.model_type, c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers,
      c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.q_lora_rank, c.kv_lora_rank,
      c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.n_routed_experts, c.n_shared_experts,
      c.num_experts_per_tok, c.moe_intermediate_size, c.first_k_dense_replace, c.moe_layer_freq, c.n_group,
      c.topk_group, c.topk_method, c.scoring_func, c.norm_topk_prob, c.routed_scaling_factor, c.rms_norm_eps,
      c.initializer_range, c.attention_bias, c.tie_word_embeddings, c.max_position_embeddings,
      c.num_mtp_layers, r.theta, r.type, r.factor, r.original_max_position_embeddings, r.beta_fast,
      r.beta_slow, r.mscale, r.mscale_all_dim, r.attention_factor, r.low_freq_factor, r.high_freq_factor,
      r.interleaved, c.bos_token_id, c.pad_token_id, fmt::join(c.eos_token_ids, ","));
}

Config from(const Json& json) { return Config::from_json(json, "here/config.json"); }

TEST(Config, ReadsTheReleasedSpelling) {
  Config config = from(v3());
  EXPECT_TRUE(config.is_mla());
  EXPECT_EQ(config.qk_head_dim(), 20);
  EXPECT_EQ(config.rope_dim(), 8);
  EXPECT_EQ(config.num_mtp_layers, 1);
  EXPECT_EQ(config.rope.type, "yarn");
  EXPECT_EQ(config.rope.factor, 4);
  EXPECT_EQ(config.rope.theta, 10000);
  EXPECT_TRUE(config.rope.interleaved);
  EXPECT_EQ(config.eos_token_ids, (std::vector<int64_t>{1, 5}));
  EXPECT_FALSE(config.is_moe_layer(0));
  EXPECT_TRUE(config.is_moe_layer(1));
  EXPECT_TRUE(config.is_moe_layer(3));
  config = from(with(v3(), {{"moe_layer_freq", 2}}));
  EXPECT_FALSE(config.is_moe_layer(1));
  EXPECT_TRUE(config.is_moe_layer(2));
  EXPECT_TRUE(config.is_moe_layer(3));  // an MTP module
  config = from(with(v3(), {{"first_k_dense_replace", 5}}));
  EXPECT_FALSE(config.is_moe_layer(2));
  EXPECT_TRUE(config.is_moe_layer(3));
  EXPECT_FALSE(from(with(v3(), {{"n_routed_experts", 0}})).is_moe_layer(3));
}

TEST(Config, ReadsTheSpellingOfTransformersAlike) {
  Json released = v3(), other = v3();
  other["rope_parameters"] = other["rope_scaling"];
  other["rope_parameters"]["rope_theta"] = other["rope_theta"];
  other["rope_parameters"]["rope_type"] = "yarn";
  other["rope_parameters"].erase("type");
  other["num_mtp_layers"] = other["num_nextn_predict_layers"];
  for (const char* key : {"rope_scaling", "rope_theta", "num_nextn_predict_layers"}) other.erase(key);
  EXPECT_EQ(text_of(from(released)), text_of(from(other)));

  Json plain = with(v3(), {{"rope_scaling", nullptr}});
  Json empty = with(plain, {{"rope_theta", nullptr}});
  empty["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 10000.0}};
  EXPECT_EQ(text_of(from(plain)), text_of(from(empty)));
}

TEST(Config, DefaultsAreThoseOfTheFamily) {
  Json json = v3();
  for (const char* key : {"topk_method", "n_group", "topk_group", "num_nextn_predict_layers", "q_lora_rank"})
    json.erase(key);
  Config config = from(json);
  EXPECT_EQ(config.topk_method, "noaux_tc");
  EXPECT_EQ(config.scoring_func, "sigmoid");
  EXPECT_TRUE(config.norm_topk_prob);
  EXPECT_EQ(config.q_lora_rank, 0);
  json["model_type"] = "deepseek_v2";
  config = from(json);
  EXPECT_EQ(config.topk_method, "greedy");
  EXPECT_EQ(config.scoring_func, "softmax");
  EXPECT_FALSE(config.norm_topk_prob);
  EXPECT_EQ(config.routing().group_score, GroupScore::none);
  config = from(with(json, {{"topk_method", "group_limited_greedy"}, {"n_group", 4}, {"topk_group", 2}}));
  EXPECT_EQ(config.routing().group_score, GroupScore::max);
  EXPECT_EQ(config.routing().score, GateScore::softmax);

  Json gqa = llama();
  config = from(gqa);
  EXPECT_FALSE(config.is_mla());
  EXPECT_FALSE(config.rope.interleaved);
  EXPECT_EQ(config.head_dim, 6);
  gqa.erase("num_key_value_heads");
  EXPECT_EQ(from(gqa).num_key_value_heads, 4);
  EXPECT_EQ(from(with(gqa, {{"head_dim", 10}, {"hidden_size", 23}})).head_dim, 10);
}

TEST(Config, TakesTheSameModelUnderOtherNames) {
  for (const char* name : {"kimi_k2", "glm4_moe_lite"}) {
    EXPECT_EQ(text_of(from(with(v3(), {{"model_type", name}}))), text_of(from(v3()))) << name;
  }
  const Json types = {"dense", "dense", "sparse"};
  Json words = with(v3(), {{"mlp_layer_types", types}});
  words.erase("first_k_dense_replace");
  EXPECT_EQ(text_of(from(words)), text_of(from(with(v3(), {{"first_k_dense_replace", 2}}))));
  EXPECT_EQ(message_of(with(v3(), {{"mlp_layer_types", {"dense", "sparse"}}})),
            "here/config.json: mlp_layer_types: expected a word a layer, dense ones before sparse ones");
  for (const Json& wrong : {Json{"sparse", "dense", "sparse"}, Json{"dense", "sparse", 1}, Json("dense")})
    EXPECT_NE(message_of(with(v3(), {{"mlp_layer_types", wrong}})), "no error") << wrong;
  EXPECT_EQ(message_of(with(v3(), {{"partial_rotary_factor", 0.5}})),
            "here/config.json: partial_rotary_factor 0.5 is not supported (1)");
}

TEST(Config, ScalesTheSoftmaxAsDeployed) {
  EXPECT_DOUBLE_EQ(from(with(v3(), {{"rope_scaling", nullptr}})).softmax_scale(), 1 / std::sqrt(20.0));
  auto factor = [](const char* file) {
    Config config = Config::from_file(std::string(LATENTE_TEST_DATA "/../examples/configs/") + file);
    return config.softmax_scale() * std::sqrt(static_cast<double>(config.qk_head_dim()));
  };
  EXPECT_NEAR(factor("deepseek-v3.json"), 1.87385, 5e-6);
  EXPECT_NEAR(factor("deepseek-v2-lite.json"), 1.58963, 5e-6);
}

TEST(Config, SurvivesItsOwnJson) {
  std::vector<Json> all{v3(), llama()};
  all.push_back(with(v3(), {{"q_lora_rank", nullptr},
                            {"rope_interleave", false},
                            {"rope_scaling", nullptr},
                            {"attention_bias", true},
                            {"tie_word_embeddings", true},
                            {"norm_topk_prob", false},
                            {"initializer_range", 0.006},
                            {"pad_token_id", 3},
                            {"eos_token_id", 4},
                            {"n_shared_experts", 0}}));
  all.push_back(
      with(v3(), {{"rope_scaling", {{"attention_factor", 1.25}, {"beta_fast", 16}, {"beta_slow", 2}}}}));
  all.push_back(with(v3(), {{"model_type", "deepseek_v2"}, {"scoring_func", "softmax"}}));
  all.push_back(with(v3(), {{"n_routed_experts", 0}, {"first_k_dense_replace", 3}}));
  all.push_back(with(llama(), {{"head_dim", 10}, {"rope_scaling", {{"rope_type", "linear"}}}}));
  all.push_back(with(llama(), {{"rope_scaling", nullptr}, {"eos_token_id", nullptr}}));
  for (const Json& json : all) {
    Config config = from(json);
    for (DType type : {DType::f32, DType::bf16}) {
      Json written = config.to_json(type);
      EXPECT_EQ(written.at("torch_dtype"), type == DType::f32 ? "float32" : "bfloat16");
      std::string once = text_of(from(written));
      // Parameters of another type of RoPE are not spelled out.
      EXPECT_EQ(once, text_of(from(from(written).to_json(type))));
      EXPECT_EQ(from(written).to_json(type), written);
      if (config.rope.type != "linear") {
        EXPECT_EQ(once, text_of(config)) << written.dump(1);
      }
    }
  }
}

TEST(Config, RefusesWhatContradictsItself) {
  struct Case {
    Json changes;
    std::string part;
  };
  const std::vector<Case> cases{
      {{{"model_type", nullptr}}, "missing key model_type"},
      {{{"model_type", "gpt2"}}, "model_type \"gpt2\" is not supported"},
      {{{"model_type", 3}}, "model_type: expected a string, found 3"},
      {{{"vocab_size", nullptr}}, "missing key vocab_size"},
      {{{"vocab_size", 0}}, "vocab_size: expected a positive integer, found 0"},
      {{{"vocab_size", 64.5}}, "vocab_size: expected an integer, found 64.5"},
      {{{"vocab_size", "64"}}, "vocab_size: expected an integer"},
      {{{"vocab_size", int64_t{1} << 41}}, "vocab_size: out of range"},
      {{{"vocab_size", int64_t{1} << 32}}, "below 2^31"},
      {{{"hidden_size", -1}}, "hidden_size: expected a positive integer, found -1"},
      {{{"hidden_size", -2}}, "hidden_size: out of range"},
      {{{"intermediate_size", nullptr}}, "missing key intermediate_size"},
      {{{"num_hidden_layers", 0}}, "num_hidden_layers: expected a positive integer"},
      {{{"num_hidden_layers", 10001}}, "num_hidden_layers must be 1 to 10000"},
      {{{"num_attention_heads", 65537}}, "num_attention_heads must be 1 to 65536"},
      {{{"kv_lora_rank", nullptr}}, "missing key kv_lora_rank"},
      {{{"kv_lora_rank", 1 << 20}}, "out of range"},
      {{{"qk_nope_head_dim", 0}}, "qk_nope_head_dim"},
      {{{"qk_rope_head_dim", 7}}, "rotary dimension must be positive and even"},
      {{{"v_head_dim", 1 << 16}}, "out of range"},
      {{{"max_position_embeddings", 0}}, "max_position_embeddings must be positive"},
      {{{"rms_norm_eps", -1e-6}}, "rms_norm_eps must not be negative"},
      {{{"rms_norm_eps", "small"}}, "rms_norm_eps: expected a number"},
      {{{"tie_word_embeddings", 1}}, "tie_word_embeddings: expected true or false, found 1"},
      {{{"num_nextn_predict_layers", 65}}, "num_nextn_predict_layers must be 0 to 64"},
      {{{"num_nextn_predict_layers", -1}}, "num_nextn_predict_layers must be 0 to 64"},
      {{{"eos_token_id", 64}}, "eos_token_id lies outside the vocabulary"},
      {{{"eos_token_id", {1, "x"}}}, "eos_token_id: expected integers"},
      {{{"hidden_act", "gelu"}}, "hidden_act \"gelu\" is not supported"},
      {{{"n_routed_experts", -1}}, "n_routed_experts must be 0 to 65536"},
      {{{"n_routed_experts", 10}}, "n_routed_experts must be a multiple of n_group"},
      {{{"num_experts_per_tok", 0}}, "num_experts_per_tok must be between 1 and n_routed_experts"},
      {{{"num_experts_per_tok", 9}}, "num_experts_per_tok must be between 1 and n_routed_experts"},
      {{{"num_experts_per_tok", 5}}, "num_experts_per_tok exceeds the experts of topk_group groups"},
      {{{"moe_intermediate_size", nullptr}}, "moe_intermediate_size must be positive"},
      {{{"moe_layer_freq", 0}}, "moe_layer_freq must be positive"},
      {{{"first_k_dense_replace", -1}}, "first_k_dense_replace must not be negative"},
      {{{"topk_method", "best"}}, "topk_method must be noaux_tc, greedy or group_limited_greedy"},
      {{{"scoring_func", "tanh"}}, "scoring_func must be sigmoid or softmax"},
      {{{"n_group", 0}}, "n_routed_experts must be a multiple of n_group"},
      {{{"n_group", 3}}, "n_routed_experts must be a multiple of n_group"},
      {{{"topk_group", 0}}, "topk_group must be between 1 and n_group"},
      {{{"topk_group", 5}}, "topk_group must be between 1 and n_group"},
      {{{"n_group", 8}, {"num_experts_per_tok", 1}}, "a group needs at least two experts"},
      {{{"rope_theta", 0}}, "rope_theta must be positive"},
      {{{"rope_scaling", {{"factor", 0.5}}}}, "rope_scaling.factor at least 1"},
      {{{"rope_scaling", {{"type", "longrope"}}}}, "unknown type \"longrope\""},
      {{{"rope_scaling", {{"factor", "4"}}}}, "rope_scaling: factor: expected a number"},
      {{{"rope_scaling", 4}}, "rope_scaling: expected a JSON object"},
      {{{"quantization_config", {{"quant_method", "gptq"}}}}, "quant_method \"gptq\" is not supported"},
      {{{"quantization_config", {{"quant_method", "fp8"}, {"weight_block_size", {128}}}}},
       "expected two sizes"},
      {{{"quantization_config", {{"quant_method", "fp8"}, {"weight_block_size", {128, 0}}}}},
       "weight_block_size must be positive"},
  };
  EXPECT_EQ(message_of(v3()), "no error");
  for (const Case& one : cases) {
    std::string message = message_of(with(v3(), one.changes));
    EXPECT_NE(message.find(one.part), message.npos) << one.changes.dump() << " gave: " << message;
    EXPECT_TRUE(message.starts_with("here/config.json")) << message;
    EXPECT_EQ(message.find('\n'), message.npos) << message;
  }
  const std::vector<Case> gqa{
      {{{"num_key_value_heads", 3}}, "num_attention_heads must be a multiple of num_key_value_heads"},
      {{{"num_key_value_heads", 0}}, "num_attention_heads must be a multiple of num_key_value_heads"},
      {{{"num_attention_heads", 5}, {"num_key_value_heads", 1}}, "hidden_size 24 is not a multiple"},
      {{{"head_dim", 5}}, "rotary dimension must be positive and even"},
      {{{"head_dim", 0}}, "rotary dimension must be positive and even"},
      {{{"mlp_bias", true}}, "mlp_bias true is not supported"},
      {{{"num_nextn_predict_layers", 1}}, "num_nextn_predict_layers needs model_type"},
  };
  EXPECT_EQ(message_of(llama()), "no error");
  for (const Case& one : gqa) {
    std::string message = message_of(with(llama(), one.changes));
    EXPECT_NE(message.find(one.part), message.npos) << one.changes.dump() << " gave: " << message;
  }
  EXPECT_NE(message_of(Json::array()).find("expected a JSON object"), std::string::npos);
  EXPECT_THROW(Config::from_file("/nowhere/config.json"), Error);
  // Whatever a file holds, a message is one line.
  const Json hostile{{"model_type", "a\nb" + std::string(1000, 'M')}};
  EXPECT_EQ(message_of(hostile).find('\n'), std::string::npos);
  EXPECT_LT(message_of(hostile).size(), 400u);
}

TEST(Figures, OfTheReleasedModel) {
  Config config = Config::from_file(LATENTE_TEST_DATA "/../examples/configs/deepseek-v3.json");
  ParameterCount count = count_parameters(config);
  EXPECT_EQ(count.total, 671'026'419'200);
  EXPECT_EQ(count.active, 36'625'603'584);
  EXPECT_EQ(count.mtp_own, 11'610'068'224);
  EXPECT_EQ(count.mtp_with_shared, 13'463'426'304);
  int64_t parts = 0;
  for (const auto& part : count.parts) parts += part.total;
  EXPECT_EQ(parts, count.total);

  CacheFigures cache = cache_figures(config);
  EXPECT_EQ(cache.own, 61 * 576);
  EXPECT_EQ(2 * cache.own, 70'272);  // bytes in bfloat16
  EXPECT_EQ(cache.mha, 61 * 128 * 256);
  EXPECT_EQ(cache.gqa8, 61 * 8 * 256);
  EXPECT_EQ(cache.mqa, 61 * 256);
  EXPECT_EQ(Transformer(config, DType::bf16).cache_values_per_token(), 62 * 576);
  EXPECT_DOUBLE_EQ(decode_bytes(config, 1000, 1, 2), 36'625'603'584.0 + 70'272'000.0);
}

TEST(Figures, OfV2Lite) {
  Config config = Config::from_file(LATENTE_TEST_DATA "/../examples/configs/deepseek-v2-lite.json");
  ParameterCount count = count_parameters(config);
  EXPECT_EQ(count.total, 15'706'484'224);
  EXPECT_EQ(count.mtp_own, 0);
  EXPECT_EQ(count.mtp_with_shared, 0);
  CacheFigures cache = cache_figures(config);
  EXPECT_EQ(cache.own, 15'552);   // DeepSeek-V2, table 9: 15.6K
  EXPECT_EQ(cache.mha, 110'592);  // 110.6K
}

// Published sizes: 31B with the MTP module (GLM-4.7-Flash), 16B (Moonlight), 1T of which 32B are active (Kimi
// K2).
TEST(Figures, OfTheirHeirs) {
  const auto count = [](const char* name) {
    return count_parameters(
        Config::from_file(fmt::format("{}/../examples/configs/{}.json", LATENTE_TEST_DATA, name)));
  };
  const auto billions = [](int64_t parameters) { return static_cast<double>(parameters) / 1e9; };
  EXPECT_NEAR(billions(count("glm-4.7-flash").total), 30, 0.6);
  EXPECT_NEAR(billions(count("moonlight-16b-a3b").total), 16, 0.1);
  EXPECT_NEAR(billions(count("kimi-k2").total), 1026, 2);
  EXPECT_NEAR(billions(count("kimi-k2").active), 32, 1);
}

TEST(Figures, OfTinyModelsByHand) {
  // embedding, head 64 · 24 each; a layer: q 24·24, k and v 12·24, o 24·24, MLP 3 · 24 · 40, two norms; a
  // norm.
  Config config = from(llama());
  int64_t layer = 576 + 288 + 288 + 576 + 2880 + 48;
  ParameterCount count = count_parameters(config);
  EXPECT_EQ(count.total, 2 * 64 * 24 + 2 * layer + 24);
  EXPECT_EQ(count.active, 64 * 24 + 2 * layer + 24);
  EXPECT_EQ(cache_figures(config).own, 2 * 2 * 12);
  config.tie_word_embeddings = true;
  EXPECT_EQ(count_parameters(config).total, 64 * 24 + 2 * layer + 24);
  EXPECT_EQ(count_parameters(config).active, 64 * 24 + 2 * layer + 24);

  // A token of context costs 2 · heads · (key + value) operations a layer.
  config = from(llama());
  double active = static_cast<double>(count.active);
  EXPECT_DOUBLE_EQ(forward_flops(config, 10, false), 2 * active + 10 * 2 * 2 * 4 * (6 + 6));
  EXPECT_DOUBLE_EQ(training_flops(config, 20), 3 * forward_flops(config, 10, false));
  config = from(v3());
  active = static_cast<double>(count_parameters(config).active);
  EXPECT_DOUBLE_EQ(forward_flops(config, 10, false), 2 * active + 10 * 3 * 2 * 3 * (20 + 10));
  EXPECT_DOUBLE_EQ(forward_flops(config, 10, true), 2 * active + 10 * 3 * 2 * 3 * (16 + 8 + 16));
}

}  // namespace
}  // namespace latente
