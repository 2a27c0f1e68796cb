#include "ops/ops.h"

namespace latente {

void choose(const Tensor& logits, const Tensor& choices, const Tensor& chosen) {
  logits.plan()->record("choose", {logits, choices}, {chosen},
                        [=](Backend& b) { b.choose(logits.view(), choices.view(), chosen.view()); });
}

Tensor take_chosen(const Tensor& ids, const Tensor& from, const Tensor& chosen) {
  Plan& plan = *ids.plan();
  Tensor out = plan.intermediate({ids.count()}, DType::i32);
  plan.record("take_chosen", {ids, from, chosen}, {out},
              [=](Backend& b) { b.take_chosen(ids.view(), from.view(), chosen.view(), out.view()); });
  return out;
}

}  // namespace latente
