#include "ops/fp8.h"

namespace latente {
namespace {

constexpr int64_t grain = 16;  // bytes that rows of codes begin at multiples of

Fp8Tensors weight_room(const Shape& shape, const std::function<Tensor(Shape, DType)>& make) {
  const int rank = shape.rank();
  const auto matrix = [&](int64_t rows, int64_t columns) {
    return rank == 3 ? Shape{shape[0], rows, columns} : Shape{rows, columns};
  };
  const int64_t n = shape[-2], k = shape[-1];
  return {make(matrix(n, k), DType::f8e4m3), make(matrix(fp8_blocks(n), fp8_blocks(k)), DType::f32),
          make(matrix(k, n), DType::f8e4m3), make(matrix(fp8_blocks(k), fp8_blocks(n)), DType::f32)};
}

void record_quantise(Plan& plan, const Tensor& x, const Tensor& rows, const Tensor& offsets,
                     const Fp8Tensors& to) {
  plan.record("quantise_fp8", {x, rows, offsets}, {to.codes, to.scales, to.across_codes, to.across_scales},
              [=](Backend& b) { b.quantise_fp8(x.view(), rows.view(), offsets.view(), to.view()); });
}

}  // namespace

bool in_fp8(const Plan& plan, const Tensor& weight) {
  if (!plan.multiplies_fp8() || weight.dtype() != DType::bf16) return false;
  const Shape& shape = weight.shape();
  if (shape[-1] % grain != 0 || shape[-2] % grain != 0)
    fail("{}: FP8 products: expected sizes in multiples of {}, found {}", weight.name(), grain, shape.str());
  return true;
}

Fp8Tensors fp8_room(Plan& plan, int64_t rows, int64_t columns, int64_t experts) {
  const int64_t depth = fp8_depth(rows, experts);
  return {plan.intermediate({rows, columns}, DType::f8e4m3),
          plan.intermediate({fp8_blocks(columns), rows}, DType::f32),
          plan.intermediate({columns, depth}, DType::f8e4m3),
          plan.intermediate({depth / fp8_block, columns}, DType::f32)};
}

const Fp8Tensors& fp8_rows(const Tensor& x) {
  Plan& plan = *x.plan();
  Fp8Tensors& known = plan.fp8_of(x);
  if (!known) {
    known = fp8_room(plan, x[0], x[1], 0);
    // Whoever reads the codes passes the gradient on to x.
    known.codes.value().requires_grad = x.requires_grad();
    record_quantise(plan, x, {}, {}, known);
  }
  return known;
}

Fp8Tensors fp8_expert_rows(const Tensor& x, const Tensor& rows, const Tensor& offsets) {
  Plan& plan = *x.plan();
  const Fp8Tensors to = fp8_room(plan, rows ? rows.count() : x[0], x[1], offsets.count() - 1);
  to.codes.value().requires_grad = x.requires_grad();
  record_quantise(plan, x, rows, offsets, to);
  return to;
}

Fp8Tensors fp8_weight(Plan& plan, const Tensor& weight) {
  Fp8Tensors& known = plan.fp8_of(weight);
  if (known) return known;
  bool quantised = false;
  if (weight.value().base) {
    known =
        weight_room(weight.shape(), [&](Shape shape, DType type) { return plan.intermediate(shape, type); });
  } else {
    std::shared_ptr<Fp8Tensors>& kept = weight.value().fp8;
    if (!kept) {
      kept = std::make_shared<Fp8Tensors>(
          weight_room(weight.shape(), [](Shape shape, DType type) { return parameter(shape, type, false); }));
    }
    known = *kept;
    quantised = !plan.fresh_gradients();
  }
  if (!quantised) {
    plan.record("quantise_fp8_weight", {weight},
                {known.codes, known.scales, known.across_codes, known.across_scales},
                [weight, to = known](Backend& b) { b.quantise_fp8_weight(weight.view(), to.view()); });
  }
  return known;
}

void record_fp8_backward_input(Plan& plan, const Fp8Tensors& d, const Tensor& weight, const Tensor& offsets,
                               const Gradients::Slot& d_x) {
  const Fp8Tensors w = fp8_weight(plan, weight);
  plan.record("linear_fp8_backward_input",
              {d.codes, d.scales, weight, w.across_codes, w.across_scales, offsets}, {d_x.tensor},
              [=](Backend& b) { b.linear_fp8(d.along(), w.across(), offsets.view(), {}, d_x.view()); });
}

void record_fp8_backward_weight(Plan& plan, const Fp8Tensors& d, const Fp8Tensors& x, const Tensor& offsets,
                                const Gradients::Slot& d_weight) {
  plan.record("linear_fp8_backward_weight",
              {d.across_codes, d.across_scales, x.across_codes, x.across_scales, offsets}, {d_weight.tensor},
              [=](Backend& b) {
                b.linear_fp8_backward_weight(d.across(), x.across(), offsets.view(), d_weight.view());
              });
}

}  // namespace latente
