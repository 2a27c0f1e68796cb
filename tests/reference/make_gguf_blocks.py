#!/usr/bin/env python3
"""Makes gguf/blocks.safetensors: blocks of GGML's types and the float32 values that llama.cpp's Python package (gguf)
decodes from them. TYPE.blocks [R, bytes], TYPE.values [R, columns]. Usage: make_gguf_blocks.py OUT.safetensors"""

import pathlib
import sys

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from safetensors.numpy import save_file

# Where a block's float16 factors lie (bytes).
FACTORS = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
}
QUANTIZED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"]  # that the package can make, too
ROWS, COLUMNS = 3, 256


def random_blocks(rng, name, rows):
    """Any bytes, with factors that are finite: of common size, subnormal, zero or negative."""
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    blocks = rng.integers(0, 256, (rows, COLUMNS // values, size), dtype=np.uint8)
    for at in FACTORS[name]:
        factors = rng.normal(0, 0.02, blocks.shape[:2]).astype(np.float16)
        factors[0, 0], factors[1, 0] = 3e-7, 0
        blocks[..., at : at + 2] = factors[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def random_floats(rng, name, rows):
    """Every kind of bits but NaN."""
    bits = rng.integers(0, 1 << 16, (rows, COLUMNS), dtype=np.uint16)
    infinite = 0x7C00 if name == "F16" else 0x7F80
    bits[(bits & infinite) == infinite] &= 0x8000 | infinite
    return bits.view(np.uint8)


def main():
    rng = np.random.default_rng(7)
    tensors = {}
    for name in ["F16", "BF16", *FACTORS]:
        kind = GGMLQuantizationType[name]
        make = random_blocks if name in FACTORS else random_floats
        blocks = make(rng, name, ROWS)
        if name in QUANTIZED:
            real = quants.quantize(rng.normal(0, 1, (1, COLUMNS)).astype(np.float32), kind)
            blocks = np.concatenate([blocks, real.view(np.uint8)])
        values = quants.dequantize(blocks, kind)
        assert values.dtype == np.float32 and not np.isnan(values).any()
        tensors[f"{name}.blocks"], tensors[f"{name}.values"] = blocks, values
    out = pathlib.Path(sys.argv[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out, metadata={"format": "np"})


if __name__ == "__main__":
    main()
