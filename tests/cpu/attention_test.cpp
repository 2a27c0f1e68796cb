#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/attention_support.h"

namespace latente {
namespace {

template <class T>
struct Gradients {
  explicit Gradients(const Inputs<T>& in) : q(in.q), k(in.k), k_rope(in.k_rope), v(in.v) {
    fill(0.25);  // what is added to
  }
  void fill(double x) {
    for (Strided<T>* s : {&q, &k, &k_rope, &v}) s->fill([x] { return x; });
  }
  Strided<T> q, k, k_rope, v;
};

// Which gradients are wanted, and which are added to.
struct Wanted {
  bool q = true, k = true, k_rope = true, v = true;
  bool add_q = false, add_k = false, add_k_rope = false, add_v = false;
};

template <class T>
Gradients<T> backward(CpuBackend& cpu, Inputs<T>& in, const Outputs<T>& o, const Wanted& w = {}) {
  Gradients<T> g(in);
  std::vector<T> delta(static_cast<size_t>(in.tokens * in.dims.heads));
  cpu.attention_expanded_backward(in.d_out.view, in.q.view, in.k.view, in.rope_view(), in.v.view,
                                  vector_view(in.starts), in.scale, o.out.view, o.lse.rows(),
                                  View(delta.data(), {in.tokens, in.dims.heads}, dtype_of<T>),
                                  {w.q ? g.q.view : View(), w.add_q}, {w.k ? g.k.view : View(), w.add_k},
                                  {w.k_rope && in.dims.rope ? g.k_rope.rows() : View(), w.add_k_rope},
                                  {w.v ? g.v.view : View(), w.add_v});
  return g;
}

// The oracle: out, lse and all gradients by their definitions, in double.
template <class T>
struct Oracle {
  explicit Oracle(const Inputs<T>& in)
      : out(in.tokens, in.dims.heads, in.dims.value),
        lse(in.tokens, 1, in.dims.heads),
        d_q(in.tokens, in.dims.heads, in.dims.nope + in.dims.rope),
        d_k(in.tokens, in.dims.groups, in.dims.nope),
        d_k_rope(in.tokens, 1, std::max<int64_t>(in.dims.rope, 1)),
        d_v(in.tokens, in.dims.groups, in.dims.value) {
    for (Strided<double>* s : {&out, &d_q, &d_k, &d_k_rope, &d_v}) s->fill([] { return 0.0; });
    for (int64_t t = 0; t < in.tokens; ++t) {
      for (int64_t h = 0; h < in.dims.heads; ++h) row(in, t, h);
    }
  }

  void row(const Inputs<T>& in, int64_t t, int64_t h) {
    const Dimensions& n = in.dims;
    const int64_t g = h / (n.heads / n.groups), start = in.starts[static_cast<size_t>(t)];
    auto key = [&](int64_t j, int64_t i) {
      return static_cast<double>(i < n.nope ? in.k.at(j, g, i) : in.k_rope.at(j, 0, i - n.nope));
    };
    std::vector<double> p;
    for (int64_t j = start; j <= t; ++j) {
      double dot = 0;
      for (int64_t i = 0; i < n.nope + n.rope; ++i) dot += static_cast<double>(in.q.at(t, h, i)) * key(j, i);
      p.push_back(dot * in.scale);
    }
    const double top = *std::max_element(p.begin(), p.end());
    double sum = 0;
    for (double s : p) sum += std::exp(s - top);
    lse.at(t, 0, h) = top + std::log(sum);
    for (double& s : p) s = std::exp(s - lse.at(t, 0, h));

    double delta = 0;
    std::vector<double> d_p(p.size());
    for (size_t j = 0; j < p.size(); ++j) {
      for (int64_t i = 0; i < n.value; ++i) {
        const int64_t token = start + static_cast<int64_t>(j);
        out.at(t, h, i) += p[j] * static_cast<double>(in.v.at(token, g, i));
        d_p[j] += static_cast<double>(in.d_out.at(t, h, i)) * static_cast<double>(in.v.at(token, g, i));
        d_v.at(token, g, i) += p[j] * static_cast<double>(in.d_out.at(t, h, i));
      }
      delta += p[j] * d_p[j];
    }
    for (size_t j = 0; j < p.size(); ++j) {
      const double d_s = p[j] * (d_p[j] - delta) * in.scale;
      const int64_t token = start + static_cast<int64_t>(j);
      for (int64_t i = 0; i < n.nope + n.rope; ++i) {
        const double query = static_cast<double>(in.q.at(t, h, i));
        d_q.at(t, h, i) += d_s * key(token, i);
        (i < n.nope ? d_k.at(token, g, i) : d_k_rope.at(token, 0, i - n.nope)) += d_s * query;
      }
    }
  }

  Strided<double> out, lse, d_q, d_k, d_k_rope, d_v;
};

// Packed documents of random lengths; some tokens are padding that attends to itself only.
std::vector<int32_t> packed(Random& random, int64_t tokens, int64_t longest, double padding) {
  std::vector<int32_t> starts;
  while (static_cast<int64_t>(starts.size()) < tokens) {
    const auto begin = static_cast<int32_t>(starts.size());
    const int64_t length = random.between(1, std::min(longest, tokens - begin));
    starts.insert(starts.end(), static_cast<size_t>(length), begin);
    for (int64_t i = 0; random.chance(padding) && begin + length + i < tokens; ++i) {
      starts.push_back(static_cast<int32_t>(starts.size()));
    }
  }
  return starts;
}

const std::vector<Dimensions> all_dimensions = {
    {1, 1, 8, 0, 8},     {2, 2, 48, 16, 48}, {4, 4, 64, 32, 64}, {2, 2, 128, 64, 128}, {4, 2, 64, 0, 64},
    {6, 1, 32, 0, 32},   {8, 2, 16, 0, 24},  {3, 3, 13, 5, 7},   {4, 2, 33, 8, 40},    {1, 1, 192, 0, 128},
    {5, 5, 24, 64, 192}, {2, 1, 72, 2, 17},  {16, 16, 8, 4, 8},
};

template <class T>
void check_forward(CpuBackend& cpu, Inputs<T>& in, const Oracle<T>& oracle) {
  const Outputs<T> o = forward(cpu, in);
  EXPECT_LT(error(o.out, oracle.out), tolerance<T>);
  EXPECT_LT(error(o.lse, oracle.lse), tolerance<T>);
  EXPECT_EQ(o.out.written_outside(), 0);
}

template <class T>
void check_gradients(const Inputs<T>& in, const Gradients<T>& g, const Oracle<T>& oracle,
                     const Wanted& w = {}) {
  auto check = [](const Strided<T>& got, const Strided<double>& expected, bool wanted, bool added) {
    if (wanted) {
      EXPECT_LT(error(got, expected, added ? 0.25 : 0), 4 * tolerance<T>);
    } else {
      Strided<T> untouched(got);
      untouched.fill([] { return 0.25; });
      EXPECT_EQ(differences(got, untouched), 0);
    }
    EXPECT_EQ(got.written_outside(), 0);
  };
  check(g.q, oracle.d_q, w.q, w.add_q);
  check(g.k, oracle.d_k, w.k, w.add_k);
  check(g.v, oracle.d_v, w.v, w.add_v);
  if (in.dims.rope) check(g.k_rope, oracle.d_k_rope, w.k_rope, w.add_k_rope);
}

template <class T>
class Attention : public ::testing::Test {
 protected:
  CpuBackend one{1}, three{3};
};
using Activations = ::testing::Types<float, double>;
TYPED_TEST_SUITE(Attention, Activations);

TYPED_TEST(Attention, MatchesDoubleLoops) {
  Random random(1);
  for (const Dimensions& dims : all_dimensions) {
    for (const int64_t tokens :
         {int64_t{1}, int64_t{2}, int64_t{97}, random.between(3, 96), random.between(98, 300)}) {
      const int64_t longest = random.chance(0.5) ? tokens : std::max<int64_t>(1, tokens / 3);
      Inputs<TypeParam> in(dims, packed(random, tokens, longest, 0.3), random.next_u64());
      SCOPED_TRACE(::testing::Message() << dims << ", " << tokens << " tokens");
      const Oracle<TypeParam> oracle(in);
      check_forward(this->one, in, oracle);
      check_gradients(in, backward(this->one, in, forward(this->one, in)), oracle);
      check_gradients(in, backward(this->three, in, forward(this->three, in)), oracle);
    }
  }
}

// starts need not rise: any token may attend to any stretch of tokens that ends with itself.
TYPED_TEST(Attention, TakesAnyStarts) {
  Random random(2);
  for (const int64_t tokens : {int64_t{40}, int64_t{250}}) {
    std::vector<int32_t> starts;
    for (int64_t t = 0; t < tokens; ++t) starts.push_back(static_cast<int32_t>(random.between(0, t)));
    Inputs<TypeParam> in({4, 2, 24, 8, 16}, starts, 3);
    const Oracle<TypeParam> oracle(in);
    check_forward(this->three, in, oracle);
    check_gradients(in, backward(this->one, in, forward(this->one, in)), oracle);
    check_gradients(in, backward(this->three, in, forward(this->three, in)), oracle);
  }
}

// A window that slides: the first key blocks are out of reach of the later queries.
TYPED_TEST(Attention, SkipsKeysBeforeAWindow) {
  std::vector<int32_t> starts;
  for (int32_t t = 0; t < 300; ++t) starts.push_back(std::max(0, t - 60));
  Inputs<TypeParam> in({2, 2, 16, 8, 16}, starts, 4);
  const Oracle<TypeParam> oracle(in);
  check_forward(this->one, in, oracle);
  check_gradients(in, backward(this->one, in, forward(this->one, in)), oracle);
  check_gradients(in, backward(this->three, in, forward(this->three, in)), oracle);
}

TYPED_TEST(Attention, AddsToGradientsAndSkipsNullOnes) {
  Inputs<TypeParam> in({4, 2, 20, 12, 28}, std::vector<int32_t>(130, 0), 5);
  const Oracle<TypeParam> oracle(in);
  const Outputs<TypeParam> o = forward(this->one, in);
  for (unsigned bits = 0; bits < 256; ++bits) {
    auto bit = [bits](unsigned i) { return (bits >> i & 1) != 0; };
    const Wanted w{bit(0), bit(1), bit(2), bit(3), bit(4), bit(5), bit(6), bit(7)};
    SCOPED_TRACE(bits);
    check_gradients(in, backward(bits % 3 ? this->one : this->three, in, o, w), oracle, w);
  }
}

// More kv heads than parts of d_k_rope are kept at once.
TYPED_TEST(Attention, AddsUpTheRopeGradientOfManyHeads) {
  Inputs<TypeParam> in({70, 70, 4, 6, 4}, packed(*std::make_unique<Random>(6), 30, 20, 0.2), 6);
  const Oracle<TypeParam> oracle(in);
  const Outputs<TypeParam> o = forward(this->one, in);
  for (const bool add : {false, true}) {
    Wanted w;
    w.add_k_rope = add;
    check_gradients(in, backward(this->three, in, o, w), oracle, w);
  }
}

TYPED_TEST(Attention, SurvivesScoresOfAnySize) {
  Inputs<TypeParam> in({2, 2, 16, 0, 8}, std::vector<int32_t>(120, 0), 7);
  Random random(8);
  in.q.fill([&] { return 40 * random.normal(); });  // scores of several hundred
  const Oracle<TypeParam> oracle(in);
  const Outputs<TypeParam> o = forward(this->one, in);
  // A float score of 500 is known to 3e-5 only.
  const double allowed = std::is_same_v<TypeParam, double> ? 1e-10 : 5e-3;
  EXPECT_LT(error(o.out, oracle.out), allowed);
  EXPECT_LT(error(o.lse, oracle.lse), tolerance<TypeParam>);
}

// The same bits whoever computes, alone or beside other documents.
TYPED_TEST(Attention, HasTheSameBitsForAnyThreadsAndCompany) {
  Random random(9);
  for (const Dimensions& dims : all_dimensions) {
    const std::vector<int32_t> before = packed(random, random.between(1, 150), 100, 0.3);
    const int64_t tokens = random.between(1, 150), shift = static_cast<int64_t>(before.size());
    std::vector<int32_t> starts = before;
    starts.insert(starts.end(), static_cast<size_t>(tokens), static_cast<int32_t>(shift));
    Inputs<TypeParam> in(dims, starts, random.next_u64());
    SCOPED_TRACE(::testing::Message() << dims << ", " << shift << " + " << tokens << " tokens");

    const Outputs<TypeParam> o = forward(this->one, in), o3 = forward(this->three, in);
    EXPECT_EQ(differences(o.out, o3.out), 0);
    EXPECT_EQ(differences(o.lse, o3.lse), 0);
    const Gradients<TypeParam> g = backward(this->one, in, o), g3 = backward(this->three, in, o);
    EXPECT_EQ(differences(g.q, g3.q), 0);
    EXPECT_EQ(differences(g.k, g3.k), 0);
    EXPECT_EQ(differences(g.k_rope, g3.k_rope), 0);
    EXPECT_EQ(differences(g.v, g3.v), 0);

    // The last document alone, and its first rows alone.
    for (const int64_t count : {tokens, (tokens + 1) / 2, int64_t{1}}) {
      Inputs<TypeParam> alone(dims, std::vector<int32_t>(static_cast<size_t>(count), 0), 0);
      auto take = [shift](Strided<TypeParam>& to, const Strided<TypeParam>& from) {
        for (int64_t t = 0; t < to.view[0]; ++t)
          for (int64_t h = 0; h < to.view[1]; ++h)
            for (int64_t i = 0; i < to.view[2]; ++i) to.at(t, h, i) = from.at(shift + t, h, i);
      };
      take(alone.q, in.q);
      take(alone.k, in.k);
      take(alone.k_rope, in.k_rope);
      take(alone.v, in.v);
      take(alone.d_out, in.d_out);
      const Outputs<TypeParam> a = forward(this->one, alone);
      Outputs<TypeParam> expected(alone);
      take(expected.out, o.out);
      take(expected.lse, o.lse);
      EXPECT_EQ(differences(a.out, expected.out), 0) << count;
      EXPECT_EQ(differences(a.lse, expected.lse), 0) << count;
      const Gradients<TypeParam> b = backward(this->three, alone, a);
      Gradients<TypeParam> expected_gradients(alone);
      take(expected_gradients.q, g.q);
      EXPECT_EQ(differences(b.q, expected_gradients.q), 0) << count;
      if (count < tokens) continue;  // keys also hear of later queries
      take(expected_gradients.k, g.k);
      take(expected_gradients.v, g.v);
      take(expected_gradients.k_rope, g.k_rope);
      EXPECT_EQ(differences(b.k, expected_gradients.k), 0);
      EXPECT_EQ(differences(b.v, expected_gradients.v), 0);
      if (dims.rope) {
        EXPECT_EQ(differences(b.k_rope, expected_gradients.k_rope), 0);
      }
    }
  }
}

TEST(AttentionGradient, MatchesFiniteDifferences) {
  CpuBackend cpu(2);
  Random random(10);
  Inputs<double> in({4, 2, 10, 6, 8}, packed(random, 110, 60, 0.3), 11);
  auto loss = [&] {
    const Outputs<double> o = forward(cpu, in);
    double sum = 0;
    for (int64_t t = 0; t < in.tokens; ++t)
      for (int64_t h = 0; h < in.dims.heads; ++h)
        for (int64_t i = 0; i < in.dims.value; ++i) sum += o.out.at(t, h, i) * in.d_out.at(t, h, i);
    return sum;
  };
  const Gradients<double> g = backward(cpu, in, forward(cpu, in));
  auto check = [&](Strided<double>& x, const Strided<double>& gradient) {
    for (int repeat = 0; repeat < 20; ++repeat) {
      const int64_t t = random.between(0, x.view[0] - 1), h = random.between(0, x.view[1] - 1),
                    i = random.between(0, x.view[2] - 1);
      const double kept = x.at(t, h, i), step = 1e-5;
      x.at(t, h, i) = kept + step;
      const double above = loss();
      x.at(t, h, i) = kept - step;
      const double below = loss();
      x.at(t, h, i) = kept;
      EXPECT_NEAR(gradient.at(t, h, i), (above - below) / (2 * step), 1e-7);
    }
  };
  check(in.q, g.q);
  check(in.k, g.k);
  check(in.k_rope, g.k_rope);
  check(in.v, g.v);
}

}  // namespace
}  // namespace latente
