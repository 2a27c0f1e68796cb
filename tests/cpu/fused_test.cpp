// Fused calls have the bits of the calls that they stand for, with weights of any kinds beside each other.
#include <gtest/gtest.h>

#include <vector>

#include "base/random.h"
#include "cpu/cpu_backend.h"
#include "tensor/device.h"

namespace latente {
namespace {

class CpuFused : public testing::Test {
 protected:
  Tensor normals(Shape shape, double scale = 1) {
    Tensor tensor = buffer(cpu_, shape, DType::f32);
    for (int64_t i = 0; i < shape.count(); ++i)
      tensor.view().as<float>()[i] = static_cast<float>(scale * random_.normal());
    return tensor;
  }
  Tensor empty(Shape shape) { return normals(shape, 1e6); }  // poison

  // A weight or a stack of them, in the form that `type` has for running alone.
  View weight(Shape shape, DType type) {
    const Tensor values = kept_.emplace_back(normals(shape, 0.2));
    const int64_t matrices = shape.rank() == 3 ? shape[0] : 1;
    Tensor narrow = type == DType::bf16 ? buffer(cpu_, shape, type) : values;
    convert(DType::f32, values.view().data, narrow.dtype(), narrow.view().data, shape.count());
    const Backend::Packed packed =
        is_quantised(type) ? *cpu_.quantised(shape, type, 32) : *cpu_.packed(narrow.view());
    View view = packed.view;
    view.data = memory_.emplace_back(cpu_.allocate(packed.bytes)).get();
    if (!is_quantised(type)) {
      cpu_.pack(narrow.view(), view);
      return view;
    }
    const int64_t rows = shape[-2], matrix = rows * shape[-1];
    for (int64_t i = 0; i < matrices; ++i)
      EXPECT_TRUE(cpu_.quantise(values.view().as<float>() + i * matrix, nullptr, view, i, 0, rows));
    return view;
  }

  static std::vector<float> read(const Tensor& tensor) {
    const float* from = tensor.view().as<float>();
    return {from, from + tensor.count()};
  }

  CpuBackend cpu_{3};
  Random random_{3};
  std::vector<Tensor> kept_;
  std::vector<std::shared_ptr<void>> memory_;
};

constexpr DType types[] = {DType::f32, DType::bf16, DType::q8, DType::q4};
constexpr int64_t counts[] = {1, 2, 7, 40};

TEST_F(CpuFused, ProductsOfTheSameRows) {
  for (const DType type : types) {
    for (const DType other_type : types) {
      const View w = weight({200, 320}, type), other = weight({72, 320}, other_type);
      for (const int64_t rows : counts) {
        const Tensor x = normals({rows, 320});
        const Tensor a = empty({rows, 200}), b = empty({rows, 72}), c = empty({rows, 200}),
                     d = empty({rows, 72});
        cpu_.linear_both(x.view(), w, other, a.view(), b.view());
        cpu_.Backend::linear_both(x.view(), w, other, c.view(), d.view());
        EXPECT_EQ(read(a), read(c)) << rows << " rows";
        EXPECT_EQ(read(b), read(d)) << rows << " rows";
      }
    }
  }
}

TEST_F(CpuFused, Experts) {
  const int64_t width = 136, inner = 80, shared_inner = 160, experts = 6, top_k = 3;
  for (const DType type : types) {
    for (const bool shared : {false, true}) {
      const DType shared_type = type == DType::q4 ? DType::q8 : type;
      ExpertLayer at;
      at.gate = weight({experts, inner, width}, type), at.up = weight({experts, inner, width}, type);
      at.down = weight({experts, width, inner}, type);
      if (shared) {
        at.shared_gate = weight({shared_inner, width}, shared_type);
        at.shared_up = weight({shared_inner, width}, shared_type);
        at.shared_down = weight({width, shared_inner}, shared_type);
      }
      for (const int64_t rows : counts) {
        std::vector<Tensor> kept;
        const auto keep = [&](Tensor tensor) { return kept.emplace_back(std::move(tensor)).view(); };
        const auto indices = [&](Shape shape) { return keep(buffer(cpu_, shape, DType::i32)); };
        at.x = keep(normals({rows, width}));
        at.experts = indices({rows, top_k});
        for (int64_t i = 0, first = 0; i < rows * top_k; ++i) {  // different ones of each row
          if (i % top_k == 0) first = static_cast<int64_t>(random_.below(static_cast<uint64_t>(experts)));
          at.experts.as<int32_t>()[i] = static_cast<int32_t>((first + i) % experts);
        }
        at.weights = keep(normals({rows, top_k}));
        at.offsets = indices({experts + 1}), at.rows = indices({rows * top_k});
        at.slots = indices({rows, top_k});
        at.gated = keep(empty({rows * top_k, inner})), at.risen = keep(empty({rows * top_k, inner}));
        at.inner = keep(empty({rows * top_k, inner})), at.results = keep(empty({rows * top_k, width}));
        if (shared) {
          at.shared_gated = keep(empty({rows, shared_inner}));
          at.shared_risen = keep(empty({rows, shared_inner}));
          at.shared_inner = keep(empty({rows, shared_inner}));
        }
        const Tensor a = empty({rows, width}), b = empty({rows, width});
        at.out = a.view();
        cpu_.expert_layer(at);
        at.out = b.view();
        cpu_.Backend::expert_layer(at);
        EXPECT_EQ(read(a), read(b)) << name_of(type) << ", " << rows << " rows";
      }
    }
  }
}

}  // namespace
}  // namespace latente
