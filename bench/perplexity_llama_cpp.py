#!/usr/bin/env python3
"""Perplexity of llama.cpp (package llama-cpp-python) in its own types of a model's weights, over the same tokens in the
same windows as `latente perplexity`.

    perplexity_llama_cpp.py MODEL.gguf DIRECTORY TEXT --types F32,Q8_0,Q4_0,Q4_K_M --context 1024 --stride 512 --max-tokens 4096

The model's weights are rounded to bfloat16 first, as DIRECTORY has them, which is the same model in Hugging Face's layout
and has the tokenizer. Needs the packages gguf, numpy, tokenizers and llama-cpp-python."""

import argparse
import pathlib
import tempfile

import gguf
import llama_cpp as ll
import numpy as np
import tokenizers


def widened(source, out):
    """The file with its tensors in float32, rounded to bfloat16."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        writer.add_key_value(name, field.contents(), field.types[0],
                             field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        bits = values.view(np.uint32)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
        writer.add_tensor(tensor.name, rounded if values.ndim > 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantised(source, out, kind):
    params = ll.llama_model_quantize_default_params()
    params.ftype = getattr(ll, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if ll.llama_model_quantize(str(source).encode(), str(out).encode(), params) != 0:
        raise SystemExit(f"llama.cpp does not quantise to {kind}")


def scores(path, ids, context_size, stride, threads):
    """-log p of each token but the first."""
    params = ll.llama_model_default_params()
    params.use_extra_bufts = False  # weights repacked for AMX, which not every build may use
    model = ll.llama_model_load_from_file(str(path).encode(), params)
    params = ll.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = context_size
    params.n_threads = params.n_threads_batch = threads
    context = ll.llama_init_from_model(model, params)
    vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    result, begin = [], 0
    while len(result) < len(ids) - 1:
        piece = ids[begin:begin + context_size]
        ll.llama_memory_clear(ll.llama_get_memory(context), True)
        batch = ll.llama_batch_init(len(piece), 0, 1)
        batch.n_tokens = len(piece)
        for i, token in enumerate(piece):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        if ll.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed")
        for at in range(len(result) + 1 - begin, len(piece)):
            row = np.ctypeslib.as_array(ll.llama_get_logits_ith(context, at - 1), (vocabulary,)).astype(np.float64)
            top = row.max()
            result.append(top + np.log(np.exp(row - top).sum()) - row[piece[at]])
        ll.llama_batch_free(batch)
        begin += stride
    ll.llama_free(context)
    ll.llama_model_free(model)
    return np.array(result)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("text")
    parser.add_argument("--types", default="F32,Q8_0,Q4_0,Q4_K_M")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--stride", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    ll.llama_backend_init()
    log = ll.llama_log_callback(lambda *a: None)
    ll.llama_log_set(log, None)
    tokenizer = tokenizers.Tokenizer.from_file(str(args.directory / "tokenizer.json"))
    text = open(args.text, encoding="utf-8").read()
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:args.max_tokens]
    with tempfile.TemporaryDirectory() as directory:
        wide = pathlib.Path(directory) / "f32.gguf"
        widened(args.model, wide)
        for kind in args.types.split(","):
            path = wide
            if kind != "F32":
                path = pathlib.Path(directory) / f"{kind}.gguf"
                quantised(wide, path, kind)
            nll = scores(path, ids, args.context, args.stride, args.threads)
            print(f"{kind:<8} {len(nll)} tokens, nll {nll.mean():.5f}, perplexity {np.exp(nll.mean()):.4f}, "
                  f"{path.stat().st_size / 1e6:.0f} MB", flush=True)


main()
