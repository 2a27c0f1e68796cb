#include "train/objective.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "cpu/cpu_backend.h"
#include "model/weights.h"
#include "train/pass.h"

namespace latente {
namespace {

constexpr int64_t vocabulary = 11, sequences = 3, length = 6, modules = 2, places = sequences * length;

Config config_of() {
  return Config::from_json(nlohmann::json::parse(R"({
    "model_type": "deepseek_v3", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2,
    "v_head_dim": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 5, "first_k_dense_replace": 1, "initializer_range": 0.3,
    "num_nextn_predict_layers": 2})"),
                           "config");
}

// A float64 model, its objective recorded with gradients, and the gradients' memory.
struct Recorded {
  explicit Recorded(const ObjectiveOptions& how)
      : options(how), backend(1), model(config_of(), DType::f64), plan(backend, {.training = true}) {
    allocate_parameters(model);
    initialise(model, 5);
    rope = make_rope_table(backend, model.config(), 16);
    objective = record_objective(plan, model, rope, options);
    plan.backward(objective.losses());
    plan.compile();
    gradients = allocate_gradients(backend, model);
    plan.allocate();
  }
  static double value(const Tensor& tensor) { return tensor.view().as<double>()[0]; }
  double run() {
    plan.run();
    double sum = 0;
    for (const Tensor& loss : objective.losses()) sum += value(loss);
    return sum;
  }
  void zero_gradients() {
    for (const Tensor& gradient : gradients.gradients) backend.fill(gradient.view(), 0);
  }

  ObjectiveOptions options;
  CpuBackend backend;
  Transformer model;
  Tensor rope;
  Plan plan;
  Objective objective;
  GradientMemory gradients;
};

ObjectiveOptions plain() {
  ObjectiveOptions options;
  options.sequences = sequences;
  options.sequence_length = length;
  return options;
}

std::vector<int32_t> random_ids(uint64_t seed, int64_t count = places) {
  Random random(seed);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < count; ++i) ids.push_back(static_cast<int32_t>(random.below(vocabulary)));
  return ids;
}

TEST(Objective, FillsPlainSequences) {
  Recorded recorded(plain());
  Objective& o = recorded.objective;
  const std::vector<int32_t> ids = random_ids(1);
  const std::vector<int64_t> held = {6, 4, 1};
  for (bool cut : {false, true}) {
    fill_from_sequences(o, ids, plain(), cut ? held : std::vector<int64_t>{}, 0.3);
    // Targets of depth d: held - 1 - d a sequence, none below 0.
    const std::vector<double> counts = cut ? std::vector<double>{8, 6, 4} : std::vector<double>{15, 12, 9};
    for (int64_t s = 0; s < sequences; ++s) {
      int64_t end = cut ? held[static_cast<size_t>(s)] : length;
      for (int64_t i = 0; i < length; ++i) {
        int64_t t = s * length + i;
        auto id = [&](int64_t ahead) { return i + ahead < end ? ids[static_cast<size_t>(t + ahead)] : -1; };
        EXPECT_EQ(o.ids.view().as<int32_t>()[t], std::max(id(0), 0));
        EXPECT_EQ(o.positions.view().as<int32_t>()[t], i);
        EXPECT_EQ(o.starts.view().as<int32_t>()[t], s * length);
        EXPECT_EQ(o.targets.view().as<int32_t>()[t], id(1));
        EXPECT_EQ(o.token_mask.view().as<double>()[t], i < end ? 1 : 0);
        EXPECT_DOUBLE_EQ(o.token_weights.view().as<double>()[t], id(1) < 0 ? 0 : 1 / counts[0]);
        for (int64_t k = 0; k < modules; ++k) {
          const Objective::Mtp& module = o.mtp[static_cast<size_t>(k)];
          EXPECT_EQ(module.ids.view().as<int32_t>()[t], std::max(id(k + 1), 0));
          EXPECT_EQ(module.targets.view().as<int32_t>()[t], id(k + 2));
          EXPECT_DOUBLE_EQ(module.token_weights.view().as<double>()[t],
                           id(k + 2) < 0 ? 0 : 0.15 / counts[static_cast<size_t>(k + 1)]);
        }
      }
    }
  }
}

Batch random_batch(uint64_t seed = 0) {
  Batch batch;
  batch.sequences = sequences;
  batch.length = length;
  for (uint64_t d = 0; d <= modules; ++d) {
    batch.inputs.push_back(random_ids(100 * seed + 10 + d));
    batch.targets.push_back(random_ids(100 * seed + 20 + d));
    batch.targets.back()[3 + d] = -1;
  }
  batch.lengths = {6, 5, 0};
  for (int64_t t = 0; t < places; ++t) {
    batch.starts.push_back(static_cast<int32_t>(t / length * length + (t % length > 3 ? 2 : 0)));
    if (t % length < batch.lengths[static_cast<size_t>(t / length)]) continue;
    for (std::vector<int32_t>& targets : batch.targets) targets[static_cast<size_t>(t)] = -1;
  }
  for (const std::vector<int32_t>& targets : batch.targets) {
    batch.target_counts.push_back(
        std::count_if(targets.begin(), targets.end(), [](int32_t x) { return x >= 0; }));
  }
  batch.target_bytes = 40;
  return batch;
}

TEST(Objective, FillsFromABatch) {
  Recorded recorded(plain());
  Objective& o = recorded.objective;
  const Batch batch = random_batch();
  const std::vector<double> weights = {0.5, 0.25, 0.125};
  fill_from_batch(o, batch, weights);
  for (int64_t t = 0; t < places; ++t) {
    auto at = static_cast<size_t>(t);
    EXPECT_EQ(o.ids.view().as<int32_t>()[t], batch.inputs[0][at]);
    EXPECT_EQ(o.positions.view().as<int32_t>()[t], t % length);
    EXPECT_EQ(o.starts.view().as<int32_t>()[t], batch.starts[at]);
    EXPECT_EQ(o.targets.view().as<int32_t>()[t], batch.targets[0][at]);
    EXPECT_EQ(o.token_weights.view().as<double>()[t], batch.targets[0][at] < 0 ? 0 : 0.5);
    EXPECT_EQ(o.token_mask.view().as<double>()[t], t < 11 ? 1 : 0);
    for (size_t k = 0; k < modules; ++k) {
      EXPECT_EQ(o.mtp[k].ids.view().as<int32_t>()[t], batch.inputs[k + 1][at]);
      EXPECT_EQ(o.mtp[k].targets.view().as<int32_t>()[t], batch.targets[k + 1][at]);
      EXPECT_EQ(o.mtp[k].token_weights.view().as<double>()[t],
                batch.targets[k + 1][at] < 0 ? 0 : weights[k + 1]);
    }
  }
}

TEST(Objective, LossesAreWeightedSums) {
  Recorded recorded(plain());
  const Batch batch = random_batch();
  const std::vector<double> weights = {0.5, 0.25, 0.125};
  fill_from_batch(recorded.objective, batch, weights);
  recorded.run();
  ASSERT_EQ(recorded.objective.losses().size(), 3u);
  for (size_t d = 0; d < 3; ++d) {
    const CrossEntropy& result = d == 0 ? recorded.objective.main : recorded.objective.mtp[d - 1].result;
    double sum = 0;
    for (int64_t t = 0; t < places; ++t) {
      double nll = result.nll.view().as<double>()[t];
      EXPECT_EQ(nll == 0, batch.targets[d][static_cast<size_t>(t)] < 0);
      sum += weights[d] * nll;
    }
    EXPECT_NEAR(Recorded::value(result.loss), sum, 1e-14);
  }
}

// The whole objective's gradient: losses of all depths, balance losses of all routers, masks.
TEST(Objective, GradientOfEverything) {
  ObjectiveOptions options = plain();
  options.balance = {
      .alpha = 0.1, .device_alpha = 0.05, .communication_alpha = 0.07, .devices = 2, .devices_per_token = 2};
  Recorded recorded(options);
  // One a router: the second layer's and each module's.
  EXPECT_EQ(recorded.objective.balance_losses.size(), 3u);
  fill_from_batch(recorded.objective, random_batch(), std::vector<double>{0.5, 0.25, 0.125});
  recorded.run();
  int checked = 0;
  Random random(3);
  std::vector<std::pair<Tensor, std::vector<double>>> gradients;
  recorded.model.for_each([&](const std::string&, Tensor& tensor) {
    if (!tensor.value().grad) return;
    const double* gradient = Tensor(tensor.value().grad).view().as<double>();
    gradients.emplace_back(tensor, std::vector<double>(gradient, gradient + tensor.count()));
  });
  for (auto& [tensor, gradient] : gradients) {
    for (int i = 0; i < 3; ++i) {
      auto at = random.below(gradient.size());
      double& x = tensor.view().as<double>()[at];
      const double before = x, step = 1e-5;
      x = before + step;
      const double above = recorded.run();
      x = before - step;
      const double below = recorded.run();
      x = before;
      EXPECT_NEAR((above - below) / (2 * step), gradient[at], 1e-8) << tensor.name() << " " << at;
      ++checked;
    }
  }
  EXPECT_GT(checked, 100);
}

// Padding and what stands there change neither losses nor gradients nor loads.
TEST(Objective, PaddingCountsNothing) {
  ObjectiveOptions options = plain();
  options.balance.alpha = 0.1;
  options.count_load = true;
  auto outcome = [&](int32_t padding) {
    Recorded recorded(options);
    Batch batch = random_batch();
    for (int64_t t = 11; t < places; ++t) {
      for (std::vector<int32_t>& inputs : batch.inputs) inputs[static_cast<size_t>(t)] = padding;
    }
    fill_from_batch(recorded.objective, batch, std::vector<double>{0.5, 0.25, 0.125});
    std::vector<double> numbers = {recorded.run()};
    for (const Tensor& gradient : recorded.gradients.gradients) {
      const double* g = gradient.view().as<double>();
      numbers.insert(numbers.end(), g, g + gradient.count());
    }
    double choices = 0;
    for (auto& [path, gate] : recorded.model.gates()) {
      for (int64_t e = 0; e < 4; ++e) choices += gate->load.view().as<float>()[e];
    }
    EXPECT_EQ(choices, 3 * 2 * 11);  // routers, experts a token, tokens
    return numbers;
  };
  EXPECT_EQ(outcome(3), outcome(9));
}

TEST(Pass, AddsUpWhatItsObjectiveFound) {
  CpuBackend backend(1);
  Recorded recorded(plain());
  ObjectiveOptions options = plain();
  options.balance.alpha = 0.1;
  Pass pass(backend, recorded.model, recorded.rope, options, {.training = true});
  allocate_gradients(backend, recorded.model);
  pass.allocate(nullptr);
  const Batch batch = random_batch();
  LossSums sums, twice;
  const std::vector<double> ones = {1, 1, 1};
  pass.run(batch, ones, sums);
  pass.run(batch, ones, twice);
  pass.run(batch, ones, twice, Pass::Mode::checked);
  fill_from_batch(recorded.objective, batch, ones);
  recorded.run();
  ASSERT_EQ(sums.depths.size(), 3u);
  for (size_t d = 0; d < 3; ++d) {
    const CrossEntropy& result = d == 0 ? recorded.objective.main : recorded.objective.mtp[d - 1].result;
    EXPECT_NEAR(sums.depths[d].nll, Recorded::value(result.loss), 1e-12);
    EXPECT_EQ(sums.depths[d].targets, batch.target_counts[d]);
    EXPECT_DOUBLE_EQ(sums.depths[d].mean(), sums.depths[d].nll / static_cast<double>(batch.target_counts[d]));
    EXPECT_DOUBLE_EQ(twice.depths[d].mean(), sums.depths[d].mean());
    EXPECT_EQ(twice.depths[d].targets, 2 * sums.depths[d].targets);
  }
  EXPECT_GT(sums.balance, 0);
  EXPECT_DOUBLE_EQ(twice.balance, 2 * sums.balance);
  EXPECT_DOUBLE_EQ(sums.bits_per_byte(), sums.depths[0].nll / std::log(2) / 40);
  EXPECT_DOUBLE_EQ(
      sums.objective(0.4),
      sums.depths[0].mean() + 0.2 * (sums.depths[1].mean() + sums.depths[2].mean()) + sums.balance);
}

// The module's prediction at a place and the main model's at the next are of the same token.
TEST(Pass, CountsWhereTheModuleAndTheMainModelAgree) {
  CpuBackend backend(1);
  Recorded recorded(plain());
  Pass pass(backend, recorded.model, recorded.rope, plain(), {});
  pass.allocate(nullptr);
  const std::vector<double> ones = {1, 1, 1};
  const int32_t* main = recorded.objective.main.predicted.view().as<int32_t>();
  const int32_t* module = recorded.objective.mtp[0].result.predicted.view().as<int32_t>();
  LossSums sums;
  int64_t agreed = 0, compared = 0;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const Batch batch = random_batch(seed);
    pass.run(batch, ones, sums);
    fill_from_batch(recorded.objective, batch, ones);
    recorded.run();
    for (int64_t s = 0; s < sequences; ++s) {
      for (int64_t i = 0; i + 1 < length; ++i) {
        int64_t t = s * length + i;
        if (batch.targets[1][static_cast<size_t>(t)] < 0) continue;
        if (batch.targets[0][static_cast<size_t>(t + 1)] < 0) continue;
        ++compared;
        agreed += main[t + 1] == module[t] ? 1 : 0;
      }
    }
  }
  EXPECT_GT(agreed, 0);
  EXPECT_LT(agreed, compared);
  EXPECT_EQ(sums.compared, compared);
  EXPECT_EQ(sums.agreed, agreed);
  EXPECT_DOUBLE_EQ(sums.acceptance(), static_cast<double>(agreed) / static_cast<double>(compared));
}

}  // namespace
}  // namespace latente
