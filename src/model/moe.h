// DeepSeekMoE with auxiliary-loss-free balancing (DeepSeek-V3 report, section 2.1.2).
#pragma once

#include "model/layers.h"

namespace latente {

struct Gate {
  Tensor weight;                   // [E, hidden], of the exact type: choices turn on small differences
  Tensor e_score_correction_bias;  // [E] f32, or null (V2): moved by update_routing_bias, not by gradients
  FIELDS(weight, e_score_correction_bias)

  Tensor load;  // [E] f32: choices counted since the last update; no parameter
};

// Stored stacked; a checkpoint sees experts.17.gate_proj.weight (expert_path).
struct Experts {
  Tensor gate_proj, up_proj;  // [E, inner, hidden]
  Tensor down_proj;           // [E, hidden, inner]
  FIELDS(gate_proj, up_proj, down_proj)
};

struct Moe {
  Gate gate;
  Experts experts;
  Mlp shared_experts;  // n_shared_experts side by side, or null
  FIELDS(gate, experts, shared_experts)

  Routing routing;

  Moe() = default;
  Moe(const Config& config, DType type);
  Tensor operator()(Stream& stream, const Norm& norm, Step& at) const;
};

// True for "….mlp.experts.gate_proj" and its sisters: a stack of [E, …] that a checkpoint holds expert by
// expert.
bool is_expert_stack(const std::string& path);
// "….mlp.experts.gate_proj", 17 → "….mlp.experts.17.gate_proj.weight"
std::string expert_path(const std::string& stack, int64_t expert);
// The matrices that a checkpoint holds for a parameter: one, or of a stack one an expert; and their names.
int64_t matrices_of(const Tensor& parameter);
std::string matrix_path(const std::string& path, int64_t index);

}  // namespace latente
