// GGUF models that are changed, broken or in several files.
#include <gtest/gtest.h>

#include <filesystem>

#include "model/gguf.h"
#include "model/gguf_writer.h"
#include "model/model_source.h"

namespace latente {
namespace {

using test::comparable;
using test::expect_same_parameters;
using test::GgufLayout;

const std::string references = LATENTE_TEST_DATA "/reference/";

// A file of the tests' writer, changed by hand.
class Changed : public testing::Test {
 protected:
  Changed() : directory_(references + "v3-yarn"), config_(load_config(directory_)) {}

  // The model with these keys besides, or in place of its own.
  std::string message(const std::function<void(GgufBytes&)>& change) {
    GgufBytes file;
    change(file);
    GgufBytes all = test::gguf_of(config_, directory_);
    all.override_with(file);
    return message_of_bytes(all.bytes());
  }
  std::string message_of_bytes(const std::string& bytes) {
    place_.put("model.gguf", bytes);
    std::string text = message_of([&] {
      GgufCheckpoint file(place_.at("model.gguf"));
      Transformer model(file.config(), DType::f32);
      load_parameters(model, file);
    });
    // Without the directory.
    size_t at = text.find(place_.path() + "/");
    return at == text.npos ? text : text.erase(at, place_.path().size() + 1);
  }
  // The tensors by name, each to be written, changed or left out.
  std::string message_with(const std::function<bool(GgufBytes&, const std::string&, std::vector<int64_t>&,
                                                    std::vector<float>&)>& change) {
    GgufBytes file;
    test::write_keys(file, config_);
    const test::TensorSink sink = [&](const std::string& name, std::vector<int64_t> shape,
                                      const std::vector<float>& values) {
      std::vector<float> copy = values;
      if (change(file, name, shape, copy)) return;
      file.floats(name, std::vector<uint64_t>(shape.rbegin(), shape.rend()), copy);
    };
    GgufLayout layout;
    test::GgufTensors(config_, directory_, layout, sink).write();
    return message_of_bytes(file.bytes());
  }

  TemporaryDirectory place_;
  Checkpoint directory_;
  Config config_;
};

TEST_F(Changed, KeysThatMakeNoModelAreErrors) {
  struct Case {
    const char* key;
    std::function<void(GgufBytes&, const char*)> set;
    const char* message;
  };
  auto number = [](uint32_t value) {
    return [value](GgufBytes& file, const char* key) { file.set(key, value); };
  };
  auto real = [](float value) { return [value](GgufBytes& file, const char* key) { file.set(key, value); }; };
  auto text = [](const char* value) {
    return [value](GgufBytes& file, const char* key) { file.set(key, value); };
  };
  auto truth = [](bool value) { return [value](GgufBytes& file, const char* key) { file.set(key, value); }; };
  auto none = [](GgufBytes& file, const char* key) { file.leave_out(key); };
  const Case cases[] = {
      {"general.architecture", text("llama"),
       "model.gguf: general.architecture: expected deepseek2, found \"llama\""},
      {"general.architecture", number(1), "general.architecture: expected a string, found 1"},
      {"general.architecture", none, "no key general.architecture"},
      {"general.type", text("adapter"), "general.type: expected a model, found \"adapter\""},
      {"deepseek2.block_count", none, "model.gguf: no key deepseek2.block_count"},
      {"deepseek2.block_count", number(0), "deepseek2.block_count: expected at least 1, found 0"},
      {"deepseek2.block_count", text("2"), "deepseek2.block_count: expected an integer, found \"2\""},
      {"deepseek2.block_count", number(3),
       "no tensor blk.2.attn_norm.weight for model.layers.2.input_layernorm"},
      {"deepseek2.block_count", number(1), "the model has no parameter model.layers.1."},
      {"deepseek2.block_count", number(~0u),
       "deepseek2.block_count: expected 0 to 2147483647, found 4294967295"},
      {"deepseek2.block_count", number(1u << 30), "num_hidden_layers must be 1 to 10000"},
      {"deepseek2.nextn_predict_layers", number(2),
       "deepseek2.nextn_predict_layers: expected fewer than block_count"},
      {"deepseek2.vocab_size", number(63), "model.embed_tokens.weight: expected [63, 32], found [64, 32] in"},
      {"deepseek2.embedding_length", number(31), "(token_embd.weight)"},
      {"deepseek2.attention.head_count", number(4),
       "blk.0.attn_k_b.weight: expected [4, 16, 12], found [3, 16, 12]"},
      {"deepseek2.attention.head_count", none, "no key deepseek2.attention.head_count"},
      {"deepseek2.attention.kv_lora_rank", none, "no key deepseek2.attention.kv_lora_rank"},
      {"deepseek2.attention.q_lora_rank", none, "the model has no parameter model.layers.0.self_attn.q_a_"},
      {"deepseek2.attention.key_length_mla", number(32),
       "deepseek2.attention.key_length_mla: expected more than rope.dimension_count 32, found 32"},
      {"deepseek2.attention.key_length_mla", none, "found [3, 16, 12]"},
      {"deepseek2.attention.value_length_mla", none, "no key deepseek2.attention.value_length_mla"},
      {"deepseek2.attention.layer_norm_rms_epsilon", none,
       "no key deepseek2.attention.layer_norm_rms_epsilon"},
      {"deepseek2.attention.layer_norm_rms_epsilon", real(std::nanf("")),
       "expected a finite number, found nan"},
      {"deepseek2.attention.temperature_scale", real(0.1f), "temperature_scale: expected none, found 0.1"},
      {"deepseek2.attention.causal", truth(false), "deepseek2.attention.causal: expected true, found false"},
      {"deepseek2.rope.dimension_count", number(31),
       "model.gguf: the rotary dimension must be positive and even"},
      {"deepseek2.rope.freq_base", real(0), "deepseek2.rope.freq_base: expected a positive number, found 0"},
      {"deepseek2.rope.scaling.type", text("longrope"),
       "deepseek2.rope.scaling.type: expected none, linear or yarn, found \"longrope\""},
      {"deepseek2.rope.scaling.factor", real(0.5f),
       "deepseek2.rope.scaling.factor: expected at least 1, found 0.5"},
      {"deepseek2.rope.scaling.factor", real(INFINITY), "expected a finite number, found inf"},
      {"deepseek2.rope.scaling.yarn_ext_factor", real(0.5f), "yarn_ext_factor: expected 1, found 0.5"},
      {"deepseek2.rope.scaling.yarn_beta_fast", real(-1),
       "yarn_beta_fast: expected a positive number, found -1"},
      {"deepseek2.expert_gating_func", number(3),
       "deepseek2.expert_gating_func: expected 1 (softmax) or 2 (sigmoid), found 3"},
      {"deepseek2.expert_used_count", number(9),
       "num_experts_per_tok must be between 1 and n_routed_experts"},
      {"deepseek2.expert_count", number(16), "_exps.weight: expected a stack of 16 experts, found [8, "},
      {"deepseek2.expert_count", number(0), "expected a stack of 0 experts, found [8,"},
      {"deepseek2.expert_group_count", number(3), "n_routed_experts must be a multiple of n_group"},
      {"deepseek2.expert_feed_forward_length", none, "no key deepseek2.expert_feed_forward_length"},
      {"tokenizer.ggml.eos_token_id", number(64), "tokenizer.ggml.eos_token_id: expected 0 to 63, found 64"},
      {"split.no", number(1), "split.no: expected 0, of the first file, found 1"},
      {"split.count", number(0), "split.count: expected 1 to 99999, found 0"},
      {"split.count", number(2),
       "expected a name that ends in -00001-of-00002.gguf, as the first of 2 files has"},
  };
  EXPECT_EQ(message([](GgufBytes&) {}), "no error");
  for (const Case& each : cases) {
    SCOPED_TRACE(each.key);
    expect_has(message([&](GgufBytes& file) { each.set(file, each.key); }), each.message);
  }
}

TEST_F(Changed, KeysThatMayBeAbsentOrOtherwise) {
  auto config_with = [&](const std::function<void(GgufBytes&)>& change) {
    GgufBytes keys, all = test::gguf_of(config_, directory_);
    change(keys);
    all.override_with(keys);
    place_.put("model.gguf", all.bytes());
    return GgufCheckpoint(place_.at("model.gguf")).config();
  };
  EXPECT_EQ(config_with([](GgufBytes& file) { file.leave_out("deepseek2.vocab_size"); }).vocab_size, 64);
  Config plain = config_with([](GgufBytes& file) {
    file.leave_out("deepseek2.rope.scaling.type").leave_out("deepseek2.rope.scaling.factor");
    file.leave_out("deepseek2.rope.freq_base");
  });
  EXPECT_EQ(plain.rope.type, "default");
  EXPECT_EQ(plain.rope.theta, 10000);
  // llama.cpp: a factor alone is linear.
  EXPECT_EQ(config_with([](GgufBytes& file) { file.leave_out("deepseek2.rope.scaling.type"); }).rope.type,
            "linear");
  Config yarn = config_with([](GgufBytes& file) {
    file.set("deepseek2.rope.scaling.yarn_beta_fast", 16.f).set("deepseek2.rope.scaling.yarn_beta_slow", 2.f);
    file.set("deepseek2.rope.scaling.yarn_log_multiplier", 0.0707f);
  });
  EXPECT_EQ(yarn.rope.beta_fast, 16);
  EXPECT_EQ(yarn.rope.beta_slow, 2);
  EXPECT_NEAR(yarn.rope.mscale_all_dim, 0.707, 1e-15);  // not the float32's 0.70700002
  EXPECT_EQ(yarn.rope.mscale, yarn.rope.mscale_all_dim);
  // Files before groups of experts were known.
  Config no_groups = config_with([](GgufBytes& file) {
    file.leave_out("deepseek2.expert_group_count").leave_out("deepseek2.expert_group_used_count");
  });
  EXPECT_EQ(no_groups.n_group, 1);
  EXPECT_EQ(no_groups.routing().group_score, GroupScore::none);
  Config softmax = config_with([](GgufBytes& file) {
    file.leave_out("deepseek2.expert_gating_func").leave_out("deepseek2.expert_weights_norm");
    file.set("deepseek2.expert_weights_scale", 0.f);
  });
  EXPECT_EQ(softmax.scoring_func, "softmax");
  EXPECT_EQ(softmax.topk_method, "noaux_tc");  // it has a routing bias
  EXPECT_FALSE(softmax.norm_topk_prob);
  EXPECT_EQ(softmax.routed_scaling_factor, 1);
  Config ends = config_with([](GgufBytes& file) {
    file.set("tokenizer.ggml.eos_token_id", 3u).set("tokenizer.ggml.eot_token_id", 5u);
    file.set("tokenizer.ggml.eom_token_id", 3u).set("tokenizer.ggml.bos_token_id", ~0u);
  });
  EXPECT_EQ(ends.eos_token_ids, (std::vector<int64_t>{3, 5}));
  EXPECT_EQ(ends.bos_token_id, -1);
}

TEST_F(Changed, TensorsThatMakeNoModelAreErrors) {
  using Extents = std::vector<int64_t>;
  using Floats = std::vector<float>;
  auto without = [&](const std::string& left_out) {
    return message_with(
        [&](GgufBytes&, const std::string& name, Extents&, Floats&) { return name == left_out; });
  };
  auto instead = [&](const std::string& changed,
                     const std::function<void(GgufBytes&, const std::string&)>& write) {
    return message_with([&](GgufBytes& file, const std::string& name, Extents&, Floats&) {
      if (name != changed) return false;
      write(file, name);
      return true;
    });
  };
  EXPECT_EQ(without(""), "no error");
  expect_has(without("token_embd.weight"), "model.gguf: no tensor token_embd.weight");
  expect_has(without("output_norm.weight"), "model.gguf: no tensor output_norm.weight for model.norm.weight");
  expect_has(without("blk.1.attn_k_b.weight"),
             "model.gguf: no tensor blk.1.attn_k_b.weight beside blk.1.attn_v_b.weight");
  expect_has(without("blk.1.attn_v_b.weight"),
             "model.gguf: no tensor blk.1.attn_v_b.weight beside blk.1.attn_k_b.weight");
  expect_has(
      without("blk.1.ffn_up_exps.weight"),
      "model.gguf: no tensor blk.1.ffn_up_exps.weight for model.layers.1.mlp.experts.0.up_proj.weight");
  expect_has(without("blk.1.exp_probs_b.bias"), "no error");  // then there is none in the model
  expect_has(instead("blk.0.attn_norm.weight",
                     [](GgufBytes& file, const std::string& name) {
                       file.tensor(name, {32}, 26, std::string(128, '\0'));
                     }),
             "model.gguf: blk.0.attn_norm.weight: cannot decode elements of type I32");
  expect_has(instead("blk.1.ffn_norm.weight",
                     [](GgufBytes& file, const std::string& name) { file.floats(name, {31}, Floats(31)); }),
             "model.layers.1.post_attention_layernorm.weight: expected [32], found [31] in");
  expect_has(instead("blk.1.attn_v_b.weight",
                     [](GgufBytes& file, const std::string& name) {
                       file.floats(name, {16, 9, 3}, Floats(432));
                     }),
             "blk.1.attn_v_b.weight: expected [3, 10, 16], found [3, 9, 16]");
  expect_has(instead("output_norm.weight",
                     [](GgufBytes& file, const std::string& name) { file.floats(name, {0}, {}); }),
             "model.gguf: tensor \"output_norm.weight\" is empty");
  expect_has(instead("output_norm.weight",
                     [](GgufBytes& file, const std::string& name) {
                       file.floats(name, {32}, Floats(32)).floats("rope_freqs.weight", {4}, Floats(4));
                     }),
             "tensor \"rope_freqs.weight\": the architecture deepseek2 has none of this name");
  expect_has(instead("output_norm.weight",
                     [](GgufBytes& file, const std::string& name) {
                       file.floats(name, {32}, Floats(32));
                       file.floats("blk.1.ffn_gate_up_exps.weight", {32, 16, 8}, Floats(4096));
                     }),
             ": holds model.layers.1.mlp.experts.0.gate_proj.weight, which another tensor holds too");
  expect_has(
      instead("output_norm.weight",
              [](GgufBytes& file, const std::string& name) {
                file.floats(name, {32}, Floats(32)).floats("blk.0.ffn_gate_inp.weight", {32, 8}, Floats(256));
              }),
      "model.gguf: the model has no parameter model.layers.0.mlp.gate.weight");
}

// Blocks are handed out as they lie, expert by expert, and read as decode() says.
TEST_F(Changed, BlocksAreFoundAndDecoded) {
  std::mt19937 generator = seeded();
  std::string stack;  // [8, 8, 32] in Q8_0
  for (int block = 0; block < 64; ++block) {
    f16 scale(std::normal_distribution<float>()(generator));
    stack += bytes_of(&scale, 2);
    for (int i = 0; i < 32; ++i) stack += static_cast<char>(generator());
  }
  std::string text =
      message_with([&](GgufBytes& file, const std::string& name, std::vector<int64_t>&, std::vector<float>&) {
        if (name == "blk.1.ffn_up_exps.weight") return file.tensor(name, {32, 8, 8}, 8, stack), true;
        return false;
      });
  ASSERT_EQ(text, "no error");
  GgufCheckpoint file(place_.at("model.gguf"));
  const std::string name = "model.layers.1.mlp.experts.5.up_proj.weight";
  MappedBlocks blocks = *file.blocks(name);
  EXPECT_EQ(blocks.type, GgmlType::q8_0);
  EXPECT_EQ(blocks.shape, (Shape{8, 32}));
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(blocks.bytes.data()), blocks.bytes.size()),
            stack.substr(5 * 8 * 34, 8 * 34));
  EXPECT_FALSE(file.map(name));
  EXPECT_FALSE(file.dtype_in_file(name));
  std::vector<float> decoded(256), wide(512, -7);
  decode(GgmlType::q8_0, blocks.bytes.data(), 256, decoded.data());
  std::vector<float> read(256);
  file.read(name, view_of(read, {8, 32}));
  EXPECT_EQ(read, decoded);
  View gaps(wide.data(), {8, 32}, DType::f32);
  gaps.strides = {64, 2};
  file.read(name, gaps);
  for (size_t i = 0; i < 256; ++i) {
    EXPECT_EQ(wide[i * 2], decoded[i]);
    EXPECT_EQ(wide[i * 2 + 1], -7);
  }
  std::vector<double> doubles(256);
  file.read(name, view_of(doubles, {8, 32}));
  EXPECT_EQ(doubles, std::vector<double>(decoded.begin(), decoded.end()));

  // In parts and transposed there are no blocks of the parameter; floats are mapped.
  EXPECT_FALSE(file.blocks("model.layers.0.self_attn.kv_b_proj.weight"));
  EXPECT_FALSE(file.map("model.layers.0.self_attn.kv_b_proj.weight"));
  std::optional<MappedTensor> norm = file.map("model.norm.weight");
  ASSERT_TRUE(norm);
  std::vector<float> same(32);
  directory_.read("model.norm.weight", view_of(same, {32}));
  EXPECT_EQ(std::memcmp(norm->view.data, same.data(), 128), 0);
  EXPECT_EQ(message_of([&] { file.read("x", view_of(same, {32})); }),
            file.file().path() + ": no tensor \"x\"");
}

TEST_F(Changed, SplitModels) {
  std::vector<GgufBytes> parts(3);
  test::write_keys(parts[0], config_);
  uint32_t tensors = 0;
  const test::TensorSink sink = [&](const std::string& name, std::vector<int64_t> shape,
                                    const std::vector<float>& values) {
    // None in the first, as with llama-gguf-split --no-tensor-first-split.
    parts[1 + tensors++ % 2].floats(name, std::vector<uint64_t>(shape.rbegin(), shape.rend()), values);
  };
  GgufLayout layout;
  test::GgufTensors(config_, directory_, layout, sink).write();
  auto write = [&](uint32_t count, uint32_t of_tensors) {
    for (uint32_t i = 0; i < 3; ++i) {
      GgufBytes part = parts[i];
      part.set("split.no", i).set("split.count", count).set("split.tensors.count", of_tensors);
      place_.put(fmt::format("m-{:05}-of-00003.gguf", i + 1), part.bytes());
    }
  };
  const std::string first = place_.at("m-00001-of-00003.gguf");
  write(3, tensors);
  GgufCheckpoint model(first);
  EXPECT_EQ(model.files().size(), 3u);
  expect_same_parameters(model, directory_, config_);

  auto message = [&](const std::string& path) { return message_of([&] { GgufCheckpoint file(path); }); };
  expect_has(message(place_.at("m-00002-of-00003.gguf")),
             "m-00002-of-00003.gguf: split.no: expected 0, of the first");
  write(3, tensors + 1);
  expect_has(message(first),
             fmt::format("split.tensors.count: expected the {} tensors of all 3 files", tensors));
  write(4, tensors);
  expect_has(message(first), "expected a name that ends in -00001-of-00004.gguf");
  write(3, tensors);
  std::filesystem::copy_file(place_.at("m-00002-of-00003.gguf"), place_.at("m-00003-of-00003.gguf"),
                             std::filesystem::copy_options::overwrite_existing);
  expect_has(message(first), "m-00003-of-00003.gguf: split.no: expected 2, found 1");
  std::filesystem::remove(place_.at("m-00003-of-00003.gguf"));
  expect_has(message(first), "m-00003-of-00003.gguf: ");
}

TEST_F(Changed, ModelsAreOpenedByPath) {
  EXPECT_TRUE(is_gguf(references + "gguf/v2-lite.gguf"));
  EXPECT_FALSE(is_gguf(references + "v3"));
  EXPECT_FALSE(is_gguf(references + "v3/config.json"));
  EXPECT_FALSE(is_gguf(references + "none.gguf"));
  place_.put("blob", test::gguf_of(config_, directory_).bytes());
  EXPECT_TRUE(is_gguf(place_.at("blob")));
  EXPECT_EQ(comparable(open_model(place_.at("blob")).config), comparable(config_));
  EXPECT_EQ(comparable(config_of_model(place_.at("blob"))), comparable(config_));
  EXPECT_EQ(comparable(config_of_model(references + "v3-yarn")), comparable(config_));
  EXPECT_EQ(comparable(config_of_model(references + "v3-yarn/config.json")), comparable(config_));
  EXPECT_EQ(stored_type(*open_model(references + "gguf/v3-bf16.gguf").tensors), DType::bf16);
  EXPECT_EQ(stored_type(*open_model(place_.at("blob")).tensors), DType::f32);
  expect_has(message_of([&] { open_model(place_.at("none")); }), "expected a checkpoint directory");
}

}  // namespace
}  // namespace latente
