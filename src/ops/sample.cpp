#include "ops/ops.h"

namespace latente {

Tensor most_likely(const Tensor& logits) {
  Plan& plan = *logits.plan();
  Tensor out = plan.intermediate({logits[0]}, DType::i32);
  plan.record("most_likely", {logits}, {out}, [=](Backend& b) { b.most_likely(logits.view(), out.view()); });
  return out;
}

}  // namespace latente
