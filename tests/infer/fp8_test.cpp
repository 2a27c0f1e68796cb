// A model stored in FP8 with block scales runs as it is stored, near its values in float32 and with the same
// bits for any number of rows.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/file.h"
#include "checkpoint/support.h"
#include "infer/support.h"
#include "model/fp8_weights.h"
#include "model/run_weights.h"
#include "model/weights.h"

namespace latente {
namespace {

using namespace test;

bool in_fp8(const std::string& name) {
  return name.ends_with("_proj.weight") && !name.ends_with("kv_b_proj.weight") &&
         !name.ends_with("eh_proj.weight");
}

// Codes and scales of a matrix, a scale for each 128 rows and columns.
struct Blocks {
  explicit Blocks(const View& values) : rows(values[0]), columns(values[1]) {
    const int64_t across = (columns + 127) / 128;
    scales.resize(static_cast<size_t>((rows + 127) / 128 * across));
    const float* x = values.as<float>();
    const auto scale = [&](int64_t i) -> float& {
      return scales[static_cast<size_t>(i / columns / 128 * across + i % columns / 128)];
    };
    for (int64_t i = 0; i < rows * columns; ++i) scale(i) = std::max(scale(i), std::abs(x[i]) / 448);
    for (int64_t i = 0; i < rows * columns; ++i) codes.push_back(f8e4m3(x[i] / scale(i)));
  }
  int64_t rows, columns;
  std::vector<f8e4m3> codes;
  std::vector<float> scales;
};

void store(const std::string& original, const std::string& place) {
  const Checkpoint from(original);
  std::vector<TensorSpec> specs;
  std::map<std::string, Blocks> blocks;
  for (const std::string& name : from.names()) {
    const View stored = from.map(name)->view;
    if (!in_fp8(name)) {
      specs.push_back({name, stored.dtype, stored.shape});
      continue;
    }
    std::vector<float> values(static_cast<size_t>(stored.count()));
    const View view(values.data(), stored.shape, DType::f32);
    from.read(name, view);
    const Blocks& of = blocks.emplace(name, Blocks(view)).first->second;
    specs.push_back({name, DType::f8e4m3, stored.shape});
    specs.push_back({name + "_scale_inv", DType::f32, {(of.rows + 127) / 128, (of.columns + 127) / 128}});
  }
  CheckpointWriter writer(place, specs);
  for (TensorSpec& spec : specs) {
    const std::string name = spec.name;
    if (name.ends_with("_scale_inv")) {
      writer.write(name,
                   View(blocks.at(name.substr(0, name.size() - 10)).scales.data(), spec.shape, DType::f32));
    } else if (in_fp8(name)) {
      writer.write(name, View(blocks.at(name).codes.data(), spec.shape, DType::f8e4m3));
    } else {
      writer.write(name, from.map(name)->view);
    }
  }
  auto config = nlohmann::json::parse(read_file(original + "/config.json"));
  config["quantization_config"] = {{"quant_method", "fp8"}, {"weight_block_size", {128, 128}}};
  writer.write_file("config.json", config.dump());
  writer.commit();
}

TEST(Fp8Models, RunAsStored) {
  TemporaryDirectory place;
  const Tiny tiny{};
  Transformer model = made(tiny, 3);
  save_model(model, place.at("original"), {.weights = DType::bf16, .files = {}});
  store(place.at("original"), place.at("model"));
  const auto load = [&](const std::string& type) {
    RunWeights weights;
    weights.type = type;
    return load_for_running(open_model(place.at("model")), weights, backend());
  };
  const auto stored = load("auto"), wide = load("f32");
  EXPECT_NE(type_text(*stored).find("fp8"), std::string::npos);
  int64_t codes = 0, others = 0;
  stored->for_each([&](const std::string& path, const Tensor& tensor) {
    const bool experts = path.find("mlp.experts") != path.npos;
    (tensor.dtype() == DType::f8e4m3 ? codes : others) += experts ? tensor.count() : 0;
  });
  EXPECT_GT(codes, 0);
  EXPECT_EQ(others, 0);
  Random random(4);
  const std::vector<int32_t> ids = random_tokens(random, 30, model.config().vocab_size);
  const RunnerOptions how{.context = 64, .page_size = 16, .chunk = 32};
  SequenceRunner a(backend(), *stored, how), b(backend(), *wide, how), alone(backend(), *stored, how);
  const auto tokens = [&](size_t first, size_t count) { return std::span(ids).subspan(first, count); };
  for (const auto& [first, count] : {std::pair<size_t, size_t>{0, 20}, {20, 1}, {21, 3}, {24, 1}}) {
    const auto found = copy_of(a.forward(tokens(first, count), static_cast<int64_t>(first), 1));
    const auto near = copy_of(b.forward(tokens(first, count), static_cast<int64_t>(first), 1));
    ASSERT_EQ(found.size(), near.size());
    float largest = 0;
    for (float logit : near) largest = std::max(largest, std::abs(logit));
    for (size_t i = 0; i < near.size(); ++i) EXPECT_NEAR(found[i], near[i], 1e-5f * largest) << first;
    // A few tokens at once and one after another: the same bits.
    std::vector<float> same;
    if (first == 0) {
      same = copy_of(alone.forward(tokens(first, count), 0, 1));
    } else {
      for (size_t i = first; i < first + count; ++i)
        same = copy_of(alone.forward(tokens(i, 1), static_cast<int64_t>(i), 1));
    }
    EXPECT_EQ(found, same) << first;
  }
  EXPECT_NO_THROW(load("fp8"));
  RunWeights weights;
  weights.type = "fp8";
  EXPECT_THROW(load_for_running(open_model(place.at("original")), weights, backend()), Error);
}

// Of FP8 and of bfloat16: with none of the matrices laid out, some, and all.
TEST(Fp8Models, NothingDependsOnHowMuchIsLaidOut) {
  TemporaryDirectory place;
  Tiny tiny;
  tiny.mtp = 1;
  Transformer original = made(tiny, 3);
  save_model(original, place.at("bf16"), {.weights = DType::bf16, .files = {}});
  store(place.at("bf16"), place.at("fp8"));
  Random random(4);
  const std::vector<int32_t> ids = random_tokens(random, 30, original.config().vocab_size);
  for (const char* type : {"fp8", "bf16"}) {
    const ModelSource source = open_model(place.at(type));
    for (int threads : {1, 3}) {
      CpuBackend on(threads);
      const auto logits = [&](const Transformer& model) {
        SequenceRunner runner(on, model, {.context = 64, .page_size = 16, .chunk = 32});
        std::vector<std::vector<float>> rows;
        for (const auto& [first, count] : {std::pair<size_t, size_t>{0, 20}, {20, 1}, {21, 3}, {24, 1}})
          rows.push_back(
              copy_of(runner.forward(std::span(ids).subspan(first, count), static_cast<int64_t>(first), 1)));
        return rows;
      };
      // With drafts.
      const auto text = [&](const Transformer& model) {
        Engine engine(on, model, {.context = 64, .page_size = 16, .chunk = 32});
        GenerationOptions options;
        options.max_tokens = 20;
        return generated(engine, std::span(ids).first(20), options);
      };
      const auto copied = load_for_running(source, {.copied = true}, on);
      const auto want = logits(*copied);
      const Text want_text = text(*copied);
      const auto later = std::make_shared<BackgroundLayout>();
      Transformer model(source.config, DType::bf16);
      if (type == std::string("fp8")) {
        load_fp8(model, *source.tensors, on, later.get());
      } else {
        LoadOptions how;
        how.map_where_possible = how.without_experts = true;
        load_parameters(model, *source.tensors, how);
        pack_weights(model, on, *source.tensors, *later);
      }
      int64_t steps = 0;
      do {
        EXPECT_EQ(logits(model), want) << type << ", " << steps << " laid out";
        EXPECT_EQ(text(model), want_text) << type << ", " << steps << " laid out";
      } while (later->step() && ++steps);
      EXPECT_GT(steps, 10) << type;
      EXPECT_EQ(logits(*load_for_running(source, {}, on)), want) << type;
    }
  }
}

TEST(Fp8Models, AreMadeUpToMeasure) {
  RunWeights weights;
  weights.type = "fp8";
  const auto model = load_for_running({tiny_config(Tiny{}), nullptr}, weights, backend());
  EXPECT_NE(type_text(*model).find("fp8"), std::string::npos);
  const std::vector<int32_t> ids = {1, 2, 3};
  SequenceRunner runner(backend(), *model, {.context = 64, .page_size = 16, .chunk = 32});
  for (float logit : runner.forward(ids, 0, 1)) EXPECT_TRUE(std::isfinite(logit));
}

}  // namespace
}  // namespace latente
