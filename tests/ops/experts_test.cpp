#include <algorithm>
#include <numeric>

#include "ops/support.h"

namespace latente::test {
namespace {

struct Gate {
  int64_t tokens = 0, experts = 0;
  Routing routing;
  Numbers logits, bias, mask;  // bias, mask: empty for none
};

struct Decision {
  Numbers weights, experts, load;
  double balance_loss = 0;
};

// The report's equations with full sorts.
Decision decide(const Gate& gate) {
  const Routing& r = gate.routing;
  const auto experts = static_cast<size_t>(gate.experts), top_k = static_cast<size_t>(r.top_k);
  const size_t groups = r.group_score == GroupScore::none ? 1 : static_cast<size_t>(r.groups);
  Decision d;
  d.load.assign(experts, 0.0);
  const size_t tokens = static_cast<size_t>(gate.tokens);
  const Balance& balance = r.balance;
  const size_t sequence = balance.per_sequence && balance.sequence_length > 0
                              ? static_cast<size_t>(balance.sequence_length)
                              : tokens;
  const size_t devices = static_cast<size_t>(balance.devices), on_device = experts / devices;
  double loss_sum = 0, sequences = 0;
  for (size_t begin = 0; begin < tokens; begin += sequence) {
    Numbers counts(experts, 0.0), shares(experts, 0.0), visits(devices, 0.0);
    double counted = 0;
    for (size_t t = begin; t < begin + sequence; ++t) {
      Numbers s(gate.logits.begin() + static_cast<std::ptrdiff_t>(t * experts),
                gate.logits.begin() + static_cast<std::ptrdiff_t>((t + 1) * experts));
      if (r.score == GateScore::sigmoid) {
        for (double& x : s) x = 1 / (1 + std::exp(-x));
      } else {
        double sum = 0;
        for (double& x : s) sum += x = std::exp(x);
        for (double& x : s) x /= sum;
      }
      Numbers selection = s;
      for (size_t e = 0; e < experts && !gate.bias.empty(); ++e) selection[e] += gate.bias[e];
      const size_t size = experts / groups;
      Numbers group_scores;
      for (size_t g = 0; g < groups; ++g) {
        Numbers members(selection.begin() + static_cast<std::ptrdiff_t>(g * size),
                        selection.begin() + static_cast<std::ptrdiff_t>((g + 1) * size));
        std::sort(members.rbegin(), members.rend());
        group_scores.push_back(members[0] +
                               (r.group_score == GroupScore::top2_sum && size > 1 ? members[1] : 0));
      }
      auto order = [](const Numbers& values) {
        std::vector<size_t> indices(values.size());
        std::iota(indices.begin(), indices.end(), 0);
        std::stable_sort(indices.begin(), indices.end(),
                         [&](size_t a, size_t b) { return values[a] > values[b]; });
        return indices;
      };
      if (groups > 1) {
        std::vector<size_t> by_score = order(group_scores);
        for (size_t i = static_cast<size_t>(r.top_groups); i < groups; ++i) {
          for (size_t e = by_score[i] * size; e < (by_score[i] + 1) * size; ++e) selection[e] = -INFINITY;
        }
      }
      std::vector<size_t> chosen = order(selection);
      chosen.resize(top_k);
      double sum = 1e-20;
      for (size_t e : chosen) sum += s[e];
      const bool masked = !gate.mask.empty() && gate.mask[t] == 0;
      for (size_t e : chosen) {
        d.experts.push_back(static_cast<double>(e));
        d.weights.push_back(s[e] / (r.normalise ? sum : 1.0) * r.scale);
        if (!masked) counts[e] += 1;
      }
      if (masked) continue;
      for (size_t i = 0; i < devices; ++i) {
        visits[i] += std::any_of(chosen.begin(), chosen.end(),
                                 [&](size_t e) { return i * on_device <= e && e < (i + 1) * on_device; });
      }
      counted += 1;
      double total = std::accumulate(s.begin(), s.end(), 0.0);
      for (size_t e = 0; e < experts; ++e) shares[e] += s[e] / total;
    }
    for (size_t e = 0; e < experts; ++e) d.load[e] += counts[e];
    if (counted == 0) continue;
    sequences += 1;
    double n = static_cast<double>(experts), k = static_cast<double>(top_k);
    for (size_t e = 0; e < experts; ++e) {
      loss_sum += balance.alpha * (n / (k * counted) * counts[e]) * (shares[e] / counted);
    }
    // DeepSeek-V2, equations 26 to 31.
    for (size_t i = 0; i < devices; ++i) {
      double f = 0, p = 0;
      for (size_t e = i * on_device; e < (i + 1) * on_device; ++e) {
        f += n / (k * counted) * counts[e] / static_cast<double>(on_device);
        p += shares[e] / counted;
      }
      double sent = static_cast<double>(devices) /
                    (static_cast<double>(balance.devices_per_token) * counted) * visits[i];
      loss_sum += balance.device_alpha * f * p + balance.communication_alpha * sent * p;
    }
  }
  d.balance_loss = sequences > 0 ? loss_sum / sequences : 0.0;
  return d;
}

Tensor bias_of(Plan& plan, const Gate& gate, DType dtype) {
  return gate.bias.empty() ? Tensor() : constant(plan, {gate.experts}, dtype, gate.bias);
}

Tensor mask_of(Plan& plan, const Gate& gate, DType dtype) {
  return gate.mask.empty() ? Tensor() : constant(plan, {gate.tokens}, dtype, gate.mask);
}

// The exact type that this device has.
const DType exact = dtypes().front();

Decision routed(const Gate& gate, DType dtype, int threads) {
  Plan plan(backend(threads), {.training = true});
  Tensor logits = constant(plan, {gate.tokens, gate.experts}, dtype, gate.logits);
  Tensor load = buffer(backend(), {gate.experts}, DType::f32);
  Routed out = route(logits, bias_of(plan, gate, dtype), mask_of(plan, gate, dtype), gate.routing, load);
  plan.keep(out.weights), plan.keep(out.experts);
  if (out.balance_loss) plan.keep(out.balance_loss);
  plan.compile();
  plan.allocate();
  plan.run();
  Decision d{read(out.weights.view()), read(out.experts.view()), read(load.view()), 0};
  if (out.balance_loss) d.balance_loss = read(out.balance_loss.view())[0];
  plan.run();
  Numbers twice = read(load.view());
  for (size_t e = 0; e < twice.size(); ++e) EXPECT_EQ(twice[e], 2 * d.load[e]);
  return d;
}

Gate random_gate(int64_t tokens, int64_t experts, Routing routing, bool bias, bool mask, uint64_t seed) {
  Gate gate{tokens, experts, routing, normal(tokens * experts, seed), {}, {}};
  if (bias) gate.bias = normal(experts, seed + 1, 0.3);
  if (mask) {
    for (int64_t t = 0; t < tokens; ++t) gate.mask.push_back(t % 3 == 1 ? 0.0 : 1.0);
  }
  return gate;
}

std::vector<Gate> gates(int64_t tokens) {
  Routing v3{.top_k = 4, .group_score = GroupScore::top2_sum, .groups = 4, .top_groups = 2, .scale = 2.5};
  Routing plain{.top_k = 3};
  Routing one{.top_k = 1};
  Routing v2{.top_k = 3,
             .score = GateScore::softmax,
             .group_score = GroupScore::max,
             .groups = 4,
             .top_groups = 2,
             .normalise = false,
             .scale = 16};
  Routing lite{.top_k = 6, .score = GateScore::softmax, .normalise = false};
  std::vector<Gate> all = {
      random_gate(tokens, 16, v3, true, false, 1), random_gate(tokens, 9, plain, false, true, 2),
      random_gate(tokens, 5, one, true, false, 3), random_gate(tokens, 12, v2, false, false, 4),
      random_gate(tokens, 10, lite, false, true, 5)};
  for (size_t i = 0; i < 5; ++i) {
    for (bool per_sequence : {true, false}) {
      Gate balanced = all[i];
      Balance& balance = balanced.routing.balance;
      balance.alpha = 0.3;
      balance.per_sequence = per_sequence;
      balance.sequence_length = tokens / 2;
      all.push_back(balanced);
      if (i != 0 && i != 3) continue;
      // Of DeepSeek-V2's other losses each alone, then all together.
      balance = {
          .device_alpha = 0.5, .devices = 4, .per_sequence = per_sequence, .sequence_length = tokens / 2};
      all.push_back(balanced);
      balance.device_alpha = 0;
      balance.communication_alpha = 0.7;
      balance.devices_per_token = 2;
      all.push_back(balanced);
      balance.alpha = 0.3, balance.device_alpha = 0.5;
      all.push_back(balanced);
    }
  }
  return all;
}

TEST(Route, ChoosesAsTheReportSays) {
  for (const Gate& gate : gates(80)) {
    Decision want = decide(gate);
    for (DType dtype : dtypes()) {
      if (dtype == DType::bf16) continue;  // routers are exact
      for (int threads : {1, 3}) {
        Decision got = routed(gate, dtype, threads);
        double tolerance = dtype == DType::f64 ? 1e-13 : 1e-6;
        EXPECT_EQ(got.experts, want.experts);
        expect_close(got.weights, want.weights, tolerance, "weights");
        EXPECT_EQ(got.load, want.load);
        EXPECT_NEAR(got.balance_loss, want.balance_loss, tolerance);
      }
    }
  }
}

TEST(Route, GradientWithBalanceLoss) {
  for (const Gate& gate : gates(6)) {
    std::vector<Input> inputs = {{{gate.tokens, gate.experts}, gate.logits, true}};
    check(inputs, [&](Plan& plan, const std::vector<Tensor>& p) {
      DType dtype = p[0].dtype();
      Routed out =
          route(leaf(plan, p[0]), bias_of(plan, gate, dtype), mask_of(plan, gate, dtype), gate.routing, {});
      Graph graph{{out.weights}, {}};
      if (out.balance_loss) graph.losses.push_back(out.balance_loss);
      return graph;
    });
  }
}

TEST(Route, GradientOfTheBalanceLossAlone) {
  Gate gate = gates(6)[5];
  check({{{gate.tokens, gate.experts}, gate.logits, true}}, [&](Plan& plan, const std::vector<Tensor>& p) {
    Routed out = route(leaf(plan, p[0]), bias_of(plan, gate, p[0].dtype()), {}, gate.routing, {});
    return Graph{{}, {out.balance_loss}};
  });
}

// Every token on one device: f' = D / 1 there, f'' = D / M, and P its experts' share.
TEST(Route, DeviceLossesOfAnUnbalancedRouter) {
  Gate gate;
  gate.tokens = 3, gate.experts = 6;
  gate.routing = {.top_k = 2, .score = GateScore::softmax};
  for (int t = 0; t < 3; ++t) gate.logits.insert(gate.logits.end(), {0, 0, 5, 5, 0, 0});
  const double p = 2 * std::exp(5) / (2 * std::exp(5) + 4);
  Balance& balance = gate.routing.balance;
  balance = {.device_alpha = 1, .devices = 3, .per_sequence = false};
  EXPECT_NEAR(routed(gate, exact, 1).balance_loss, 3 * p, tolerance_of(exact, 1e-14, 1e-6));
  balance = {.communication_alpha = 1, .devices = 3, .devices_per_token = 2, .per_sequence = false};
  EXPECT_NEAR(routed(gate, exact, 1).balance_loss, 1.5 * p, tolerance_of(exact, 1e-14, 1e-6));
}

TEST(Route, ASequenceOfPaddingIsLeftOutOfTheMean) {
  Routing routing{.top_k = 2, .balance = {.alpha = 0.5, .sequence_length = 4}};
  Gate gate = random_gate(8, 6, routing, false, false, 9);
  gate.mask = {1, 1, 1, 1, 0, 0, 0, 0};
  Gate alone = gate;
  alone.tokens = 4;
  alone.mask.clear();
  alone.logits.resize(24);
  EXPECT_DOUBLE_EQ(routed(gate, exact, 1).balance_loss, routed(alone, exact, 1).balance_loss);
  gate.mask.assign(8, 0.0);
  EXPECT_EQ(routed(gate, exact, 1).balance_loss, 0.0);
  EXPECT_EQ(routed(gate, exact, 1).load, Numbers(6, 0.0));
}

TEST(Route, TiesGoToTheLowerIndex) {
  Gate gate;
  gate.tokens = 1, gate.experts = 8;
  gate.logits.assign(8, 0.25);
  gate.routing.top_k = 3;
  EXPECT_EQ(routed(gate, DType::f32, 1).experts, (Numbers{0, 1, 2}));
  gate.routing.group_score = GroupScore::top2_sum;
  gate.routing.groups = 4, gate.routing.top_groups = 2;
  EXPECT_EQ(routed(gate, DType::f32, 1).experts, (Numbers{0, 1, 2}));
  gate.logits[6] = 1;
  EXPECT_EQ(routed(gate, DType::f32, 1).experts, (Numbers{6, 0, 1}));
}

// With every biased score negative, a closed group masked with 0 instead of -inf would be chosen.
TEST(Route, ClosedGroupsStayClosedUnderNegativeBiases) {
  Gate gate = random_gate(
      20, 8, {.top_k = 3, .group_score = GroupScore::top2_sum, .groups = 4, .top_groups = 2}, true, false, 5);
  for (double& b : gate.bias) b -= 5;
  Decision want = decide(gate), got = routed(gate, exact, 1);
  EXPECT_EQ(got.experts, want.experts);
  expect_close(got.weights, want.weights, tolerance_of(exact, 1e-13, 1e-6), "weights");
}

TEST(Route, KeepsIndicesValidWhateverTheLogits) {
  Gate gate;
  gate.tokens = 2, gate.experts = 6;
  gate.routing.top_k = 3;
  gate.logits.assign(12, NAN);
  Numbers experts = routed(gate, DType::f32, 1).experts;
  for (size_t t = 0; t < 2; ++t) {
    std::sort(experts.begin() + static_cast<std::ptrdiff_t>(t * 3),
              experts.begin() + static_cast<std::ptrdiff_t>(t * 3 + 3));
    for (size_t k = 0; k < 3; ++k) {
      EXPECT_GE(experts[t * 3 + k], 0);
      EXPECT_LT(experts[t * 3 + k], 6);
      if (k > 0) {
        EXPECT_NE(experts[t * 3 + k], experts[t * 3 + k - 1]);
      }
    }
  }
}

const std::vector<int32_t> choices = {2, 0, 1, 2, 0, 2, 2, 4, 4, 0};  // [5, 2] of 6 experts, 3 and 5 idle

TEST(ExpertOrder, SortsStably) {
  Plan plan(backend());
  ExpertOrder order = expert_order(indices(plan, {5, 2}, choices), 6);
  for (const Tensor& tensor : {order.offsets, order.rows, order.slots}) plan.keep(tensor);
  plan.compile();
  plan.allocate();
  plan.run();
  EXPECT_EQ(read(order.offsets.view()), (Numbers{0, 3, 4, 8, 8, 10, 10}));
  EXPECT_EQ(read(order.rows.view()), (Numbers{0, 2, 4, 1, 0, 1, 2, 3, 3, 4}));
  EXPECT_EQ(read(order.slots.view()), (Numbers{4, 0, 3, 5, 1, 6, 7, 8, 9, 2}));
}

// A whole expert layer: out[t] = base[t] + sum_k w[t, k] · down_e(silu(gate_e x) · up_e x).
TEST(Experts, ForwardAndGradients) {
  const int64_t tokens = 5, width = 4, inner = 3, experts = 6;
  std::vector<Input> inputs = {random_input({tokens, width}, 1),
                               random_input({experts, inner, width}, 2),
                               random_input({experts, inner, width}, 3),
                               random_input({experts, width, inner}, 4),
                               exact_input({tokens, 2}, 5),
                               random_input({tokens, width}, 6)};
  for (bool onto : {false, true}) {
    auto out = check(inputs, [&](Plan& plan, const std::vector<Tensor>& p) {
      ExpertOrder order = expert_order(indices(plan, {tokens, 2}, choices), experts);
      Tensor middle = expert_gated_linear(leaf(plan, p[0]), order, p[1], p[2]);
      Tensor y = expert_linear(middle, order, p[3]);
      return Graph{{combine(y, leaf(plan, p[4]), order, onto ? leaf(plan, p[5]) : Tensor())}, {}};
    });
    Numbers want(static_cast<size_t>(tokens * width), 0.0);
    if (onto) want = inputs[5].values;
    for (size_t i = 0; i < choices.size(); ++i) {
      size_t t = i / 2, e = static_cast<size_t>(choices[i]);
      auto part = [](const Numbers& all, size_t index, size_t count) {
        auto at = all.begin() + static_cast<std::ptrdiff_t>(index * count);
        return Numbers(at, at + static_cast<std::ptrdiff_t>(count));
      };
      Numbers x = part(inputs[0].values, t, 4);
      Numbers g = product(x, part(inputs[1].values, e, 12), 1, inner, width);
      Numbers u = product(x, part(inputs[2].values, e, 12), 1, inner, width);
      for (size_t j = 0; j < g.size(); ++j) g[j] = g[j] / (1 + std::exp(-g[j])) * u[j];
      Numbers y = product(g, part(inputs[3].values, e, 12), 1, width, inner);
      for (size_t j = 0; j < 4; ++j) want[t * 4 + j] += inputs[4].values[i] * y[j];
    }
    expect_close(out[0], want, 1e-12, "experts");
  }
}

// More rows than a tile has for some experts, none for others.
TEST(Experts, OfManySizes) {
  struct Sizes {
    int64_t tokens, width, inner, experts, top_k;
  };
  std::vector<Sizes> all = {{4, 8, 8, 3, 2}};
  if (on_cuda) all = {{3, 64, 72, 9, 2}, {70, 72, 136, 5, 2}, {400, 200, 64, 7, 3}, {1000, 40, 24, 40, 4}};
  for (const auto& [tokens, width, inner, experts, top_k] : all) {
    SCOPED_TRACE(fmt::format("{} tokens, {} x {}, {} of {}", tokens, width, inner, top_k, experts));
    std::vector<int32_t> chosen;
    Random random(3);
    for (int64_t t = 0; t < tokens; ++t) {
      // The first half of the experts gets most.
      for (int64_t k = 0; k < top_k; ++k) {
        const int64_t below = random.chance(0.8) ? (experts + 1) / 2 : experts;
        chosen.push_back(static_cast<int32_t>(random.below(static_cast<uint64_t>(below))));
      }
    }
    check({random_input({tokens, width}, 1), random_input({experts, inner, width}, 2, 0.2),
           random_input({experts, inner, width}, 3, 0.2), random_input({experts, width, inner}, 4, 0.2),
           exact_input({tokens, top_k}, 5)},
          [&](Plan& plan, const std::vector<Tensor>& p) {
            ExpertOrder order = expert_order(indices(plan, {tokens, top_k}, chosen), experts);
            Tensor middle = expert_gated_linear(leaf(plan, p[0]), order, p[1], p[2]);
            Tensor y = expert_linear(middle, order, p[3]);
            return Graph{{combine(y, leaf(plan, p[4]), order)}, {}};
          });
  }
}

// The input is used by others too, and one weight serves three times.
TEST(Experts, WithPartsUsedTwice) {
  std::vector<Input> inputs = {random_input({5, 4}, 1), random_input({6, 4, 4}, 2), exact_input({5, 2}, 5)};
  check(inputs, [&](Plan& plan, const std::vector<Tensor>& p) {
    ExpertOrder order = expert_order(indices(plan, {5, 2}, choices), 6);
    Tensor x = leaf(plan, p[0]), weights = leaf(plan, p[2]);
    Tensor middle = expert_gated_linear(x, order, p[1], p[1]);
    Tensor y = expert_linear(middle, order, p[1]);
    return Graph{{combine(y, weights, order, add(x, x)), combine(y, weights, order)}, {}};
  });
}

TEST(MixtureOfExperts, GradientReachesTheRouter) {
  std::vector<Input> inputs = {random_input({6, 4}, 1), exact_input({8, 4}, 2), random_input({8, 3, 4}, 3),
                               random_input({8, 3, 4}, 4), random_input({8, 4, 3}, 5)};
  Routing routing{.top_k = 3,
                  .group_score = GroupScore::top2_sum,
                  .groups = 4,
                  .top_groups = 2,
                  .scale = 2.5,
                  .balance = {.alpha = 0.1, .sequence_length = 3}};
  check(inputs, [&](Plan& plan, const std::vector<Tensor>& p) {
    Tensor x = leaf(plan, p[0]);
    Routed routed = route(linear(x, p[1]), {}, {}, routing, {});
    ExpertOrder order = expert_order(routed.experts, 8);
    Tensor middle = expert_gated_linear(x, order, p[2], p[3]);
    Tensor y = expert_linear(middle, order, p[4]);
    return Graph{{combine(y, routed.weights, order)}, {routed.balance_loss}};
  });
}

}  // namespace
}  // namespace latente::test
