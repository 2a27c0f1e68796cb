#include "ops/support.h"

namespace latente::test {
namespace {

struct Case {
  int64_t tokens, width, vocabulary;
};

TEST(LinearCrossEntropy, LossAndGradients) {
  for (const Case& c :
       {Case{1, 3, 5}, Case{6, 4, 9}, Case{on_cuda ? 9000 : 1100, 2, 5}}) {  // the last in several chunks
    std::vector<Input> inputs = {random_input({c.tokens, c.width}, 1),
                                 random_input({c.vocabulary, c.width}, 2)};
    std::vector<int32_t> targets;
    Numbers weights;
    for (int64_t t = 0; t < c.tokens; ++t) {
      targets.push_back(static_cast<int32_t>(t % 4 == 2 ? -1 : t * 7 % c.vocabulary));
      weights.push_back(t % 5 == 3 ? 0.0 : as_tested(0.1 + static_cast<double>(t % 3)));
    }
    auto build = [&](Plan& plan, const std::vector<Tensor>& p) {
      Tensor factors = constant(plan, {c.tokens}, exact_type(p[0].dtype()), weights);
      return Graph{
          {},
          {linear_cross_entropy(leaf(plan, p[0]), p[1], indices(plan, {c.tokens}, targets), factors).loss}};
    };
    check(inputs, build, 1e-6, 1e-4);

    Numbers logits = product(inputs[0].values, inputs[1].values, c.tokens, c.vocabulary, c.width);
    double loss = 0;
    Numbers nll, predicted;
    for (size_t t = 0; t < targets.size(); ++t) {
      const double* row = logits.data() + t * static_cast<size_t>(c.vocabulary);
      double sum = 0;
      int64_t best = 0;
      for (int64_t i = 0; i < c.vocabulary; ++i) {
        sum += std::exp(row[i]);
        if (row[i] > row[best]) best = i;
      }
      nll.push_back(targets[t] < 0 ? 0.0 : std::log(sum) - row[targets[t]]);
      predicted.push_back(static_cast<double>(best));
      loss += weights[t] * nll.back();
    }
    for (bool training : {false, true}) {
      const DType dtype = dtypes().front();
      const double tolerance = tolerance_of(dtype, 1e-12, 1e-5);
      Plan plan(backend(), {.training = training});
      Tensor h = parameter(inputs[0].shape, dtype), w = parameter(inputs[1].shape, dtype);
      for (size_t i = 0; i < 2; ++i) {
        allocate(backend(), i == 0 ? h : w);
        write((i == 0 ? h : w).view(), inputs[i].values);
      }
      CrossEntropy out = linear_cross_entropy(leaf(plan, h), w, indices(plan, {c.tokens}, targets),
                                              constant(plan, {c.tokens}, dtype, weights));
      plan.keep(out.loss), plan.keep(out.nll), plan.keep(out.predicted);
      if (training) {
        plan.backward({out.loss});
        allocate(backend(), Tensor(h.value().grad)), allocate(backend(), Tensor(w.value().grad));
      }
      plan.compile();
      plan.allocate();
      plan.run();
      expect_close(read(out.nll.view()), nll, tolerance, "nll");
      EXPECT_NEAR(read(out.loss.view())[0], loss, tolerance * (10 * std::abs(loss) + 1));
      EXPECT_EQ(read(out.predicted.view()), predicted);
    }
  }
}

// Two losses over one head that is also the embedding, as with multi-token prediction and tied weights.
TEST(LinearCrossEntropy, TwiceOverATiedHead) {
  std::vector<Input> inputs = {random_input({7, 4}, 1), random_input({4, 4}, 2), random_input({4}, 3)};
  check(
      inputs,
      [&](Plan& plan, const std::vector<Tensor>& p) {
        auto loss = [&](const Tensor& h, const std::vector<int32_t>& targets) {
          return linear_cross_entropy(h, p[0], indices(plan, {3}, targets),
                                      constant(plan, {3}, exact_type(p[0].dtype()), {1, 0.5, 2}))
              .loss;
        };
        Tensor h = embedding(indices(plan, {3}, {0, 6, 0}), p[0]);
        Tensor next = add(rms_norm(h, p[2], 1e-6), linear(h, p[1]));
        return Graph{{}, {loss(h, {1, 2, 6}), loss(next, {3, -1, 4})}};
      },
      1e-7, 5e-5);
}

}  // namespace
}  // namespace latente::test
