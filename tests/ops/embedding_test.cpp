#include "ops/support.h"

namespace latente::test {
namespace {

TEST(EmbeddingOp, PicksRowsAndAddsTheirGradients) {
  std::vector<Input> inputs = {random_input({5, 7}, 1)};
  const std::vector<int32_t> ids = {4, 0, 4, 2, 4, 0};
  auto out = check(inputs, [&](Plan& plan, const std::vector<Tensor>& p) {
    return Graph{{embedding(indices(plan, {6}, ids), p[0])}, {}};
  });
  for (size_t t = 0; t < ids.size(); ++t) {
    for (size_t i = 0; i < 7; ++i)
      EXPECT_EQ(out[0][t * 7 + i], inputs[0].values[static_cast<size_t>(ids[t]) * 7 + i]);
  }
}

// Rows used often, far apart, and by whole packs of columns.
TEST(EmbeddingOp, OfManyIds) {
  const int64_t count = on_cuda ? 3000 : 30, width = on_cuda ? 72 : 3;
  std::vector<int32_t> ids;
  Random random(4);
  for (int64_t i = 0; i < count; ++i)
    ids.push_back(static_cast<int32_t>(random.chance(0.3) ? 7 : random.below(50)));
  check({random_input({50, width}, 1)}, [&](Plan& plan, const std::vector<Tensor>& p) {
    return Graph{{embedding(indices(plan, {count}, ids), p[0])}, {}};
  });
}

TEST(EmbeddingOp, OfATableUsedTwiceAndTiedToTheHead) {
  std::vector<Input> inputs = {random_input({6, 4}, 2)};
  check(inputs, [&](Plan& plan, const std::vector<Tensor>& p) {
    Tensor a = embedding(indices(plan, {3}, {1, 5, 1}), p[0]);
    Tensor b = embedding(indices(plan, {3}, {0, 1, 2}), p[0]);
    return Graph{{linear(add(a, b), p[0])}, {}};
  });
}

TEST(SelectRows, OfAValueAndOfItsColumns) {
  std::vector<Input> inputs = {random_input({6, 8}, 3)};
  const std::vector<int32_t> rows = {5, 0, 0, 3};
  auto out = check(inputs, [&](Plan& plan, const std::vector<Tensor>& p) {
    Tensor x = leaf(plan, p[0]), at = indices(plan, {4}, rows);
    return Graph{{select_rows(x, at), select_rows(x.columns(2, 5), at)}, {}};
  });
  for (size_t t = 0; t < rows.size(); ++t) {
    for (size_t i = 0; i < 8; ++i)
      EXPECT_EQ(out[0][t * 8 + i], inputs[0].values[static_cast<size_t>(rows[t]) * 8 + i]);
    for (size_t i = 0; i < 3; ++i)
      EXPECT_EQ(out[1][t * 3 + i], inputs[0].values[static_cast<size_t>(rows[t]) * 8 + 2 + i]);
  }
}

}  // namespace
}  // namespace latente::test
