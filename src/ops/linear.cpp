#include "ops/ops.h"

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

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check_linear(x, weight);
  Plan& plan = *x.plan();
  Tensor out = plan.intermediate({x[0], weight[0]}, x.dtype());
  plan.record(
      "linear", {x, weight, bias}, {out},
      [=](Backend& b) {
        b.linear(x.view(), weight.view(), bias.view(), {out.view(), false});
      },
      [=](Gradients& g) {
        Tensor d_out = g.of(out);
        linear_gradient(g, d_out, x, weight);
        if (auto d_bias = g.slot(bias)) {
          g.plan().record("linear_backward_bias", {d_out}, {d_bias.tensor},
                          [=](Backend& b) { b.linear_backward_bias(d_out.view(), d_bias.view()); });
        }
      });
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
