// Weights of 8 and 4 bits and of FP8 on a device: products have the bits of products with the same weights
// widened to bfloat16, whoever reads them and however many rows there are; models write what the CPU writes
// within rounding.
#include <gtest/gtest.h>

#include "attention_support.h"
#include "base/random.h"
#include "checkpoint/support.h"
#include "cpu/cpu_backend.h"
#include "cuda/backend.h"
#include "cuda/coded.h"
#include "cuda/kernels.h"
#include "cuda/small_model.h"
#include "infer/engine.h"
#include "infer/sequence_runner.h"
#include "model/convert.h"
#include "model/run_weights.h"
#include "tensor/device.h"
#include "tensor/panels.h"
#include "tensor/tensor.h"

namespace latente {
namespace {

struct Kind {
  DType type;
  int64_t group;
};
void PrintTo(const Kind& kind, std::ostream* out) { *out << name_of(kind.type) << kind.group; }

// Everything goes by these numbers of rows.
constexpr int64_t coded_rows[] = {1, 2, 4, 5, 8, 9, 17, 32, 33, 64, 100, 300};

class CudaCoded : public testing::TestWithParam<Kind> {
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
  Tensor empty(Shape shape, DType type = DType::bf16) { return normals(shape, type, 1e6); }  // poison
  Tensor indices(const std::vector<int32_t>& values, Shape shape) {
    Tensor tensor = buffer(device_, shape, DType::i32);
    device_.upload(values.data(), tensor.view());
    return tensor;
  }
  std::vector<double> read(const View& view) {
    std::vector<double> values(static_cast<size_t>(view.count()));
    convert(view.dtype, on_host(device_, view).view.data, DType::f64, values.data(), view.count());
    return values;
  }
  void expect_same(const Tensor& a, const Tensor& b, int64_t rows) {
    EXPECT_EQ(read(a.view()), read(b.view())) << rows << " rows";
  }

  // A weight in both forms.
  struct Pair {
    Tensor coded, wide;
  };
  Pair weight(Shape shape) {
    const auto [type, group] = GetParam();
    const int64_t n = shape[-2], k = shape[-1], matrices = shape.rank() == 3 ? shape[0] : 1;
    const auto form = device_.quantised(shape, type, group);
    EXPECT_TRUE(form);
    std::vector<std::byte> host(static_cast<size_t>(form->bytes));
    std::vector<float> values(static_cast<size_t>(n * k)), widened(static_cast<size_t>(shape.count()));
    const int64_t bytes = form->bytes / matrices;
    for (int64_t i = 0; i < matrices; ++i) {
      // Groups of very different sizes.
      for (size_t j = 0; j < values.size(); ++j)
        values[j] = static_cast<float>(random_.normal() * std::exp2(static_cast<double>(j / 32 % 7) - 3));
      std::byte* matrix = host.data() + i * bytes;
      float* wide = widened.data() + i * n * k;
      if (type == DType::f8e4m3) {
        EXPECT_TRUE(quantised::quantise_squares(values.data(), n, k, matrix));
        const auto* scales = reinterpret_cast<const float*>(matrix);
        convert(DType::f8e4m3, matrix + quantised::square_scale_bytes(n, k), DType::f32, wide, n * k);
        for (int64_t j = 0; j < n * k; ++j)
          wide[j] *= scales[j / k / group * groups_of(k, group) + j % k / group];
      } else {
        View to = form->view;
        to.data = host.data();
        EXPECT_TRUE(device_.quantise(values.data(), nullptr, to, i, 0, n));
        quantised::unpack(quantised::form_of(type, group), matrix, k, 0, n, wide);
      }
    }
    Pair pair{parameter(shape, type, false), buffer(device_, shape, DType::bf16)};
    View view = form->view;
    std::shared_ptr<void> memory = device_.take_panels(host.data(), view);
    bind_view(pair.coded, view, std::move(memory));
    HostWriter writer(device_, pair.wide.view());
    convert(DType::f32, widened.data(), DType::bf16, writer.view().data, shape.count());
    writer.finish();
    return pair;
  }

  cuda::CudaBackend device_;
  Backend& base_ = device_;
  Random random_{3};
};

INSTANTIATE_TEST_SUITE_P(Kinds, CudaCoded,
                         testing::Values(Kind{DType::q8, 64}, Kind{DType::q8, 32}, Kind{DType::q8, 96},
                                         Kind{DType::q8, 256}, Kind{DType::q4, 64}, Kind{DType::q4, 32},
                                         Kind{DType::q4, 128}, Kind{DType::q4, 160},
                                         Kind{DType::f8e4m3, 128}));

TEST_P(CudaCoded, Linear) {
  const std::pair<int64_t, int64_t> shapes[] = {{200, 72}, {136, 264}, {72, 2048}, {264, 768}, {37, 50}};
  for (const auto& [n, k] : shapes) {
    const Pair w = weight({n, k});
    const Tensor bias = normals({n}, DType::f32);
    for (const int64_t rows : coded_rows) {
      const Tensor x = normals({rows, k});
      for (const DType type : {DType::bf16, DType::f32}) {
        const Tensor a = empty({rows, n}, type), b = empty({rows, n}, type);
        device_.linear(x.view(), w.coded.view(), {}, {a.view(), false});
        device_.linear(x.view(), w.wide.view(), {}, {b.view(), false});
        expect_same(a, b, rows);
        device_.linear(x.view(), w.coded.view(), bias.view(), {a.view(), true});
        device_.linear(x.view(), w.wide.view(), bias.view(), {b.view(), true});
        expect_same(a, b, rows);
      }
    }
  }
}

TEST_P(CudaCoded, ProductsThatShareALaunch) {
  const int64_t depth = 264;
  const Pair w = weight({200, depth}), other = weight({72, depth}), third = weight({200, depth});
  for (const int64_t rows : coded_rows) {
    const Tensor x = normals({rows, depth}, DType::bf16, 0.1);
    const Tensor a = empty({rows, 200}), b = empty({rows, 72}), c = empty({rows, 200}), d = empty({rows, 72});
    device_.linear_both(x.view(), w.coded.view(), other.coded.view(), a.view(), b.view());
    base_.Backend::linear_both(x.view(), w.wide.view(), other.wide.view(), c.view(), d.view());
    expect_same(a, c, rows), expect_same(b, d, rows);
    const Tensor gated = empty({rows, 200}), risen = empty({rows, 200});
    device_.gated_linear(x.view(), w.coded.view(), third.coded.view(), gated.view(), risen.view(), a.view(),
                         false);
    base_.Backend::gated_linear(x.view(), w.wide.view(), third.wide.view(), gated.view(), risen.view(),
                                c.view(), false);
    expect_same(a, c, rows);
  }
}

// Norms in front, where warps share a strip's depth: a last part of one piece, in which scales end early; an
// even number of parts; many.
TEST_P(CudaCoded, ProductsOfNorms) {
  for (const int64_t depth : {1056, 1064, 2048, 6000}) {
    const Pair w = weight({72, depth}), other = weight({200, depth});
    const Tensor norm = normals({depth});
    for (const int64_t rows : {1, 3, 8, 9}) {
      const Tensor h = normals({rows, depth}), pending = normals({rows, depth}),
                   scratch = empty({rows, depth});
      Tensor sums[2], a[2], b[2];
      for (const bool coded : {false, true}) {
        sums[coded] = empty({rows, depth}), a[coded] = empty({rows, 72}), b[coded] = empty({rows, 200});
        const NormedRows x{h.view(), pending.view(), norm.view(), 1e-6, sums[coded].view(), scratch.view()};
        coded ? device_.normed_linear(x, w.coded.view(), other.coded.view(), a[1].view(), b[1].view())
              : base_.Backend::normed_linear(x, w.wide.view(), other.wide.view(), a[0].view(), b[0].view());
      }
      expect_same(a[0], a[1], rows), expect_same(b[0], b[1], rows), expect_same(sums[0], sums[1], rows);
    }
  }
}

// So many that a warp has two strips of them, the last one without a neighbour; deeper than what is on its
// way.
TEST_P(CudaCoded, ManyColumns) {
  const int64_t depth = 840, columns = 8472, half = 4232;
  const Pair w = weight({columns, depth}), gate = weight({half, depth}), up = weight({half, depth});
  for (const int64_t rows : {1, 3, 8}) {
    const Tensor x = normals({rows, depth}, DType::bf16, 0.1);
    const Tensor a = empty({rows, columns}), b = empty({rows, columns});
    device_.linear(x.view(), w.coded.view(), {}, {a.view(), false});
    device_.linear(x.view(), w.wide.view(), {}, {b.view(), false});
    expect_same(a, b, rows);
    const Tensor c = empty({rows, half}), d = empty({rows, half}), gated = empty({rows, half}),
                 risen = empty({rows, half});
    device_.gated_linear(x.view(), gate.coded.view(), up.coded.view(), gated.view(), risen.view(), c.view(),
                         false);
    base_.Backend::gated_linear(x.view(), gate.wide.view(), up.wide.view(), gated.view(), risen.view(),
                                d.view(), false);
    expect_same(c, d, rows);
  }
}

TEST_P(CudaCoded, AbsorbedQueries) {
  const int64_t heads = 5, rank = 72, rope = 16;
  const Tensor table = normals({64, rope}, DType::f32);
  for (const int64_t nope : {64, 136}) {
    const Pair w = weight({heads, rank, nope});
    for (const int64_t rows : coded_rows) {
      std::vector<int32_t> places;
      for (int64_t t = 0; t < rows; ++t) places.push_back(static_cast<int32_t>(random_.below(64)));
      const Tensor q = normals({rows, heads, nope + rope}), positions = indices(places, {rows});
      const Tensor other_q = buffer(device_, q.shape(), DType::bf16);  // it may be rotated in place
      device_.copy(q.view(), {other_q.view(), false});
      const Tensor a = empty({rows, heads, rank + rope}), b = empty({rows, heads, rank + rope});
      const bool interleaved = rows % 2 == 0;
      device_.absorb_rotated(q.view(), w.coded.view(), false, positions.view(), table.view(), interleaved,
                             a.view());
      base_.Backend::absorb_rotated(other_q.view(), w.wide.view(), false, positions.view(), table.view(),
                                    interleaved, b.view());
      expect_same(a, b, rows);
      const Tensor x = normals({rows, heads, nope}), c = empty({rows, heads, rank}),
                   d = empty({rows, heads, rank});
      device_.head_linear(x.view(), w.coded.view(), false, c.view());
      device_.head_linear(x.view(), w.wide.view(), false, d.view());
      expect_same(c, d, rows);
    }
  }
}

TEST_P(CudaCoded, Experts) {
  const int64_t width = 136, inner = 72, top_k = 3;
  for (const int64_t experts : {4, 40}) {
    for (const int64_t shared : {0, 152}) {
      const Pair gate = weight({experts, inner, width}), up = weight({experts, inner, width}),
                 down = weight({experts, width, inner});
      std::vector<Pair> of_shared;
      if (shared > 0) {
        of_shared.push_back(weight({shared, width})), of_shared.push_back(weight({shared, width}));
        of_shared.push_back(weight({width, shared}));
      }
      for (const int64_t rows : coded_rows) {
        std::vector<int32_t> chosen;
        for (int64_t t = 0; t < rows; ++t) {
          const auto first = static_cast<int64_t>(random_.below(static_cast<uint64_t>(experts - 1)));
          for (int64_t k = 0; k < top_k; ++k)
            chosen.push_back(static_cast<int32_t>((first + k) % (experts - 1)));  // the last one has no rows
        }
        ExpertLayer at;
        std::vector<Tensor> kept;
        auto keep = [&](Tensor tensor) { return kept.emplace_back(std::move(tensor)).view(); };
        at.x = keep(normals({rows, width}, DType::bf16, 0.1));
        at.experts = keep(indices(chosen, {rows, top_k}));
        at.weights = keep(normals({rows, top_k}, DType::f32));
        at.offsets = keep(buffer(device_, {experts + 1}, DType::i32));
        at.rows = keep(buffer(device_, {rows * top_k}, DType::i32));
        at.slots = keep(buffer(device_, {rows, top_k}, DType::i32));
        at.gated = keep(empty({rows * top_k, inner})), at.risen = keep(empty({rows * top_k, inner}));
        at.inner = keep(empty({rows * top_k, inner})), at.results = keep(empty({rows * top_k, width}));
        if (shared > 0) {
          at.shared_gated = keep(empty({rows, shared})), at.shared_risen = keep(empty({rows, shared}));
          at.shared_inner = keep(empty({rows, shared}));
        }
        const Tensor a = empty({rows, width}), b = empty({rows, width});
        for (const bool coded : {true, false}) {
          auto of = [&](const Pair& pair) { return (coded ? pair.coded : pair.wide).view(); };
          at.gate = of(gate), at.up = of(up), at.down = of(down);
          if (shared > 0) {
            at.shared_gate = of(of_shared[0]), at.shared_up = of(of_shared[1]);
            at.shared_down = of(of_shared[2]);
          }
          at.out = (coded ? a : b).view();
          coded ? device_.expert_layer(at) : base_.Backend::expert_layer(at);
        }
        expect_same(a, b, rows);
      }
    }
  }
}

// Where the workspace holds a part of the widened weights.
TEST_P(CudaCoded, WidenedPieceByPiece) {
  const int64_t n = 200, k = 264, rows = 100, experts = 5;
  const int64_t bytes = 2 * n * k * 2 + 1000;  // two matrices
  Device other(bytes);
  cuda::Context& context = other.context;
  const Pair w = weight({n, k}), stack = weight({experts, n, k});
  const Tensor x = normals({rows, k}), bias = normals({n}, DType::f32);
  const Tensor a = empty({rows, n}), b = empty({rows, n});
  const Tensor offsets = indices({0, 3, 3, 61, 90, 100}, {experts + 1});
  device_.synchronize();  // the other stream does not wait for uploads
  context.workspace_bytes = 64 * k * 2 + 500;
  cuda::linear(x.view(), w.coded.view(), bias.view(), {a.view(), false}, context);
  other.stream.synchronize();
  device_.linear(x.view(), w.wide.view(), bias.view(), {b.view(), false});
  expect_same(a, b, rows);
  device_.synchronize();

  context.workspace_bytes = bytes;
  cuda::grouped_linear(x.view(), {}, offsets.view(), stack.coded.view(), a.view(), context);
  other.stream.synchronize();
  device_.grouped_linear(x.view(), {}, offsets.view(), stack.wide.view(), b.view());
  expect_same(a, b, rows);
}

const std::string references = LATENTE_TEST_DATA "/reference/";

std::vector<int32_t> tokens(Random& random, int64_t count) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < count; ++i) ids.push_back(static_cast<int32_t>(random.below(64)));
  return ids;
}

// Logits, token by token: some of a piece read at once, and of tokens one by one and some at a time behind.
std::vector<std::vector<float>> logits_of(Backend& backend, const Transformer& model, DType cache) {
  RunnerOptions how;
  how.context = 96;
  how.cache_type = cache;
  SequenceRunner runner(backend, model, how);
  Random random(5);
  std::vector<std::vector<float>> all;
  int64_t at = 0;
  const auto vocabulary = static_cast<size_t>(model.config().vocab_size);
  for (const int64_t count : {60, 1, 1, 3, 1, 8, 1, 12}) {
    const std::vector<int32_t> ids = tokens(random, count);
    std::span<float> logits = runner.forward(ids, at, std::min<int64_t>(count, 12));
    for (; !logits.empty(); logits = logits.subspan(vocabulary))
      all.emplace_back(logits.begin(), logits.begin() + static_cast<std::ptrdiff_t>(vocabulary));
    at += count;
  }
  return all;
}

using Logits = std::vector<std::vector<float>>;

double relative_distance(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(a[i] - b[i], 2), norm += std::pow(b[i], 2);
  }
  return std::sqrt(difference / norm);
}

// The CPU rounds activations to 8 bits, the device to bfloat16. Where that makes a router choose another
// expert, a token is farther off.
void expect_near(const Logits& got, const Logits& want, const std::string& what) {
  ASSERT_EQ(got.size(), want.size());
  std::vector<double> distances;
  for (size_t i = 0; i < want.size(); ++i) distances.push_back(relative_distance(got[i], want[i]));
  std::sort(distances.begin(), distances.end());
  EXPECT_LT(distances[distances.size() / 2], 0.02) << what;
  EXPECT_LT(distances[distances.size() * 4 / 5], 0.06) << what << ", largest " << distances.back();
}

// What is stored as FP8 is the same model as its values in bfloat16, to the bit.
TEST(CudaCodedModel, Fp8IsItsValues) {
  cuda::CudaBackend device;
  const ModelSource source = open_model(references + "v3-fp8");
  RunWeights wide;
  wide.type = "bf16";
  const auto kept = load_for_running(source, {}, device), widened = load_for_running(source, wide, device);
  EXPECT_EQ(type_text(*kept).substr(0, 3), "fp8");
  EXPECT_EQ(logits_of(device, *kept, DType::bf16), logits_of(device, *widened, DType::bf16));
}

TEST(CudaCodedModel, ConvertedModelsAnswerAsOnTheCpu) {
  cuda::CudaBackend device;
  CpuBackend cpu(2);
  for (const std::string name : {"v3-mtp2", "v3-noq", "v2-lite", "llama-gqa"}) {
    for (const DType type : {DType::q8, DType::q4}) {
      const TemporaryDirectory directory;
      const std::string out = directory.at("converted");
      ConvertOptions options;
      options.weights.type = type;
      convert_model(references + name, out, cpu, options);
      const auto there = load_for_running(open_model(out), {}, device);
      const auto here = load_for_running(open_model(out), {}, cpu);
      RunWeights as_converted;
      as_converted.type = type == DType::q8 ? "int8" : "int4";
      const auto again = load_for_running(open_model(references + name), as_converted, device);
      const Logits got = logits_of(device, *there, DType::bf16);
      EXPECT_EQ(got, logits_of(device, *again, DType::bf16)) << name;
      expect_near(got, logits_of(cpu, *here, DType::f32), name + " in " + as_converted.type);
    }
  }
}

TEST(CudaCodedModel, RandomModelsAnswerAsOnTheCpu) {
  cuda::CudaBackend device;
  CpuBackend cpu(2);
  for (const bool compressed : {false, true}) {
    for (const std::string type : {"int8", "int4"}) {
      RunWeights how;
      how.type = type;
      const auto there = load_for_running({small_config(compressed), nullptr}, how, device);
      const auto here = load_for_running({small_config(compressed), nullptr}, how, cpu);
      expect_near(logits_of(device, *there, DType::bf16), logits_of(cpu, *here, DType::f32), type);
    }
  }
}

// Alone and among others, with drafts and without: the same text.
TEST(CudaCodedModel, TextsDoNotDependOnCompany) {
  cuda::CudaBackend device;
  for (const std::string type : {"int8", "int4", "fp8"}) {
    RunWeights how;
    how.type = type;
    const auto model = load_for_running({small_config(true), nullptr}, how, device);
    std::vector<std::vector<int32_t>> prompts;
    Random random(7);
    for (int64_t s = 0; s < 11; ++s) prompts.push_back(tokens(random, 3 + 9 * (s % 4)));
    auto write = [&](int64_t at_once, int64_t drafts) {
      RunnerOptions options;
      options.context = 96;
      options.cache_type = DType::bf16;
      options.sequences = at_once;
      Engine engine(device, *model, options);
      std::vector<std::vector<int32_t>> texts(prompts.size());
      for (size_t s = 0; s < prompts.size(); ++s) {
        Request request;
        request.prompt = prompts[s];
        request.options.max_tokens = 40;
        request.options.draft = drafts;
        request.on_token = [&texts, s](GeneratedToken token) { return texts[s].push_back(token.id), true; };
        request.on_finish = [](const GenerationStats& stats) { EXPECT_FALSE(stats.error); };
        engine.submit(std::move(request));
      }
      while (engine.step()) continue;
      return texts;
    };
    const auto alone = write(1, 0);
    EXPECT_EQ(alone, write(11, 0)) << type;
    EXPECT_EQ(alone, write(4, 2)) << type;
  }
}

}  // namespace
}  // namespace latente
