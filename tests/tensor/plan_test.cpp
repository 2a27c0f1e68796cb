#include "tensor/plan.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "base/random.h"
#include "cpu/cpu_backend.h"

namespace latente {
namespace {

CpuBackend& backend() {
  static CpuBackend cpu(1);
  return cpu;
}

// Ops enough to build graphs of, recorded as src/ops does.
Tensor sum_of(Plan& plan, const Tensor& a, const Tensor& b) {
  Tensor out = plan.intermediate(a.shape(), a.dtype());
  plan.record(
      "sum", {a, b}, {out}, [=](Backend& cpu) { cpu.add(a.view(), b.view(), out.view()); },
      [=](Gradients& g) {
        Tensor d_out = g.of(out);
        g.share(a, d_out);
        g.share(b, d_out);
      });
  return out;
}

Tensor gated(Plan& plan, const Tensor& gate, const Tensor& up) {
  Tensor out = plan.intermediate(gate.shape(), gate.dtype());
  plan.record(
      "gated", {gate, up}, {out}, [=](Backend& cpu) { cpu.swiglu(gate.view(), up.view(), out.view()); },
      [=](Gradients& g) {
        Tensor d_out = g.of(out);
        auto d_gate = g.slot(gate), d_up = g.slot(up);
        g.plan().record("gated_backward", {d_out, gate, up}, {d_gate.tensor, d_up.tensor}, [=](Backend& cpu) {
          cpu.swiglu_backward(d_out.view(), gate.view(), up.view(), d_gate.view(), d_up.view());
        });
      });
  return out;
}

Tensor filled(const Tensor& tensor, std::vector<float> values) {
  if (!tensor.has_storage()) allocate(tensor);
  std::copy(values.begin(), values.end(), tensor.view().as<float>());
  return tensor;
}

Tensor weight(std::string name, std::vector<float> values) {
  Tensor tensor = parameter({1, static_cast<int64_t>(values.size())}, DType::f32);
  tensor.value().name = std::move(name);
  return filled(tensor, std::move(values));
}

std::vector<float> read(const Tensor& tensor) {
  View view = tensor.view();
  EXPECT_TRUE(view.contiguous());
  return {view.as<float>(), view.as<float>() + view.count()};
}

Tensor gradient(const Tensor& parameter) {
  Tensor grad(parameter.value().grad);
  if (!grad.has_storage()) allocate(grad);
  return grad;
}

void prepare(Plan& plan) {
  plan.compile();
  plan.allocate();
}

struct RandomPlan {
  RandomPlan(uint64_t seed, bool reuse_memory, int64_t memory = 0)
      : plan(backend(), {.training = true, .memory = memory, .reuse_memory = reuse_memory}) {
    Random random(seed);
    auto numbers = [&](int64_t count) {
      std::vector<float> values(static_cast<size_t>(count));
      for (float& value : values) value = static_cast<float>(random.normal());
      return values;
    };
    // Values of four sizes; each new one is made of two of its size.
    std::vector<Tensor> values[4];
    for (int64_t size = 0; size < 4; ++size) {
      weights.push_back(weight("w", numbers(7 + 40 * size)));
      values[size].push_back(weights.back());
      values[size].push_back(
          filled(plan.input("x", weights.back().shape(), DType::f32), numbers(7 + 40 * size)));
      values[size].push_back(sum_of(plan, values[size][0], values[size][1]));
    }
    for (int i = 0; i < 60; ++i) {
      std::vector<Tensor>& of_size = values[random.below(4)];
      const Tensor a = of_size[random.below(of_size.size())], b = of_size.back();
      of_size.push_back(random.chance(0.5) ? sum_of(plan, a, b) : gated(plan, a, b));
    }
    std::vector<Tensor> losses;
    for (auto& of_size : values) losses.push_back(of_size.back());
    plan.backward(losses);
    kept = losses;
    for (const Tensor& w : weights) gradient(w);
    prepare(plan);
  }
  Plan plan;
  std::vector<Tensor> weights, kept;
};

TEST(Plan, SharedMemoryChangesNoBit) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    RandomPlan shared(seed, true), apart(seed, false);
    shared.plan.run();
    apart.plan.run();
    for (size_t i = 0; i < 4; ++i) {
      EXPECT_EQ(read(shared.kept[i]), read(apart.kept[i])) << "seed " << seed;
      EXPECT_EQ(read(gradient(shared.weights[i])), read(gradient(apart.weights[i]))) << "seed " << seed;
    }
    EXPECT_EQ(shared.plan.unplanned_bytes(), apart.plan.unplanned_bytes());
    EXPECT_EQ(apart.plan.arena_bytes(), apart.plan.unplanned_bytes());
    EXPECT_LT(shared.plan.arena_bytes() * 10, apart.plan.arena_bytes() * 9) << "seed " << seed;
  }
}

TEST(Plan, ResultsMadeAgainChangeNoBit) {
  int smaller = 0;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    RandomPlan whole(seed, true);
    whole.plan.run();
    EXPECT_EQ(whole.plan.recomputed_share(), 0);
    for (int64_t memory : {whole.plan.arena_bytes() - 1, int64_t{1}}) {
      RandomPlan tight(seed, true, memory);
      tight.plan.run();
      for (size_t i = 0; i < 4; ++i) {
        EXPECT_EQ(read(tight.kept[i]), read(whole.kept[i])) << "seed " << seed;
        EXPECT_EQ(read(gradient(tight.weights[i])), read(gradient(whole.weights[i]))) << "seed " << seed;
      }
      EXPECT_LE(tight.plan.arena_bytes(), whole.plan.arena_bytes()) << "seed " << seed;
      const bool saves = tight.plan.arena_bytes() < whole.plan.arena_bytes();
      EXPECT_EQ(tight.plan.recomputed_share() > 0, saves) << "seed " << seed;
      smaller += saves ? 1 : 0;
    }
  }
  EXPECT_GT(smaller, 10);
}

// A chain of which the gradient reads every value: with a checkpoint every ten values, what is kept is the
// checkpoints and the values between two of them.
TEST(Plan, KeepsCheckpointsAndMakesTheRestAgain) {
  auto arena = [](bool checkpoints, int64_t memory) {
    Tensor w = weight("w", std::vector<float>(1000, 0.5f));
    Plan plan(backend(), {.training = true, .memory = memory});
    Tensor x = sum_of(plan, w, filled(plan.input("x", {1, 1000}, DType::f32), std::vector<float>(1000, 1)));
    for (int i = 0; i < 100; ++i) {
      x = gated(plan, x, w);
      if (checkpoints && i % 10 == 9) plan.checkpoint(x);
    }
    plan.backward({x});
    gradient(w);
    plan.compile();
    return plan.arena_bytes() / 4032;  // 1000 floats, aligned
  };
  EXPECT_GE(arena(true, 0), 100);
  EXPECT_LE(arena(true, 1), 10 + 10 + 5);
}

TEST(Plan, RunsTwiceWithTheSameBits) {
  RandomPlan random(3, true);
  random.plan.run();
  std::vector<std::vector<float>> first;
  for (const Tensor& tensor : random.kept) first.push_back(read(tensor));
  random.plan.run();
  for (size_t i = 0; i < first.size(); ++i) EXPECT_EQ(read(random.kept[i]), first[i]);
}

TEST(Plan, AccumulatesGradientsUntilTheyAreZeroed) {
  Tensor w = weight("w", {1, 2});
  Plan plan(backend(), {.training = true});
  Tensor x = filled(plan.input("x", {1, 2}, DType::f32), {10, 20});
  plan.backward({sum_of(plan, sum_of(plan, w, x), w)});
  Tensor grad = gradient(w);
  prepare(plan);
  EXPECT_FALSE(x.value().grad);
  plan.run();
  EXPECT_EQ(read(grad), (std::vector<float>{2, 2}));
  plan.run();
  EXPECT_EQ(read(grad), (std::vector<float>{4, 4}));
  backend().fill(grad.view(), 0.0);
  plan.run();
  EXPECT_EQ(read(grad), (std::vector<float>{2, 2}));
}

// A loss starts with the gradient 1, also where it is part of another loss.
TEST(Plan, LossThatFeedsAnotherLoss) {
  Tensor w = weight("w", {3});
  Plan plan(backend(), {.training = true});
  Tensor loss = sum_of(plan, w, w);
  Tensor more = sum_of(plan, loss, w);
  plan.backward({loss, more});
  gradient(w);
  prepare(plan);
  plan.run();
  EXPECT_EQ(read(gradient(w)), std::vector<float>{5});
  EXPECT_EQ(read(loss), std::vector<float>{6});
  EXPECT_EQ(read(more), std::vector<float>{9});
}

TEST(Plan, LeavesOutWhatNoParameterNeeds) {
  Tensor w = weight("w", {1, 2}), frozen = weight("frozen", {1, 2});
  frozen.value().requires_grad = false;
  Plan plan(backend(), {.training = true});
  Tensor x = filled(plan.input("x", {1, 2}, DType::f32), {1, 1});
  Tensor fixed = gated(plan, x, frozen);
  Tensor out = gated(plan, w, fixed);
  gated(plan, w, x);  // reaches no loss
  EXPECT_FALSE(fixed.requires_grad());
  EXPECT_TRUE(out.requires_grad());
  size_t before = plan.node_count();
  plan.backward({out});
  EXPECT_EQ(plan.node_count(), before + 2);  // the loss's one, and one gradient
  EXPECT_FALSE(frozen.value().grad);
}

TEST(Plan, InferenceRecordsNoGradients) {
  Tensor w = weight("w", {1, 2});
  Plan plan(backend());
  Tensor out = sum_of(plan, w, w);
  EXPECT_FALSE(out.requires_grad());
  plan.keep(out);
  prepare(plan);
  plan.run();
  EXPECT_EQ(read(out), (std::vector<float>{2, 4}));
}

TEST(Plan, DropsAForwardThatItsGradientReplaces) {
  Tensor w = weight("w", {2});
  Plan plan(backend(), {.training = true});
  int forward = 0, fused = 0;
  Tensor loss = plan.intermediate({1, 1}, DType::f32);
  plan.record(
      "loss", {w}, {loss}, [&](Backend&) { ++forward; },
      [&, w, loss](Gradients& g) {
        auto d_w = g.slot(w);
        g.replace_forward();
        g.plan().record("loss_with_gradient", {w}, {loss, d_w.tensor}, [&, w, loss](Backend& cpu) {
          ++fused;
          cpu.copy(w.view(), {loss.view(), false});
        });
      });
  plan.backward({loss});
  gradient(w);
  prepare(plan);
  plan.run();
  EXPECT_EQ(forward, 0);
  EXPECT_EQ(fused, 1);
  EXPECT_EQ(read(loss), std::vector<float>{2});
  EXPECT_EQ(plan.describe().find("loss "), std::string::npos);
}

TEST(Plan, RefusesToReadWhatIsNotWritten) {
  Plan plan(backend());
  Tensor never = plan.intermediate({1, 2}, DType::f32);
  sum_of(plan, never, never);
  try {
    plan.compile();
    FAIL();
  } catch (const std::logic_error& error) {
    EXPECT_NE(std::string(error.what()).find("sum"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("before it is written"), std::string::npos);
  }
}

// Doubles x in place.
Tensor doubled(Plan& plan, const Tensor& x) {
  Tensor out = plan.updated(x);
  plan.record("doubled", {x}, {out}, [=](Backend& cpu) { cpu.add(out.view(), out.view(), out.view()); });
  return out;
}

TEST(Plan, RefusesToReadWhatWasChangedInPlace) {
  auto compile = [](bool old, int64_t begin, int64_t end) {
    Tensor w = filled(parameter({2, 4}, DType::f32), {1, 2, 3, 4, 5, 6, 7, 8});
    Plan plan(backend());
    Tensor x = sum_of(plan, w, w);
    Tensor left = doubled(plan, x.columns(0, 2));
    Tensor read_later = old ? x.columns(begin, end) : left;
    Tensor out = sum_of(plan, read_later, read_later);
    plan.keep(out);
    prepare(plan);
    plan.run();
    return read(out);
  };
  EXPECT_EQ(compile(false, 0, 2), (std::vector<float>{8, 16, 40, 48}));
  EXPECT_EQ(compile(true, 2, 4), (std::vector<float>{12, 16, 28, 32}));  // beside the change
  EXPECT_THROW(compile(true, 0, 2), std::logic_error);
  EXPECT_THROW(compile(true, 1, 3), std::logic_error);
  EXPECT_THROW(compile(true, 0, 4), std::logic_error);
}

TEST(Plan, CheckedRunNamesOpScopeAndParameter) {
  Tensor w = weight("model.norm.weight", {1, 2}), other = weight("model.head.weight", {1, 1});
  Plan plan(backend());
  {
    Plan::Scope model(&plan, "model");
    Plan::Scope layers(&plan, "layers.3");
    gated(plan, sum_of(plan, w, w), other);
  }
  prepare(plan);
  plan.run_checked();
  filled(other, {1, std::numeric_limits<float>::quiet_NaN()});
  try {
    plan.run_checked();
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()),
              "not finite: first in op gated of model.layers.3 with parameter model.head.weight");
  }
  filled(w, {std::numeric_limits<float>::infinity(), 1});
  try {
    plan.run_checked();
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("op sum of model.layers.3 with parameter model.norm.weight"),
              std::string::npos)
        << error.what();
  }
}

TEST(Plan, KeepsWhatItIsTold) {
  Plan plan(backend());
  Tensor x = filled(plan.input("x", {1, 64}, DType::f32), std::vector<float>(64, 1.0f));
  Tensor first = sum_of(plan, x, x), value = first;
  plan.keep(first);
  for (int i = 0; i < 5; ++i) value = sum_of(plan, value, x);
  plan.keep(value.columns(0, 3));  // a slice keeps its root
  prepare(plan);
  plan.run();
  EXPECT_EQ(read(first), std::vector<float>(64, 2.0f));
  EXPECT_EQ(read(value), std::vector<float>(64, 7.0f));
  EXPECT_EQ(plan.arena_bytes(), 3 * 256);  // the first, and two in turn for the others
}

TEST(Plan, SharesAnArenaWithAnotherPlan) {
  Tensor w = weight("w", {1, 2});
  Plan small(backend()), large(backend());
  Tensor a = sum_of(small, w, w);
  Tensor b = sum_of(large, sum_of(large, sum_of(large, w, w), w), w);
  small.keep(a), large.keep(b);
  small.compile(), large.compile();
  std::shared_ptr<void> arena = backend().allocate(std::max(small.arena_bytes(), large.arena_bytes()));
  small.allocate(arena), large.allocate(arena);
  small.run();
  EXPECT_EQ(read(a), (std::vector<float>{2, 4}));
  large.run();
  EXPECT_EQ(read(b), (std::vector<float>{4, 8}));
  small.allocate();  // moved to an arena of its own
  small.run();
  EXPECT_EQ(read(a), (std::vector<float>{2, 4}));
  EXPECT_EQ(read(b), (std::vector<float>{4, 8}));
}

TEST(Plan, DescribesAndProfilesItsNodes) {
  Tensor w = weight("w", {1, 2});
  Plan plan(backend());
  Plan::Scope scope(&plan, "here");
  sum_of(plan, sum_of(plan, w, w), w);
  prepare(plan);
  EXPECT_EQ(plan.node_count(), 2u);
  EXPECT_NE(plan.describe().find("sum"), std::string::npos);
  EXPECT_NE(plan.describe().find("here [1, 2]"), std::string::npos);
  std::map<std::string, double> seconds;
  plan.run_profiled(seconds);
  EXPECT_EQ(seconds.size(), 1u);
  EXPECT_GE(seconds.at("sum"), 0.0);
}

}  // namespace
}  // namespace latente
