#include <numbers>

#include "ops/support.h"

namespace latente::test {
namespace {

// Angles of any size: cosines and sines need not come from a formula.
Tensor table_of(int64_t positions, int64_t width) {
  Tensor table = buffer({positions, width}, DType::f32);
  Random random(77);
  float* row = table.view().as<float>();
  for (int64_t p = 0; p < positions; ++p, row += width) {
    for (int64_t i = 0; i < width / 2; ++i) {
      double angle = random.uniform(0, 2 * std::numbers::pi);
      row[i] = static_cast<float>(std::cos(angle));
      row[width / 2 + i] = static_cast<float>(std::sin(angle));
    }
  }
  return table;
}

Numbers rotated(Numbers x, const std::vector<int32_t>& positions, const Tensor& table, int64_t heads,
                int64_t width, bool interleaved) {
  int64_t rope = table[1], half = rope / 2;
  for (size_t t = 0; t < positions.size(); ++t) {
    const float* row = table.view().as<float>() + positions[t] * rope;
    for (int64_t h = 0; h < heads; ++h) {
      double* at = x.data() + (static_cast<int64_t>(t) * heads + h) * width + width - rope;
      for (int64_t i = 0; i < half; ++i) {
        double& a = at[interleaved ? 2 * i : i];
        double& b = at[interleaved ? 2 * i + 1 : i + half];
        double c = static_cast<double>(row[i]), s = static_cast<double>(row[half + i]), before = a;
        a = a * c - b * s;
        b = before * s + b * c;
      }
    }
  }
  return x;
}

TEST(Rope, RotatesTheLastColumns) {
  const std::vector<int32_t> positions = {3, 0, 3, 9, 1};
  for (bool interleaved : {false, true}) {
    for (int64_t rope_width : {2, 6, 24, 64}) {
      for (int64_t rest : {0, 3, 8}) {
        int64_t width = rope_width + rest;
        std::vector<Input> inputs = {random_input({5, 3 * width}, 1)};
        Tensor table = table_of(10, rope_width);
        auto out = check(inputs, [&](Plan& plan, const std::vector<Tensor>& p) {
          Tensor x = leaf(plan, p[0]).reshape({5, 3, width});
          return Graph{{rope(x, indices(plan, {5}, positions), on_device(plan, table), interleaved)}, {}};
        });
        expect_close(out[0], rotated(inputs[0].values, positions, table, 3, width, interleaved), 1e-13,
                     "rope");
      }
    }
  }
}

// As in MLA: one product holds the latent and the rotary key; the norm reads one part, rope changes the
// other.
TEST(Rope, OfColumnsBesideOthers) {
  std::vector<Input> inputs = {random_input({4, 5}, 1), random_input({11, 5}, 2), random_input({7}, 3)};
  Tensor table = table_of(6, 4);
  check(inputs, [&](Plan& plan, const std::vector<Tensor>& p) {
    Tensor kv = linear(leaf(plan, p[0]), p[1]);
    Tensor latent = rms_norm(kv.columns(0, 7), p[2], 1e-6);
    Tensor key = rope(kv.columns(7, 11).reshape({4, 1, 4}), indices(plan, {4}, {5, 1, 0, 2}),
                      on_device(plan, table), true);
    return Graph{{latent, key}, {}};
  });
}

// The rotated value is used twice, and its gradient buffer would be shared with the sum's.
TEST(Rope, DoesNotRotateAGradientThatOthersStillRead) {
  std::vector<Input> inputs = {random_input({3, 4}, 1), random_input({3, 4}, 2)};
  Tensor table = table_of(6, 4);
  check(inputs, [&](Plan& plan, const std::vector<Tensor>& p) {
    Tensor a = leaf(plan, p[0]), b = leaf(plan, p[1]);
    Tensor r = rope(a.reshape({3, 1, 4}), indices(plan, {3}, {5, 1, 2}), on_device(plan, table), false)
                   .reshape({3, 4});
    Tensor sum = add(r, b);
    return Graph{{add(sum, r), add(sum, b)}, {}};
  });
}

TEST(Rope, RefusesToLetTheOldValueBeRead) {
  Plan plan(backend(), {.training = true});
  Tensor table = table_of(6, 4);
  Tensor x = leaf(plan, buffer({3, 4}, DType::f32));
  rope(x.reshape({3, 1, 4}), indices(plan, {3}, {5, 1, 2}), table, false);
  add(x, x);
  EXPECT_THROW(plan.compile(), std::logic_error);
}

}  // namespace
}  // namespace latente::test
