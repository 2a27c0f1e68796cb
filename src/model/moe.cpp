#include "model/moe.h"

#include "ops/fp8.h"

namespace latente {

Moe::Moe(const Config& config, DType type) : routing(config.routing()) {
  int64_t experts_count = config.n_routed_experts, hidden = config.hidden_size,
          inner = config.moe_intermediate_size;
  DType exact = exact_type(type);
  gate.weight = parameter({experts_count, hidden}, exact);
  if (config.topk_method == "noaux_tc")
    gate.e_score_correction_bias = parameter({experts_count}, exact, false);
  gate.load = parameter({experts_count}, DType::f32, false);
  experts.gate_proj = parameter({experts_count, inner, hidden}, type);
  experts.up_proj = parameter({experts_count, inner, hidden}, type);
  experts.down_proj = parameter({experts_count, hidden, inner}, type);
  if (config.n_shared_experts > 0) shared_experts = Mlp(hidden, inner * config.n_shared_experts, type);
}

Tensor Moe::operator()(Stream& stream, const Norm& norm, Step& at) const {
  const bool fused = stream.h.plan()->fuses() && !experts.gate_proj.view().residency;
  const auto layer = [&](const Tensor& x, const Routed& routed) {
    const Mlp& shared = shared_experts;
    return expert_layer(x, routed,
                        {experts.gate_proj, experts.up_proj, experts.down_proj, shared.gate_proj.weight,
                         shared.up_proj.weight, shared.down_proj.weight});
  };
  if (fused && !at.count_load) {
    const NormedRoute to =
        normed_route(stream.unnormed(norm), gate.weight, gate.e_score_correction_bias, routing);
    stream.keep(to.sum);
    return layer(to.out, to.routed);
  }
  const Tensor x = stream.normed(norm);
  int64_t count = gate.weight[0];
  Routing how = routing;
  how.balance = at.balance;
  Tensor logits = linear(x, gate.weight);  // [T, E]
  Routed routed =
      route(logits, gate.e_score_correction_bias, at.token_mask, how, at.count_load ? gate.load : Tensor());
  if (routed.balance_loss) at.balance_losses.push_back(routed.balance_loss);

  if (fused) return layer(x, routed);
  ExpertOrder order = expert_order(routed.experts, count);
  const auto from_shared = [&] { return shared_experts.gate_proj ? shared_experts(x, at) : Tensor(); };
  // Computed first where there is something to wait for.
  const bool reading = expert_read(order, experts.gate_proj, experts.up_proj, experts.down_proj);
  Tensor shared = reading ? from_shared() : Tensor();  // [T, hidden]
  // In FP8 the router's weights are applied to what goes into the second product, so that the results need
  // not be kept for the weights' gradient.
  const bool early = in_fp8(*x.plan(), experts.gate_proj);
  Tensor inner = expert_gated_linear(x, order, experts.gate_proj, experts.up_proj,
                                     early ? routed.weights : Tensor());  // [T·K, inner]
  if (!reading) shared = from_shared();
  return combined_expert_linear(inner, order, experts.down_proj, early ? Tensor() : routed.weights, shared);
}

bool is_expert_stack(const std::string& path) {
  size_t at = path.rfind('.');
  return at != std::string::npos && path.substr(0, at).ends_with(".mlp.experts");
}

std::string expert_path(const std::string& stack, int64_t expert) {
  size_t at = stack.rfind('.');
  LATENTE_ASSERT(at != std::string::npos);
  return stack.substr(0, at + 1) + std::to_string(expert) + stack.substr(at) + ".weight";
}

int64_t matrices_of(const Tensor& parameter) { return parameter.shape().rank() == 3 ? parameter[0] : 1; }

std::string matrix_path(const std::string& path, int64_t index) {
  return is_expert_stack(path) ? expert_path(path, index) : path;
}

}  // namespace latente
