#include "ops/ops.h"

namespace latente {
namespace {

// The gradient of out = norm(x): both rms_norm's and, with x the sum, rms_norm_add's.
void norm_gradient(Gradients& g, const Tensor& x, const Tensor& weight, const Tensor& out,
                   const Tensor& rstd) {
  Tensor d_out = g.of(out);
  auto d_x = g.slot(x), d_weight = g.slot(weight);
  g.plan().record(
      "rms_norm_backward", {d_out, x, weight, rstd}, {d_x.tensor, d_weight.tensor}, [=](Backend& b) {
        b.rms_norm_backward(d_out.view(), x.view(), weight.view(), rstd.view(), d_x.view(), d_weight.view());
      });
}

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  LATENTE_ASSERT(x.shape().rank() == 2 && weight[0] == x[1]);
  Plan& plan = *x.plan();
  Tensor out = plan.intermediate(x.shape(), x.dtype());
  Tensor rstd = plan.intermediate({x[0]}, exact_type(x.dtype()));
  plan.record(
      "rms_norm", {x, weight}, {out, rstd},
      [=](Backend& b) { b.rms_norm(x.view(), weight.view(), eps, out.view(), rstd.view()); },
      [=](Gradients& g) { norm_gradient(g, x, weight, out, rstd); });
  return out;
}

SumAndNorm rms_norm_add(const Tensor& h, const Tensor& x, const Tensor& weight, double eps) {
  LATENTE_ASSERT(h.shape() == x.shape() && weight[0] == x[1]);
  Plan& plan = *x.plan();
  Tensor sum = plan.intermediate(x.shape(), x.dtype());
  Tensor out = plan.intermediate(x.shape(), x.dtype());
  Tensor rstd = plan.intermediate({x[0]}, exact_type(x.dtype()));
  plan.record(
      "rms_norm_add", {h, x, weight}, {sum, out, rstd},
      [=](Backend& b) {
        b.rms_norm_add(h.view(), x.view(), weight.view(), eps, sum.view(), out.view(), rstd.view());
      },
      [=](Gradients& g) {
        if (g.reached(out)) norm_gradient(g, sum, weight, out, rstd);
        Tensor d_sum = g.of(sum);
        g.share(h, d_sum);
        g.share(x, d_sum);
      });
  plan.record_again({sum, weight}, {out, rstd}, [=](Backend& b) {
    b.rms_norm(sum.view(), weight.view(), eps, out.view(), rstd.view());
  });
  return {sum, out};
}

}  // namespace latente
