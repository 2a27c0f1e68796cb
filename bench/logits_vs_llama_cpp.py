#!/usr/bin/env python3
"""Logits of random models of the architecture deepseek2, ours against llama.cpp's (package llama-cpp-python), for each
type of weights: the largest difference relative to the largest logit, of the worst token and of the median one, with the
prompt read at once and with tokens written one by one. Beside that, how far each is from the file's values in float32
with nothing rounded: products with quantised weights round activations to 8 bits in both. Then the difference of all
logits of a token in the L2 norm, relative to that of llama.cpp's (worst token, median one), how many tokens have the
same most likely successor, and the same two for llama.cpp as it runs by default (weights laid out anew, flash attention,
a float16 cache) beside llama.cpp with neither: how far apart rounding alone sets one program from itself.

    logits_vs_llama_cpp.py build/bench/bench/bench_logits [--types F32,Q8_0] [--cases v3,lite]

Needs the packages gguf, numpy, safetensors and llama-cpp-python."""

import argparse
import pathlib
import subprocess
import sys
import tempfile

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as Type, quants

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests/reference"))
import make_gguf  # noqa: E402

SHAPE = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "q_lora_rank": 96, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 256,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "model_type": "deepseek_v3",
}
YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0}
# All experts are chosen, but in v3-groups: where rounding decides between two of them, logits differ at once by tenths.
# llama.cpp takes models without query compression only of V2-Lite's 27 layers.
CASES = {
    "v3": {},
    "v3-yarn": {"rope_scaling": YARN, "qk_nope_head_dim": 128, "v_head_dim": 128, "kv_lora_rank": 512},
    "v3-groups": {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "hidden_size": 512},
    "v3-old": {"old": True},
    "v2": {"model_type": "deepseek_v2", "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "lite": {"model_type": "deepseek_v2", "q_lora_rank": None, "num_hidden_layers": 27, "norm_topk_prob": False,
             "routed_scaling_factor": 1.0},
    "lite-yarn": {"model_type": "deepseek_v2", "q_lora_rank": None, "num_hidden_layers": 27, "norm_topk_prob": False,
                  "routed_scaling_factor": 1.0, "rope_scaling": YARN, "old": True},
}
FALLBACK = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}  # llama.cpp's, for narrow rows


def tensors(config, old):
    """(name, shape, kind) as llama.cpp names them."""
    c = config
    heads, nope, rope, v = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    rank, hidden, experts, inner = c["kv_lora_rank"], c["hidden_size"], c["n_routed_experts"], c["moe_intermediate_size"]
    yield "token_embd.weight", (c["vocab_size"], hidden), "embedding"
    yield "output_norm.weight", (hidden,), "norm"
    yield "output.weight", (c["vocab_size"], hidden), "matrix"
    for layer in range(c["num_hidden_layers"]):
        def named(name, *shape, kind="matrix"):
            return f"blk.{layer}.{name}", shape, kind
        yield named("attn_norm.weight", hidden, kind="norm")
        yield named("ffn_norm.weight", hidden, kind="norm")
        if c["q_lora_rank"]:
            yield named("attn_q_a.weight", c["q_lora_rank"], hidden)
            yield named("attn_q_a_norm.weight", c["q_lora_rank"], kind="norm")
            yield named("attn_q_b.weight", heads * (nope + rope), c["q_lora_rank"])
        else:
            yield named("attn_q.weight", heads * (nope + rope), hidden)
        yield named("attn_kv_a_mqa.weight", rank + rope, hidden)
        yield named("attn_kv_a_norm.weight", rank, kind="norm")
        if old:
            yield named("attn_kv_b.weight", heads * (nope + v), rank)
        else:
            yield named("attn_k_b.weight", heads, rank, nope)
            yield named("attn_v_b.weight", heads, v, rank)
        yield named("attn_output.weight", hidden, heads * v)
        if layer < c["first_k_dense_replace"]:
            stacks, width = [("", ())], c["intermediate_size"]
        else:
            yield named("ffn_gate_inp.weight", experts, hidden, kind="router")
            if c["model_type"] == "deepseek_v3":
                yield named("exp_probs_b.bias", experts, kind="bias")
            stacks, width = [("_exps", (experts,)), ("_shexp", ())], inner
        for end, stack in stacks:
            yield named(f"ffn_gate{end}.weight", *stack, width, hidden)
            yield named(f"ffn_up{end}.weight", *stack, width, hidden)
            yield named(f"ffn_down{end}.weight", *stack, hidden, width)


def random_k_blocks(rng, shape, kind, deviation):
    """Random codes and sub-scales, which the package gguf does not make from values."""
    values, size = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // values, size), dtype=np.uint8)

    def put(at, value):
        blocks[:, at:at + 2] = (value * rng.uniform(0.7, 1.3, len(blocks))).astype(np.float16)[:, None].view(np.uint8)
    if kind == Type.Q6_K:
        put(208, deviation / 1400)  # codes of 18.5 and scales of 74 in quadratic mean
    else:
        step = deviation / (170 if kind == Type.Q4_K else 340)
        put(0, step)
        put(2, step * (7.5 if kind == Type.Q4_K else 15.5))
    return blocks.reshape(*shape[:-1], -1)


def write(path, config, kind, old, seed):
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "deepseek2")
    make_gguf.write_keys(writer, config, 0, old)
    writer.add_tokenizer_model("none")
    for name, shape, role in tensors(config, old):
        # What layers add to the stream is small beside it, as in trained models, or each one's rounding would show whole.
        gain = 0.3 if "attn_output" in name or "ffn_down" in name else 1.2
        deviation = {"norm": 0.2, "bias": 0.1, "embedding": 1.0}.get(role, gain / np.sqrt(shape[-1]))
        as_kind = kind if role in ("matrix", "embedding") else Type.F32
        if shape[-1] % GGML_QUANT_SIZES[as_kind][0]:
            as_kind = FALLBACK[as_kind]
        if as_kind in FALLBACK:
            writer.add_tensor(name, random_k_blocks(rng, shape, as_kind, deviation), raw_dtype=as_kind)
            continue
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(deviation) + np.float32(role == "norm")
        if as_kind == Type.F16:  # the released models are bfloat16
            values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
        if as_kind == Type.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quants.quantize(values, as_kind), raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Theirs:
    def __init__(self, path, vocabulary, threads, by_default=False):
        import llama_cpp as ll

        self.ll, self.vocabulary = ll, vocabulary
        ll.llama_backend_init()
        self.log = ll.llama_log_callback(lambda *a: None)
        ll.llama_log_set(self.log, None)
        params = ll.llama_model_default_params()
        params.use_extra_bufts = by_default  # repacked weights: some shapes have no kernel
        self.model = ll.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {path}")
        params = ll.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        if not by_default:
            params.flash_attn_type = 0
            params.type_k = params.type_v = 0  # float32
        self.context = ll.llama_init_from_model(self.model, params)

    def logits(self, ids, written):
        ll = self.ll
        ll.llama_memory_clear(ll.llama_get_memory(self.context), True)
        rows, read = [], len(ids) - written
        for first, last in [(0, read), *((i, i + 1) for i in range(read, len(ids)))]:
            batch = ll.llama_batch_init(last - first, 0, 1)
            batch.n_tokens = last - first
            for i in range(last - first):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(ids[first + i]), first + i, 1, 1
                batch.seq_id[i][0] = 0
            if ll.llama_decode(self.context, batch) != 0:
                raise SystemExit("llama_decode failed")
            rows += [np.ctypeslib.as_array(ll.llama_get_logits_ith(self.context, i), (self.vocabulary,)).copy()
                     for i in range(last - first)]
            ll.llama_batch_free(batch)
        return np.stack(rows)

    def close(self):
        self.ll.llama_free(self.context)
        self.ll.llama_model_free(self.model)


def theirs(path, vocabulary, threads, ids, written, by_default):
    model = Theirs(path, vocabulary, threads, by_default)
    logits = model.logits(ids, written)
    model.close()
    return logits


def ours(program, path, kind, ids, written, vocabulary, threads):
    done = subprocess.run([program, path, kind, str(threads), str(written)], input=" ".join(map(str, ids)).encode(),
                          capture_output=True)
    if done.returncode:
        raise SystemExit(done.stderr.decode())
    return np.frombuffer(done.stdout, np.float32).reshape(len(ids), vocabulary), done.stderr.decode().strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--types", default="F32,F16,BF16,Q8_0,Q4_0,Q4_K,Q6_K")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--written", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    heads = ("read", "written", "ours-f32", "theirs-f32")
    columns = "".join(f"{head:>11}{'median':>9}" for head in (*heads, "L2"))
    print(f"{'':<12}{'type':<6}{columns}{'same top':>10}{'theirs L2':>11}{'median':>9}{'same top':>10}  held as")
    for case in args.cases.split(","):
        config = SHAPE | CASES[case]
        old, vocabulary = config.pop("old", False), config["vocab_size"]
        ids = np.random.default_rng(args.seed).integers(0, vocabulary, args.tokens)
        read = args.tokens - args.written
        for kind in args.types.split(","):
            with tempfile.TemporaryDirectory() as directory:
                path = pathlib.Path(directory) / "model.gguf"
                write(path, config, Type[kind], old, args.seed)
                by_default, expected = (theirs(path, vocabulary, args.threads, ids, args.written, way) for way in (True, False))
                found, held = ours(args.program, path, "auto", ids, args.written, vocabulary, args.threads)
                decoded, _ = ours(args.program, path, "f32", ids, args.written, vocabulary, args.threads)
            scale = np.abs(expected).max()
            def off(a, b, rows):
                each = np.abs(a[rows] - b[rows]).max(axis=1) / scale
                return f"{each.max():>11.1e}{np.median(each):>9.1e}"
            everything = slice(None)
            columns = (off(found, expected, slice(read)), off(found, expected, slice(read, None)),
                       off(found, decoded, everything), off(expected, decoded, everything))
            def as_a_whole(a):
                norms = np.linalg.norm(a - expected, axis=1) / np.linalg.norm(expected, axis=1)
                same = f"{(a.argmax(axis=1) == expected.argmax(axis=1)).sum()}/{args.tokens}"
                return f"{norms.max():>11.1e}{np.median(norms):>9.1e}{same:>10}"
            print(f"{case:<12}{kind:<6}{''.join(columns)}{as_a_whole(found)}{as_a_whole(by_default)}  {held}", flush=True)


main()
