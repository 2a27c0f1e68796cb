// Models whose experts are read from the disk when they are chosen: the same bits as from memory.
#include "model/experts_on_demand.h"

#include <gtest/gtest.h>

#include "checkpoint/support.h"
#include "infer/support.h"
#include "model/convert.h"
#include "model/run_weights.h"

namespace latente {
namespace {

using namespace test;

// Experts of several pages.
Config config_of(int64_t modules) {
  return Config::from_json({{"model_type", "deepseek_v3"},
                            {"vocab_size", 64},
                            {"hidden_size", 128},
                            {"intermediate_size", 96},
                            {"num_hidden_layers", 3},
                            {"num_attention_heads", 2},
                            {"max_position_embeddings", 512},
                            {"kv_lora_rank", 16},
                            {"q_lora_rank", 24},
                            {"qk_nope_head_dim", 12},
                            {"qk_rope_head_dim", 8},
                            {"v_head_dim", 10},
                            {"n_routed_experts", 16},
                            {"n_shared_experts", 1},
                            {"num_experts_per_tok", 3},
                            {"moe_intermediate_size", 96},
                            {"first_k_dense_replace", 1},
                            {"n_group", 4},
                            {"topk_group", 2},
                            {"num_nextn_predict_layers", modules}},
                           "test");
}

// Of everything, and of the routed experts.
std::pair<int64_t, int64_t> bytes_of(Transformer& model) {
  int64_t all = 0, experts = 0;
  const auto add = [&](const std::string& path, const Tensor& tensor) {
    const View view = tensor.view();
    const auto form = backend().quantised(view.shape, view.dtype, view.group);
    const int64_t bytes = form ? form->bytes : view.bytes();
    all += bytes;
    if (is_expert_stack(path)) experts += bytes;
  };
  model.for_each([&](const std::string& path, Tensor& tensor) { add(path, tensor); });
  return {all, experts};
}

struct Form {
  const char* name;
  DType stored;
  DType converted;  // q8, q4, or as stored
};

class ExpertsOnDemand : public testing::TestWithParam<Form> {
 protected:
  // The model's path.
  std::string written(int64_t modules, uint64_t seed) {
    Transformer model(config_of(modules), DType::f32);
    randomise(model, seed);
    SaveOptions how;
    how.weights = GetParam().stored;
    how.max_shard_bytes = 1'000'000;
    const std::string path = directory_.at(fmt::format("model{}", seed)), out = path + "-out";
    save_model(model, path, how);
    if (!is_quantised(GetParam().converted)) return path;
    ConvertOptions options;
    options.weights.type = GetParam().converted;
    options.weights.group = 32;
    convert_model(path, out, backend(), options);
    return out;
  }

  TemporaryDirectory directory_;
};

TEST_P(ExpertsOnDemand, TextAndLogitsAreThoseFromMemory) {
  for (uint64_t seed : {1, 2}) {
    const int64_t modules = seed == 1 ? 2 : 0;
    const std::string path = written(modules, seed);
    Random random(seed);
    const auto whole = load_for_running(open_model(path), {}, backend());
    ASSERT_EQ(residency_of(*whole), nullptr);
    const auto prompt = random_tokens(random, 40, 64);
    RunnerOptions how;
    how.context = 128;
    GenerationOptions options;
    options.max_tokens = 30;
    const Text want = plain(*whole, how, prompt, options);
    const auto logits = uncached(*whole, prompt);

    const auto [all, experts] = bytes_of(*whole);
    for (double share : {0.0, 0.5, 0.9}) {
      RunWeights weights;
      weights.memory = 1;
      const std::string message = message_of([&] { load_for_running(open_model(path), weights, backend()); });
      expect_has(message, "memory: expected at least ");
      expect_has(message, "every token reads");
      weights.memory = all - experts + static_cast<int64_t>(share * static_cast<double>(experts));
      if (share == 0) weights.memory += 3 * 3 * (128 * 96 * 4 + 2 * 4096);
      weights.memory = std::min(weights.memory, all - 1);
      for (int threads : {1, 3}) {
        CpuBackend several(threads);
        const auto model = load_for_running(open_model(path), weights, several);
        const Residency* residency = residency_of(*model);
        ASSERT_NE(residency, nullptr);
        Engine engine(several, *model, how);
        for (int64_t draft : {0, 2}) {
          options.draft = draft;
          EXPECT_EQ(generated(engine, prompt, options), want) << threads;
        }
        EXPECT_TRUE(uncached(*model, prompt) == logits);
        const Residency::Figures figures = residency->figures();
        EXPECT_LE(figures.resident, figures.budget);
        EXPECT_LE(figures.budget, weights.memory);
        EXPECT_GT(figures.bytes_read, 0);
        EXPECT_GT(figures.wanted, 0);
        if (share > 0.8) {
          EXPECT_GT(figures.found, 0);
        }
      }
    }
  }
}

TEST_P(ExpertsOnDemand, AFileCutOffWhileItRunsIsAnError) {
  const std::string path = written(0, 3);
  RunWeights weights;
  {
    const auto whole = load_for_running(open_model(path), {}, backend());
    weights.memory = bytes_of(*whole).first - 1;
  }
  const ModelSource source = open_model(path);
  const auto model = load_for_running(source, weights, backend());
  std::set<std::string> files;
  for (const std::string& name : source.tensors->names()) files.insert(source.tensors->file_of(name));
  for (const std::string& file : files) std::filesystem::resize_file(file, 4096);
  RunnerOptions how;
  how.context = 8;
  SequenceRunner runner(backend(), *model, how);
  const std::vector<int32_t> ids{1, 2, 3};
  expect_has(message_of([&] { runner.forward(ids, 0, 1); }), ".safetensors: expected ");
}

INSTANTIATE_TEST_SUITE_P(Forms, ExpertsOnDemand,
                         testing::Values(Form{"q8", DType::f32, DType::q8},
                                         Form{"q4", DType::bf16, DType::q4},
                                         Form{"bf16", DType::bf16, DType::bf16},
                                         Form{"f32", DType::f32, DType::f32}),
                         [](const auto& test) { return test.param.name; });

TEST(Memory, WeightsThatMustBeThereAsAWholeSaySo) {
  Transformer model(config_of(0), DType::f32);
  randomise(model, 1);
  const TemporaryDirectory directory;
  save_model(model, directory.at("model"), {});
  for (const char* type : {"int8", "bf16"}) {
    RunWeights weights;
    weights.type = type;
    weights.memory = 100'000;
    expect_has(message_of([&] { load_for_running(open_model(directory.at("model")), weights, backend()); }),
               "latente convert");
    weights.memory = int64_t{1} << 30;
    EXPECT_EQ(residency_of(*load_for_running(open_model(directory.at("model")), weights, backend())),
              nullptr);
  }
}

}  // namespace
}  // namespace latente
