#include "ops/ops.h"

namespace latente {

Tensor embedding(const Tensor& ids, const Tensor& table) {
  Plan& plan = *ids.plan();
  Tensor out = plan.intermediate({ids.count(), table[1]}, plan.backend().activation_type(table.dtype()));
  plan.record(
      "embedding", {ids, table}, {out},
      [=](Backend& b) { b.embedding(ids.view(), table.view(), out.view()); },
      [=](Gradients& g) {
        Tensor d_out = g.of(out);
        auto d_table = g.slot(table);
        if (!d_table) return;
        g.plan().record("embedding_backward", {ids, d_out}, {d_table.tensor},
                        [=](Backend& b) { b.embedding_backward(ids.view(), d_out.view(), d_table.view()); });
      });
  return out;
}

Tensor select_rows(const Tensor& x, const Tensor& rows) { return embedding(rows, x); }

}  // namespace latente
