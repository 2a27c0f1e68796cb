#!/usr/bin/env python3
"""Makes tiny random models and what transformers computes with them; README.md beside this file says what is stored.

    make_reference.py --all --out tests/reference          every committed case
    make_reference.py --case v3-mtp1 --out DIR --heads 5   one case, with other shapes
    make_reference.py --random --seed 7 --out DIR          a shape drawn from the seed
"""

import argparse
import json
import math
import pathlib
import random
import re
import sys
import tempfile

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import cases
import oracle

LAMBDA = 0.3
MIN_ROUTING_GAP = 1e-4
MIN_LOGIT_GAP = 1e-3
MIN_DISTINCT = 4
MAX_DRAWS = 400


def draw_weights(model, generator):
    """Weights that keep activations near 1, spread the routing, and make some biased scores negative."""
    weights = {}
    for name, view in model.views().items():
        noise = torch.randn(view.shape, generator=generator, dtype=torch.float64)
        if name.endswith("e_score_correction_bias"):
            value = -0.4 + 0.3 * noise
        elif name.endswith("norm.weight"):
            value = 1 + 0.2 * noise
        elif name.endswith(".bias"):
            value = 0.2 * noise
        elif name.endswith("embed_tokens.weight"):
            tied = model.main.config.tie_word_embeddings
            value = noise * (1.5 / math.sqrt(view.shape[1]) if tied else 1.0)
        else:
            gain = 1.5 if re.search(r"(mlp\.gate|lm_head|q_b_proj|q_proj)\.weight$", name) else 1.0
            value = gain * noise / math.sqrt(view.shape[1])
        weights[name] = value
    return weights


def to_disk(weights, case, model):
    """The tensors of the checkpoint in their storage type, the MTP modules' copies of embedding and head included."""
    stored = {}
    for name, value in weights.items():
        if name.endswith("e_score_correction_bias") or case.storage == "float32":
            stored[name] = value.to(torch.float32)
        elif case.storage == "fp8":
            quantized = value.dim() == 2 and ".layers." in name and not re.search(r"(mlp\.gate|eh_proj)\.", name)
            if quantized:
                # Blocks of different magnitude, so that a wrong scale cannot go unseen.
                blocks = [torch.arange(n) // oracle.FP8_BLOCK for n in value.shape]
                value = value * 2.0 ** (blocks[0][:, None] - blocks[1][None])
                stored[name], scale = oracle.quantize_fp8(value)
                stored[name.removesuffix(".weight") + ".weight_scale_inv"] = scale
            else:
                stored[name] = value.to(torch.bfloat16)
        else:
            stored[name] = value.to(getattr(torch, case.storage))
    head = "model.embed_tokens.weight" if case.config["tie_word_embeddings"] else "lm_head.weight"
    for k in range(model.depth):
        prefix = f"model.layers.{model.layers + k}"
        stored[f"{prefix}.embed_tokens.weight"] = stored["model.embed_tokens.weight"].clone()
        stored[f"{prefix}.shared_head.head.weight"] = stored[head].clone()
    return stored


def write_config(case, directory):
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(case.config, indent=2, sort_keys=True)
    (directory / "config.json").write_text(text + "\n")
    if case.spelling == "transformers":
        config = AutoConfig.from_pretrained(directory)
        config.architectures = case.config["architectures"]
        config.save_pretrained(directory)


def write_tensors(stored, shards, directory):
    for old in directory.glob("*.safetensors*"):
        old.unlink()
    stored = {k: v.contiguous() for k, v in stored.items()}
    if shards == 1:
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(stored)
    weight_map = {}
    for s in range(shards):
        file = f"model-{s + 1:05}-of-{shards:05}.safetensors"
        part = names[s * len(names) // shards : (s + 1) * len(names) // shards]
        save_file({k: stored[k] for k in part}, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(v.numel() * v.element_size() for v in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


class RoutingWatch:
    """Smallest distance between a selected and the best rejected expert (or group), over every router call."""

    def __init__(self, model):
        self.gap = math.inf
        roots = [model.main] + ([model.mtp] if model.mtp is not None else [])
        routers = [m for root in roots for m in root.modules() if type(m).__name__.endswith("TopkRouter")]
        self.hooks = [router.register_forward_hook(self.watch) for router in routers]

    def watch(self, router, _, output):
        logits = output[0].detach()
        if hasattr(router, "e_score_correction_bias"):
            scores, best = logits.sigmoid() + router.e_score_correction_bias, 2
        else:
            # Relative to the mean score, since softmax scores shrink with the number of experts.
            scores, best = logits.softmax(-1) * logits.shape[-1], 1
        if getattr(router, "topk_method", "noaux_tc") != "greedy" and router.num_group > 1:
            groups = scores.view(scores.shape[0], router.num_group, -1)
            total = groups.topk(min(best, groups.shape[-1]), -1).values.sum(-1)
            self.note(total, router.topk_group)
            keep = torch.zeros_like(total, dtype=torch.bool).scatter_(1, total.topk(router.topk_group, -1).indices, True)
            scores = groups.masked_fill(~keep[..., None], -math.inf).flatten(1)
        self.note(scores, router.top_k)

    def note(self, scores, k):
        if k < scores.shape[-1]:
            ordered = scores.sort(-1, descending=True).values
            self.gap = min(self.gap, (ordered[:, k - 1] - ordered[:, k]).min().item())

    def close(self):
        for hook in self.hooks:
            hook.remove()


def logit_gap(model, prompt, generated):
    """Checks the cached generation against one uncached pass; returns the smallest lead of a chosen token."""
    ids = torch.cat([prompt, generated])[None]
    with torch.no_grad():
        out, _ = model.forward(ids)
    logits = out["logits"][0, prompt.shape[0] - 1 : -1]
    top = logits.topk(2, -1)
    if not torch.equal(top.indices[:, 0], generated):
        raise RuntimeError("generation with the cache differs from the uncached model")
    return (top.values[:, 0] - top.values[:, 1]).min().item()


def attempt(case, seed, directory):
    """One draw of weights and tokens. Returns (reference tensors, metadata, stored tensors) or None if a tie is near."""
    generator = torch.Generator().manual_seed(seed)
    model = oracle.Oracle(directory, case.depth)
    stored = to_disk(draw_weights(model, generator), case, model)
    write_tensors(stored, case.shards, directory)
    model.set_weights(oracle.load_tensors(directory))
    vocab = case.config["vocab_size"]
    input_ids = torch.randint(2, vocab, (case.batch, case.length), generator=generator)
    lengths = None
    if case.lengths is not None:
        lengths = torch.tensor(case.lengths)
        input_ids[torch.arange(case.length)[None] >= lengths[:, None]] = 0

    watch = RoutingWatch(model)
    out, total = model.forward(input_ids, lengths, LAMBDA)
    rows = [row if lengths is None else row[: lengths[r]] for r, row in enumerate(input_ids)]
    generated = [model.generate(row, case.new_tokens) for row in rows]
    lead = min(logit_gap(model, row, new) for row, new in zip(rows, generated, strict=True))
    watch.close()
    distinct = min(len(set(g.tolist())) for g in generated)
    ended = any(case.config["eos_token_id"] in g for g in generated)
    if watch.gap < MIN_ROUTING_GAP or lead < MIN_LOGIT_GAP or ended or distinct < min(MIN_DISTINCT, case.new_tokens // 3):
        return None

    if case.gradients:
        total.backward()
        out.update({f"grad.{k}": v for k, v in model.gradients().items()})
    tensors = {k: v.detach() for k, v in out.items()}
    tensors["input_ids"] = input_ids
    tensors["generated"] = torch.stack(generated)
    if lengths is not None:
        tensors["lengths"] = lengths
    if case.depth:
        tensors["mtp_lambda"] = torch.tensor(LAMBDA, dtype=torch.float64)
    metadata = {
        "format": "pt",
        "seed": str(seed),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "min_routing_gap": f"{watch.gap:.3g}",
        "min_logit_gap": f"{lead:.3g}",
    }
    return tensors, metadata


def distance(a, b):
    norm = b.double().norm().item()
    return (a.double() - b.double()).norm().item() / norm if norm else a.double().norm().item()


def float32_error(case, directory, tensors):
    """How far transformers' own float32 run of the model is from the reference: (outputs, gradients)."""
    model = oracle.Oracle(directory, case.depth, torch.float32)
    model.set_weights(oracle.load_tensors(directory))
    out, total = model.forward(tensors["input_ids"], tensors.get("lengths"), LAMBDA)
    worst = max(distance(v.detach(), tensors[k]) for k, v in out.items())
    if not case.gradients:
        return worst, 0.0
    total.backward()
    return worst, max(distance(v, tensors[f"grad.{k}"]) for k, v in model.gradients().items())


def load_error(directory, tensors):
    """Distance of the logits when transformers' own loader reads the directory: proves names and layout."""
    config = json.loads((directory / "config.json").read_text())
    if config.pop("quantization_config", None):
        # transformers spreads FP8 scales evenly over the matrix, which is wrong at ragged edges: let it read float32.
        with tempfile.TemporaryDirectory() as plain:
            plain = pathlib.Path(plain)
            (plain / "config.json").write_text(json.dumps(config))
            write_tensors({k: v.float() for k, v in oracle.load_tensors(directory).items()}, 1, plain)
            return load_error(plain, tensors)
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    if hasattr(model.config, "n_routed_experts"):
        model.set_experts_implementation("eager")  # the default one wants sizes that are multiples of 16 bytes
    if info["missing_keys"]:
        raise RuntimeError(f"transformers misses {sorted(info['missing_keys'])}")
    lengths = tensors.get("lengths")
    with oracle.Float32(), torch.no_grad():
        logits = model(tensors["input_ids"]).logits
    if lengths is not None:
        logits = logits * (torch.arange(logits.shape[1])[None] < lengths[:, None])[..., None]
    return distance(logits, tensors["logits"])


def make(name, case, seed, directory, store):
    write_config(case, directory)
    for draw in range(MAX_DRAWS):
        result = attempt(case, seed + 1000 * draw, directory)
        if result is not None:
            break
    else:
        sys.exit(f"{name}: no draw of {MAX_DRAWS} is free of near-ties")
    tensors, metadata = result
    values, grads = float32_error(case, directory, tensors)
    loaded = load_error(directory, tensors)
    for key, value in tensors.items():
        if value.is_floating_point():
            tensors[key] = value.to(store)
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / "reference.safetensors", metadata=metadata)
    for file in directory.iterdir():
        file.chmod(0o644)
    print(
        f"{name}: seed {metadata['seed']}, routing gap {metadata['min_routing_gap']}, logit gap "
        f"{metadata['min_logit_gap']}; transformers in float32 is off by {values:.1e} (outputs), {grads:.1e} "
        f"(gradients), {loaded:.1e} (logits, its own loader)"
    )
    return loaded


def override(case, args):
    config = case.config
    if args.heads:
        config["num_attention_heads"] = config["num_key_value_heads"] = args.heads
        if config["model_type"] != "deepseek_v3":
            config["hidden_size"] = args.heads * max(1, config["hidden_size"] // args.heads)
    if args.rope:
        config["qk_rope_head_dim"] = args.rope
    if args.experts:
        config["n_routed_experts"] = args.experts
        if args.experts % config["n_group"] or args.experts < 2 * config["n_group"]:
            config["n_group"] = config["topk_group"] = 1
        reachable = args.experts // config["n_group"] * config["topk_group"]
        config["num_experts_per_tok"] = min(config["num_experts_per_tok"], reachable)
    if args.batch or args.length or args.lengths:
        case.lengths = args.lengths
        case.batch = len(args.lengths) if args.lengths else args.batch or case.batch
        case.length = max(args.lengths) if args.lengths else args.length or case.length
    case.new_tokens = args.new_tokens or case.new_tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--case", choices=cases.CASES)
    what.add_argument("--all", action="store_true", help="every committed case, each into OUT/<case>")
    what.add_argument("--random", action="store_true", help="a shape drawn from --seed")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--heads", type=int, help="attention heads")
    parser.add_argument("--rope", type=int, help="qk_rope_head_dim")
    parser.add_argument("--experts", type=int, help="n_routed_experts")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of each row; shorter rows are padded right")
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--store", choices=["float32", "float64"], default="float32", help="type of stored values")
    args = parser.parse_args()

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    store = getattr(torch, args.store)
    if args.all:
        for name, case in cases.CASES.items():
            make(name, case, args.seed, args.out / name, store)
        return
    if args.random:
        name, case = f"random-{args.seed}", cases.random_case(random.Random(args.seed))
    else:
        name, case = args.case, cases.CASES[args.case]
    override(case, args)
    make(name, case, args.seed, args.out, store)


if __name__ == "__main__":
    main()
