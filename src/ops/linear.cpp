#include "ops/fp8.h"

namespace latente {
namespace {

void check_linear(const Tensor& x, const Tensor& weight) {
  LATENTE_ASSERT(x.shape().rank() == 2 && weight.shape().rank() == 2 && weight[1] == x[1]);
}

void linear_gradient(Gradients& g, const Tensor& d_out, const Tensor& x, const Tensor& weight) {
  if (auto d_x = g.slot(x)) {
    g.plan().record("linear_backward_input", {d_out, weight}, {d_x.tensor},
                    [=](Backend& b) { b.linear_backward_input(d_out.view(), weight.view(), d_x.view()); });
  }
  if (auto d_w = g.slot(weight)) {
    g.plan().record("linear_backward_weight", {d_out, x}, {d_w.tensor},
                    [=](Backend& b) { b.linear_backward_weight(d_out.view(), x.view(), d_w.view()); });
  }
}

void linear_fp8_gradient(Gradients& g, const Tensor& d_out, const Tensor& x, const Tensor& weight) {
  const auto d_x = g.slot(x), d_w = g.slot(weight);
  if (!d_x && !d_w) return;
  const Fp8Tensors& d = fp8_rows(d_out);
  if (d_x) record_fp8_backward_input(g.plan(), d, weight, {}, d_x);
  if (d_w) record_fp8_backward_weight(g.plan(), d, fp8_rows(x), {}, d_w);
}

// out (+)= x · weightᵀ + bias; `base`: what is added to, or null.
void record_linear_fp8(Plan& plan, const Tensor& base, const Tensor& x, const Tensor& weight,
                       const Tensor& bias, const Tensor& out, Plan::Gradient gradient) {
  const Fp8Tensors &from = fp8_rows(x), w = fp8_weight(plan, weight);
  const bool onto = static_cast<bool>(base);
  plan.record(
      "linear_fp8", {base, from.codes, from.scales, weight, w.codes, w.scales, bias}, {out},
      [=](Backend& b) {
        b.linear_fp8(from.along(), w.along(), {}, bias.view(), {out.view(), onto});
      },
      std::move(gradient));
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check_linear(x, weight);
  Plan& plan = *x.plan();
  const bool exact = x.dtype() == DType::bf16 && weight.dtype() == DType::f32;
  const bool fp8 = in_fp8(plan, weight);
  Tensor out = plan.intermediate({x[0], weight[0]}, exact ? DType::f32 : x.dtype());
  const Plan::Gradient gradient = [=](Gradients& g) {
    Tensor d_out = g.of(out);
    (fp8 ? linear_fp8_gradient : linear_gradient)(g, d_out, x, weight);
    if (auto d_bias = g.slot(bias)) {
      g.plan().record("linear_backward_bias", {d_out}, {d_bias.tensor},
                      [=](Backend& b) { b.linear_backward_bias(d_out.view(), d_bias.view()); });
    }
  };
  if (fp8) {
    record_linear_fp8(plan, {}, x, weight, bias, out, gradient);
    return out;
  }
  const bool of_many = exact && plan.training() && !bias;
  plan.record(
      "linear", {x, weight, bias}, {out},
      [=](Backend& b) {
        if (of_many) return b.linear_of_many(x.view(), weight.view(), out.view());
        b.linear(x.view(), weight.view(), bias.view(), {out.view(), false});
      },
      gradient);
  return out;
}

Tensor linear_exact(const Tensor& x, const Tensor& weight) {
  check_linear(x, weight);
  Plan& plan = *x.plan();
  Tensor out = plan.intermediate({x[0], weight[0]}, exact_type(x.dtype()));
  plan.record("linear", {x, weight}, {out}, [=](Backend& b) {
    b.linear(x.view(), weight.view(), {}, {out.view(), false});
  });
  return out;
}

Tensor linear_onto(const Tensor& base, const Tensor& x, const Tensor& weight) {
  check_linear(x, weight);
  LATENTE_ASSERT(base[0] == x[0] && base[1] == weight[0]);
  Plan& plan = *x.plan();
  Tensor out = plan.updated(base);
  if (in_fp8(plan, weight)) {
    record_linear_fp8(plan, base, x, weight, {}, out,
                      [=](Gradients& g) { linear_fp8_gradient(g, g.of(out), x, weight); });
    return out;
  }
  plan.record(
      "linear_onto", {base, x, weight}, {out},
      [=](Backend& b) {
        b.linear(x.view(), weight.view(), {}, {out.view(), true});
      },
      [=](Gradients& g) { linear_gradient(g, g.of(out), x, weight); });
  return out;
}

Tensor head_linear(const Tensor& x, const Tensor& w, bool transpose) {
  LATENTE_ASSERT(x.shape().rank() == 3 && w.shape().rank() == 3 && w[0] == x[1] &&
                 w[transpose ? 1 : 2] == x[2]);
  Plan& plan = *x.plan();
  Tensor out = plan.intermediate({x[0], x[1], w[transpose ? 2 : 1]}, x.dtype());
  plan.record("head_linear", {x, w}, {out},
              [=](Backend& b) { b.head_linear(x.view(), w.view(), transpose, out.view()); });
  return out;
}

}  // namespace latente
