#include "ops/support.h"

namespace latente::test {
namespace {

Numbers normed(const Numbers& x, const Numbers& weight, double eps) {
  size_t n = weight.size();
  Numbers out(x.size());
  for (size_t t = 0; t < x.size() / n; ++t) {
    double sum = 0;
    for (size_t i = 0; i < n; ++i) sum += x[t * n + i] * x[t * n + i];
    for (size_t i = 0; i < n; ++i)
      out[t * n + i] = x[t * n + i] / std::sqrt(sum / static_cast<double>(n) + eps) * weight[i];
  }
  return out;
}

TEST(RmsNorm, MatchesItsDefinition) {
  std::vector<Shape> shapes = {{1, 1}, {3, 5}, {40, 33}};
  if (on_cuda) shapes.insert(shapes.end(), {{70, 64}, {1300, 128}, {9, 1024}, {5, 2056}, {3, 7168}});
  for (Shape shape : shapes) {
    std::vector<Input> inputs = {random_input(shape, 1), random_input({shape[1]}, 2)};
    auto out = check(inputs, [](Plan& plan, const std::vector<Tensor>& p) {
      return Graph{{rms_norm(leaf(plan, p[0]), p[1], 1e-3)}, {}};
    });
    expect_close(out[0], normed(inputs[0].values, inputs[1].values, 1e-3), 1e-13, "rms_norm");
  }
}

TEST(RmsNorm, OfColumns) {
  std::vector<Input> inputs = {random_input({6, 12}, 3), random_input({5}, 4), random_input({4}, 5)};
  check(inputs, [](Plan& plan, const std::vector<Tensor>& p) {
    Tensor x = leaf(plan, p[0]);
    return Graph{{rms_norm(x.columns(0, 5), p[1], 1e-6), rms_norm(x.columns(6, 10), p[2], 1e-6)}, {}};
  });
}

TEST(RmsNormAdd, GivesSumAndNorm) {
  std::vector<Input> inputs = {random_input({7, 19}, 6), random_input({7, 19}, 7), random_input({19}, 8)};
  auto both = [](Plan& plan, const std::vector<Tensor>& p) {
    SumAndNorm y = rms_norm_add(leaf(plan, p[0]), leaf(plan, p[1]), p[2], 1e-5);
    return Graph{{y.sum, y.out}, {}};
  };
  auto out = check(inputs, both);
  Numbers sum(inputs[0].values);
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += inputs[1].values[i];
  EXPECT_EQ(out[0], sum);
  expect_close(out[1], normed(sum, inputs[2].values, 1e-5), 1e-13, "rms_norm_add");
}

TEST(RmsNormAdd, WithOneResultUnused) {
  std::vector<Input> inputs = {random_input({3, 6}, 6), random_input({3, 6}, 7), random_input({6}, 8)};
  for (bool sum : {false, true}) {
    check(inputs, [sum](Plan& plan, const std::vector<Tensor>& p) {
      SumAndNorm y = rms_norm_add(leaf(plan, p[0]), leaf(plan, p[1]), p[2], 1e-5);
      return Graph{{sum ? y.sum : y.out}, {}};
    });
  }
}

// The residual stream of a transformer: every sum is used by the next norm and by the next sum.
TEST(RmsNormAdd, AsAResidualStream) {
  std::vector<Input> inputs = {random_input({4, 6}, 6), random_input({6, 6}, 7), random_input({6}, 8),
                               random_input({6}, 9)};
  check(inputs, [](Plan& plan, const std::vector<Tensor>& p) {
    Tensor h = leaf(plan, p[0]);
    Tensor pending = linear(rms_norm(h, p[2], 1e-6), p[1]);
    for (int layer = 0; layer < 3; ++layer) {
      SumAndNorm y = rms_norm_add(h, pending, p[3], 1e-6);
      h = y.sum;
      pending = linear(y.out, p[1]);
    }
    return Graph{{add(h, pending)}, {}};
  });
}

TEST(RmsNormAdd, OfAValueWithItself) {
  std::vector<Input> inputs = {random_input({3, 6}, 6), random_input({6}, 8)};
  check(inputs, [](Plan& plan, const std::vector<Tensor>& p) {
    Tensor x = leaf(plan, p[0]);
    SumAndNorm y = rms_norm_add(x, x, p[1], 1e-5);
    return Graph{{y.sum, y.out}, {}};
  });
}

}  // namespace
}  // namespace latente::test
