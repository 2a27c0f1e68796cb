#include "ops/fp8.h"

namespace latente {
namespace {

struct Gate {
  Tensor gated, risen, out;

  Gate(Plan& plan, int64_t rows, int64_t width, DType type)
      : gated(plan.intermediate({rows, width}, type)),
        risen(plan.intermediate({rows, width}, type)),
        out(plan.intermediate({rows, width}, type)) {}

  // Where the gradients of gated and risen are.
  std::pair<Tensor, Tensor> gradients(Gradients& g) const {
    const Tensor d_out = g.of(out);
    const auto d_gated = g.slot(gated), d_risen = g.slot(risen);
    g.plan().record(
        "swiglu_backward", {d_out, gated, risen}, {d_gated.tensor, d_risen.tensor}, [=, *this](Backend& b) {
          b.swiglu_backward(d_out.view(), gated.view(), risen.view(), d_gated.view(), d_risen.view());
        });
    return {d_gated.tensor, d_risen.tensor};
  }
  // The same, quantised; and of the weights that are the factors of out's rows, if there are any.
  std::pair<Fp8Tensors, Fp8Tensors> gradients_fp8(Gradients& g, const Tensor& offsets, const Tensor& factors,
                                                  const Tensor& slots,
                                                  const Gradients::Slot& d_weights) const {
    const Tensor d_out = g.of(out);
    Plan& plan = g.plan();
    const int64_t experts = offsets ? offsets.count() - 1 : 0;
    const Fp8Tensors d_gated = fp8_room(plan, out[0], out[1], experts);
    const Fp8Tensors d_risen = fp8_room(plan, out[0], out[1], experts);
    plan.record("swiglu_backward_fp8", {d_out, gated, risen, factors, slots, offsets},
                {d_gated.codes, d_gated.scales, d_gated.across_codes, d_gated.across_scales, d_risen.codes,
                 d_risen.scales, d_risen.across_codes, d_risen.across_scales, d_weights.tensor},
                [=, *this](Backend& b) {
                  b.swiglu_backward_fp8(d_out.view(), gated.view(), risen.view(), factors.view(),
                                        slots.view(), offsets.view(), d_gated.view(), d_risen.view(),
                                        d_weights.view());
                });
    return {d_gated, d_risen};
  }
  // Their products with x quantised, of all rows or with offsets of experts'; forward as gated_linear is.
  void record_fp8(Plan& plan, const Fp8Tensors& x, const Tensor& gate, const Tensor& up,
                  const Tensor& offsets, const Tensor& factors, Plan::Gradient gradient) const {
    const Fp8Tensors g = fp8_weight(plan, gate), u = fp8_weight(plan, up);
    plan.record(
        "gated_linear_fp8",
        {x.codes, x.scales, gate, up, g.codes, g.scales, u.codes, u.scales, offsets, factors},
        {gated, risen, out},
        [=, *this](Backend& b) {
          b.gated_linear_fp8(x.along(), g.along(), u.along(), offsets.view(), factors.view(), gated.view(),
                             risen.view(), out.view());
        },
        std::move(gradient));
  }
  static void record_fp8_backward_input(Plan& plan, const Fp8Tensors& d_gated, const Fp8Tensors& d_risen,
                                        const Tensor& gate, const Tensor& up, const Tensor& offsets,
                                        const Gradients::Slot& d_x) {
    const Fp8Tensors g = fp8_weight(plan, gate), u = fp8_weight(plan, up);
    plan.record("gated_linear_fp8_backward_input",
                {d_gated.codes, d_gated.scales, d_risen.codes, d_risen.scales, gate, up, g.across_codes,
                 g.across_scales, u.across_codes, u.across_scales, offsets},
                {d_x.tensor}, [=](Backend& b) {
                  b.gated_linear_fp8_backward_input(d_gated.along(), d_risen.along(), g.across(), u.across(),
                                                    offsets.view(), d_x.view());
                });
  }
  static void record_fp8_backward_weight(Gradients& g, const Fp8Tensors& d_gated, const Fp8Tensors& d_risen,
                                         const Fp8Tensors& x, const Tensor& gate, const Tensor& up,
                                         const Tensor& offsets) {
    const auto d_gate = g.slot(gate), d_up = g.slot(up);
    if (!d_gate && !d_up) return;
    g.plan().record("gated_linear_fp8_backward_weight",
                    {d_gated.across_codes, d_gated.across_scales, d_risen.across_codes, d_risen.across_scales,
                     x.across_codes, x.across_scales, offsets},
                    {d_gate.tensor, d_up.tensor}, [=](Backend& b) {
                      b.gated_linear_fp8_backward_weight(d_gated.across(), d_risen.across(), x.across(),
                                                         offsets.view(), d_gate.view(), d_up.view());
                    });
  }
  void record_swiglu(Plan& plan, Plan::Gradient gradient) const {
    plan.record(
        "swiglu", {gated, risen}, {out},
        [*this](Backend& b) { b.swiglu(gated.view(), risen.view(), out.view()); }, std::move(gradient));
  }
};

// The gradient of products that were recorded by themselves: swiglu's has it.
void in_swiglus(Gradients&) {}

}  // namespace

Tensor gated_linear(const Tensor& x, const Tensor& gate, const Tensor& up) {
  LATENTE_ASSERT(gate.shape() == up.shape() && gate[1] == x[1]);
  Plan& plan = *x.plan();
  const Gate to(plan, x[0], gate[0], x.dtype());
  if (in_fp8(plan, gate)) {
    to.record_fp8(plan, fp8_rows(x), gate, up, {}, {}, [=](Gradients& g) {
      const auto [d_gated, d_risen] = to.gradients_fp8(g, {}, {}, {}, {});
      if (const auto d_x = g.slot(x))
        Gate::record_fp8_backward_input(g.plan(), d_gated, d_risen, gate, up, {}, d_x);
      Gate::record_fp8_backward_weight(g, d_gated, d_risen, fp8_rows(x), gate, up, {});
    });
    return to.out;
  }
  const Plan::Gradient gradient = [=](Gradients& g) {
    const auto [d_gated, d_risen] = to.gradients(g);
    if (const auto d_x = g.slot(x)) {
      g.plan().record("gated_linear_backward_input", {d_gated, d_risen, gate, up}, {d_x.tensor},
                      [=, d_gated = d_gated, d_risen = d_risen](Backend& b) {
                        b.gated_linear_backward_input(d_gated.view(), d_risen.view(), gate.view(), up.view(),
                                                      d_x.view());
                      });
    }
    const auto d_gate = g.slot(gate), d_up = g.slot(up);
    if (!d_gate && !d_up) return;
    g.plan().record("gated_linear_backward_weight", {d_gated, d_risen, x}, {d_gate.tensor, d_up.tensor},
                    [=, d_gated = d_gated, d_risen = d_risen](Backend& b) {
                      b.gated_linear_backward_weight(d_gated.view(), d_risen.view(), x.view(), d_gate.view(),
                                                     d_up.view());
                    });
  };
  if (plan.fuses_gates()) {
    const bool kept = plan.training();
    plan.record(
        "gated_linear", {x, gate, up}, {to.gated, to.risen, to.out},
        [=](Backend& b) {
          b.gated_linear(x.view(), gate.view(), up.view(), to.gated.view(), to.risen.view(), to.out.view(),
                         kept);
        },
        gradient);
    return to.out;
  }
  for (const auto& [weight, out] : {std::pair{gate, to.gated}, {up, to.risen}}) {
    plan.record(
        "linear", {x, weight}, {out},
        [x, weight = weight, out = out](Backend& b) {
          b.linear(x.view(), weight.view(), {}, {out.view(), false});
        },
        in_swiglus);
  }
  to.record_swiglu(plan, gradient);
  return to.out;
}

Tensor expert_gated_linear(const Tensor& x, const ExpertOrder& order, const Tensor& gate, const Tensor& up,
                           const Tensor& weights) {
  LATENTE_ASSERT(gate.shape() == up.shape() && gate[2] == x[1]);
  Plan& plan = *x.plan();
  const int64_t choices = order.rows.count();
  const Gate to(plan, choices, gate[1], x.dtype());
  const auto [offsets, rows, slots] = order;
  if (in_fp8(plan, gate)) {
    const Fp8Tensors from = fp8_expert_rows(x, rows, offsets);
    Tensor factors;
    if (weights) {
      factors = plan.intermediate({choices}, weights.dtype());
      plan.record(
          "sort_weights", {weights, slots}, {factors},
          [=, slots = slots](Backend& b) { b.sort_weights(weights.view(), slots.view(), factors.view()); },
          in_swiglus);
    }
    to.record_fp8(
        plan, from, gate, up, offsets, factors, [=, offsets = offsets, slots = slots](Gradients& g) {
          const auto d_weights = weights ? g.slot(weights) : Gradients::Slot();
          const auto [d_gated, d_risen] = to.gradients_fp8(g, offsets, factors, slots, d_weights);
          Gate::record_fp8_backward_weight(g, d_gated, d_risen, from, gate, up, offsets);
          const auto d_x = g.slot(x);
          if (!d_x) return;
          const Tensor sorted = g.plan().intermediate({choices, x[1]}, x.dtype());
          Gate::record_fp8_backward_input(g.plan(), d_gated, d_risen, gate, up, offsets, {sorted, false});
          g.plan().record("combine", {sorted, slots}, {d_x.tensor},
                          [=](Backend& b) { b.combine(sorted.view(), {}, slots.view(), d_x.view()); });
        });
    return to.out;
  }
  LATENTE_ASSERT(!weights);
  const Plan::Gradient gradient = [=, offsets = offsets, rows = rows, slots = slots](Gradients& g) {
    const auto [d_gated, d_risen] = to.gradients(g);
    const auto d_gate = g.slot(gate), d_up = g.slot(up);
    if (d_gate || d_up) {
      g.plan().record("expert_gated_linear_backward_weight", {d_gated, d_risen, x, rows, offsets},
                      {d_gate.tensor, d_up.tensor}, [=, d_gated = d_gated, d_risen = d_risen](Backend& b) {
                        b.grouped_gated_linear_backward_weight(d_gated.view(), d_risen.view(), x.view(),
                                                               rows.view(), offsets.view(), d_gate.view(),
                                                               d_up.view());
                      });
    }
    const auto d_x = g.slot(x);
    if (!d_x) return;
    const Tensor sorted = g.plan().intermediate({choices, x[1]}, x.dtype());
    g.plan().record("expert_gated_linear_backward_input", {d_gated, d_risen, offsets, gate, up}, {sorted},
                    [=, d_gated = d_gated, d_risen = d_risen](Backend& b) {
                      b.grouped_gated_linear_backward_input(d_gated.view(), d_risen.view(), offsets.view(),
                                                            gate.view(), up.view(), {sorted.view(), false});
                    });
    g.plan().record("combine", {sorted, slots}, {d_x.tensor},
                    [=](Backend& b) { b.combine(sorted.view(), {}, slots.view(), d_x.view()); });
  };
  if (plan.fuses_gates()) {
    plan.record(
        "expert_gated_linear", {x, rows, offsets, gate, up}, {to.gated, to.risen, to.out},
        [=, offsets = offsets, rows = rows](Backend& b) {
          b.grouped_gated_linear(x.view(), rows.view(), offsets.view(), gate.view(), up.view(),
                                 to.gated.view(), to.risen.view(), to.out.view());
        },
        gradient);
    return to.out;
  }
  plan.record(
      "expert_gate_up", {x, rows, offsets, gate, up}, {to.gated, to.risen},
      [=, offsets = offsets, rows = rows](Backend& b) {
        b.grouped_linear(x.view(), rows.view(), offsets.view(), gate.view(), to.gated.view());
        b.grouped_linear(x.view(), rows.view(), offsets.view(), up.view(), to.risen.view());
      },
      in_swiglus);
  to.record_swiglu(plan, gradient);
  return to.out;
}

}  // namespace latente
