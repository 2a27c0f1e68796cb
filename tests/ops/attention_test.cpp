#include "ops/support.h"

namespace latente::test {
namespace {

struct Heads {
  int64_t tokens, heads, groups, nope, rope, value;
};

// out [T, H, dv] by the definition.
Numbers attend(const Heads& a, const Numbers& q, const Numbers& k, const Numbers& k_rope, const Numbers& v,
               const std::vector<int32_t>& starts, double scale) {
  Numbers out(static_cast<size_t>(a.tokens * a.heads * a.value), 0.0);
  const int64_t width = a.nope + a.rope;
  for (int64_t t = 0; t < a.tokens; ++t) {
    for (int64_t h = 0; h < a.heads; ++h) {
      const int64_t g = h / (a.heads / a.groups);
      Numbers p;
      double sum = 0;
      const int64_t start = starts[static_cast<size_t>(t)];
      for (int64_t s = start; s <= t; ++s) {
        double score = 0;
        for (int64_t i = 0; i < width; ++i) {
          double key = i < a.nope ? k[static_cast<size_t>((s * a.groups + g) * a.nope + i)]
                                  : k_rope[static_cast<size_t>(s * a.rope + i - a.nope)];
          score += q[static_cast<size_t>((t * a.heads + h) * width + i)] * key;
        }
        p.push_back(std::exp(score * scale));
        sum += p.back();
      }
      for (int64_t s = start; s <= t; ++s) {
        for (int64_t i = 0; i < a.value; ++i) {
          out[static_cast<size_t>((t * a.heads + h) * a.value + i)] +=
              p[static_cast<size_t>(s - start)] / sum *
              v[static_cast<size_t>((s * a.groups + g) * a.value + i)];
        }
      }
    }
  }
  return out;
}

TEST(AttentionExpanded, ForwardAndGradients) {
  const std::vector<int32_t> starts = {0, 0, 0, 3, 3};  // two packed sequences
  for (const Heads& a : {Heads{5, 2, 2, 3, 2, 4}, Heads{5, 4, 2, 3, 0, 3}, Heads{5, 3, 1, 4, 0, 2}}) {
    std::vector<Input> inputs = {random_input({a.tokens, a.heads * (a.nope + a.rope)}, 1),
                                 random_input({a.tokens, a.groups * a.nope}, 2),
                                 random_input({a.tokens, a.groups * a.value}, 3),
                                 random_input({a.tokens, std::max<int64_t>(a.rope, 1)}, 4)};
    auto out = check(
        inputs,
        [&](Plan& plan, const std::vector<Tensor>& p) {
          Tensor q = leaf(plan, p[0]).reshape({a.tokens, a.heads, a.nope + a.rope});
          Tensor k = leaf(plan, p[1]).reshape({a.tokens, a.groups, a.nope});
          Tensor v = leaf(plan, p[2]).reshape({a.tokens, a.groups, a.value});
          Tensor k_rope = a.rope ? leaf(plan, p[3]) : Tensor();
          return Graph{{attention_expanded(q, k, k_rope, v, indices(plan, {a.tokens}, starts), 0.6)}, {}};
        },
        1e-7, 5e-5);
    expect_close(
        out[0],
        attend(a, inputs[0].values, inputs[1].values, inputs[3].values, inputs[2].values, starts, 0.6), 1e-12,
        "attention");
  }
}

// As MLA records it: keys and values are columns of one product, the rotary key is rotated in place beside
// the latent, and queries in the last columns of each head.
TEST(AttentionExpanded, OfSlicesChangedInPlace) {
  const int64_t tokens = 4, heads = 2, nope = 3, rope_width = 2, value = 4, rank = 3;
  Tensor table = buffer({8, rope_width}, DType::f32);
  for (int64_t i = 0; i < 8; ++i) {
    table.view().as<float>()[2 * i] = std::cos(static_cast<float>(i));
    table.view().as<float>()[2 * i + 1] = std::sin(static_cast<float>(i));
  }
  std::vector<Input> inputs = {random_input({tokens, 5}, 1),
                               random_input({heads * (nope + rope_width), 5}, 2),
                               random_input({rank + rope_width, 5}, 3), random_input({rank}, 4),
                               random_input({heads * (nope + value), rank}, 5)};
  check(
      inputs,
      [&](Plan& plan, const std::vector<Tensor>& p) {
        Tensor x = leaf(plan, p[0]), positions = indices(plan, {tokens}, {0, 1, 2, 3});
        Tensor q = rope(linear(x, p[1]).reshape({tokens, heads, nope + rope_width}), positions,
                        on_device(plan, table), true);
        Tensor kv_a = linear(x, p[2]);
        Tensor c = rms_norm(kv_a.columns(0, rank), p[3], 1e-6);
        Tensor k_rope = kv_a.columns(rank, rank + rope_width).reshape({tokens, 1, rope_width});
        k_rope = rope(k_rope, positions, on_device(plan, table), true).reshape({tokens, rope_width});
        Tensor kv = linear(c, p[4]).reshape({tokens, heads, nope + value});
        Tensor out = attention_expanded(q, kv.columns(0, nope), k_rope, kv.columns(nope, nope + value),
                                        indices(plan, {tokens}, {0, 0, 0, 0}), 0.4);
        return Graph{{out}, {}};
      },
      1e-7, 5e-5);
}

struct Recorded {
  Plan plan{backend()};
  Tensor result;
  Numbers operator()() {
    plan.keep(result);
    plan.compile();
    plan.allocate();
    plan.run();
    return read(result.view());
  }
};

TEST(AbsorbQuery, FoldsTheKeyProjection) {
  const size_t tokens = 3, heads = 2, nope = 4, rank = 5, rope_width = 2;
  Numbers q = normal(3 * 2 * 6, 1), w = normal(2 * 4 * 5, 2);
  Numbers want;
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t h = 0; h < heads; ++h) {
      const double* row = q.data() + (t * heads + h) * (nope + rope_width);
      for (size_t r = 0; r < rank; ++r) {
        want.push_back(0);
        for (size_t n = 0; n < nope; ++n) want.back() += row[n] * w[(h * nope + n) * rank + r];
      }
      for (size_t i = 0; i < rope_width; ++i) want.push_back(row[nope + i]);
    }
  }
  for (DType dtype : dtypes()) {
    Recorded run;
    run.result =
        absorb_query(constant(run.plan, {3, 2, 6}, dtype, q), constant(run.plan, {2, 4, 5}, dtype, w));
    expect_close(run(), want, tolerance_of(dtype, 1e-13, 1e-6), "absorb_query");
  }
}

// Keys and values stored by slot and read through a block table, against the plain definition.
TEST(AttentionPaged, ReadsWhatCacheStoreWrote) {
  const int64_t tokens = 7, heads = 4, groups = 2, dim = 3, value = 2, page = 4, pages = 5;
  for (DType dtype : dtypes()) {
    Numbers q = normal(tokens * heads * dim, 1), k = normal(tokens * groups * dim, 2),
            v = normal(tokens * groups * value, 3);
    Tensor keys = buffer(backend(), {pages, page, groups, dim}, dtype),
           values = buffer(backend(), {pages, page, groups, value}, dtype);
    Recorded run;
    // Position p of the sequence lies in page table[p / page], slot p % page: positions 0..6 are 8, 9, 10,
    // 11, 16, 17, 18.
    const std::vector<int32_t> by_position = {8, 9, 10, 11, 16, 17, 18};
    Tensor at = indices(run.plan, {tokens}, by_position);
    cache_store(constant(run.plan, {tokens, groups * dim}, dtype, k), at,
                keys.reshape({pages, page, groups * dim}));
    cache_store(constant(run.plan, {tokens, groups * value}, dtype, v), at,
                values.reshape({pages, page, groups * value}));
    PageTensors table{indices(run.plan, {1, 2}, {2, 4}),
                      indices(run.plan, {tokens}, std::vector<int32_t>(7, 0)),
                      indices(run.plan, {tokens}, {0, 1, 2, 3, 4, 5, 6})};
    run.result =
        attention_paged(constant(run.plan, {tokens, heads, dim}, dtype, q), keys, values, table, 0.7);
    Numbers want =
        attend({tokens, heads, groups, dim, 0, value}, q, k, {}, v, std::vector<int32_t>(7, 0), 0.7);
    expect_close(run(), want, tolerance_of(dtype, 1e-12, 2e-6), "attention_paged");
  }
}

TEST(CacheStore, SkipsNegativeSlotsAndKeepsOtherColumns) {
  Tensor cache = buffer(backend(), {2, 3, 5}, DType::f32);
  write(cache.view(), Numbers(30, -1.0));
  Plan plan(backend());
  Tensor x = constant(plan, {3, 2}, DType::f32, {1, 2, 3, 4, 5, 6});
  cache_store(x, indices(plan, {3}, {4, -1, 0}), cache.columns(3, 5));
  plan.compile();
  plan.allocate();
  plan.run();
  Numbers want(30, -1.0);
  want[4 * 5 + 3] = 1, want[4 * 5 + 4] = 2, want[3] = 5, want[4] = 6;
  EXPECT_EQ(read(cache.view()), want);
}

}  // namespace
}  // namespace latente::test
