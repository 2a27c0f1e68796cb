#include "ops/support.h"

namespace latente::test {
namespace {

double silu(double x) { return x / (1 + std::exp(-x)); }

TEST(Add, SumsAndSharesItsGradient) {
  for (Shape shape : {Shape{1, 1}, Shape{3, 7}, Shape{5, 64}, Shape{2, 3, 4}}) {
    std::vector<Input> inputs = {random_input(shape, 1), random_input(shape, 2)};
    auto out = check(inputs, [](Plan& plan, const std::vector<Tensor>& p) {
      return Graph{{add(leaf(plan, p[0]), leaf(plan, p[1]))}, {}};
    });
    for (size_t i = 0; i < out[0].size(); ++i)
      EXPECT_EQ(out[0][i], inputs[0].values[i] + inputs[1].values[i]);
  }
}

TEST(Add, OfAValueWithItself) {
  std::vector<Input> inputs = {random_input({3, 5}, 1)};
  auto out = check(inputs, [](Plan& plan, const std::vector<Tensor>& p) {
    Tensor x = leaf(plan, p[0]);
    return Graph{{add(x, x), add(x, add(x, x))}, {}};
  });
  for (size_t i = 0; i < out[0].size(); ++i) EXPECT_EQ(out[0][i], 2 * inputs[0].values[i]);
}

// The residual connection: x's gradient is out's until the branch adds to it.
TEST(Add, AroundAnOpOfTheSameShape) {
  std::vector<Input> inputs = {random_input({4, 6}, 1), random_input({6, 6}, 2), random_input({6}, 3)};
  check(inputs, [](Plan& plan, const std::vector<Tensor>& p) {
    Tensor x = leaf(plan, p[0]);
    Tensor y = add(x, linear(x, p[1]));
    Tensor z = add(rms_norm(y, p[2], 1e-6), y);
    return Graph{{add(z, swiglu(z, y))}, {}};
  });
}

TEST(Add, OfSlices) {
  std::vector<Input> inputs = {random_input({4, 10}, 1), random_input({4, 3}, 2)};
  auto out = check(inputs, [](Plan& plan, const std::vector<Tensor>& p) {
    Tensor x = leaf(plan, p[0]), y = leaf(plan, p[1]);
    return Graph{{add(x.columns(0, 3), y), add(x.columns(5, 8), x.columns(3, 6))}, {}};
  });
  for (size_t t = 0; t < 4; ++t) {
    for (size_t i = 0; i < 3; ++i)
      EXPECT_EQ(out[0][t * 3 + i], inputs[0].values[t * 10 + i] + inputs[1].values[t * 3 + i]);
  }
}

TEST(Swiglu, MatchesItsDefinition) {
  for (Shape shape : {Shape{1, 1}, Shape{4, 9}, Shape{3, 32}}) {
    std::vector<Input> inputs = {random_input(shape, 3, 3.0), random_input(shape, 4)};
    auto out = check(inputs, [](Plan& plan, const std::vector<Tensor>& p) {
      return Graph{{swiglu(leaf(plan, p[0]), leaf(plan, p[1]))}, {}};
    });
    for (size_t i = 0; i < out[0].size(); ++i)
      EXPECT_NEAR(out[0][i], silu(inputs[0].values[i]) * inputs[1].values[i], 1e-14);
  }
}

TEST(Swiglu, OfColumnsOfOneProduct) {
  std::vector<Input> inputs = {random_input({5, 14}, 5)};
  auto out = check(inputs, [](Plan& plan, const std::vector<Tensor>& p) {
    Tensor x = leaf(plan, p[0]);
    Tensor y = swiglu(x.columns(0, 6), x.columns(6, 12));  // the last two columns are nobody's
    return Graph{{y, swiglu(y, y)}, {}};
  });
  for (size_t t = 0; t < 5; ++t) {
    for (size_t i = 0; i < 6; ++i)
      EXPECT_NEAR(out[0][t * 6 + i], silu(inputs[0].values[t * 14 + i]) * inputs[0].values[t * 14 + 6 + i],
                  1e-14);
  }
}

TEST(Swiglu, OfExtremes) {
  for (DType dtype : dtypes()) {
    Plan plan(backend());
    Tensor gate = constant(plan, {1, 5}, dtype, {-1e4, -100, 0, 100, 1e4});
    Tensor up = constant(plan, {1, 5}, dtype, {1, 1, 1, 1, 1});
    Tensor out = swiglu(gate, up);
    plan.keep(out);
    plan.compile();
    plan.allocate();
    plan.run();
    expect_close(read(out.view()), {0, 0, 0, 100, 1e4}, tolerance_of(dtype, 1e-7, 1e-7), "swiglu");
  }
}

}  // namespace
}  // namespace latente::test
