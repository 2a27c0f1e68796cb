// Small training runs: a corpus of made-up sentences, a tokenizer trained on it, a model of three layers, and
// a look into what a run saved.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "base/random.h"
#include "checkpoint/training_state.h"
#include "cpu/cpu_backend.h"
#include "model/weights.h"
#include "tokenizer/train_bpe.h"
#include "train/trainer.h"

namespace latente::test {

namespace fs = std::filesystem;

// The report of every step, by number; a stop after one of them.
struct Recorder : TrainObserver {
  std::map<int64_t, StepReport> steps;
  std::vector<ValidationReport> validations;
  std::vector<SampleReport> samples;
  std::vector<int64_t> saved;
  int64_t first_step = -1, stop_after = -1, last = -1;

  void on_start(int64_t step) override { first_step = last = step; }
  void on_step(const StepReport& report) override {
    last = report.step;
    EXPECT_TRUE(steps.emplace(report.step, report).second) << "step " << report.step << " was reported twice";
  }
  void on_validation(const ValidationReport& report) override { validations.push_back(report); }
  void on_sample(const SampleReport& report) override { samples.push_back(report); }
  void on_saved(int64_t step, const std::string&) override { saved.push_back(step); }
  bool stop() override { return stop_after >= 0 && last >= stop_after; }
};

inline std::string made_up_text(int documents) {
  Random random(7);
  auto one_of = [&](std::initializer_list<const char*> words) {
    return std::string(words.begin()[random.below(words.size())]);
  };
  std::string text;
  for (int d = 0; d < documents; ++d) {
    if (d > 0) text += "<|endoftext|>\n";
    for (uint64_t i = 2 + random.below(5); i > 0; --i) {
      text += "The " + one_of({"old", "small", "red", "quiet"}) + " " +
              one_of({"fox", "river", "house", "sailor"}) + " " + one_of({"watches", "finds", "follows"}) +
              " the " + one_of({"moon", "road", "lamp", "garden"}) + ".\n";
    }
  }
  return text;
}

inline nlohmann::json small_config() {
  return nlohmann::json::parse(R"({
    "model_type": "deepseek_v3", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 16, "q_lora_rank": 24,
    "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "n_routed_experts": 8, "n_shared_experts": 1,
    "num_experts_per_tok": 3, "moe_intermediate_size": 8, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": true, "routed_scaling_factor": 2.5,
    "max_position_embeddings": 128, "num_nextn_predict_layers": 1, "rope_theta": 10000.0})");
}

inline void write_text(const std::string& path, std::string_view text) { std::ofstream(path) << text; }

// A directory with everything a run reads, and room for runs; removed in the end.
class TrainerTest : public testing::Test {
 protected:
  TrainerTest() {
    std::string pattern = (fs::temp_directory_path() / "latente-train-XXXXXX").string();
    directory_ = ::mkdtemp(pattern.data());
    std::string text = made_up_text(60);
    write_text(at("text.txt"), text);
    write_text(at("config.json"), small_config().dump());
    BpeTrainOptions how;
    how.vocab_size = 300;
    how.threads = 1;
    for (const char* mark : {"<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"})
      how.special_tokens.emplace_back(mark);
    bool given = false;
    train_bpe([&](std::string& document) { return document = text, !std::exchange(given, true); }, how)
        .save(at("tokenizer"));
  }
  ~TrainerTest() override { fs::remove_all(directory_); }

  std::string at(const std::string& name) const { return directory_ + "/" + name; }

  // Six steps of eight sequences of 32 tokens; nothing but the last state is saved.
  TrainOptions options(const std::string& out) const {
    TrainOptions options;
    options.out = at(out);
    options.steps = 6;
    options.threads = 2;
    options.model.config = at("config.json");
    options.model.tokenizer = at("tokenizer");
    options.data.files = {at("text.txt")};
    options.data.validation_share = 0.1;
    options.data.cache = at("cache");
    options.batch.tokens = 256;
    options.batch.length = 32;
    options.batch.sequences = 8;
    options.schedule.kind = ScheduleKind::constant;
    options.schedule.lr = 3e-3;
    options.balance.bias_rate = 0.01;
    options.validation.every = 0;
    options.save.every = 0;
    return options;
  }

  static bool run(const TrainOptions& options, Recorder& recorder,
                  Trainer::Start how = Trainer::Start::fresh) {
    CpuBackend backend(options.threads);
    Trainer trainer(backend, options, recorder);
    trainer.start(how);
    return trainer.run();
  }
  static Recorder run(const TrainOptions& options, Trainer::Start how = Trainer::Start::fresh) {
    Recorder recorder;
    EXPECT_TRUE(run(options, recorder, how));
    return recorder;
  }
  // The message of the Error that ends a run.
  static std::string error_of(const TrainOptions& options, Trainer::Start how = Trainer::Start::fresh) {
    Recorder recorder;
    try {
      run(options, recorder, how);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  }

  std::string directory_;
};

// A saved state, the last one by default.
class Saved {
 public:
  explicit Saved(const TrainOptions& options) : Saved(*latest_good(options.out + "/checkpoints").directory) {}
  explicit Saved(const std::string& directory) : state_(directory), model_(state_.model_directory()) {}

  int64_t step() const { return state_.step(); }
  const std::string& directory() const { return state_.directory(); }
  // Of the model or, as "m.NAME", of the optimizer.
  std::vector<float> read(const std::string& name) const {
    bool of_model = model_.contains(name);
    Tensor tensor =
        buffer(of_model ? model_.entry(name).shape() : state_.tensors().at(name).shape(), DType::f32);
    if (of_model) {
      model_.read(name, tensor.view());
    } else {
      state_.tensors().read(name, tensor.view());
    }
    return {tensor.view().as<float>(), tensor.view().as<float>() + tensor.count()};
  }
  std::vector<std::string> optimizer_names(const std::string& prefix) const {
    std::vector<std::string> names;
    for (const SafetensorsEntry& entry : state_.tensors().entries()) {
      if (entry.name.starts_with(prefix)) names.push_back(entry.name);
    }
    return names;
  }
  std::vector<std::string> routing_biases() const {
    std::vector<std::string> names;
    for (const std::string& name : model_.names()) {
      if (name.ends_with("e_score_correction_bias")) names.push_back(name);
    }
    return names;
  }

 private:
  TrainingState state_;
  Checkpoint model_;
};

// Weights, routing biases, optimizer and position, to the last bit.
inline void expect_same_state(const Saved& a, const Saved& b) {
  EXPECT_EQ(a.step(), b.step());
  for (const char* name : {"model/model.safetensors", "model/config.json", "optimizer.safetensors"}) {
    EXPECT_EQ(read_file(a.directory() + "/" + name), read_file(b.directory() + "/" + name)) << name;
  }
  auto position = [](const Saved& saved) {
    auto json = nlohmann::json::parse(read_file(saved.directory() + "/state.json"));
    json.erase("options");
    return json;
  };
  EXPECT_EQ(position(a), position(b));
}

inline void expect_same_losses(const LossSums& a, const LossSums& b) {
  ASSERT_EQ(a.depths.size(), b.depths.size());
  for (size_t d = 0; d < a.depths.size(); ++d) {
    EXPECT_EQ(a.depths[d].nll, b.depths[d].nll);
    EXPECT_EQ(a.depths[d].targets, b.depths[d].targets);
  }
  EXPECT_EQ(a.balance, b.balance);
  EXPECT_EQ(a.bytes, b.bytes);
  EXPECT_EQ(a.agreed, b.agreed);
}

}  // namespace latente::test
