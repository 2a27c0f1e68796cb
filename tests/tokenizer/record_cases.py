"""Writes tests/tokenizer/recorded/*.json: what the Python package `tokenizers` makes of small tokenizers and hostile
text, for recorded_test.cpp; and what its BpeTrainer makes of a text, for train_bpe_test.cpp.

    record_cases.py TEXT.txt      # English, for the vocabularies of the known kinds
"""

import json
import os
import random
import sys

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hostile_text import hostile
from random_tokenizer import random_tokenizer
import train_kinds

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "recorded")
ROLES = ["<|endoftext|>", "<|user|>"]


def cases(value, rng, count, longest):
    tokenizer = Tokenizer.from_str(json.dumps(value))
    tokens = [token["content"] for token in value["added_tokens"]]
    out = []
    while len(out) < count:
        text = hostile(rng, tokens, longest)
        add, parse = rng.random() < 0.5, rng.random() < 0.8
        tokenizer.encode_special_tokens = not parse
        try:
            ids = tokenizer.encode(text, add_special_tokens=add).ids
            out.append([text, add, parse, ids, tokenizer.decode(ids, skip_special_tokens=False), tokenizer.decode(ids)])
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
    return out


def clear_added_tokens(value):
    """Whether no added token vanishes in normalization or is found by the same string as another: an Error here."""
    normalizer = Tokenizer.from_str(json.dumps(value)).normalizer
    found = [(t["normalized"], normalizer.normalize_str(t["content"]) if normalizer and t["normalized"] else t["content"])
             for t in value["added_tokens"]]
    return len(set(found)) == len(found) and all(text for _, text in found)


def write(name, value):
    with open(os.path.join(FOLDER, name), "w", encoding="ascii") as file:
        json.dump(value, file, separators=(",", ":"))
        file.write("\n")


def byte_level_kind(kind, text, vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = train_kinds.pre_tokenizer(kind)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, special_tokens=ROLES, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([text], trainer)
    return json.loads(tokenizer.to_str())


def sentencepiece_kind(text):
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False,
                                  special_tokens=special + [f"<0x{b:02X}>" for b in range(256)])
    trained.train_from_iterator(text.split("\n"), trainer)
    value = json.loads(trained.to_str())
    out = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    out.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    out.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    result = json.loads(out.to_str())
    for key in ("vocab", "merges"):
        result["model"][key] = value["model"][key]
    result["added_tokens"] = [{"id": i, "content": c, "single_word": False, "lstrip": False, "rstrip": False,
                               "normalized": False, "special": True} for i, c in enumerate(special)]
    return result


def main():
    os.makedirs(FOLDER, exist_ok=True)
    rng = random.Random(20261124)
    with open(sys.argv[1], encoding="utf-8", errors="ignore") as file:
        text = file.read(60_000)
    kinds = {}
    for kind in ("deepseek-v3", "gpt2", "llama3"):
        kinds[kind] = byte_level_kind(kind, text, 600)
        kinds[kind]["model"]["ignore_merges"] = kind == "llama3"
    kinds["sentencepiece"] = sentencepiece_kind(text)
    write("kinds.json", [{"name": name, "tokenizer": value, "cases": cases(value, rng, 40, 12)}
                         for name, value in kinds.items()])
    parts = []
    while len(parts) < 40:
        value = random_tokenizer(rng)
        if len(json.dumps(value)) > 9000:
            continue
        try:
            if not clear_added_tokens(value):
                continue
            parts.append({"name": f"random {len(parts)}", "tokenizer": value, "cases": cases(value, rng, 8, 8)})
        except Exception:  # the package refuses the tokenizer
            continue
    write("parts.json", parts)

    sample = text[: 12_000]
    training = []
    for kind in ("deepseek-v3", "gpt2", "llama3"):
        for size in (400, 100_000):
            value = byte_level_kind(kind, sample, size)
            tokens = sorted(value["model"]["vocab"], key=value["model"]["vocab"].get)
            training.append({"kind": kind, "vocab_size": size, "tokens": tokens, "merges": value["model"]["merges"]})
    write("training.json", {"text": sample, "special": ROLES, "trained": training})


if __name__ == "__main__":
    sys.stderr = open(os.devnull, "w")
    os.dup2(sys.stderr.fileno(), 2)  # the package's panics
    main()
