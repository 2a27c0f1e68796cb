#include <fmt/format.h>
#include <gtest/gtest.h>

#include <numeric>
#include <span>
#include <string>

#include "cuda/attention_support.h"
#include "cuda/graph.h"

namespace latente {
namespace {

struct Dimensions {
  int64_t heads, groups, nope, rope, value;
};
std::string text(const Dimensions& d) {
  return fmt::format("{}/{} heads, {}+{}/{}", d.heads, d.groups, d.nope, d.rope, d.value);
}

// Inputs as the model's projections leave them: k and v are columns of one matrix, k_rope follows a latent.
struct Inputs {
  Inputs(Device& device, const Dimensions& d, const std::vector<int32_t>& starts_, DType type_, uint64_t seed)
      : dims(d),
        type(type_),
        tokens(static_cast<int64_t>(starts_.size())),
        scale(1 / std::sqrt(static_cast<double>(d.nope + d.rope))),
        host_starts(starts_),
        starts(device, starts_),
        q(device, {tokens, d.heads, d.nope + d.rope}, type_),
        k(device, {tokens, d.groups, d.nope}, type_, 0, d.value),
        k_rope(device, {tokens, std::max<int64_t>(d.rope, 1)}, type_, 8, 0),
        v(device, {tokens, d.groups, d.value}, type_, d.nope, 0),
        d_out(device, {tokens, d.heads, d.value}, type_),
        out(device, {tokens, d.heads, d.value}, type_),
        lse(device, {tokens, d.heads}, DType::f32),
        delta(device, {tokens, d.heads}, DType::f32),
        d_q(device, q.view.shape, type_),
        d_k(device, k.view.shape, type_, 0, d.value),
        d_k_rope(device, k_rope.view.shape, type_, 8, 0),
        d_v(device, v.view.shape, type_, d.nope, 0) {
    Random random(seed);
    for (DeviceTensor* x : {&q, &k, &k_rope, &v, &d_out}) x->randomise(random);
  }
  View rope() const { return dims.rope ? k_rope.view : View(); }
  void forward(Device& device) {
    cuda::attention_expanded(q.view, k.view, rope(), v.view, starts.view, scale, out.view, lse.view,
                             device.context);
    device.stream.synchronize();
  }
  void backward(Device& device, bool accumulate = false) {
    cuda::attention_expanded_backward(
        d_out.view, q.view, k.view, rope(), v.view, starts.view, scale, out.view, lse.view,
        {delta.view, {}, longest}, {d_q.view, accumulate}, {d_k.view, accumulate},
        {dims.rope ? d_k_rope.view : View(), accumulate}, {d_v.view, accumulate}, device.context);
    device.stream.synchronize();
  }
  double key(int64_t t, int64_t g, int64_t i) const {
    return i < dims.nope ? k.at(t, g, i)
                         : k_rope.values[static_cast<size_t>(t * k_rope.view.shape[1] + i - dims.nope)];
  }

  Dimensions dims;
  DType type;
  int64_t tokens;
  double scale;
  int64_t longest = 0;
  std::vector<int32_t> host_starts;
  DeviceIndices starts;
  DeviceTensor q, k, k_rope, v, d_out, out, lse, delta, d_q, d_k, d_k_rope, d_v;
};

// Attention and its gradient by loops in double.
struct Oracle {
  explicit Oracle(const Inputs& in) {
    const Dimensions& n = in.dims;
    const int64_t width = n.nope + n.rope, share = n.heads / n.groups;
    const auto size = [&](int64_t heads, int64_t w) { return static_cast<size_t>(in.tokens * heads * w); };
    out.resize(size(n.heads, n.value)), lse.resize(size(n.heads, 1));
    d_q.resize(size(n.heads, width)), d_k.resize(size(n.groups, n.nope)), d_v.resize(size(n.groups, n.value));
    std::vector<std::vector<double>> rope_parts(static_cast<size_t>(n.groups));
    in_parallel(n.groups, [&](int64_t g) {
      std::vector<double>& d_rope = rope_parts[static_cast<size_t>(g)];
      d_rope.assign(size(1, n.rope), 0);
      for (int64_t h = g * share; h < (g + 1) * share; ++h) {
        for (int64_t t = 0; t < in.tokens; ++t) row(in, t, h, g, d_rope);
      }
    });
    d_k_rope.assign(size(1, n.rope), 0);
    for (const auto& part : rope_parts)
      for (size_t i = 0; i < part.size(); ++i) d_k_rope[i] += part[i];
  }
  void row(const Inputs& in, int64_t t, int64_t h, int64_t g, std::vector<double>& d_rope) {
    const Dimensions& n = in.dims;
    const int64_t width = n.nope + n.rope, start = in.host_starts[static_cast<size_t>(t)];
    std::vector<double> p, d_p;
    for (int64_t j = start; j <= t; ++j) {
      double dot = 0, d_dot = 0;
      for (int64_t i = 0; i < width; ++i) dot += in.q.at(t, h, i) * in.key(j, g, i);
      for (int64_t i = 0; i < n.value; ++i) d_dot += in.d_out.at(t, h, i) * in.v.at(j, g, i);
      p.push_back(dot * in.scale);
      d_p.push_back(d_dot);
    }
    const double top = *std::max_element(p.begin(), p.end());
    double sum = 0, delta = 0;
    for (double s : p) sum += std::exp(s - top);
    lse[static_cast<size_t>(t * n.heads + h)] = top + std::log(sum);
    for (double& s : p) s = std::exp(s - top) / sum;
    for (size_t j = 0; j < p.size(); ++j) delta += p[j] * d_p[j];
    double* o = &out[static_cast<size_t>((t * n.heads + h) * n.value)];
    double* dq = &d_q[static_cast<size_t>((t * n.heads + h) * width)];
    for (size_t index = 0; index < p.size(); ++index) {
      const int64_t j = start + static_cast<int64_t>(index);
      const double d_s = p[index] * (d_p[index] - delta) * in.scale;
      double* dk = &d_k[static_cast<size_t>((j * n.groups + g) * n.nope)];
      double* dv = &d_v[static_cast<size_t>((j * n.groups + g) * n.value)];
      for (int64_t i = 0; i < n.value; ++i) {
        o[i] += p[index] * in.v.at(j, g, i);
        dv[i] += p[index] * in.d_out.at(t, h, i);
      }
      for (int64_t i = 0; i < width; ++i) {
        dq[i] += d_s * in.key(j, g, i);
        (i < n.nope ? dk[i] : d_rope[static_cast<size_t>(j * n.rope + i - n.nope)]) += d_s * in.q.at(t, h, i);
      }
    }
  }

  std::vector<double> out, lse, d_q, d_k, d_k_rope, d_v;
};

double tolerance(DType type) { return type == DType::f32 ? 1e-5 : 6e-3; }

class CudaAttention : public testing::Test {
 protected:
  void SetUp() override {
    if (cuda::device_count() == 0) GTEST_SKIP() << "no CUDA device";
  }
};

void check_all(Device& device, Inputs& in) {
  const Oracle oracle(in);
  const double most = tolerance(in.type);
  in.forward(device);
  EXPECT_LT(distance(in.out.read(), oracle.out), most);
  EXPECT_LT(distance(in.lse.read(), oracle.lse), most);
  in.backward(device);
  EXPECT_LT(distance(in.d_q.read(), oracle.d_q), 2 * most);
  EXPECT_LT(distance(in.d_k.read(), oracle.d_k), 2 * most);
  EXPECT_LT(distance(in.d_v.read(), oracle.d_v), 2 * most);
  if (in.dims.rope) {
    EXPECT_LT(distance(in.d_k_rope.read(), oracle.d_k_rope), 2 * most);
  }
  for (const DeviceTensor* x : {&in.out, &in.lse, &in.d_q, &in.d_k, &in.d_v, &in.d_k_rope}) {
    EXPECT_EQ(x->written_outside, 0);
  }
}

const std::vector<Dimensions> all_dimensions = {
    {2, 2, 128, 64, 128}, {4, 4, 64, 32, 64}, {2, 1, 64, 64, 64}, {4, 2, 64, 0, 64}, {4, 1, 128, 0, 128},
    {2, 2, 128, 0, 64},   {1, 1, 8, 0, 8},    {2, 2, 48, 16, 48}, {3, 3, 13, 5, 7},  {5, 5, 24, 64, 192},
    {16, 16, 8, 4, 8},    {4, 2, 32, 0, 32},  {2, 1, 72, 2, 17},
};

TEST_F(CudaAttention, ExpandedMatchesDoubleLoops) {
  Device device;
  Random random(1);
  for (const DType type : {DType::f32, DType::bf16}) {
    for (const Dimensions& dims : all_dimensions) {
      for (const int64_t tokens : {int64_t{1}, random.between(2, 127), random.between(300, 420)}) {
        const int64_t longest = random.chance(0.5) ? tokens : std::max<int64_t>(1, tokens / 3);
        SCOPED_TRACE(fmt::format("{}, {}, {} tokens", name_of(type), text(dims), tokens));
        Inputs in(device, dims, packed_starts(random, tokens, longest), type, random.next_u64());
        check_all(device, in);
      }
    }
  }
}

TEST_F(CudaAttention, ExpandedTakesAnyStarts) {
  Device device;
  Random random(2);
  for (const DType type : {DType::f32, DType::bf16}) {
    std::vector<int32_t> any, window, whole(1000, 0);
    for (int32_t t = 0; t < 250; ++t) any.push_back(static_cast<int32_t>(random.between(0, t)));
    for (int32_t t = 0; t < 300; ++t) window.push_back(std::max(0, t - 60));
    for (const auto& starts : {any, window, whole}) {
      for (const Dimensions& dims : {Dimensions{2, 1, 128, 64, 128}, Dimensions{2, 2, 64, 32, 64}}) {
        SCOPED_TRACE(fmt::format("{}, {}, {} tokens", name_of(type), text(dims), starts.size()));
        Inputs in(device, dims, starts, type, random.next_u64());
        check_all(device, in);
      }
    }
  }
}

// A document's rows have the bits that they have alone, wherever it stands in a call.
TEST_F(CudaAttention, ExpandedRowsDoNotDependOnTheirCompany) {
  Device device;
  Random random(3);
  for (const DType type : {DType::f32, DType::bf16}) {
    for (const Dimensions& dims :
         {Dimensions{2, 2, 128, 64, 128}, Dimensions{2, 1, 64, 32, 64}, Dimensions{2, 2, 16, 8, 24}}) {
      SCOPED_TRACE(fmt::format("{}, {}", name_of(type), text(dims)));
      const std::vector<int32_t> lengths = {random.next_u64() % 2 ? 77 : 150, 1, 300, 13, 211};
      std::vector<int32_t> starts;
      for (const int32_t length : lengths)
        starts.insert(starts.end(), static_cast<size_t>(length), static_cast<int32_t>(starts.size()));
      Inputs all(device, dims, starts, type, random.next_u64());
      all.forward(device);
      all.out.read(), all.lse.read();
      int64_t first = 0;
      for (const int32_t length : lengths) {
        Inputs alone(device, dims, std::vector<int32_t>(static_cast<size_t>(length), 0), type, 1);
        auto take = [&](const DeviceTensor& from, DeviceTensor& to) {
          const int64_t row = from.view.shape.count_from(1);
          std::copy_n(from.values.begin() + first * row, length * row, to.values.begin());
          to.upload();
        };
        take(all.q, alone.q), take(all.k, alone.k), take(all.k_rope, alone.k_rope), take(all.v, alone.v);
        alone.forward(device);
        alone.out.read(), alone.lse.read();
        for (size_t i = 0; i < alone.out.values.size(); ++i)
          ASSERT_EQ(alone.out.values[i],
                    all.out.values[i + static_cast<size_t>(first * dims.heads * dims.value)]);
        for (size_t i = 0; i < alone.lse.values.size(); ++i)
          ASSERT_EQ(alone.lse.values[i], all.lse.values[i + static_cast<size_t>(first * dims.heads)]);
        first += length;
      }
    }
  }
}

TEST_F(CudaAttention, GradientsAreRepeatableAndAdd) {
  Device large, small(int64_t{3} << 20);
  Random random(4);
  for (const DType type : {DType::f32, DType::bf16}) {
    for (const Dimensions& dims : {Dimensions{16, 16, 128, 64, 128}, Dimensions{12, 6, 64, 32, 64}}) {
      SCOPED_TRACE(fmt::format("{}, {}", name_of(type), text(dims)));
      Inputs in(large, dims, packed_starts(random, 700, 500), type, random.next_u64());
      in.forward(large);
      in.backward(large);
      const auto d_q = in.d_q.read(), d_k = in.d_k.read(), d_v = in.d_v.read(), d_rope = in.d_k_rope.read();
      in.backward(small);
      EXPECT_EQ(in.d_q.read(), d_q);
      EXPECT_EQ(in.d_k.read(), d_k);
      EXPECT_EQ(in.d_v.read(), d_v);
      EXPECT_EQ(in.d_k_rope.read(), d_rope);
      for (DeviceTensor* x : {&in.d_q, &in.d_k, &in.d_k_rope, &in.d_v}) x->set([] { return 0.25; });
      in.backward(large, true);
      const double most = type == DType::f32 ? 1e-6 : 6e-3;
      EXPECT_LT(distance(in.d_q.read(), d_q, 0.25), 4 * most);
      EXPECT_LT(distance(in.d_k.read(), d_k, 0.25), 4 * most);
      EXPECT_LT(distance(in.d_v.read(), d_v, 0.25), 4 * most);
      EXPECT_LT(distance(in.d_k_rope.read(), d_rope, 0.25), 4 * most);
    }
  }
}

// What the host knows of contexts' lengths changes no result, nor a bit unless it is wrong.
TEST_F(CudaAttention, GradientsWithKnownContexts) {
  Device device;
  Random random(5);
  for (const Dimensions& dims : {Dimensions{2, 2, 128, 64, 128}, Dimensions{4, 2, 128, 0, 128}}) {
    SCOPED_TRACE(text(dims));
    Inputs in(device, dims, packed_starts(random, 900, 400), DType::bf16, random.next_u64());
    const Oracle oracle(in);
    in.forward(device);
    std::vector<std::vector<double>> unknown;
    for (const int64_t longest : {0, 400, 20}) {
      SCOPED_TRACE(longest);
      in.longest = longest;
      in.backward(device);
      std::vector<std::vector<double>> found = {in.d_q.read(), in.d_k.read(), in.d_v.read()};
      if (dims.rope) found.push_back(in.d_k_rope.read());
      EXPECT_LT(distance(found[0], oracle.d_q), 2 * tolerance(in.type));
      EXPECT_LT(distance(found[1], oracle.d_k), 2 * tolerance(in.type));
      EXPECT_LT(distance(found[2], oracle.d_v), 2 * tolerance(in.type));
      if (dims.rope) {
        EXPECT_LT(distance(found[3], oracle.d_k_rope), 2 * tolerance(in.type));
      }
      if (longest == 0) {
        unknown = std::move(found);
      } else if (longest == 400) {
        EXPECT_EQ(found, unknown);
      }
    }
  }
}

// Each kernel on tensor cores once, on little: for compute-sanitizer.
TEST_F(CudaAttention, SmallCallsOfEachKernel) {
  Device device;
  Random random(6);
  for (const Dimensions& dims :
       {Dimensions{1, 1, 128, 64, 128}, Dimensions{2, 1, 64, 32, 64}, Dimensions{1, 1, 64, 64, 64},
        Dimensions{1, 1, 64, 0, 64}, Dimensions{1, 1, 128, 0, 128}, Dimensions{1, 1, 128, 0, 64}}) {
    for (const int64_t longest : {0, 100}) {
      SCOPED_TRACE(fmt::format("{}, {}", text(dims), longest));
      Inputs in(device, dims, packed_starts(random, 150, 100), DType::bf16, random.next_u64());
      in.longest = longest;
      check_all(device, in);
    }
  }
}

TEST_F(CudaAttention, SkipsNullGradients) {
  Device device;
  for (const DType type : {DType::f32, DType::bf16}) {
    for (const Dimensions& dims : {Dimensions{2, 2, 64, 32, 64}, Dimensions{2, 1, 128, 64, 128}}) {
      Inputs in(device, dims, std::vector<int32_t>(200, 0), type, 9);
      const Oracle oracle(in);
      in.forward(device);
      auto run = [&](Grad q, Grad k, Grad rope, Grad v) {
        cuda::attention_expanded_backward(in.d_out.view, in.q.view, in.k.view, in.rope(), in.v.view,
                                          in.starts.view, in.scale, in.out.view, in.lse.view, in.delta.view,
                                          q, k, rope, v, device.context);
        device.stream.synchronize();
      };
      const double most = 2 * tolerance(type);
      run({in.d_q.view}, {}, {}, {});
      EXPECT_LT(distance(in.d_q.read(), oracle.d_q), most);
      run({}, {in.d_k.view}, {}, {});
      EXPECT_LT(distance(in.d_k.read(), oracle.d_k), most);
      run({}, {}, {in.d_k_rope.view}, {});
      EXPECT_LT(distance(in.d_k_rope.read(), oracle.d_k_rope), most);
      run({}, {}, {}, {in.d_v.view});
      EXPECT_LT(distance(in.d_v.read(), oracle.d_v), most);
    }
  }
}

}  // namespace
}  // namespace latente
