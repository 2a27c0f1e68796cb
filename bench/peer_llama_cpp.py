#!/usr/bin/env python3
"""Speed of llama.cpp (package llama-cpp-python) on random weights of a config.json's shape, one JSON object a line,
as `latente bench --json` prints them.

    peer_llama_cpp.py CONFIG --type Q8_0 --prompt 512 --gen 128 --depth 0,4096 --threads 2

Needs the packages gguf, numpy and llama-cpp-python (built natively)."""

import argparse
import ctypes
import json
import os
import pathlib
import statistics
import tempfile
import time

import numpy as np
import gguf


def random_tensor(rng, shape, kind):
    """Raw blocks of `kind` for a matrix [..., rows, columns], and the shape in bytes."""
    count = int(np.prod(shape))
    if kind == gguf.GGMLQuantizationType.F32:
        return (rng.standard_normal(count, dtype=np.float32) * 0.02).reshape(shape)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = count // block
    sample = rng.integers(0, 256, (4096, size), dtype=np.uint8)
    scale = np.float16(0.02 / 40 if kind == gguf.GGMLQuantizationType.Q8_0 else 0.02 / 3)
    sample[:, 0:2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
    data = np.tile(sample, (blocks // 4096 + 1, 1))[:blocks]
    return data.reshape(*shape[:-1], shape[-1] // block * size)


def write_gguf(config, path, kind):
    c = config
    rng = np.random.default_rng(1)
    w = gguf.GGUFWriter(path, "deepseek2")
    heads, nope, rope, v = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    rank, hidden, layers = c["kv_lora_rank"], c["hidden_size"], c["num_hidden_layers"]
    w.add_block_count(layers)
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(hidden)
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(heads)
    w.add_head_count_kv(1)
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_rope_freq_base(c["rope_theta"])
    w.add_vocab_size(c["vocab_size"])
    w.add_leading_dense_block_count(c["first_k_dense_replace"])
    if c.get("q_lora_rank"):
        w.add_q_lora_rank(c["q_lora_rank"])
    w.add_kv_lora_rank(rank)
    w.add_key_length(rank + rope)
    w.add_value_length(rank)
    w.add_key_length_mla(nope + rope)
    w.add_value_length_mla(v)
    w.add_rope_dimension_count(rope)
    w.add_expert_count(c["n_routed_experts"])
    w.add_expert_used_count(c["num_experts_per_tok"])
    w.add_expert_shared_count(c["n_shared_experts"])
    w.add_expert_feed_forward_length(c["moe_intermediate_size"])
    w.add_expert_weights_scale(c.get("routed_scaling_factor", 1.0))
    sigmoid = c.get("scoring_func") == "sigmoid"
    w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX)
    w.add_expert_weights_norm(bool(c.get("norm_topk_prob")))
    w.add_tokenizer_model("none")

    def matrix(name, *shape, as_kind=None):
        as_kind = kind if as_kind is None else as_kind
        w.add_tensor(name + ".weight", random_tensor(rng, shape, as_kind), raw_dtype=as_kind)

    def norm(name, width):
        w.add_tensor(name + ".weight", np.ones(width, dtype=np.float32))

    f32 = gguf.GGMLQuantizationType.F32
    matrix("token_embd", c["vocab_size"], hidden)
    norm("output_norm", hidden)
    matrix("output", c["vocab_size"], hidden)
    for i in range(layers):
        b = f"blk.{i}."
        norm(b + "attn_norm", hidden)
        norm(b + "ffn_norm", hidden)
        if c.get("q_lora_rank"):
            matrix(b + "attn_q_a", c["q_lora_rank"], hidden)
            norm(b + "attn_q_a_norm", c["q_lora_rank"])
            matrix(b + "attn_q_b", heads * (nope + rope), c["q_lora_rank"])
        else:
            matrix(b + "attn_q", heads * (nope + rope), hidden)
        matrix(b + "attn_kv_a_mqa", rank + rope, hidden)
        norm(b + "attn_kv_a_norm", rank)
        matrix(b + "attn_k_b", heads, rank, nope)
        matrix(b + "attn_v_b", heads, v, rank)
        matrix(b + "attn_output", hidden, heads * v)
        if i < c["first_k_dense_replace"]:
            matrix(b + "ffn_gate", c["intermediate_size"], hidden)
            matrix(b + "ffn_up", c["intermediate_size"], hidden)
            matrix(b + "ffn_down", hidden, c["intermediate_size"])
            continue
        inner, experts = c["moe_intermediate_size"], c["n_routed_experts"]
        matrix(b + "ffn_gate_inp", experts, hidden, as_kind=f32)
        if sigmoid:
            w.add_tensor(b + "exp_probs_b.bias", np.zeros(experts, dtype=np.float32))
        matrix(b + "ffn_gate_exps", experts, inner, hidden)
        matrix(b + "ffn_up_exps", experts, inner, hidden)
        matrix(b + "ffn_down_exps", experts, hidden, inner)
        shared = inner * c["n_shared_experts"]
        matrix(b + "ffn_gate_shexp", shared, hidden)
        matrix(b + "ffn_up_shexp", shared, hidden)
        matrix(b + "ffn_down_shexp", hidden, shared)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("config")
    p.add_argument("--type", default="Q8_0", choices=["Q8_0", "Q4_0", "F32"])
    p.add_argument("--prompt", type=int, default=512)
    p.add_argument("--gen", type=int, default=128)
    p.add_argument("--depth", default="0")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--plain-weights", action="store_true",
                   help="do not repack them for AMX and the like (0.3.36 aborts with quantised weights on AMX)")
    p.add_argument("--gguf", help="keep the weights in this file, and use it again")
    p.add_argument("--states", help="keep the filled caches in this folder, and use them again: filling 32,768 tokens "
                                    "takes half an hour")
    args = p.parse_args()
    import llama_cpp as ll

    config = json.load(open(args.config))
    path = args.gguf or tempfile.mktemp(suffix=".gguf")
    if not pathlib.Path(path).exists():
        write_gguf(config, path, gguf.GGMLQuantizationType[args.type])
    ll.llama_backend_init()
    log = ll.llama_log_callback(lambda *a: None)
    ll.llama_log_set(log, None)
    start = time.perf_counter()
    mp = ll.llama_model_default_params()
    mp.use_extra_bufts = not args.plain_weights
    model = ll.llama_model_load_from_file(path.encode(), mp)
    depths = [int(d) for d in args.depth.split(",")]
    cp = ll.llama_context_default_params()
    cp.n_ctx = max(depths) + max(args.prompt, args.gen) + 64
    cp.n_batch = cp.n_ubatch = 512
    cp.n_threads = cp.n_threads_batch = args.threads
    if hasattr(cp, "flash_attn_type"):
        cp.flash_attn_type = 1
    else:
        cp.flash_attn = True
    context = ll.llama_init_from_model(model, cp)
    load = time.perf_counter() - start
    memory = ll.llama_get_memory(context)
    rng = np.random.default_rng(2)

    def decode(count):
        ids = rng.integers(0, config["vocab_size"], count)
        array = (ll.llama_token * count)(*[int(i) for i in ids])
        batch = ll.llama_batch_get_one(array, count)
        if ll.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed")

    def read(count):
        while count > 0:
            decode(min(count, 512))
            count -= 512

    def cut(depth):
        ll.llama_memory_seq_rm(memory, 0, depth, -1)

    filled = 0
    for depth in depths:
        state = pathlib.Path(args.states) / f"{args.type}-{depth}" if args.states and depth > 0 else None
        if state and state.exists():
            tokens, found = (ll.llama_token * 1)(), ctypes.c_size_t()
            if ll.llama_state_load_file(context, str(state).encode(), tokens, 1, ctypes.byref(found)) is not True:
                raise SystemExit(f"{state}: llama.cpp does not read it")
        else:
            read(depth - filled)
            if state:
                ll.llama_state_save_file(context, str(state).encode(), (ll.llama_token * 1)(), 0)
        filled = depth

        def prefill():
            read(args.prompt)

        def generate():
            for _ in range(args.gen):
                decode(1)

        for kind, count, body in (("prefill", args.prompt, prefill), ("decode", args.gen, generate)):
            if count == 0:
                continue
            rates = []
            for i in range(args.repeat + 1):
                cut(depth)
                start = time.perf_counter()
                body()
                ll.llama_synchronize(context)
                if i > 0:
                    rates.append(count / (time.perf_counter() - start))
            cut(depth)
            median = statistics.median(rates)
            print(json.dumps({"kind": kind, "tokens": count, "depth": depth, "threads": args.threads,
                              "weights": args.type, "tok_s": median, "best": max(rates),
                              "spread": (max(rates) - min(rates)) / median,
                              "load_s": load, "resident": resident()}), flush=True)
    if not args.gguf:
        os.unlink(path)


main()
