// What a training run does to the model, and what reaches its steps.
#include <algorithm>
#include <cmath>

#include "infer/engine.h"
#include "train/trainer_support.h"

namespace latente::test {
namespace {

const std::string main_bias = "model.layers.1.mlp.gate.e_score_correction_bias";
const std::string mtp_bias = "model.layers.2.mlp.gate.e_score_correction_bias";

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) largest = std::max<double>(largest, std::abs(a[i] - b[i]));
  return largest;
}

double magnitude(const std::vector<float>& a) { return largest_difference(a, std::vector<float>(a.size())); }

std::vector<float> scaled(std::vector<float> values, double factor) {
  for (float& x : values) x = static_cast<float>(x * factor);
  return values;
}

TEST_F(TrainerTest, LossesFallAndTheValidationLossToo) {
  TrainOptions how = options("run");
  how.steps = 60;
  how.validation.every = 60;
  how.schedule.warmup_steps = 5;
  Recorder trained = run(how);
  ASSERT_EQ(trained.steps.size(), 60u);
  const LossSums &first = trained.steps.at(1).losses, &last = trained.steps.at(60).losses;
  // 300 of the 320 tokens exist.
  EXPECT_NEAR(first.depths[0].mean(), std::log(320.0), 0.05);
  EXPECT_NEAR(first.depths[1].mean(), std::log(320.0), 0.05);
  EXPECT_LT(last.depths[0].mean(), 2.5);
  EXPECT_LT(last.depths[1].mean(), 3.5);
  ASSERT_EQ(trained.validations.size(), 1u);
  EXPECT_LT(trained.validations[0].losses.depths[0].mean(), 2.5);
  EXPECT_GT(last.acceptance(), first.acceptance());
  EXPECT_GT(last.bits_per_byte(), 0);
  EXPECT_LT(last.bits_per_byte(), first.bits_per_byte());
}

TEST_F(TrainerTest, MicroBatchesOfAnySizeGiveTheSameGradients) {
  std::map<int64_t, Recorder> recorders;
  std::map<int64_t, std::unique_ptr<Saved>> states;
  for (int64_t sequences : {1, 2, 4}) {
    TrainOptions how = options("micro" + std::to_string(sequences));
    how.steps = 1;
    how.batch.tokens = 128;
    how.batch.sequences = sequences;
    how.batch.document_mask = true;  // target counts differ between sequences
    how.optimizer.clip = 0;
    how.balance.sequence_alpha = 0.1;
    recorders.emplace(sequences, run(how));
    states[sequences] = std::make_unique<Saved>(how);
  }
  const StepReport& whole = recorders.at(4).steps.at(1);
  EXPECT_GT(whole.losses.balance, 0.01);
  for (int64_t sequences : {1, 2}) {
    const StepReport& parts = recorders.at(sequences).steps.at(1);
    for (size_t d : {0u, 1u}) {
      EXPECT_EQ(parts.losses.depths[d].targets, whole.losses.depths[d].targets);
      EXPECT_NEAR(parts.losses.depths[d].mean(), whole.losses.depths[d].mean(), 1e-6);
    }
    EXPECT_NEAR(parts.losses.balance, whole.losses.balance, 1e-6);
    EXPECT_NEAR(parts.objective, whole.objective, 1e-6);
    EXPECT_NEAR(parts.gradient_norm / whole.gradient_norm, 1, 1e-5);
    // After one step m is the gradient times 1 - beta1.
    std::vector<std::string> names = states[4]->optimizer_names("m.");
    EXPECT_GT(names.size(), 30u);
    for (const std::string& name : names) {
      std::vector<float> want = states[4]->read(name);
      EXPECT_GT(magnitude(want), 0) << name;
      EXPECT_LT(largest_difference(states[sequences]->read(name), want), 1e-5 * magnitude(want) + 1e-9)
          << name;
    }
    for (const std::string& bias : states[4]->routing_biases()) {
      EXPECT_EQ(states[sequences]->read(bias), states[4]->read(bias));
    }
  }
}

TEST_F(TrainerTest, RoutingBiasesMoveByTheRateAndStandStillAfterwards) {
  TrainOptions how = options("run");
  how.steps = 4;
  how.balance.bias_until = 0.5;
  how.save.every = 1;
  how.save.keep = 10;
  run(how);
  auto after = [&](int step) { return Saved(how.out + "/checkpoints/step-00000" + std::to_string(step)); };
  for (const std::string& bias : {main_bias, mtp_bias}) {
    std::vector<float> first = after(1).read(bias), second = after(2).read(bias);
    EXPECT_EQ(first.size(), 8u);
    EXPECT_TRUE(std::any_of(first.begin(), first.end(), [](float b) { return b > 0; })) << bias;
    EXPECT_TRUE(std::any_of(first.begin(), first.end(), [](float b) { return b < 0; })) << bias;
    for (float b : first) EXPECT_TRUE(b == 0 || std::abs(std::abs(b) - 0.01) < 1e-7) << b;
    EXPECT_NEAR(largest_difference(first, second), 0.01, 1e-7);
    EXPECT_EQ(after(3).read(bias), second);
    EXPECT_EQ(after(4).read(bias), second);
  }
  EXPECT_NE(after(2).read(main_bias), after(2).read(mtp_bias));
}

TEST_F(TrainerTest, BiasesBalanceTheLoad) {
  auto violation = [&](const std::string& name, double rate) {
    TrainOptions how = options(name);
    how.steps = 60;
    how.balance.bias_rate = rate;
    how.balance.sequence_alpha = 0;
    Recorder trained = run(how);
    double sum = 0;
    for (int64_t step = 41; step <= 60; ++step) {
      const StepReport& report = trained.steps.at(step);
      EXPECT_EQ(report.routers, 2);
      EXPECT_GT(report.load_entropy, 0.2);
      EXPECT_LE(report.load_entropy, 1);
      sum += report.max_violation;
    }
    return sum / 20;
  };
  double without = violation("without", 0), with = violation("with", 0.01);
  EXPECT_LT(with, 0.8 * without);
}

TEST_F(TrainerTest, AuxiliaryLossesReachTheRouters) {
  // Gradients of the first step with and without a loss: only what lies before a router can change.
  auto state = [&](const std::string& name, auto change) {
    TrainOptions how = options(name);
    how.steps = 1;
    how.optimizer.clip = 0;
    how.balance.sequence_alpha = 0;
    how.balance.devices = 4;
    how.balance.devices_per_token = 2;
    change(how.balance);
    Recorder recorder = run(how);
    return std::pair(recorder.steps.at(1).losses.balance, Saved(how));
  };
  auto none = state("none", [](BalanceOptions&) {});
  EXPECT_EQ(none.first, 0);
  std::map<std::string, double> losses;
  auto expect_effect = [&](const std::string& name, auto change) {
    auto with = state(name, change);
    losses[name] = with.first;
    for (const char* gate : {"m.model.layers.1.mlp.gate.weight", "m.model.layers.2.mlp.gate.weight"}) {
      EXPECT_GT(largest_difference(with.second.read(gate), none.second.read(gate)), 1e-6)
          << name << ", " << gate;
    }
    EXPECT_EQ(with.second.read("m.lm_head.weight"), none.second.read("m.lm_head.weight"));
  };
  expect_effect("sequence", [](BalanceOptions& b) { b.sequence_alpha = 1; });
  expect_effect("expert", [](BalanceOptions& b) { b.expert_alpha = 1; });
  expect_effect("device", [](BalanceOptions& b) { b.device_alpha = 1; });
  expect_effect("communication", [](BalanceOptions& b) { b.communication_alpha = 1; });
  // Each is about 1 a router when the load is even; uneven loads of single sequences weigh more.
  for (auto [name, loss] : losses) EXPECT_NEAR(loss, 2, 0.5) << name;
  EXPECT_GT(losses["sequence"], losses["expert"]);
  EXPECT_NE(losses["device"], losses["communication"]);
}

TEST_F(TrainerTest, ValidationChangesNothing) {
  TrainOptions without = options("without"), with = options("with");
  without.data.files = with.data.files;
  with.validation.every = 1;
  with.validation.batches = 0;
  Recorder trained = run(with);
  run(without);
  EXPECT_EQ(trained.validations.size(), 6u);
  expect_same_state(Saved(with), Saved(without));
  // The whole set: every token but the first is a target.
  CpuBackend backend(1);
  Recorder unused;
  Trainer trainer(backend, with, unused, Trainer::Purpose::facts);
  EXPECT_EQ(trained.validations[0].losses.depths[0].targets, trainer.facts().validation_tokens - 1);
  EXPECT_EQ(trained.validations[0].losses.balance, 0);
  EXPECT_LT(trained.validations[5].losses.depths[0].mean(), trained.validations[0].losses.depths[0].mean());
}

TEST_F(TrainerTest, LambdaWeighsTheModulesAndChangesInTime) {
  auto gradients = [&](const std::string& name, double lambda, int64_t steps) {
    TrainOptions how = options(name);
    how.steps = steps;
    how.optimizer.clip = 0;
    how.balance.sequence_alpha = 0;
    how.mtp = {.lambda = lambda, .lambda_after = 0, .change_at = 0.5};
    Recorder recorder = run(how);
    const StepReport& first = recorder.steps.at(1);
    EXPECT_NEAR(first.objective, first.losses.depths[0].mean() + lambda * first.losses.depths[1].mean(),
                1e-12);
    if (steps == 2) {
      EXPECT_EQ(recorder.steps.at(2).objective, recorder.steps.at(2).losses.depths[0].mean());
    }
    return Saved(how);
  };
  Saved none = gradients("none", 0, 1), some = gradients("some", 0.3, 1), twice = gradients("twice", 0.6, 1);
  Saved later = gradients("later", 0.3, 2);
  size_t own = 0;
  for (const std::string& name : some.optimizer_names("m.model.layers.2.")) {
    ++own;
    std::vector<float> gradient = some.read(name);
    EXPECT_EQ(magnitude(none.read(name)), 0) << name;
    EXPECT_GT(magnitude(gradient), 0) << name;
    EXPECT_LT(largest_difference(twice.read(name), scaled(gradient, 2)), 1e-5 * magnitude(gradient)) << name;
    // The second step adds nothing to m, which decays by beta1.
    EXPECT_LT(largest_difference(later.read(name), scaled(gradient, 0.9)), 1e-6 * magnitude(gradient))
        << name;
  }
  EXPECT_GT(own, 10u);
  // The shared embedding is moved by both.
  EXPECT_GT(
      largest_difference(none.read("m.model.embed_tokens.weight"), some.read("m.model.embed_tokens.weight")),
      0);
}

TEST_F(TrainerTest, ScheduleReachesTheStep) {
  auto moved = [&](const std::string& name, auto change) {
    TrainOptions how = options(name);
    how.steps = 4;
    how.save.every = 1;
    how.save.keep = 10;
    change(how.schedule);
    Recorder recorder;
    recorder.stop_after = 0;
    EXPECT_FALSE(run(how, recorder));
    recorder.stop_after = 1;
    EXPECT_FALSE(run(how, recorder, Trainer::Start::resume));
    EXPECT_DOUBLE_EQ(recorder.steps.at(1).learning_rate, learning_rate(how.schedule, 0, 4));
    std::vector<float> before = Saved(how.out + "/checkpoints/step-000000").read("lm_head.weight");
    std::vector<float> after = Saved(how.out + "/checkpoints/step-000001").read("lm_head.weight");
    for (size_t i = 0; i < before.size(); ++i) after[i] -= before[i];
    recorder.stop_after = -1;
    EXPECT_TRUE(run(how, recorder, Trainer::Start::resume));
    for (int64_t step = 2; step <= 4; ++step) {
      EXPECT_DOUBLE_EQ(recorder.steps.at(step).learning_rate, learning_rate(how.schedule, step - 1, 4));
    }
    return after;
  };
  std::vector<float> whole = moved("constant", [](ScheduleOptions&) {});
  std::vector<float> half =
      moved("warm", [](ScheduleOptions& s) { s.warmup_steps = 2, s.kind = ScheduleKind::wsd; });
  EXPECT_NEAR(magnitude(whole), 3e-3, 3e-4);
  EXPECT_LT(largest_difference(scaled(half, 2), whole), 1e-3 * magnitude(whole));
}

TEST_F(TrainerTest, ExportedModelIsTheTrainedOne) {
  for (const char* dtype : {"f32", "bf16"}) {
    TrainOptions how = options(std::string("run-") + dtype);
    how.model.dtype = dtype;
    how.samples.every = 6;
    how.samples.prompts = {"The old"};
    how.samples.tokens = 20;
    how.samples.temperature = 0;
    how.validation.batches = 0;
    Recorder trained = run(how);
    ASSERT_EQ(trained.validations.size(), 1u);
    ASSERT_EQ(trained.samples.size(), 1u);
    Saved last(how);
    EXPECT_EQ(read_file(how.out + "/model/model.safetensors"),
              read_file(last.directory() + "/model/model.safetensors"));

    // Trained on for no steps: its validation loss is that of the same logits.
    TrainOptions again = options(std::string("again-") + dtype);
    again.model.config.clear();
    again.model.from = how.out + "/model";
    again.model.tokenizer.clear();
    again.model.dtype = dtype;
    again.schedule.lr = 0;
    again.optimizer.weight_decay = 0;
    again.balance.bias_rate = 0;
    again.steps = 1;
    again.validation.batches = 0;
    Recorder loaded = run(again);
    expect_same_losses(loaded.validations.at(0).losses, trained.validations[0].losses);

    Checkpoint checkpoint(how.out + "/model");
    Config config = load_config(checkpoint);
    EXPECT_EQ(config.num_mtp_layers, 1);
    EXPECT_EQ(config.eos_token_ids, std::vector<int64_t>{0});
    Transformer model(config, dtype == std::string("bf16") ? DType::bf16 : DType::f32);
    load_parameters(model, checkpoint);
    Tokenizer tokenizer = Tokenizer::load(how.out + "/model");
    CpuBackend backend(2);
    Engine engine(backend, model, {.context = 64});
    GenerationOptions greedy;
    greedy.max_tokens = 20;
    greedy.sampling.temperature = 0;
    greedy.stop_tokens.assign(1, 0);
    std::vector<int32_t> written;
    engine.generate(tokenizer.encode("The old"), greedy, [&](GeneratedToken token) {
      written.push_back(token.id);
      return true;
    });
    EXPECT_EQ(tokenizer.decode(written, true), trained.samples[0].text);
  }
}

TEST_F(TrainerTest, LittleMemoryTakesTimeAndChangesNoBit) {
  TrainOptions how = options("whole");
  RunFacts whole;
  {
    CpuBackend backend(1);
    Recorder recorder;
    whole = Trainer(backend, how, recorder, Trainer::Purpose::facts).facts();
  }
  EXPECT_EQ(whole.recomputed_share, 0);
  Recorder ample = run(how);

  const auto gib = static_cast<double>(int64_t{1} << 30);
  how.out = at("tight");
  how.memory = static_cast<double>(whole.memory.total() - whole.memory.activations / 4) / gib;
  CpuBackend backend(how.threads);
  Recorder little;
  Trainer trainer(backend, how, little);
  EXPECT_LE(static_cast<double>(trainer.facts().memory.total()), how.memory * gib);
  EXPECT_GT(trainer.facts().recomputed_share, 0);
  EXPECT_LT(trainer.facts().recomputed_share, 1);
  trainer.start(Trainer::Start::fresh);
  EXPECT_TRUE(trainer.run());
  for (const auto& [step, report] : ample.steps) {
    EXPECT_EQ(little.steps.at(step).objective, report.objective) << step;
    EXPECT_EQ(little.steps.at(step).gradient_norm, report.gradient_norm) << step;
    EXPECT_EQ(little.steps.at(step).load_entropy, report.load_entropy) << step;
  }
  how.memory /= 1e3;
  how.out = at("tiny");
  EXPECT_NE(error_of(how).find("the run needs "), std::string::npos);
}

TEST_F(TrainerTest, ChoosesMicroBatchesThatFit) {
  TrainOptions how = options("run");
  how.batch.sequences = 0;
  CpuBackend backend(1);
  Recorder unused;
  Trainer trainer(backend, how, unused, Trainer::Purpose::facts);
  EXPECT_EQ(trainer.facts().sequences, 8);
  EXPECT_EQ(trainer.facts().accumulation, 1);
  EXPECT_EQ(trainer.options().batch.sequences, 8);
  how.batch.tokens = 32 * 768;
  Trainer large(backend, how, unused, Trainer::Purpose::facts);
  EXPECT_EQ(large.facts().sequences, 384);  // of at most 16384 tokens
  EXPECT_EQ(large.facts().accumulation, 2);
  EXPECT_FALSE(fs::exists(how.out));
}

}  // namespace
}  // namespace latente::test
