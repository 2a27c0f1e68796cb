#!/usr/bin/env python3
"""Writes a reference model (a folder beside this file) as llama.cpp's converter would write it: architecture
deepseek2. The rules are those of its conversion/deepseek.py, put down anew here with the package gguf.

    make_gguf.py FOLDER OUT.gguf [--type Q8_0] [--old] [--fused] [--tokenizer]
"""

import argparse
import json
import pathlib

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, RopeScalingType, quants
from safetensors import safe_open

HERE = pathlib.Path(__file__).parent

NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": "attn_kv_b.weight",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "eh_proj.weight": "nextn.eh_proj.weight",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "embed_tokens.weight": "nextn.embed_tokens.weight",
    "shared_head.head.weight": "nextn.shared_head_head.weight",
    "shared_head.norm.weight": "nextn.shared_head_norm.weight",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def load(folder):
    import torch  # here alone: bench/logits_vs_llama_cpp.py writes files without it

    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name).to(torch.float32).numpy() for name in file.keys()}
    return tensors


def translate(tensors, config, old, fused):
    """(name, array) as the converter names and shapes them."""
    heads, nope, v = (config[k] for k in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))
    experts = config.get("n_routed_experts", 0)
    for name, value in tensors.items():
        if name in WHOLE:
            yield WHOLE[name], value
            continue
        _, _, layer, rest = name.split(".", 3)
        if rest.startswith("mlp.experts."):
            _, _, index, kind, _ = rest.split(".")
            if index != "0":
                continue
            stack = lambda kind: np.stack(
                [tensors[f"model.layers.{layer}.mlp.experts.{e}.{kind}.weight"] for e in range(experts)]
            )
            if not fused or kind == "down_proj":
                yield f"blk.{layer}.ffn_{kind.removesuffix('_proj')}_exps.weight", stack(kind)
            elif kind == "gate_proj":
                yield f"blk.{layer}.ffn_gate_up_exps.weight", np.concatenate([stack(kind), stack("up_proj")], 1)
            continue
        if rest == "self_attn.kv_b_proj.weight" and not old:
            both = value.reshape(heads, nope + v, -1)
            yield f"blk.{layer}.attn_k_b.weight", both[:, :nope].transpose(0, 2, 1)
            yield f"blk.{layer}.attn_v_b.weight", both[:, nope:]
            continue
        stem, _, end = rest.rpartition(".")
        yield f"blk.{layer}." + (NAMES.get(rest) or f"{NAMES[stem]}.{end}"), value


def write_keys(writer, config, depth, old):
    moe = config.get("n_routed_experts", 0)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nope, rotary, rank = (config[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank"))
    writer.add_type("model")
    writer.add_block_count(config["num_hidden_layers"] + depth)
    if depth:
        writer.add_nextn_predict_layers(depth)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_attention_heads"] if old else 1)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if config.get("q_lora_rank"):
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    if old:
        writer.add_key_length(nope + rotary)
        writer.add_value_length(config["v_head_dim"])
    else:
        writer.add_key_length(rank + rotary)
        writer.add_value_length(rank)
        writer.add_key_length_mla(nope + rotary)
        writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rotary)
    writer.add_rope_freq_base(config.get("rope_theta") or rope["rope_theta"])
    if rope.get("rope_type", rope.get("type")) == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if not old:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(moe)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    sigmoid = config["model_type"] == "deepseek_v3"
    if sigmoid or not old:
        writer.add_uint32("deepseek2.expert_gating_func", 2 if sigmoid else 1)


# The model's 64 tokens as text: two that are special, 61 characters ("\u0120" spells a space) and a merged one.
TOKENS = ["<bos>", "<eos>", *"\u0120abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'-()ABCDEFGHIJKLMN", "th"]


def write_tokenizer(writer, config):
    assert len(TOKENS) == config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-v3")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 2)])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)


def write(folder, out, kind="F32", old=False, fused=False, tokenizer=False):
    config = json.loads((folder / "config.json").read_text())
    tensors = load(folder)
    layers = config["num_hidden_layers"]
    depth = 0
    while f"model.layers.{layers + depth}.eh_proj.weight" in tensors:
        depth += 1
    writer = GGUFWriter(out, "deepseek2")
    write_keys(writer, config, depth, old)
    if tokenizer:
        write_tokenizer(writer, config)
    quantized = GGMLQuantizationType[kind]
    block = GGML_QUANT_SIZES[quantized][0]
    for name, value in translate(tensors, config, old, fused):
        value = np.ascontiguousarray(value)
        small = value.ndim == 1 or name.endswith("ffn_gate_inp.weight")
        if kind == "F32" or small or value.shape[-1] % block:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, quants.quantize(value, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, nargs="?")
    parser.add_argument("out", type=pathlib.Path, nargs="?")
    parser.add_argument("--type", default="F32", help="of matrices whose rows are whole blocks")
    parser.add_argument("--old", action="store_true", help="kv_b in one tensor, as before absorbed attention")
    parser.add_argument("--fused", action="store_true", help="gates and ups of experts in one tensor")
    parser.add_argument("--tokenizer", action="store_true", help="with a tokenizer of 64 tokens")
    args = parser.parse_args()
    write(args.folder, args.out, args.type, args.old, args.fused, args.tokenizer)


if __name__ == "__main__":
    main()
