#!/usr/bin/env python3
"""Reads what make_gguf.py writes with llama.cpp itself (package xllamacpp) and compares with transformers' logits
behind each prompt and with its greedy text. It shows that the files which our tests read are what llama.cpp reads.
Not for v2-group, whose groups llama.cpp ranks differently, nor for models without query compression that do not have
27 layers, which it refuses.

    compare_with_llama_cpp.py FOLDER...
"""

import argparse
import json
import pathlib
import sys
import tempfile

import numpy as np
import xllamacpp
from safetensors.numpy import load_file

import make_gguf

TOLERANCE = 1e-5  # of log-probabilities; llama.cpp computes in float32
VARIANTS = [{}, {"old": True}, {"fused": True}]


def serve(path):
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def compare(path, reference):
    """(greedy tokens are the same, largest difference of a log-probability behind a prompt)"""
    server = serve(path)
    ids, logits, generated = (reference[k] for k in ("input_ids", "logits", "generated"))
    lengths = reference.get("lengths", [ids.shape[1]] * ids.shape[0])
    same, worst = True, 0.0
    for row, length, wide, expected in zip(ids, lengths, logits, generated, strict=True):
        request = {"prompt": row[:length].tolist(), "n_predict": len(expected), "temperature": 0, "n_probs": wide.shape[1]}
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        content = answer["choices"][0]["logprobs"]["content"]
        same = same and [token["id"] for token in content] == expected.tolist()
        last = wide[length - 1].astype(np.float64)
        last -= last.max()
        last -= np.log(np.exp(last).sum())
        theirs = content[0]["top_logprobs"]
        assert len(theirs) == wide.shape[1]
        worst = max(worst, max(abs(each["logprob"] - last[each["id"]]) for each in theirs))
    return same, worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=pathlib.Path, nargs="+")
    bad = 0
    for folder in parser.parse_args().folders:
        reference = load_file(folder / "reference.safetensors")
        for variant in VARIANTS:
            with tempfile.TemporaryDirectory() as directory:
                path = pathlib.Path(directory) / "model.gguf"
                make_gguf.write(folder, path, tokenizer=True, **variant)
                same, worst = compare(path, reference)
            good = same and worst <= TOLERANCE
            bad += not good
            print(f"{folder.name} {variant}: log-probabilities within {worst:.1e}, text {'the same' if same else 'DIFFERS'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
