// The same bits whatever the batch: a row of a product does not depend on how many rows there are.
#include "cuda/backend.h"
#include "ops/ops.h"
#include "tensor/device.h"

#include <gtest/gtest.h>

#include "base/random.h"

namespace latente {
namespace {

class CudaRows : public testing::TestWithParam<DType> {
 protected:
  Tensor normals(Shape shape, uint64_t seed, DType type) {
    Random random(seed);
    std::vector<double> values(static_cast<size_t>(shape.count()));
    for (double& x : values) x = random.normal();
    Tensor tensor = buffer(device_, shape, type);
    HostWriter writer(device_, tensor.view());
    convert(DType::f64, values.data(), type, writer.view().data, shape.count());
    writer.finish();
    return tensor;
  }
  std::vector<double> read(const Tensor& tensor) {
    std::vector<double> values(static_cast<size_t>(tensor.count()));
    convert(tensor.dtype(), on_host(device_, tensor.view()).view.data, DType::f64, values.data(),
            tensor.count());
    return values;
  }

  cuda::CudaBackend device_;
};

TEST_P(CudaRows, OfALinear) {
  const DType type = GetParam();
  for (const int64_t depth : {64, 520}) {
    const int64_t rows = 200, columns = 136;
    const Tensor x = normals({rows, depth}, 1, type), w = normals({columns, depth}, 2, type);
    const Tensor all = buffer(device_, {rows, columns}, DType::f32);
    device_.linear(x.view(), w.view(), {}, {all.view(), false});
    const std::vector<double> want = read(all);
    for (const int64_t count : {1, 2, 16, 17, 32, 33, 64, 128, 129}) {
      const Tensor some = buffer(device_, {count, columns}, DType::f32);
      const int64_t first = rows - count;
      device_.linear(x.rows(first, rows).view(), w.view(), {}, {some.view(), false});
      const std::vector<double> got = read(some);
      EXPECT_TRUE(std::equal(got.begin(), got.end(), want.begin() + first * columns)) << count << " rows";
    }
  }
}

TEST_P(CudaRows, OfExperts) {
  const DType type = GetParam();
  const int64_t tokens = 300, depth = 72, columns = 64, experts = 4, top_k = 2;
  const Tensor x = normals({tokens, depth}, 1, type), w = normals({experts, columns, depth}, 2, type);
  std::vector<int32_t> chosen;
  Random random(5);
  for (int64_t i = 0; i < tokens * top_k; ++i) chosen.push_back(static_cast<int32_t>(random.below(experts)));
  // The sum over a token's choices of their products.
  auto run = [&](int64_t count) {
    const Tensor choices = buffer(device_, {count, top_k}, DType::i32);
    device_.upload(chosen.data(), choices.view());
    const Tensor offsets = buffer(device_, {experts + 1}, DType::i32);
    const Tensor rows = buffer(device_, {count * top_k}, DType::i32);
    const Tensor slots = buffer(device_, {count, top_k}, DType::i32);
    device_.expert_order(choices.view(), offsets.view(), rows.view(), slots.view());
    const Tensor y = buffer(device_, {count * top_k, columns}, type);
    device_.grouped_linear(x.rows(0, count).view(), rows.view(), offsets.view(), w.view(), y.view());
    const Tensor out = buffer(device_, {count, columns}, type);
    device_.combine(y.view(), {}, slots.view(), {out.view(), false});
    return read(out);
  };
  const std::vector<double> want = run(tokens);
  for (const int64_t count : {1, 3, 40, 150}) {
    const std::vector<double> got = run(count);
    EXPECT_TRUE(std::equal(got.begin(), got.end(), want.begin())) << count << " tokens";
  }
}

INSTANTIATE_TEST_SUITE_P(Types, CudaRows, testing::Values(DType::f32, DType::bf16),
                         [](const auto& type) { return std::string(name_of(type.param)); });

}  // namespace
}  // namespace latente
