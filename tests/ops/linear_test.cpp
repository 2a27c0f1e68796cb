#include "ops/support.h"

namespace latente::test {
namespace {

TEST(LinearOp, WithAndWithoutBias) {
  for (int64_t rows : {1, 5}) {
    std::vector<Input> inputs = {random_input({rows, 7}, 1), random_input({4, 7}, 2), exact_input({4}, 3)};
    auto out = check(inputs, [](Plan& plan, const std::vector<Tensor>& p) {
      Tensor x = leaf(plan, p[0]);
      return Graph{{linear(x, p[1]), linear(x, p[1], p[2])}, {}};
    });
    Numbers want = product(inputs[0].values, inputs[1].values, rows, 4, 7);
    expect_close(out[0], want, 1e-13, "linear");
    for (size_t i = 0; i < want.size(); ++i) want[i] += inputs[2].values[i % 4];
    expect_close(out[1], want, 1e-13, "linear with bias");
  }
}

// Sizes of several tiles on a device, whole and cut.
TEST(LinearOp, OfManySizes) {
  struct Sizes {
    int64_t rows, width, out;
  };
  std::vector<Sizes> all = {{3, 8, 16}};
  if (on_cuda)
    all = {{1, 64, 8}, {16, 72, 136}, {40, 200, 64}, {128, 128, 128}, {300, 264, 392}, {130, 40, 24}};
  for (const auto& [rows, width, out] : all) {
    SCOPED_TRACE(fmt::format("{} x {} x {}", rows, width, out));
    check({random_input({rows, width}, 1), random_input({out, width}, 2, 0.2), exact_input({out}, 3)},
          [](Plan& plan, const std::vector<Tensor>& p) {
            Tensor x = leaf(plan, p[0]);
            Tensor y = linear(x, p[1], p[2]);
            return Graph{{y, linear_onto(linear(x, p[1]), x, p[1])}, {}};
          });
  }
}

TEST(LinearOp, OfColumnsOfValueAndWeight) {
  std::vector<Input> inputs = {random_input({5, 9}, 1), random_input({4, 9}, 2)};
  check(inputs, [](Plan& plan, const std::vector<Tensor>& p) {
    Tensor x = leaf(plan, p[0]);
    Tensor left = linear(x.columns(0, 4), p[1].columns(0, 4));
    Tensor whole = linear_onto(left, x.columns(4, 9), p[1].columns(4, 9));
    return Graph{{whole, linear(x.columns(2, 6), p[1].columns(3, 7))}, {}};
  });
}

TEST(LinearOp, OfRowsOfAWeightUsedTwice) {
  std::vector<Input> inputs = {random_input({3, 4}, 1), random_input({6, 4}, 2)};
  check(inputs, [](Plan& plan, const std::vector<Tensor>& p) {
    Tensor x = leaf(plan, p[0]);
    Tensor y = linear(x, p[1].rows(1, 5));
    return Graph{{linear(y, p[1].rows(0, 4)), y}, {}};
  });
}

TEST(LinearOp, WithoutGradientOfTheInput) {
  std::vector<Input> inputs = {random_input({4, 7}, 2), exact_input({4}, 3)};
  check(inputs, [](Plan& plan, const std::vector<Tensor>& p) {
    Tensor x = constant(plan, {5, 7}, p[0].dtype(), normal(35, 9));
    return Graph{{linear(x, p[0], p[1])}, {}};
  });
}

TEST(LinearOnto, AddsInPlace) {
  std::vector<Input> inputs = {random_input({5, 4}, 1), random_input({5, 7}, 2), random_input({4, 7}, 3)};
  auto out = check(inputs, [](Plan& plan, const std::vector<Tensor>& p) {
    Tensor base = leaf(plan, p[0]), x = leaf(plan, p[1]);
    return Graph{{linear_onto(linear_onto(base, x, p[2]), x, p[2])}, {}};
  });
  Numbers want = product(inputs[1].values, inputs[2].values, 5, 4, 7);
  for (size_t i = 0; i < want.size(); ++i) want[i] = inputs[0].values[i] + 2 * want[i];
  expect_close(out[0], want, 1e-13, "linear_onto");
}

// The base's gradient is out's, and the branch starts from a value that shares it.
TEST(LinearOnto, OntoASumOfItsOwnInput) {
  std::vector<Input> inputs = {random_input({3, 4}, 1), random_input({3, 4}, 2), random_input({4, 4}, 3)};
  check(inputs, [](Plan& plan, const std::vector<Tensor>& p) {
    Tensor x = leaf(plan, p[0]), y = leaf(plan, p[1]);
    Tensor out = linear_onto(add(x, y), x, p[2]);
    return Graph{{add(out, x), swiglu(out, y)}, {}};
  });
}

TEST(LinearOnto, RefusesABaseThatItsReadersStillNeed) {
  Plan plan(backend(), {.training = true});
  Tensor weight = parameter({4, 4}, DType::f32), scale = parameter({4}, DType::f32);
  Tensor base = linear(constant(plan, {3, 4}, DType::f32, normal(12, 1)), weight);
  Tensor x = rms_norm(base, scale, 1e-6);  // its gradient reads base
  Tensor out = linear_onto(base, x, weight);
  plan.backward({probe(plan, out, 5)});
  EXPECT_THROW(plan.compile(), std::logic_error);
}

TEST(HeadLinear, MatchesLoops) {
  for (DType dtype : dtypes()) {
    for (bool transpose : {false, true}) {
      Numbers x = normal(5 * 3 * 4, 1), w = normal(3 * 4 * 6, 2);
      Plan plan(backend());
      Tensor xs = constant(plan, {5, 3, 4}, dtype, x);
      Tensor ws = constant(plan, transpose ? Shape{3, 4, 6} : Shape{3, 6, 4}, dtype, w);
      Tensor out = head_linear(xs, ws, transpose);
      plan.keep(out);
      plan.compile();
      plan.allocate();
      plan.run();
      Numbers want(5 * 3 * 6, 0.0);
      for (size_t t = 0; t < 5; ++t) {
        for (size_t h = 0; h < 3; ++h) {
          for (size_t n = 0; n < 6; ++n) {
            for (size_t k = 0; k < 4; ++k) {
              want[(t * 3 + h) * 6 + n] +=
                  x[(t * 3 + h) * 4 + k] * (transpose ? w[(h * 4 + k) * 6 + n] : w[(h * 6 + n) * 4 + k]);
            }
          }
        }
      }
      expect_close(read(out.view()), want, tolerance_of(dtype, 1e-13, 1e-6), "head_linear");
    }
  }
}

}  // namespace
}  // namespace latente::test
