// A plan captured once as a CUDA graph and replayed while expert choices change in device memory.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <vector>

#include "base/random.h"
#include "cuda/backend.h"
#include "cuda/choices.h"
#include "cuda/graph.h"
#include "cuda/memory.h"
#include "ops/ops.h"
#include "tensor/device.h"

namespace latente {
namespace {

struct Sizes {
  int64_t tokens, experts, top_k, width, hidden, layers, steps;
  DType weight = DType::f32;
};
std::string label(const Sizes& at) {
  return fmt::format("T{}E{}{}", at.tokens, at.experts, name_of(at.weight));
}
void PrintTo(const Sizes& at, std::ostream* out) { *out << label(at); }

// Host values in double, of the precision that the device sees.
std::vector<double> normals(int64_t count, uint64_t stream, double deviation, DType dtype) {
  std::vector<float> drawn(static_cast<size_t>(count));
  fill_normal(drawn, 7, stream, 0, 0, deviation);
  std::vector<double> values(drawn.begin(), drawn.end());
  if (dtype == DType::bf16) {
    for (double& value : values)
      value = static_cast<double>(static_cast<float>(bf16(static_cast<float>(value))));
  }
  return values;
}

// Logits [S, T, E]: every token alike in the first step (most experts get nothing), all experts alike in the
// second, random in the others.
std::vector<float> draw_logits(const Sizes& at, uint64_t stream) {
  std::vector<float> logits(static_cast<size_t>(at.steps * at.tokens * at.experts));
  fill_normal(logits, 8, stream);
  for (int64_t s = 0; s < std::min<int64_t>(at.steps, 2); ++s) {
    for (int64_t t = 0; t < at.tokens; ++t) {
      for (int64_t e = 0; e < at.experts; ++e) {
        const int64_t turn =
            s == 0 ? e * 5 % at.experts : (e + at.experts - t * at.top_k % at.experts) % at.experts;
        logits[static_cast<size_t>((s * at.tokens + t) * at.experts + e)] = -0.1f * static_cast<float>(turn);
      }
    }
  }
  return logits;
}

// The choices of one token, as choices.h says.
std::vector<int32_t> choices_of(const float* logits, const Sizes& at) {
  std::vector<int32_t> order(static_cast<size_t>(at.experts));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  order.resize(static_cast<size_t>(at.top_k));
  return order;
}

struct Weights {
  std::vector<double> x, gate, up, down;
  explicit Weights(const Sizes& at)
      : x(normals(at.tokens * at.width, 1, 1, DType::f32)),
        gate(normals(at.experts * at.hidden * at.width, 2, 1 / std::sqrt(at.width), at.weight)),
        up(normals(at.experts * at.hidden * at.width, 3, 1 / std::sqrt(at.width), at.weight)),
        down(normals(at.experts * at.width * at.hidden, 4, 1 / std::sqrt(at.hidden), at.weight)) {}
};

void multiply(const double* w, const std::vector<double>& x, std::vector<double>& out) {
  for (size_t n = 0; n < out.size(); ++n) {
    out[n] = std::inner_product(x.begin(), x.end(), w + n * x.size(), 0.0);
  }
}

// The layers of MoePlan, a token and a choice at a time: [S, T, D].
std::vector<double> by_loops(const Sizes& at, const Weights& weights,
                             const std::vector<std::vector<float>>& logits) {
  std::vector<double> results;
  const size_t width = static_cast<size_t>(at.width), hidden = static_cast<size_t>(at.hidden);
  std::vector<double> gate(hidden), up(hidden), y(width);
  for (int64_t row = 0; row < at.steps * at.tokens; ++row) {
    const double* first = weights.x.data() + row % at.tokens * at.width;
    std::vector<double> x(first, first + at.width);
    for (const std::vector<float>& layer : logits) {
      const float* scores = layer.data() + row * at.experts;
      std::vector<double> out(width);
      double sum = 0;
      for (int32_t e : choices_of(scores, at)) {
        const double weight = 1 / (1 + std::exp(-static_cast<double>(scores[e])));
        sum += weight;
        const size_t matrix = static_cast<size_t>(e) * hidden * width;
        multiply(&weights.gate[matrix], x, gate);
        multiply(&weights.up[matrix], x, up);
        for (size_t i = 0; i < hidden; ++i) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
        multiply(&weights.down[matrix], gate, y);
        for (size_t i = 0; i < width; ++i) out[i] += weight * y[i];
      }
      for (double& value : out) value /= sum;
      x = out;
    }
    results.insert(results.end(), x.begin(), x.end());
  }
  return results;
}

double relative_error(const std::vector<double>& found, const std::vector<double>& expected) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += (found[i] - expected[i]) * (found[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference / norm);
}

// Layers x = sum of experts down(silu(gate(x)) · up(x)), recorded through the model's own ops.
class MoePlan {
 public:
  explicit MoePlan(const Sizes& sizes) : at(sizes), plan(backend) {
    const DType activation = backend.activation_type(at.weight);
    step = plan.input("step", {1}, DType::i32);
    x = plan.input("x", {at.tokens, at.width}, activation);
    results = plan.input("results", {at.steps, at.tokens, at.width}, activation);
    gate = plan.input("gate", {at.experts, at.hidden, at.width}, at.weight);
    up = plan.input("up", {at.experts, at.hidden, at.width}, at.weight);
    down = plan.input("down", {at.experts, at.width, at.hidden}, at.weight);
    Tensor h = x;
    for (int64_t layer = 0; layer < at.layers; ++layer) {
      Tensor scores = plan.input("logits", {at.steps, at.tokens, at.experts}, DType::f32);
      Tensor weights = plan.intermediate({at.tokens, at.top_k}, DType::f32);
      Tensor experts = plan.intermediate({at.tokens, at.top_k}, DType::i32);
      plan.record("choose", {step, scores}, {weights, experts}, [=, this](Backend&) {
        ++host_visits;
        choose(step.view(), scores.view(), weights.view(), experts.view(), backend.stream());
      });
      order = expert_order(experts, at.experts);
      h = combine(expert_linear(expert_gated_linear(h, order, gate, up), order, down), weights, order);
      logits.push_back(scores);
    }
    plan.record("keep_result", {step, h}, {results}, [=, this](Backend&) {
      keep_result(step.view(), h.view(), results.view(), backend.stream());
    });
    plan.record("advance", {step}, {step}, [this](Backend&) { advance(step.view(), backend.stream()); });
    for (const Tensor& tensor : {order.offsets, order.rows, order.slots}) plan.keep(tensor);
    plan.compile();
    plan.allocate();
  }

  void fill(const Tensor& tensor, const std::vector<double>& values) {
    std::vector<char> bytes(static_cast<size_t>(tensor.view().bytes()));
    convert(DType::f64, values.data(), tensor.dtype(), bytes.data(), tensor.count());
    backend.upload(bytes.data(), tensor.view());
  }
  void fill(const Weights& weights, const std::vector<std::vector<float>>& all_logits) {
    fill(x, weights.x);
    fill(gate, weights.gate);
    fill(up, weights.up);
    fill(down, weights.down);
    for (size_t i = 0; i < logits.size(); ++i) backend.upload(all_logits[i].data(), logits[i].view());
  }
  // Back to step 0, with NaN where results will stand.
  void rewind() {
    const int32_t zero = 0;
    backend.upload(&zero, step.view());
    fill(results, std::vector<double>(static_cast<size_t>(results.count()), std::nan("")));
  }
  std::vector<double> read_results() {
    std::vector<char> bytes(static_cast<size_t>(results.view().bytes()));
    backend.download(results.view(), bytes.data());
    std::vector<double> values(static_cast<size_t>(results.count()));
    convert(results.dtype(), bytes.data(), DType::f64, values.data(), results.count());
    return values;
  }
  std::vector<int32_t> read_indices(const Tensor& tensor) {
    std::vector<int32_t> values(static_cast<size_t>(tensor.count()));
    backend.download(tensor.view(), values.data());
    return values;
  }

  Sizes at;
  cuda::CudaBackend backend;
  Plan plan;
  Tensor step, x, results, gate, up, down;
  std::vector<Tensor> logits;  // a layer each
  ExpertOrder order;           // of the last layer
  int64_t host_visits = 0;     // how often the host passed the nodes that choose
};

class PlanGraph : public testing::Test {
 protected:
  void SetUp() override {
    if (cuda::device_count() == 0) GTEST_SKIP() << "no CUDA device";
  }
  static std::vector<std::vector<float>> draw_all_logits(const Sizes& at) {
    std::vector<std::vector<float>> all;
    for (int64_t layer = 0; layer < at.layers; ++layer)
      all.push_back(draw_logits(at, static_cast<uint64_t>(layer)));
    return all;
  }
};

class PlanGraphSizes : public PlanGraph, public testing::WithParamInterface<Sizes> {};

TEST_P(PlanGraphSizes, ReplaysFollowChoicesThatOnlyTheDeviceKnows) {
  const Sizes at = GetParam();
  const Weights weights(at);
  const auto logits = draw_all_logits(at);
  MoePlan moe(at);
  moe.fill(weights, logits);

  moe.rewind();
  for (int64_t s = 0; s < at.steps; ++s) moe.plan.run_eagerly();
  const std::vector<double> eager = moe.read_results();

  moe.rewind();
  moe.host_visits = 0;
  const cuda::Graph graph(moe.backend.stream(), [&] { moe.plan.run_eagerly(); });
  EXPECT_EQ(graph.node_count(), static_cast<size_t>(7 * at.layers + 2));
  for (int64_t s = 0; s < at.steps; ++s) graph.launch(moe.backend.stream());
  const std::vector<double> replayed = moe.read_results();

  EXPECT_EQ(moe.host_visits, at.layers);  // the capture, no replay
  EXPECT_EQ(replayed, eager);
  EXPECT_LT(relative_error(replayed, by_loops(at, weights, logits)), at.weight == DType::bf16 ? 1e-2 : 2e-6);
}

TEST_P(PlanGraphSizes, OrderIsAStableSort) {
  const Sizes at = GetParam();
  const auto logits = draw_all_logits(at);
  MoePlan moe(at);
  moe.fill(Weights(at), logits);
  moe.rewind();
  const cuda::Graph graph(moe.backend.stream(), [&] { moe.plan.run_eagerly(); });
  for (int64_t s = 0; s < at.steps; ++s) {
    graph.launch(moe.backend.stream());
    std::vector<int32_t> experts;
    for (int64_t t = 0; t < at.tokens; ++t) {
      const auto chosen = choices_of(logits.back().data() + (s * at.tokens + t) * at.experts, at);
      experts.insert(experts.end(), chosen.begin(), chosen.end());
    }
    std::vector<int32_t> sorted(experts.size()), rows, slots(experts.size());
    std::iota(sorted.begin(), sorted.end(), 0);
    std::stable_sort(sorted.begin(), sorted.end(), [&](int32_t a, int32_t b) {
      return experts[static_cast<size_t>(a)] < experts[static_cast<size_t>(b)];
    });
    for (int32_t choice : sorted) {
      slots[static_cast<size_t>(choice)] = static_cast<int32_t>(rows.size());
      rows.push_back(choice / static_cast<int32_t>(at.top_k));
    }
    std::vector<int32_t> offsets{0};
    for (int32_t e = 0; e < at.experts; ++e) {
      offsets.push_back(offsets.back() + static_cast<int32_t>(std::count(experts.begin(), experts.end(), e)));
    }
    EXPECT_EQ(moe.read_indices(moe.order.offsets), offsets) << "step " << s;
    EXPECT_EQ(moe.read_indices(moe.order.rows), rows) << "step " << s;
    EXPECT_EQ(moe.read_indices(moe.order.slots), slots) << "step " << s;
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, PlanGraphSizes,
                         testing::Values(Sizes{37, 37, 5, 72, 40, 2, 6}, Sizes{200, 8, 2, 130, 65, 1, 5},
                                         Sizes{1, 256, 8, 64, 64, 2, 8},
                                         Sizes{150, 70, 6, 48, 80, 2, 5, DType::bf16}),
                         [](const auto& shape) { return label(shape.param); });

// The same bits whatever the batch.
TEST_F(PlanGraph, ATokenAloneGetsTheResultItHasInABatch) {
  const Sizes batch{70, 16, 4, 80, 48, 2, 4};
  Sizes single = batch;
  single.tokens = 1;
  Weights weights(batch);
  auto logits = draw_all_logits(batch);
  MoePlan many(batch), one(single);
  many.fill(weights, logits);
  many.rewind();
  for (int64_t s = 0; s < batch.steps; ++s) many.plan.run_eagerly();
  const std::vector<double> all = many.read_results();

  for (int64_t t : {int64_t{0}, int64_t{33}, int64_t{69}}) {
    Weights own = weights;
    own.x.assign(weights.x.begin() + t * batch.width, weights.x.begin() + (t + 1) * batch.width);
    std::vector<std::vector<float>> own_logits(logits.size());
    for (size_t layer = 0; layer < logits.size(); ++layer) {
      for (int64_t s = 0; s < batch.steps; ++s) {
        const auto first = logits[layer].begin() + (s * batch.tokens + t) * batch.experts;
        own_logits[layer].insert(own_logits[layer].end(), first, first + batch.experts);
      }
    }
    one.fill(own, own_logits);
    one.rewind();
    for (int64_t s = 0; s < batch.steps; ++s) one.plan.run_eagerly();
    const std::vector<double> alone = one.read_results();
    for (int64_t s = 0; s < batch.steps; ++s) {
      for (int64_t d = 0; d < batch.width; ++d) {
        ASSERT_EQ(alone[static_cast<size_t>(s * batch.width + d)],
                  all[static_cast<size_t>((s * batch.tokens + t) * batch.width + d)]);
      }
    }
  }
}

TEST_F(PlanGraph, ACaptureThatWaitsOrAllocatesThrowsAndTheStreamSurvives) {
  const Sizes at{4, 8, 2, 16, 16, 1, 2};
  const Weights weights(at);
  const auto logits = draw_all_logits(at);
  MoePlan moe(at);
  moe.fill(weights, logits);
  moe.rewind();
  const cuda::Stream& stream = moe.backend.stream();
  EXPECT_THROW(cuda::Graph(stream, [&] { stream.synchronize(); }), Error);
  EXPECT_THROW(cuda::Graph(stream, [&] { cuda::allocate(1024); }), Error);
  EXPECT_THROW(cuda::Graph(stream, [&] { throw std::logic_error("not CUDA's"); }), std::logic_error);
  for (int64_t s = 0; s < at.steps; ++s) moe.plan.run_eagerly();
  EXPECT_LT(relative_error(moe.read_results(), by_loops(at, weights, logits)), 2e-6);
}

// Prints what a run costs, as a loop over the nodes and as a graph; decides nothing by it.
TEST_F(PlanGraph, Timings) {
  using Clock = std::chrono::steady_clock;
  using Microseconds = std::chrono::duration<double, std::micro>;
  constexpr int repeats = 60;
  auto median = [](std::vector<double>& values) {
    std::nth_element(values.begin(), values.begin() + repeats / 2, values.end());
    return values[repeats / 2];
  };
  std::printf("%-44s %8s %21s %21s\n", "", "", "eager, us", "graph, us");
  std::printf("%-44s %8s %10s %10s %10s %10s\n", "", "kernels", "queued", "done", "queued", "done");
  for (const Sizes& at :
       {Sizes{1, 64, 6, 256, 128, 26, 1, DType::bf16}, Sizes{1, 64, 6, 2048, 1408, 26, 1, DType::bf16},
        Sizes{64, 64, 6, 2048, 1408, 26, 1, DType::bf16},
        Sizes{1024, 64, 6, 2048, 1408, 4, 1, DType::bf16}}) {
    MoePlan moe(at);
    // One expert's weights for all: values do not change the time.
    std::vector<float> pattern(static_cast<size_t>(at.hidden * at.width));
    fill_normal(pattern, 9, 0, 0, 0, 1 / std::sqrt(at.width));
    std::vector<bf16> narrow(pattern.begin(), pattern.end());
    for (const Tensor& tensor : {moe.gate, moe.up, moe.down}) {
      for (int64_t e = 0; e < at.experts; ++e) {
        moe.backend.upload(narrow.data(),
                           View(tensor.rows(e, e + 1).view().data, {at.hidden * at.width}, DType::bf16));
      }
    }
    moe.fill(moe.x, normals(at.tokens * at.width, 1, 1, DType::f32));
    for (int64_t layer = 0; layer < at.layers; ++layer) {
      std::vector<float> drawn(static_cast<size_t>(at.tokens * at.experts));
      fill_normal(drawn, 8, static_cast<uint64_t>(layer));
      moe.backend.upload(drawn.data(), moe.logits[static_cast<size_t>(layer)].view());
    }
    const cuda::Stream& stream = moe.backend.stream();
    const cuda::Graph graph(stream, [&] { moe.plan.run_eagerly(); });
    std::vector<double> eager_queued, eager_done, graph_queued, graph_done;
    for (int i = -5; i < repeats; ++i) {  // the first five warm up
      auto time = [&](auto&& work, std::vector<double>& queued, std::vector<double>& done) {
        moe.rewind();
        const Clock::time_point start = Clock::now();
        work();
        const Clock::time_point middle = Clock::now();
        stream.synchronize();
        if (i < 0) return;
        queued.push_back(Microseconds(middle - start).count());
        done.push_back(Microseconds(Clock::now() - start).count());
      };
      time([&] { moe.plan.run_eagerly(); }, eager_queued, eager_done);
      time([&] { graph.launch(stream); }, graph_queued, graph_done);
    }
    std::printf("T %4d, E %d, K %d, D %4d, F %4d, %2d layers    %8zu %10.1f %10.1f %10.1f %10.1f\n",
                static_cast<int>(at.tokens), static_cast<int>(at.experts), static_cast<int>(at.top_k),
                static_cast<int>(at.width), static_cast<int>(at.hidden), static_cast<int>(at.layers),
                graph.node_count(), median(eager_queued), median(eager_done), median(graph_queued),
                median(graph_done));
  }
}

}  // namespace
}  // namespace latente
