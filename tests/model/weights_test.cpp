#include "model/weights.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "checkpoint/support.h"
#include "model/support.h"

namespace latente {
namespace {

using test::Tiny;
using test::tiny_config;

Transformer made(const Tiny& tiny, DType type = DType::f32, uint64_t seed = 7) {
  Transformer model(tiny_config(tiny), type);
  test::randomise(model, seed);
  return model;
}

std::map<std::string, std::string> bits_of(Transformer& model) {
  std::map<std::string, std::string> bits;
  model.for_each([&](const std::string& path, Tensor& tensor) {
    bits[path] = bytes_of(tensor.view().data, static_cast<size_t>(tensor.view().bytes()));
  });
  return bits;
}

// Names what differs rather than print it.
void expect_same(Transformer& a, Transformer& b) {
  auto ours = bits_of(a), theirs = bits_of(b);
  EXPECT_EQ(ours.size(), theirs.size());
  for (const auto& [path, data] : ours) EXPECT_TRUE(data == theirs[path]) << path;
}

Transformer loaded(const std::string& directory, DType type, const LoadOptions& options = {}) {
  Checkpoint checkpoint(directory);
  Transformer model(load_config(checkpoint), type);
  load_parameters(model, checkpoint, options);
  return model;
}

struct RoundTrip {
  const char* name;
  Tiny tiny;
  DType type = DType::f32;
  int64_t shard = 5'000'000'000;
};
void PrintTo(const RoundTrip& how, std::ostream* out) { *out << how.name; }

class Weights : public testing::TestWithParam<RoundTrip> {};

TEST_P(Weights, SavedAndLoadedAreTheSameBits) {
  const RoundTrip& how = GetParam();
  Transformer model = made(how.tiny, how.type);
  TemporaryDirectory directory;
  std::string place = directory.at("model");
  save_model(model, place,
             {.weights = how.type, .max_shard_bytes = how.shard, .files = {{"note.txt", "kept"}}});
  bool sharded = std::filesystem::exists(place + "/model.safetensors.index.json");
  EXPECT_EQ(sharded, how.shard < 1'000'000);
  EXPECT_TRUE(std::filesystem::exists(place + "/note.txt"));

  Checkpoint checkpoint(place);
  EXPECT_EQ(stored_type(checkpoint), how.type);
  Transformer copied = loaded(place, how.type);
  expect_same(copied, model);
  EXPECT_EQ(copied.config().to_json(how.type), model.config().to_json(how.type));
  for (auto& [path, gate] : copied.gates()) EXPECT_TRUE(gate->load.has_storage()) << path;
  int64_t calls = 0, last = 0, total = 0;
  Transformer mapped =
      loaded(place, how.type, {.map_where_possible = true, .progress = [&](int64_t done, int64_t all) {
                                 ++calls, last = done, total = all;
                               }});
  expect_same(mapped, model);
  EXPECT_EQ(calls, last);
  EXPECT_GT(calls, 0);
  EXPECT_LE(last, total);

  // A second save over the first replaces it.
  Transformer other = made(how.tiny, how.type, 8);
  save_model(other, place, {.weights = how.type, .files = {}});
  Transformer again = loaded(place, how.type);
  expect_same(again, other);
}

INSTANTIATE_TEST_SUITE_P(
    All, Weights,
    testing::Values(RoundTrip{"f32", {}}, RoundTrip{"f64", {}, DType::f64},
                    RoundTrip{"bf16", {.mtp = 1}, DType::bf16},
                    RoundTrip{"sharded", {.mtp = 1}, DType::f32, 20'000},
                    RoundTrip{"bf16_sharded", {.mtp = 2, .tied = true}, DType::bf16, 9'000},
                    RoundTrip{"tied", {.tied = true}}, RoundTrip{"mtp2", {.mtp = 2}},
                    RoundTrip{"tied_mtp1", {.mtp = 1, .tied = true}},
                    RoundTrip{"no_query_compression", {.compressed = false, .bias = true}},
                    RoundTrip{"bf16_biased", {.bias = true}, DType::bf16},
                    RoundTrip{"v2", {.family = "deepseek_v2"}},
                    RoundTrip{"llama", {.family = "llama", .bias = true}}),
    [](const auto& one) { return std::string(one.param.name); });

TEST(Weights, RoutingBiasesStayFloat32) {
  Transformer model = made({});
  TemporaryDirectory directory;
  save_model(model, directory.at("m"), {.weights = DType::bf16, .files = {}});
  Checkpoint checkpoint(directory.at("m"));
  EXPECT_EQ(checkpoint.entry("model.layers.1.mlp.gate.e_score_correction_bias").dtype, DType::f32);
  EXPECT_EQ(checkpoint.entry("model.layers.1.mlp.gate.weight").dtype, DType::bf16);
  Transformer again = loaded(directory.at("m"), DType::bf16);
  const std::string path = "model.layers.1.mlp.gate.e_score_correction_bias";
  EXPECT_TRUE(bits_of(again).at(path) == bits_of(model).at(path));
}

TEST(Weights, AreStoredUnderTheReleasedNames) {
  Transformer model = made({.mtp = 1});
  std::map<std::string, Shape> names;
  for_each_stored(model, [&](const std::string& name, const View& view) {
    EXPECT_TRUE(names.emplace(name, view.shape).second) << name << " twice";
  });
  auto expect = [&](const std::string& name, Shape shape) {
    ASSERT_TRUE(names.contains(name)) << name;
    EXPECT_EQ(names.at(name), shape) << name;
  };
  expect("model.embed_tokens.weight", {64, 32});
  expect("model.norm.weight", {32});
  expect("lm_head.weight", {64, 32});
  expect("model.layers.0.mlp.gate_proj.weight", {40, 32});
  expect("model.layers.1.self_attn.q_a_proj.weight", {24, 32});
  expect("model.layers.1.self_attn.q_a_layernorm.weight", {24});
  expect("model.layers.1.self_attn.q_b_proj.weight", {4 * 20, 24});
  expect("model.layers.1.self_attn.kv_a_proj_with_mqa.weight", {24, 32});
  expect("model.layers.1.self_attn.kv_a_layernorm.weight", {16});
  expect("model.layers.1.self_attn.kv_b_proj.weight", {4 * 22, 16});
  expect("model.layers.1.self_attn.o_proj.weight", {32, 40});
  expect("model.layers.1.mlp.gate.weight", {8, 32});
  expect("model.layers.1.mlp.gate.e_score_correction_bias", {8});
  expect("model.layers.1.mlp.experts.7.down_proj.weight", {32, 8});
  expect("model.layers.1.mlp.shared_experts.up_proj.weight", {8, 32});
  expect("model.layers.1.post_attention_layernorm.weight", {32});
  for (const char* name : {"enorm.weight", "hnorm.weight", "shared_head.norm.weight"})
    expect(std::string("model.layers.2.") + name, {32});
  expect("model.layers.2.eh_proj.weight", {32, 64});
  expect("model.layers.2.embed_tokens.weight", {64, 32});
  expect("model.layers.2.shared_head.head.weight", {64, 32});
  expect("model.layers.2.mlp.experts.0.gate_proj.weight", {8, 32});
  EXPECT_FALSE(names.contains("model.layers.3.eh_proj.weight"));
}

// Writes the model's tensors after `change` had its way with them.
using Stored = std::map<std::string, std::pair<Shape, std::vector<float>>>;
void write_changed(const std::string& place, const Config& config, Transformer& model,
                   const std::function<void(Stored&)>& change) {
  Stored stored;
  for_each_stored(model, [&](const std::string& name, const View& view) {
    const float* data = view.as<float>();
    stored[name] = {view.shape, std::vector<float>(data, data + view.count())};
  });
  change(stored);
  std::vector<TensorSpec> specs;
  for (const auto& [name, tensor] : stored) specs.push_back({name, DType::f32, tensor.first});
  CheckpointWriter writer(place, specs);
  for (auto& [name, tensor] : stored)
    writer.write(name, View(tensor.second.data(), tensor.first, DType::f32));
  writer.write_file("config.json", config.to_json(DType::f32).dump());
  writer.commit();
}

std::string refusal(const Tiny& tiny, const std::function<void(Stored&)>& change) {
  TemporaryDirectory directory;
  Transformer model = made(tiny);
  write_changed(directory.at("m"), model.config(), model, change);
  return message_of([&] { loaded(directory.at("m"), DType::f32); });
}

TEST(Weights, RefuseWhatIsMissingSurplusOrMisshapen) {
  EXPECT_EQ(refusal({}, [](Stored&) {}), "no error");
  for (const char* name :
       {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
        "model.layers.0.input_layernorm.weight", "model.layers.1.self_attn.kv_b_proj.weight",
        "model.layers.1.mlp.experts.5.up_proj.weight", "model.layers.1.mlp.gate.e_score_correction_bias"}) {
    expect_has(refusal({}, [&](Stored& stored) { ASSERT_EQ(stored.erase(name), 1u); }), name);
  }
  for (const char* name :
       {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.experts.8.up_proj.weight",
        "model.extra", "model.layers.2.self_attn.o_proj.weight", "model.layers.20.input_layernorm.weight",
        "model.layers.1.self_attn.o_proj.bias", "model.layers.0.mlp.gate.weight"}) {
    std::string message = refusal({}, [&](Stored& stored) { stored[name] = {{2}, {1, 2}}; });
    expect_has(message, std::string("the model has no parameter ") + name);
    expect_has(message, "model.safetensors");
  }
  std::string message = refusal({}, [](Stored& stored) {
    stored["model.layers.1.mlp.experts.5.up_proj.weight"].first = {32, 8};
  });
  expect_has(message, "model.layers.1.mlp.experts.5.up_proj.weight: expected [8, 32], found [32, 8]");
  message = refusal({.family = "llama"}, [](Stored& stored) {
    stored["model.layers.1.self_attn.k_proj.weight"] = {{4, 32}, std::vector<float>(128)};
  });
  expect_has(message, "model.layers.1.self_attn.k_proj.weight: expected [16, 32], found [4, 32]");
}

TEST(Weights, IgnoreWhatOthersLeaveBehind) {
  EXPECT_EQ(refusal({},
                    [](Stored& s) {
                      s["model.layers.0.self_attn.rotary_emb.inv_freq"] = {{2}, {1, 2}};
                    }),
            "no error");
  EXPECT_EQ(refusal({.tied = true}, [](Stored& s) { s["lm_head.weight"] = s["model.embed_tokens.weight"]; }),
            "no error");
}

TEST(Weights, FollowTheModulesThatACheckpointReallyHolds) {
  TemporaryDirectory directory;
  Transformer model = made({.mtp = 2});
  auto drop = [](const std::string& prefix) {
    return [prefix](Stored& stored) {
      std::erase_if(stored, [&](const auto& item) { return item.first.starts_with(prefix); });
    };
  };
  // The config promises two, the checkpoint holds one, or none.
  write_changed(directory.at("one"), model.config(), model, drop("model.layers.3."));
  EXPECT_EQ(load_config(Checkpoint(directory.at("one"))).num_mtp_layers, 1);
  Transformer one = loaded(directory.at("one"), DType::f32);
  EXPECT_EQ(one.mtp.size(), 1u);
  write_changed(directory.at("none"), model.config(), model, [&](Stored& stored) {
    drop("model.layers.2.")(stored);
    drop("model.layers.3.")(stored);
  });
  EXPECT_EQ(loaded(directory.at("none"), DType::f32).mtp.size(), 0u);

  // A module that is there in part is an error.
  write_changed(directory.at("part"), model.config(), model, drop("model.layers.3.hnorm"));
  expect_has(message_of([&] { loaded(directory.at("part"), DType::f32); }), "model.layers.3.hnorm.weight");

  // Modules that the config does not ask for are left alone.
  Config fewer = model.config();
  fewer.num_mtp_layers = 0;
  write_changed(directory.at("more"), fewer, model, [](Stored&) {});
  Transformer without = loaded(directory.at("more"), DType::f32);
  EXPECT_EQ(without.mtp.size(), 0u);
  auto bits = bits_of(model);
  for (const auto& [path, data] : bits_of(without)) EXPECT_TRUE(data == bits.at(path)) << path;

  // Layers beyond a config that names too few are no modules.
  Config shallow = fewer;
  shallow.num_hidden_layers = 1;
  write_changed(directory.at("shallow"), shallow, model, [](Stored&) {});
  expect_has(message_of([&] { loaded(directory.at("shallow"), DType::f32); }),
             "the model has no parameter model.layers.1.");
}

TEST(Weights, InitialiseAsPublished) {
  Config config = tiny_config({.mtp = 1});
  config.initializer_range = 0.006;
  Transformer model(config, DType::f32), same(config, DType::f32), other(config, DType::f32);
  for (Transformer* each : {&model, &same, &other}) allocate_parameters(*each);
  initialise(model, 1), initialise(same, 1), initialise(other, 2);
  expect_same(model, same);
  EXPECT_FALSE(bits_of(model) == bits_of(other));
  std::map<std::string, int> first;
  model.for_each([&](const std::string& path, Tensor& tensor) {
    double sum = 0, squares = 0, count = static_cast<double>(tensor.count());
    for (int64_t i = 0; i < tensor.count(); ++i) {
      double x = tensor.view().as<float>()[i];
      sum += x, squares += x * x;
    }
    double mean = sum / count, deviation = std::sqrt(std::max(squares / count - mean * mean, 0.0));
    if (path.ends_with("norm.weight")) {
      EXPECT_EQ(mean, 1) << path;
      EXPECT_EQ(deviation, 0) << path;
    } else if (path.ends_with("bias")) {
      EXPECT_EQ(squares, 0) << path;
    } else {
      EXPECT_NEAR(mean, 0, 0.006 * 5 / std::sqrt(count)) << path;
      EXPECT_NEAR(deviation, 0.006, 0.006 * 4 / std::sqrt(count)) << path;
      EXPECT_EQ(first[bytes_of(tensor.view().data, 16)]++, 0) << path << " repeats another parameter";
    }
  });
}

}  // namespace
}  // namespace latente
