#include "model/gguf_names.h"

#include <algorithm>

namespace latente {
namespace {

struct Pair {
  std::string_view gguf, name;
};

constexpr Pair whole[] = {
    {"token_embd.weight", "model.embed_tokens.weight"},
    {"output_norm.weight", "model.norm.weight"},
    {"output.weight", "lm_head.weight"},
};

// Behind "blk.N." and "model.layers.N.".
constexpr Pair of_layer[] = {
    {"attn_norm.weight", "input_layernorm.weight"},
    {"attn_q.weight", "self_attn.q_proj.weight"},
    {"attn_q_a.weight", "self_attn.q_a_proj.weight"},
    {"attn_q_a.bias", "self_attn.q_a_proj.bias"},
    {"attn_q_a_norm.weight", "self_attn.q_a_layernorm.weight"},
    {"attn_q_b.weight", "self_attn.q_b_proj.weight"},
    {"attn_kv_a_mqa.weight", "self_attn.kv_a_proj_with_mqa.weight"},
    {"attn_kv_a_mqa.bias", "self_attn.kv_a_proj_with_mqa.bias"},
    {"attn_kv_a_norm.weight", "self_attn.kv_a_layernorm.weight"},
    {"attn_kv_b.weight", "self_attn.kv_b_proj.weight"},
    {"attn_k_b.weight", "self_attn.k_b_proj.weight"},
    {"attn_v_b.weight", "self_attn.v_b_proj.weight"},
    {"attn_output.weight", "self_attn.o_proj.weight"},
    {"attn_output.bias", "self_attn.o_proj.bias"},
    {"ffn_norm.weight", "post_attention_layernorm.weight"},
    {"ffn_gate.weight", "mlp.gate_proj.weight"},
    {"ffn_up.weight", "mlp.up_proj.weight"},
    {"ffn_down.weight", "mlp.down_proj.weight"},
    {"ffn_gate_inp.weight", "mlp.gate.weight"},
    {"exp_probs_b.bias", "mlp.gate.e_score_correction_bias"},
    {"ffn_gate_exps.weight", "mlp.experts.gate_proj"},
    {"ffn_up_exps.weight", "mlp.experts.up_proj"},
    {"ffn_gate_up_exps.weight", "mlp.experts.gate_up_proj"},
    {"ffn_down_exps.weight", "mlp.experts.down_proj"},
    {"ffn_gate_shexp.weight", "mlp.shared_experts.gate_proj.weight"},
    {"ffn_up_shexp.weight", "mlp.shared_experts.up_proj.weight"},
    {"ffn_down_shexp.weight", "mlp.shared_experts.down_proj.weight"},
    {"nextn.eh_proj.weight", "eh_proj.weight"},
    {"nextn.enorm.weight", "enorm.weight"},
    {"nextn.hnorm.weight", "hnorm.weight"},
    {"nextn.embed_tokens.weight", "embed_tokens.weight"},
    {"nextn.shared_head_head.weight", "shared_head.head.weight"},
    {"nextn.shared_head_norm.weight", "shared_head.norm.weight"},
};

constexpr std::string_view gguf_layer = "blk.", our_layer = "model.layers.";

// "blk.3.x.y" with `begin` "blk." → {"3", "x.y"}; nothing unless the number is plain: no sign, no leading
// zero.
struct Split {
  std::string_view number, rest;
};
std::optional<Split> split_layer(std::string_view text, std::string_view begin) {
  if (!text.starts_with(begin)) return std::nullopt;
  text.remove_prefix(begin.size());
  size_t dot = text.find('.');
  if (dot == text.npos || dot == 0 || dot > 5) return std::nullopt;
  std::string_view number = text.substr(0, dot);
  bool digits = std::all_of(number.begin(), number.end(), [](char c) { return c >= '0' && c <= '9'; });
  if (!digits || (number.size() > 1 && number[0] == '0')) return std::nullopt;
  return Split{number, text.substr(dot + 1)};
}

std::string join(std::string_view begin, std::string_view number, std::string_view rest) {
  return std::string(begin) + std::string(number) + "." + std::string(rest);
}

// "mlp.experts.17.gate_proj.weight" → "mlp.experts.gate_proj".
std::string without_expert(std::string_view rest) {
  constexpr std::string_view experts = "mlp.experts.", weight = ".weight";
  std::optional<Split> expert = split_layer(rest, experts);
  if (!expert || !expert->rest.ends_with(weight)) return std::string(rest);
  return std::string(experts) + std::string(expert->rest.substr(0, expert->rest.size() - weight.size()));
}

}  // namespace

std::optional<std::string> name_of_gguf(std::string_view gguf) {
  for (const Pair& pair : whole) {
    if (pair.gguf == gguf) return std::string(pair.name);
  }
  std::optional<Split> layer = split_layer(gguf, gguf_layer);
  if (!layer) return std::nullopt;
  for (const Pair& pair : of_layer) {
    if (pair.gguf == layer->rest) return join(our_layer, layer->number, pair.name);
  }
  return std::nullopt;
}

std::string gguf_name_of(std::string_view name) {
  for (const Pair& pair : whole) {
    if (pair.name == name) return std::string(pair.gguf);
  }
  std::optional<Split> layer = split_layer(name, our_layer);
  if (!layer) return {};
  std::string rest = without_expert(layer->rest);
  for (const Pair& pair : of_layer) {
    if (pair.name == rest) return join(gguf_layer, layer->number, pair.gguf);
  }
  return {};
}

}  // namespace latente
