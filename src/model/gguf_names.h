// Names of tensors in llama.cpp's files of the architecture deepseek2 (its src/llama-arch.cpp).
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace latente {

// "blk.3.attn_q_a.weight" → "model.layers.3.self_attn.q_a_proj.weight". Experts are stacked in both worlds:
// "blk.3.ffn_gate_exps.weight" → "model.layers.3.mlp.experts.gate_proj". What only such files have is named
// alike: self_attn.k_b_proj.weight and v_b_proj.weight, the parts of kv_b_proj, and mlp.experts.gate_up_proj,
// two stacks in one. Nothing for other names.
std::optional<std::string> name_of_gguf(std::string_view gguf);

// The other way, for messages: "model.layers.3.mlp.experts.17.gate_proj.weight" →
// "blk.3.ffn_gate_exps.weight"; empty for names that are not of such a file.
std::string gguf_name_of(std::string_view name);

}  // namespace latente
