#include <algorithm>

#include "ops/ops.h"

namespace latente {
namespace {

// Rows of logits held at once: enough to make the products efficient, which takes more on a GPU; never
// [tokens, vocabulary].
int64_t chunk_rows(const Backend& backend, int64_t tokens, int64_t vocabulary) {
  const int64_t elements = int64_t{1} << (backend.is_host() ? 22 : 26);
  const int64_t most = backend.is_host() ? 1024 : 8192;
  return std::clamp<int64_t>(elements / vocabulary, std::min<int64_t>(tokens, 64),
                             std::min<int64_t>(tokens, most));
}

}  // namespace

CrossEntropy linear_cross_entropy(const Tensor& h, const Tensor& weight, const Tensor& targets,
                                  const Tensor& token_weights) {
  LATENTE_ASSERT(h.shape().rank() == 2 && weight[1] == h[1] && targets.count() == h[0]);
  Plan& plan = *h.plan();
  const DType exact = exact_type(h.dtype());
  Tensor nll = plan.intermediate({h[0]}, exact);
  Tensor predicted = plan.intermediate({h[0]}, DType::i32);
  Tensor loss = plan.intermediate({1}, exact);
  Tensor scratch = plan.intermediate({chunk_rows(plan.backend(), h[0], weight[0]), weight[0]}, exact);
  plan.record(
      "linear_cross_entropy", {h, weight, targets, token_weights}, {scratch, nll, predicted, loss},
      [=](Backend& b) {
        b.linear_cross_entropy(h.view(), weight.view(), targets.view(), token_weights.view(), scratch.view(),
                               nll.view(), predicted.view(), loss.view());
      },
      [=](Gradients& g) {
        auto d_h = g.slot(h), d_w = g.slot(weight);
        g.replace_forward();
        g.plan().record("linear_cross_entropy_with_gradient", {h, weight, targets, token_weights},
                        {scratch, nll, predicted, loss, d_h.tensor, d_w.tensor}, [=](Backend& b) {
                          b.linear_cross_entropy_with_gradient(
                              h.view(), weight.view(), targets.view(), token_weights.view(), scratch.view(),
                              nll.view(), predicted.view(), loss.view(), d_h.view(), d_w.view());
                        });
      });
  return {loss, nll, predicted};
}

}  // namespace latente
