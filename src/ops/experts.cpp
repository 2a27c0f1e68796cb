#include "ops/fp8.h"

namespace latente {
Routed route(const Tensor& logits, const Tensor& bias, const Tensor& token_mask, const Routing& routing,
             const Tensor& load) {
  Plan& plan = *logits.plan();
  int64_t tokens = logits[0];
  Tensor scores = plan.intermediate(logits.shape(), logits.dtype());
  Tensor weights = plan.intermediate({tokens, routing.top_k}, logits.dtype());
  Tensor experts = plan.intermediate({tokens, routing.top_k}, DType::i32);
  bool balanced = plan.training() && routing.balance.any();
  Tensor balance_loss = balanced ? plan.intermediate({1}, logits.dtype()) : Tensor();
  plan.record(
      "route", {logits, bias, token_mask, load}, {scores, weights, experts, load, balance_loss},
      [=](Backend& b) {
        b.route(logits.view(), bias.view(), token_mask.view(), routing, scores.view(), weights.view(),
                experts.view(), load.view(), balance_loss.view());
      },
      [=](Gradients& g) {
        Tensor d_weights = g.reached(weights) ? g.of(weights) : Tensor();
        auto d_logits = g.slot(logits);
        g.plan().record("route_backward", {d_weights, scores, weights, experts, token_mask},
                        {d_logits.tensor}, [=](Backend& b) {
                          b.route_backward(d_weights.view(), scores.view(), weights.view(), experts.view(),
                                           token_mask.view(), routing, d_logits.view());
                        });
      });
  return {weights, experts, balance_loss};
}

ExpertOrder expert_order(const Tensor& experts, int64_t expert_count) {
  Plan& plan = *experts.plan();
  Tensor offsets = plan.intermediate({expert_count + 1}, DType::i32);
  Tensor rows = plan.intermediate({experts.count()}, DType::i32);
  Tensor slots = plan.intermediate(experts.shape(), DType::i32);
  plan.record("expert_order", {experts}, {offsets, rows, slots},
              [=](Backend& b) { b.expert_order(experts.view(), offsets.view(), rows.view(), slots.view()); });
  return {offsets, rows, slots};
}

bool expert_read(const ExpertOrder& order, const Tensor& gate, const Tensor& up, const Tensor& down) {
  if (!gate.view().residency) return false;
  const Tensor offsets = order.offsets;
  offsets.plan()->record("expert_read", {offsets, gate, up, down}, {}, [=](Backend& b) {
    b.will_read(gate.view(), up.view(), down.view(), offsets.view());
  });
  return true;
}

Tensor expert_linear(const Tensor& x, const ExpertOrder& order, const Tensor& weight) {
  LATENTE_ASSERT(x[0] == order.rows.count() && weight[2] == x[1]);
  Plan& plan = *x.plan();
  Tensor out = plan.intermediate({x[0], weight[1]}, x.dtype());
  plan.record(
      "expert_linear", {x, order.offsets, weight}, {out},
      [=](Backend& b) { b.grouped_linear(x.view(), {}, order.offsets.view(), weight.view(), out.view()); },
      [=](Gradients& g) {
        Tensor d_out = g.of(out);
        if (auto d_w = g.slot(weight)) {
          g.plan().record("expert_linear_backward_weight", {d_out, x, order.offsets}, {d_w.tensor},
                          [=](Backend& b) {
                            b.grouped_linear_backward_weight(d_out.view(), x.view(), {}, order.offsets.view(),
                                                             d_w.view());
                          });
        }
        if (auto d_x = g.slot(x)) {
          g.plan().record("expert_linear_backward_input", {d_out, order.offsets, weight}, {d_x.tensor},
                          [=](Backend& b) {
                            b.grouped_linear_backward_input(d_out.view(), order.offsets.view(), weight.view(),
                                                            d_x.view());
                          });
        }
      });
  return out;
}

namespace {

Tensor combined_expert_linear_fp8(const Tensor& x, const ExpertOrder& order, const Tensor& weight,
                                  const Tensor& base) {
  Plan& plan = *x.plan();
  const auto [offsets, rows, slots] = order;
  const Fp8Tensors from = fp8_expert_rows(x, {}, offsets), w = fp8_weight(plan, weight);
  const Tensor y = plan.intermediate({x[0], weight[1]}, x.dtype());
  // Its gradient is that of combine, which knows where d_out is.
  plan.record(
      "linear_fp8", {from.codes, from.scales, weight, w.codes, w.scales, offsets}, {y},
      [=, offsets = offsets](Backend& b) {
        b.linear_fp8(from.along(), w.along(), offsets.view(), {}, {y.view(), false});
      },
      [](Gradients&) {});
  const bool onto = static_cast<bool>(base);
  const Tensor out = onto ? plan.updated(base) : plan.intermediate({slots[0], y[1]}, y.dtype());
  plan.record(
      "combine", {y, slots, base}, {out},
      [=, slots = slots](Backend& b) {
        b.combine(y.view(), {}, slots.view(), {out.view(), onto});
      },
      [=, offsets = offsets, rows = rows](Gradients& g) {
        const Tensor d_out = g.of(out);
        const auto d_x = g.slot(x), d_w = g.slot(weight);
        if (!d_x && !d_w) return;
        const Fp8Tensors d = fp8_expert_rows(d_out, rows, offsets);
        if (d_w) record_fp8_backward_weight(g.plan(), d, from, offsets, d_w);
        if (d_x) record_fp8_backward_input(g.plan(), d, weight, offsets, d_x);
      });
  return out;
}

}  // namespace

Tensor combined_expert_linear(const Tensor& x, const ExpertOrder& order, const Tensor& weight,
                              const Tensor& weights, const Tensor& base) {
  if (in_fp8(*x.plan(), weight)) {
    LATENTE_ASSERT(!weights);
    return combined_expert_linear_fp8(x, order, weight, base);
  }
  return combine(expert_linear(x, order, weight), weights, order, base);
}

Tensor combine(const Tensor& y, const Tensor& weights, const ExpertOrder& order, const Tensor& base) {
  Plan& plan = *y.plan();
  bool onto = static_cast<bool>(base);
  Tensor out = onto ? plan.updated(base) : plan.intermediate({weights[0], y[1]}, y.dtype());
  plan.record(
      "combine", {y, weights, order.slots, base}, {out},
      [=](Backend& b) {
        b.combine(y.view(), weights.view(), order.slots.view(), {out.view(), onto});
      },
      [=](Gradients& g) {
        Tensor d_out = g.of(out);
        auto d_y = g.slot(y), d_weights = g.slot(weights);
        g.plan().record("combine_backward", {d_out, y, weights, order.slots}, {d_y.tensor, d_weights.tensor},
                        [=](Backend& b) {
                          b.combine_backward(d_out.view(), y.view(), weights.view(), order.slots.view(),
                                             d_y.view(), d_weights.view());
                        });
      });
  return out;
}

}  // namespace latente
