// llama.cpp's files against the checkpoints they were made of: by the Python package gguf
// (tests/reference/gguf, make_gguf.py) and by the tests' own writer.
#include "model/gguf.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <set>

#include "cpu/cpu_backend.h"
#include "model/gguf_writer.h"
#include "model/model_source.h"
#include "train/parity.h"

namespace latente {
namespace {

using test::comparable;
using test::expect_same_parameters;
using test::GgufLayout;

const std::string references = LATENTE_TEST_DATA "/reference/";

std::vector<std::string> written_in_python() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(references + "gguf")) {
    if (entry.path().extension() == ".gguf") names.push_back(entry.path().stem().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

// Those that llama.cpp has a form for: MLA with rotary rows in pairs.
std::vector<std::string> convertible_cases() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(references)) {
    if (!std::filesystem::exists(entry.path() / "config.json")) continue;
    Config config = Config::from_file((entry.path() / "config.json").string());
    if (config.is_mla() && config.rope.interleaved) names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::string test_name(const testing::TestParamInfo<std::string>& info) {
  std::string name = info.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

class WrittenInPython : public testing::TestWithParam<std::string> {};

TEST_P(WrittenInPython, ComputesWhatTransformersDoes) {
  ModelSource source = open_model(references + "gguf/" + GetParam() + ".gguf");
  Transformer model(source.config, DType::f32);
  load_parameters(model, *source.tensors);
  CpuBackend backend(1);
  SafetensorsFile reference(references + GetParam() + "/reference.safetensors");
  std::vector<ParityRow> rows = compare_with_reference(backend, model, reference);
  EXPECT_GT(rows.size(), 4u);
  for (const ParityRow& row : rows) EXPECT_TRUE(row.good()) << row.name << " is off by " << row.difference;
}

TEST_P(WrittenInPython, HoldsTheCheckpointToTheBit) {
  GgufCheckpoint file(references + "gguf/" + GetParam() + ".gguf");
  Checkpoint directory(references + GetParam());
  nlohmann::json expected = comparable(load_config(directory)), found = comparable(file.config());
  if (!file.file().find("tokenizer.ggml.model")) {
    for (const char* key : {"bos_token_id", "eos_token_id"}) expected.erase(key);
  }
  EXPECT_EQ(found, expected);
  expect_same_parameters(file, directory, file.config());
}

INSTANTIATE_TEST_SUITE_P(Cases, WrittenInPython, testing::ValuesIn(written_in_python()), test_name);
TEST(WrittenInPythonCases, AreThere) { EXPECT_EQ(written_in_python().size(), 2u); }

class Converted : public testing::TestWithParam<std::string> {};

TEST_P(Converted, EveryLayoutIsTheCheckpointToTheBit) {
  Checkpoint directory(references + GetParam());
  const Config config = load_config(directory);
  const GgufLayout layouts[] = {{},
                                {.split_latent = false, .whole_latent = true},
                                {.whole_latent = true},
                                {.folded = true},
                                {.fused = true},
                                {.trimmed = true}};
  for (const GgufLayout& layout : layouts) {
    TemporaryDirectory place;
    place.put("model.gguf", test::gguf_of(config, directory, layout).bytes());
    GgufCheckpoint file(place.at("model.gguf"));
    EXPECT_EQ(comparable(file.config()), comparable(config));
    expect_same_parameters(file, directory, config);
    // Shared with the main model, so that neither form need hold them.
    std::set<std::string> expected, found;
    for (const std::string& name : directory.names()) {
      if (!name.ends_with(".embed_tokens.weight") && !name.ends_with(".shared_head.head.weight"))
        expected.insert(name);
    }
    expected.insert("model.embed_tokens.weight");
    for (const std::string& name : file.names()) found.insert(name);
    EXPECT_EQ(found, expected);
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, Converted, testing::ValuesIn(convertible_cases()), test_name);
TEST(ConvertedCases, AreThere) { EXPECT_GE(convertible_cases().size(), 12u); }

// A model with one head, one expert and one shared expert: axes of one element everywhere.
TEST(Gguf, AxesOfOneElement) {
  Checkpoint reference(references + "v3");
  Config config = load_config(reference);
  config.num_attention_heads = config.num_key_value_heads = 1;
  config.n_routed_experts = config.num_experts_per_tok = config.n_group = config.topk_group = 1;
  config.num_hidden_layers = 2;
  TemporaryDirectory place;
  Transformer model(config, DType::f32);
  allocate_parameters(model);
  initialise(model, 3);
  save_model(model, place.at("m"), {});
  Checkpoint directory(place.at("m"));
  for (bool trimmed : {false, true}) {
    for (bool fused : {false, true}) {
      place.put("model.gguf", test::gguf_of(config, directory, {.fused = fused, .trimmed = trimmed}).bytes());
      GgufCheckpoint file(place.at("model.gguf"));
      EXPECT_EQ(comparable(file.config()), comparable(config));
      expect_same_parameters(file, directory, config);
    }
  }
}

TEST(Gguf, NamesGoBothWays) {
  for (const std::string& name : convertible_cases()) {
    Checkpoint directory(references + name);
    for (const std::string& parameter : directory.names()) {
      std::string gguf = gguf_name_of(parameter);
      ASSERT_FALSE(gguf.empty()) << parameter;
      std::string back = *name_of_gguf(gguf);
      if (is_expert_stack(back)) {
        EXPECT_TRUE(parameter.starts_with(back.substr(0, back.rfind('.') + 1))) << parameter;
      } else {
        EXPECT_EQ(back, parameter);
      }
    }
  }
  EXPECT_EQ(gguf_name_of("model.layers.3.mlp.experts.17.down_proj.weight"), "blk.3.ffn_down_exps.weight");
  EXPECT_EQ(gguf_name_of("model.layers.61.shared_head.norm.weight"), "blk.61.nextn.shared_head_norm.weight");
  for (const char* name : {"", "blk", "blk.", "blk.0", "blk.0.", "blk..attn_q.weight", "blk.x.attn_q.weight",
                           "blk.-1.attn_q.weight", "blk.01.attn_q.weight", "blk.123456.attn_q.weight",
                           "blk.0.attn_q", "blk.0.attn_q.weight.", "attn_q.weight", "model.norm.weight"}) {
    EXPECT_FALSE(name_of_gguf(name)) << name;
  }
  for (const char* name : {"", "model.layers.0", "model.layers.0.x", "model.layers.0.mlp.experts.1.x.weight"})
    EXPECT_EQ(gguf_name_of(name), "") << name;
}

}  // namespace
}  // namespace latente
