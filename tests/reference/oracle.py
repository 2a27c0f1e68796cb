"""What make_reference.py and check_export.py share: transformers evaluated in float64, released tensor names, MTP.

Tensors are named as released checkpoints name them (one tensor per expert, MTP module k at layers[L + k - 1]),
whatever transformers calls them inside.
"""

import json
import pathlib
import re

import torch
from safetensors import safe_open
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

FP8_BLOCK = 128
FP8_MAX = 448.0


class Float64(TorchFunctionMode):
    """Turns every explicit float32 in transformers' Python code (norms, router, softmax, RoPE) into float64.

    It also lets the router ask for the two best experts of a group that has only one.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if a is torch.float32 else a for a in args]
        for key, value in kwargs.items():
            if value is torch.float32:
                kwargs[key] = torch.float64
        clamp_topk(func, args, kwargs)
        return func(*args, **kwargs)


class Float32(TorchFunctionMode):
    """Plain float32, with only the router's request for two experts of a group of one repaired."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = list(args), dict(kwargs or {})
        clamp_topk(func, args, kwargs)
        return func(*args, **kwargs)


def clamp_topk(func, args, kwargs):
    if func not in (torch.topk, torch.Tensor.topk):
        return
    available = args[0].shape[-1]
    if "k" in kwargs:
        kwargs["k"] = min(kwargs["k"], available)
    elif len(args) > 1:
        args[1] = min(args[1], available)


def mtp_depth(directory):
    """Number of MTP modules whose tensors the checkpoint really holds; config.json may claim one without them."""
    config = AutoConfig.from_pretrained(directory)
    names = set(tensor_files(directory))
    depth = 0
    while f"model.layers.{config.num_hidden_layers + depth}.eh_proj.weight" in names:
        depth += 1
    return depth


def tensor_files(directory):
    """Tensor name -> file holding it."""
    directory = pathlib.Path(directory)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return {k: directory / v for k, v in json.loads(index.read_text())["weight_map"].items()}
    path = directory / "model.safetensors"
    with safe_open(path, "pt") as file:
        return {k: path for k in file.keys()}


def load_tensors(directory):
    """All tensors of a checkpoint in float64 under their released names, block-scaled FP8 multiplied out."""
    raw = {}
    for path in set(tensor_files(directory).values()):
        with safe_open(path, "pt") as file:
            raw.update({k: file.get_tensor(k) for k in file.keys()})
    tensors = {}
    for name, value in raw.items():
        if name.endswith(".weight_scale_inv"):
            continue
        value = value.to(torch.float64)
        scale = raw.get(name.removesuffix(".weight") + ".weight_scale_inv")
        if scale is not None:
            value = value * spread_scale(scale.to(torch.float64), value.shape)
        tensors[name] = value
    return tensors


def spread_scale(scale, shape):
    rows = scale.repeat_interleave(FP8_BLOCK, 0)[: shape[0]]
    return rows.repeat_interleave(FP8_BLOCK, 1)[:, : shape[1]]


def quantize_fp8(weight):
    """(e4m3 values, one float32 scale per 128x128 block), the edge blocks being smaller."""
    rows, columns = ((n + FP8_BLOCK - 1) // FP8_BLOCK for n in weight.shape)
    scale = torch.empty(rows, columns, dtype=torch.float32)
    for r in range(rows):
        for c in range(columns):
            block = weight[r * FP8_BLOCK : (r + 1) * FP8_BLOCK, c * FP8_BLOCK : (c + 1) * FP8_BLOCK]
            scale[r, c] = block.abs().max() / FP8_MAX
    return (weight / spread_scale(scale, weight.shape)).to(torch.float8_e4m3fn), scale


def released_names(name, tensor, layers):
    """Splits one tensor of transformers' model (or its gradient) into (released name, view)."""
    mtp = re.match(r"mtp\.layers\.(\d+)\.(.*)", name)
    if mtp:
        rest = mtp[2].removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        name = f"model.layers.{layers + int(mtp[1])}.{rest}"
    if name.endswith(".experts.gate_up_proj"):
        stem, half = name.removesuffix("gate_up_proj"), tensor.shape[1] // 2
        for e in range(tensor.shape[0]):
            yield f"{stem}{e}.gate_proj.weight", tensor[e, :half]
            yield f"{stem}{e}.up_proj.weight", tensor[e, half:]
    elif name.endswith(".experts.down_proj"):
        for e in range(tensor.shape[0]):
            yield f"{name.removesuffix('down_proj')}{e}.down_proj.weight", tensor[e]
    else:
        yield name, tensor


class Oracle:
    """A transformers model (and its MTP modules) with weights that are set and read under released names."""

    def __init__(self, directory, depth, dtype=torch.float64):
        self.mode = Float64 if dtype is torch.float64 else Float32
        config = AutoConfig.from_pretrained(directory)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        if depth:
            config.num_mtp_layers = depth
        with self.mode():
            self.main = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
            if hasattr(self.main.config, "n_routed_experts"):
                self.main.set_experts_implementation("eager")
            self.mtp = MtpModel(self.main, depth).to(dtype) if depth else None
        self.main = self.main.to(dtype).eval()
        self.depth = depth
        self.layers = config.num_hidden_layers
        self.dtype = dtype

    def tensors(self):
        """(name inside transformers, parameter or routing bias), the tensors shared by MTP modules once."""
        seen = set()
        named = list(self.main.named_parameters()) + list(self.main.named_buffers())
        if self.mtp is not None:
            extra = list(self.mtp.named_parameters()) + list(self.mtp.named_buffers())
            named += [(f"mtp.{k}", v) for k, v in extra if k.startswith("layers.")]
        for name, tensor in named:
            if id(tensor) not in seen and not name.endswith("inv_freq"):
                seen.add(id(tensor))
                yield name, tensor

    def views(self):
        """Released name -> view of the weight."""
        return {k: v for name, t in self.tensors() for k, v in released_names(name, t.detach(), self.layers)}

    def gradients(self):
        result = {}
        for name, tensor in self.tensors():
            if tensor.requires_grad:
                grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                result.update(released_names(name, grad, self.layers))
        return result

    def set_weights(self, weights):
        views = self.views()
        aliases = {n for n in weights if re.search(r"layers\.\d+\.(embed_tokens|shared_head\.head)\.weight$", n)}
        unknown, missing = set(weights) - set(views) - aliases, set(views) - set(weights)
        if unknown or missing:
            raise ValueError(f"weights do not fit the model: unknown {sorted(unknown)}, missing {sorted(missing)}")
        for name, view in views.items():
            view.copy_(weights[name])

    def forward(self, input_ids, lengths=None, lam=0.3):
        """Hidden states, logits and losses of a batch; `total` is what gradients are taken of.

        MTP module k (k = 1..D) sees positions 0..T-1-k: h'_i = eh_proj([enorm(Emb(t_{i+k})); hnorm(h_i^{k-1})]), with
        h^0 after the main model's final norm and h^k after module k's shared_head.norm.
        """
        batch, length = input_ids.shape
        ends = torch.full((batch, 1), length) if lengths is None else lengths[:, None]
        valid = torch.arange(length)[None] < ends
        labels = torch.where(valid, input_ids, -100)
        out = {}
        with self.mode():
            result = self.main(
                input_ids=input_ids,
                attention_mask=valid.long(),
                labels=labels,
                output_hidden_states=True,
                use_cache=False,
            )
            for k, hidden in enumerate(result.hidden_states):
                out[f"hidden.{k}"] = hidden
            out["logits"], out["loss"] = result.logits, result.loss
            total, hidden = result.loss, result.hidden_states[-1]
            for k in range(1, self.depth + 1):
                seen = length - k
                hidden = self.mtp.forward_layer(
                    k - 1, hidden[:, :seen], torch.arange(k, length)[None], None, input_ids=input_ids[:, k:]
                )
                logits = self.main.lm_head(hidden)
                loss = torch.nn.functional.cross_entropy(
                    logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, k + 1 :].reshape(-1), ignore_index=-100
                )
                out[f"mtp.{k}.logits"], out[f"mtp.{k}.loss"] = logits, loss
                total = total + lam / self.depth * loss
        for name, value in out.items():
            if value.dim() == 3:
                out[name] = value * valid[:, : value.shape[1], None]
        return out, total

    def generate(self, prompt, count):
        """Greedy continuation of one prompt [T], never stopping early."""
        with self.mode(), torch.no_grad():
            ids = self.main.generate(
                prompt[None], do_sample=False, max_new_tokens=count, eos_token_id=-1, pad_token_id=0
            )
        return ids[0, prompt.shape[0] :]
