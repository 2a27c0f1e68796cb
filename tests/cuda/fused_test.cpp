// Fused calls have the bits of the calls that they stand for, with few rows and with many.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "base/random.h"
#include "cuda/backend.h"
#include "tensor/device.h"
#include "tensor/tensor.h"

namespace latente {
namespace {

class CudaFused : public testing::Test {
 protected:
  Tensor normals(Shape shape, DType type = DType::bf16, double scale = 1) {
    std::vector<double> values(static_cast<size_t>(shape.count()));
    for (double& x : values) x = scale * random_.normal();
    Tensor tensor = buffer(device_, shape, type);
    HostWriter writer(device_, tensor.view());
    convert(DType::f64, values.data(), type, writer.view().data, shape.count());
    writer.finish();
    return tensor;
  }
  Tensor indices(Shape shape, int64_t below) {
    std::vector<int32_t> values(static_cast<size_t>(shape.count()));
    for (int32_t& x : values) x = static_cast<int32_t>(random_.below(static_cast<uint64_t>(below)));
    Tensor tensor = buffer(device_, shape, DType::i32);
    device_.upload(values.data(), tensor.view());
    return tensor;
  }
  Tensor empty(Shape shape, DType type = DType::bf16) { return normals(shape, type, 1e6); }  // poison
  std::vector<double> read(const Tensor& tensor) {
    std::vector<double> values(static_cast<size_t>(tensor.count()));
    if (tensor.dtype() == DType::i32) {
      const HostCopy numbers = on_host(device_, tensor.view());
      std::copy_n(numbers.view.as<int32_t>(), values.size(), values.begin());
      return values;
    }
    convert(tensor.dtype(), on_host(device_, tensor.view()).view.data, DType::f64, values.data(),
            tensor.count());
    return values;
  }
  void expect_same(const Tensor& a, const Tensor& b, int64_t rows) {
    EXPECT_EQ(read(a), read(b)) << rows << " rows";
  }

  // Gradients of two weights and of what meets both, by the fused calls and by their parts: written, or added
  // to what is there.
  void expect_gradients(Shape input, Shape weight, const std::function<void(Backend&, bool, Grad)>& to_input,
                        const std::function<void(Backend&, bool, Grad, Grad)>& to_weights) {
    for (const bool accumulate : {false, true}) {
      const Tensor start = accumulate ? normals(input) : empty(input);
      Tensor d_x[2], d_gate[2], d_up[2];
      for (const bool fused : {false, true}) {
        d_x[fused] = empty(input);
        device_.copy(start.view(), {d_x[fused].view(), false});
        to_input(base_, fused, {d_x[fused].view(), accumulate});
        d_gate[fused] = empty(weight, DType::f32), d_up[fused] = empty(weight, DType::f32);
        if (accumulate) device_.fill(d_gate[fused].view(), 3.0), device_.fill(d_up[fused].view(), -2.0);
        to_weights(base_, fused, {d_gate[fused].view(), accumulate}, {d_up[fused].view(), accumulate});
      }
      EXPECT_LT(distance(read(d_x[1]), read(d_x[0])), 6e-3) << "input, added: " << accumulate;
      EXPECT_LT(distance(read(d_gate[1]), read(d_gate[0])), 1e-5) << "gate, added: " << accumulate;
      EXPECT_LT(distance(read(d_up[1]), read(d_up[0])), 1e-5) << "up, added: " << accumulate;
    }
  }
  // Of the norm.
  static double distance(const std::vector<double>& got, const std::vector<double>& want) {
    double error = 0, norm = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      error += (got[i] - want[i]) * (got[i] - want[i]);
      norm += want[i] * want[i];
    }
    return std::sqrt(error / norm);
  }

  cuda::CudaBackend device_;
  Backend& base_ = device_;
  Random random_{3};
};

// Everything about the parts of a call goes by these numbers of rows.
constexpr int64_t row_counts[] = {1, 2, 3, 4, 5, 8, 9, 17, 31, 32, 33, 64, 65, 100};

TEST_F(CudaFused, ProductsThatShareALaunch) {
  for (const int64_t depth : {72, 768, 2048}) {
    const Tensor w = normals({200, depth}), other = normals({72, depth});
    for (const int64_t rows : row_counts) {
      const Tensor x = normals({rows, depth});
      const Tensor a = empty({rows, 200}), b = empty({rows, 72}), c = empty({rows, 200}),
                   d = empty({rows, 72});
      device_.linear_both(x.view(), w.view(), other.view(), a.view(), b.view());
      device_.Backend::linear_both(x.view(), w.view(), other.view(), c.view(), d.view());
      expect_same(a, c, rows), expect_same(b, d, rows);
    }
  }
}

TEST_F(CudaFused, Gated) {
  const int64_t depth = 264, width = 136;
  const Tensor gate = normals({width, depth}), up = normals({width, depth});
  for (const int64_t rows : row_counts) {
    const Tensor x = normals({rows, depth}, DType::bf16, 0.1);
    const Tensor s = empty({rows, width}), t = empty({rows, width}), a = empty({rows, width}),
                 b = empty({rows, width});
    device_.gated_linear(x.view(), gate.view(), up.view(), s.view(), t.view(), a.view(), false);
    device_.Backend::gated_linear(x.view(), gate.view(), up.view(), s.view(), t.view(), b.view(), false);
    expect_same(a, b, rows);
  }
}

// What is kept for gradients, and gradients: those of the two products together are rounded once.
TEST_F(CudaFused, GatedWithGradients) {
  for (const auto& [depth, width] : {std::pair{264, 136}, {72, 64}, {768, 384}, {200, 320}}) {
    const Tensor gate = normals({width, depth}, DType::bf16, 0.1),
                 up = normals({width, depth}, DType::bf16, 0.1);
    for (const int64_t rows : {3, 64, 129, 700, 3000}) {
      SCOPED_TRACE(testing::Message() << rows << " x " << depth << " x " << width);
      const Tensor x = normals({rows, depth});
      const auto inner = [&, wide = width] { return empty({rows, wide}); };
      const Tensor a[] = {inner(), inner(), inner()}, b[] = {inner(), inner(), inner()};
      device_.gated_linear(x.view(), gate.view(), up.view(), a[0].view(), a[1].view(), a[2].view(), true);
      base_.Backend::gated_linear(x.view(), gate.view(), up.view(), b[0].view(), b[1].view(), b[2].view(),
                                  true);
      for (int i = 0; i < 3; ++i) expect_same(a[i], b[i], rows);
      const Tensor d_gated = normals({rows, width}), d_risen = normals({rows, width});
      expect_gradients(
          {rows, depth}, {width, depth},
          [&](Backend& to, bool fused, Grad d_x) {
            fused
                ? to.gated_linear_backward_input(d_gated.view(), d_risen.view(), gate.view(), up.view(), d_x)
                : to.Backend::gated_linear_backward_input(d_gated.view(), d_risen.view(), gate.view(),
                                                          up.view(), d_x);
          },
          [&](Backend& to, bool fused, Grad d_gate, Grad d_up) {
            fused ? to.gated_linear_backward_weight(d_gated.view(), d_risen.view(), x.view(), d_gate, d_up)
                  : to.Backend::gated_linear_backward_weight(d_gated.view(), d_risen.view(), x.view(), d_gate,
                                                             d_up);
          });
    }
  }
}

TEST_F(CudaFused, GatedExpertsWithGradients) {
  for (const auto& sizes :
       {std::vector<int>{130, 0, 1, 70, 0, 63, 400}, {0, 0, 700, 3}, std::vector<int>(20, 77), {900, 64}}) {
    for (const auto& [depth, width] : {std::pair{264, 136}, {768, 384}, {72, 320}}) {
      const auto experts = static_cast<int64_t>(sizes.size());
      std::vector<int32_t> bounds{0};
      for (const int count : sizes) bounds.push_back(bounds.back() + count);
      const int64_t sorted = bounds.back(), tokens = sorted / 2 + 1;
      SCOPED_TRACE(testing::Message()
                   << experts << " experts, " << sorted << " rows, " << depth << " x " << width);
      const Tensor offsets = buffer(device_, {experts + 1}, DType::i32), rows = indices({sorted}, tokens);
      device_.upload(bounds.data(), offsets.view());
      const Tensor gate = normals({experts, width, depth}, DType::bf16, 0.1),
                   up = normals({experts, width, depth}, DType::bf16, 0.1), x = normals({tokens, depth});
      const auto inner = [&, wide = width] { return empty({sorted, wide}); };
      const Tensor a[] = {inner(), inner(), inner()}, b[] = {inner(), inner(), inner()};
      device_.grouped_gated_linear(x.view(), rows.view(), offsets.view(), gate.view(), up.view(), a[0].view(),
                                   a[1].view(), a[2].view());
      base_.Backend::grouped_gated_linear(x.view(), rows.view(), offsets.view(), gate.view(), up.view(),
                                          b[0].view(), b[1].view(), b[2].view());
      for (int i = 0; i < 3; ++i) expect_same(a[i], b[i], sorted);
      const Tensor d_gated = normals({sorted, width}), d_risen = normals({sorted, width});
      expect_gradients(
          {sorted, depth}, {experts, width, depth},
          [&](Backend& to, bool fused, Grad d_x) {
            fused ? to.grouped_gated_linear_backward_input(d_gated.view(), d_risen.view(), offsets.view(),
                                                           gate.view(), up.view(), d_x)
                  : to.Backend::grouped_gated_linear_backward_input(
                        d_gated.view(), d_risen.view(), offsets.view(), gate.view(), up.view(), d_x);
          },
          [&](Backend& to, bool fused, Grad d_gate, Grad d_up) {
            fused ? to.grouped_gated_linear_backward_weight(d_gated.view(), d_risen.view(), x.view(),
                                                            rows.view(), offsets.view(), d_gate, d_up)
                  : to.Backend::grouped_gated_linear_backward_weight(
                        d_gated.view(), d_risen.view(), x.view(), rows.view(), offsets.view(), d_gate, d_up);
          });
    }
  }
}

// By themselves, and beside absorbed queries.
TEST_F(CudaFused, EntriesOfTheCache) {
  const int64_t rope = 32, page = 8, heads = 3, nope = 64;
  const Tensor table = normals({64, rope}, DType::f32);
  for (const int64_t rank : {192, 512, 520}) {
    const Tensor w = normals({heads, nope, rank}), norm = normals({rank});
    for (const bool beside : {false, true}) {
      for (const int64_t rows : {1, 3, 8, 40}) {
        const Tensor kv = normals({rows, rank + rope}), queries_before = normals({rows, heads, nope + rope});
        std::vector<int32_t> slots(static_cast<size_t>(rows));
        for (size_t i = 0; i < slots.size(); ++i) slots[i] = i == 1 ? -1 : static_cast<int32_t>(3 * i + 2);
        const Tensor slot = indices({rows}, 1), positions = indices({rows}, 64);
        device_.upload(slots.data(), slot.view());
        Tensor caches[2], outs[2], queries[2];
        for (int fused = 1; fused >= 0; --fused) {  // the parts rotate kv and q in place
          const Tensor q = empty(queries_before.shape());
          device_.copy(queries_before.view(), {q.view(), false});
          caches[fused] = buffer(device_, {20, page, rank + rope}, DType::bf16);
          outs[fused] = empty({rows, rank}), queries[fused] = empty({rows, heads, rank + rope});
          LatentEntries e;
          e.latent = columns_of(kv.view(), 0, rank);
          e.latent_norm = norm.view(), e.latent_out = outs[fused].view();
          const Tensor rotary = kv.columns(rank, rank + rope).reshape({rows, 1, rope});
          e.rotary = rotary.view(), e.positions = positions.view(), e.table = table.view();
          e.latent_eps = 1e-6, e.interleaved = rows != 3;
          e.slots = slot.view(), e.cache = caches[fused].view();
          if (beside) {
            fused
                ? device_.absorb_beside_entries(e, q.view(), w.view(), true, queries[fused].view())
                : device_.Backend::absorb_beside_entries(e, q.view(), w.view(), true, queries[fused].view());
          } else {
            fused ? device_.latent_entries(e) : device_.Backend::latent_entries(e);
          }
        }
        expect_same(caches[0], caches[1], rows), expect_same(outs[0], outs[1], rows);
        if (beside) expect_same(queries[0], queries[1], rows);
      }
    }
  }
}

// A token's entry, absorbed queries, attention over few entries and the values' up-projection.
TEST_F(CudaFused, AttentionOfEntries) {
  struct Case {
    int64_t heads, rank, rope, nope, value, page;
  };
  for (const Case& c :
       {Case{16, 512, 64, 128, 128, 64}, Case{3, 512, 64, 64, 144, 16}, Case{12, 192, 32, 64, 64, 64},
        Case{2, 192, 32, 128, 96, 32}, Case{40, 512, 64, 128, 128, 64}}) {
    const Tensor table = normals({200, c.rope}, DType::f32), norm = normals({c.rank});
    const Tensor kv_b = normals({c.heads, c.nope + c.value, c.rank}, DType::bf16, 0.05);
    const int64_t table_pages = 128 / c.page, pages = 2 * table_pages + 3;
    for (const int length : {1, 16, 17, 64, 65, 100, 128}) {
      for (const int64_t tokens : {1, 2}) {
        if (tokens > 1 && length != 100) continue;
        SCOPED_TRACE(testing::Message() << c.heads << " heads, " << length << " entries, " << tokens);
        std::vector<int32_t> block_table, position, slot, sequence;
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t i = 0; i < table_pages; ++i)
            block_table.push_back(static_cast<int32_t>((i * 2 + t + 1) % pages));
          sequence.push_back(static_cast<int32_t>(t));
          position.push_back(t == 0 ? length - 1 : 5);
          const int64_t at = position.back();
          const auto page = static_cast<size_t>(t * table_pages + at / c.page);
          slot.push_back(static_cast<int32_t>(block_table[page] * c.page + at % c.page));
        }
        const auto numbers = [&](const std::vector<int32_t>& of, Shape shape) {
          Tensor tensor = buffer(device_, shape, DType::i32);
          device_.upload(of.data(), tensor.view());
          return tensor;
        };
        const Tensor tables = numbers(block_table, {tokens, table_pages}),
                     sequences = numbers(sequence, {tokens}), positions = numbers(position, {tokens}),
                     slots = numbers(slot, {tokens});
        const Tensor kv_before = normals({tokens, c.rank + c.rope}),
                     q_before = normals({tokens, c.heads, c.nope + c.rope}),
                     cache_before = normals({pages, c.page, 1, c.rank + c.rope});
        Tensor caches[2], outs[2];
        for (const bool fused : {false, true}) {
          const Tensor kv = empty(kv_before.shape()), q = empty(q_before.shape());
          caches[fused] = empty(cache_before.shape()), outs[fused] = empty({tokens, c.heads, c.value});
          device_.copy(kv_before.view(), {kv.view(), false});
          device_.copy(q_before.view(), {q.view(), false});
          device_.copy(cache_before.view(), {caches[fused].view(), false});
          const Tensor latent_out = empty({tokens, c.rank}),
                       folded = empty({tokens, c.heads, c.rank + c.rope}),
                       attended = empty({tokens, c.heads, c.rank});
          LatentEntries e;
          e.latent = columns_of(kv.view(), 0, c.rank), e.latent_norm = norm.view();
          e.latent_out = latent_out.view(), e.latent_eps = 1e-6, e.interleaved = length % 2 == 0;
          const Tensor rotary = kv.columns(c.rank, c.rank + c.rope).reshape({tokens, 1, c.rope});
          const Tensor entries = caches[fused].reshape({pages, c.page, c.rank + c.rope});
          e.rotary = rotary.view(), e.positions = positions.view(), e.table = table.view();
          e.slots = slots.view(), e.cache = entries.view();
          const Tensor w_uk = kv_b.slice(1, 0, c.nope), w_uv = kv_b.slice(1, c.nope, c.nope + c.value);
          const Pages at{tables.view(), sequences.view(), positions.view()};
          Backend& backend = base_;
          fused ? device_.attend_entries(e, q.view(), w_uk.view(), true, caches[fused].view(), at, 0.1,
                                         w_uv.view(), folded.view(), attended.view(), outs[fused].view())
                : backend.Backend::attend_entries(e, q.view(), w_uk.view(), true, caches[fused].view(), at,
                                                  0.1, w_uv.view(), folded.view(), attended.view(),
                                                  outs[fused].view());
        }
        expect_same(outs[0], outs[1], tokens), expect_same(caches[0], caches[1], tokens);
      }
    }
  }
}

TEST_F(CudaFused, ProductsOfNorms) {
  for (const int64_t depth : {72, 384, 768, 2048, 7168}) {
    const Tensor w = normals({200, depth}), other = normals({72, depth}), norm = normals({depth});
    for (const int64_t rows : row_counts) {
      const Tensor h = normals({rows, depth}), pending = normals({rows, depth});
      for (const bool adds : {true, false}) {
        Tensor sums[2], a[2], b[2], scratch = empty({rows, depth});
        for (const bool fused : {true, false}) {
          sums[fused] = empty({rows, depth}), a[fused] = empty({rows, 200}), b[fused] = empty({rows, 72});
          const NormedRows x{h.view(), adds ? pending.view() : View(),     norm.view(),
                             1e-6,     adds ? sums[fused].view() : View(), scratch.view()};
          // One product alone where nothing is pending.
          const View second = adds ? other.view() : View(), to = adds ? b[fused].view() : View();
          fused ? device_.normed_linear(x, w.view(), second, a[fused].view(), to)
                : base_.Backend::normed_linear(x, w.view(), second, a[fused].view(), to);
        }
        expect_same(a[0], a[1], rows);
        if (adds) expect_same(b[0], b[1], rows), expect_same(sums[0], sums[1], rows);
      }
    }
  }
}

TEST_F(CudaFused, RoutesOfNorms) {
  for (const int64_t depth : {72, 768, 2048}) {
    for (const int64_t experts : {8, 32, 64, 72, 160}) {
      const Tensor gate = normals({experts, depth}, DType::f32, 0.05), norm = normals({depth}),
                   bias = normals({experts}, DType::f32, 0.01);
      for (const int64_t rows : {1, 3, 8, 9, 33}) {
        const Tensor h = normals({rows, depth}), pending = normals({rows, depth});
        for (const bool v3 : {true, false}) {
          Routing routing;
          routing.top_k = 4, routing.scale = 2.5;
          routing.score = v3 ? GateScore::sigmoid : GateScore::softmax;
          routing.normalise = v3;
          if (v3) routing.groups = 4, routing.top_groups = 2, routing.group_score = GroupScore::top2_sum;
          Tensor sums[2], outs[2], scores[2], weights[2], chosen[2],
              logits = empty({rows, experts}, DType::f32);
          for (const bool fused : {true, false}) {
            sums[fused] = empty({rows, depth}), outs[fused] = empty({rows, depth});
            scores[fused] = empty({rows, experts}, DType::f32);
            weights[fused] = empty({rows, 4}, DType::f32), chosen[fused] = indices({rows, 4}, 1);
            const NormedRows x{h.view(), v3 ? pending.view() : View(),     norm.view(),
                               1e-6,     v3 ? sums[fused].view() : View(), outs[fused].view()};
            const View b = v3 ? bias.view() : View();
            fused
                ? device_.normed_route(x, gate.view(), b, routing, logits.view(), scores[fused].view(),
                                       weights[fused].view(), chosen[fused].view())
                : base_.Backend::normed_route(x, gate.view(), b, routing, logits.view(), scores[fused].view(),
                                              weights[fused].view(), chosen[fused].view());
          }
          expect_same(outs[0], outs[1], rows), expect_same(scores[0], scores[1], rows);
          expect_same(weights[0], weights[1], rows), expect_same(chosen[0], chosen[1], rows);
          if (v3) expect_same(sums[0], sums[1], rows);
        }
      }
    }
  }
}

TEST_F(CudaFused, AbsorbedQueries) {
  const int64_t heads = 5, rank = 72, rope = 16;
  const Tensor table = normals({64, rope}, DType::f32);
  for (const int64_t nope : {64, 136}) {
    const Tensor kv_b = normals({heads, nope + 24, rank});
    const Tensor w = kv_b.slice(1, 0, nope);
    for (const int64_t rows : row_counts) {
      const Tensor q = normals({rows, heads, nope + rope}), positions = indices({rows}, 64);
      const Tensor a = empty({rows, heads, rank + rope}), b = empty({rows, heads, rank + rope});
      const Tensor other_q = buffer(device_, q.shape(), DType::bf16);  // it may be rotated in place
      device_.copy(q.view(), {other_q.view(), false});
      const bool interleaved = rows % 2 == 0;
      device_.absorb_rotated(q.view(), w.view(), true, positions.view(), table.view(), interleaved, a.view());
      device_.Backend::absorb_rotated(other_q.view(), w.view(), true, positions.view(), table.view(),
                                      interleaved, b.view());
      expect_same(a, b, rows);
    }
  }
}

TEST_F(CudaFused, Experts) {
  const int64_t width = 136, inner = 72, top_k = 3;
  for (const int64_t experts : {4, 40}) {
    for (const int64_t shared : {0, 152}) {
      const Tensor gate = normals({experts, inner, width}), up = normals({experts, inner, width}),
                   down = normals({experts, width, inner});
      Tensor weights[3];
      if (shared > 0) {
        weights[0] = normals({shared, width}), weights[1] = normals({shared, width});
        weights[2] = normals({width, shared});
      }
      for (const int64_t rows : row_counts) {
        ExpertLayer at;
        std::vector<Tensor> kept;
        auto keep = [&](Tensor tensor) { return kept.emplace_back(std::move(tensor)).view(); };
        at.x = keep(normals({rows, width}, DType::bf16, 0.1));
        std::vector<int32_t> chosen;
        for (int64_t t = 0; t < rows; ++t) {
          const auto first = static_cast<int64_t>(random_.below(static_cast<uint64_t>(experts)));
          for (int64_t k = 0; k < top_k; ++k)
            chosen.push_back(static_cast<int32_t>((first + k) % experts));  // all different
        }
        at.experts = keep(buffer(device_, {rows, top_k}, DType::i32));
        device_.upload(chosen.data(), at.experts);
        at.weights = keep(normals({rows, top_k}, DType::f32));
        at.gate = gate.view(), at.up = up.view(), at.down = down.view();
        if (shared > 0) {
          at.shared_gate = weights[0].view(), at.shared_up = weights[1].view();
          at.shared_down = weights[2].view();
          at.shared_gated = keep(empty({rows, shared})), at.shared_risen = keep(empty({rows, shared}));
          at.shared_inner = keep(empty({rows, shared}));
        }
        at.offsets = keep(indices({experts + 1}, 1)), at.rows = keep(indices({rows * top_k}, 1));
        at.slots = keep(indices({rows, top_k}, 1));
        at.gated = keep(empty({rows * top_k, inner})), at.risen = keep(empty({rows * top_k, inner}));
        at.inner = keep(empty({rows * top_k, inner})), at.results = keep(empty({rows * top_k, width}));
        const Tensor a = empty({rows, width}), b = empty({rows, width});
        at.out = a.view();
        device_.expert_layer(at);
        at.out = b.view();
        device_.Backend::expert_layer(at);
        expect_same(a, b, rows);
      }
    }
  }
}

// Recorded and replayed, a chain of launches that may begin early keeps its order.
TEST_F(CudaFused, ChainsKeepTheirOrder) {
  const int64_t width = 256;
  const Tensor w = normals({width, width}, DType::bf16, 1.0 / 16), norm = normals({width});
  const Tensor first = normals({1, width});
  const Tensor a = empty({1, width}), b = empty({1, width}), sum = empty({1, width}),
               rstd = empty({1}, DType::f32);
  auto chain = [&] {
    base_.copy(first.view(), {a.view(), false});
    for (int i = 0; i < 40; ++i) {
      base_.linear(a.view(), w.view(), {}, {b.view(), false});
      base_.rms_norm_add(a.view(), b.view(), norm.view(), 1e-6, sum.view(), a.view(), rstd.view());
    }
  };
  chain();
  std::vector<double> want;
  {  // with a wait after each
    base_.copy(first.view(), {a.view(), false});
    for (int i = 0; i < 40; ++i) {
      base_.linear(a.view(), w.view(), {}, {b.view(), false});
      base_.synchronize();
      base_.rms_norm_add(a.view(), b.view(), norm.view(), 1e-6, sum.view(), a.view(), rstd.view());
      base_.synchronize();
    }
    want = read(a);
  }
  chain();
  EXPECT_EQ(read(a), want);
  const auto replay = base_.record(chain);
  for (int i = 0; i < 200; ++i) replay->launch();
  EXPECT_EQ(read(a), want);
}

}  // namespace
}  // namespace latente
