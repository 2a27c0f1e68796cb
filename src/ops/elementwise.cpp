#include "ops/ops.h"

namespace latente {

Tensor add(const Tensor& a, const Tensor& b) {
  LATENTE_ASSERT(a.shape() == b.shape());
  Tensor out = a.plan()->intermediate(a.shape(), a.dtype());
  a.plan()->record(
      "add", {a, b}, {out}, [=](Backend& backend) { backend.add(a.view(), b.view(), out.view()); },
      [=](Gradients& g) {
        Tensor d_out = g.of(out);
        g.share(a, d_out);
        g.share(b, d_out);
      });
  return out;
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  LATENTE_ASSERT(gate.shape() == up.shape());
  Plan& plan = *gate.plan();
  Tensor out = plan.intermediate(gate.shape(), gate.dtype());
  plan.record(
      "swiglu", {gate, up}, {out}, [=](Backend& b) { b.swiglu(gate.view(), up.view(), out.view()); },
      [=](Gradients& g) {
        Tensor d_out = g.of(out);
        auto d_gate = g.slot(gate), d_up = g.slot(up);
        g.plan().record("swiglu_backward", {d_out, gate, up}, {d_gate.tensor, d_up.tensor}, [=](Backend& b) {
          b.swiglu_backward(d_out.view(), gate.view(), up.view(), d_gate.view(), d_up.view());
        });
      });
  return out;
}

Tensor cast(const Tensor& x, DType dtype) {
  if (x.dtype() == dtype) return x;
  Plan& plan = *x.plan();
  Tensor out = plan.intermediate(x.shape(), dtype);
  plan.record(
      "cast", {x}, {out},
      [=](Backend& b) {
        b.copy(x.view(), {out.view(), false});
      },
      [=](Gradients& g) {
        Tensor d_out = g.of(out);
        auto d_x = g.slot(x);
        g.plan().record("cast_backward", {d_out}, {d_x.tensor},
                        [=](Backend& b) { b.copy(d_out.view(), d_x.view()); });
      });
  return out;
}

}  // namespace latente
