#include "ops/ops.h"

namespace latente {

Tensor rope(const Tensor& x, const Tensor& positions, const Tensor& table, bool interleaved) {
  LATENTE_ASSERT(x.shape().rank() == 3 && x[2] >= table[1] && positions.count() == x[0]);
  Plan& plan = *x.plan();
  int64_t width = table[1];
  Tensor rotated = x.columns(x[2] - width, x[2]);
  Tensor out = plan.updated(x);
  plan.record(
      "rope", {x, positions, table}, {out},
      [=](Backend& b) { b.rope(rotated.view(), positions.view(), table.view(), interleaved, false); },
      [=](Gradients& g) {
        Tensor d_out = g.updatable(out);
        Tensor d_rotated = d_out.columns(d_out[2] - width, d_out[2]);
        g.plan().record("rope_backward", {d_out, positions, table}, {d_out}, [=](Backend& b) {
          b.rope(d_rotated.view(), positions.view(), table.view(), interleaved, true);
        });
      });
  return out;
}

}  // namespace latente
