"""Compares `latente tokenizer train` with BpeTrainer of the Python package `tokenizers`: the vocabulary, the merges and
the ids of the training text must be the same.

    compare_training.py LATENTE TEXT.txt [--vocab-size N] [--min-frequency N]

TEXT.txt: documents that end with a line <|endoftext|>. Exit status 1 on any difference.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

SPECIAL = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"]


def documents(path):
    document = []
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            if line.rstrip("\r\n") == SPECIAL[0]:
                yield "".join(document)
                document = []
            else:
                document.append(line)
    yield "".join(document)


def trained_here(latente, text, folder, kind, arguments):
    start = time.monotonic()
    subprocess.run([latente, "tokenizer", "train", text, "--out", folder, "--pre-tokenizer", kind, "--vocab-size",
                    str(arguments.vocab_size), "--min-frequency", str(arguments.min_frequency)], check=True,
                   stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def trained_there(text, folder, arguments):
    with open(os.path.join(folder, "tokenizer.json")) as file:
        value = json.load(file)
    # The same pre-tokenizer, an empty model.
    value["model"]["vocab"], value["model"]["merges"], value["added_tokens"], value["post_processor"] = {}, [], [], None
    tokenizer = Tokenizer.from_str(json.dumps(value))
    trainer = trainers.BpeTrainer(vocab_size=arguments.vocab_size, min_frequency=arguments.min_frequency,
                                  special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    start = time.monotonic()
    tokenizer.train_from_iterator(documents(text), trainer)
    return tokenizer, time.monotonic() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("latente")
    parser.add_argument("text")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--min-frequency", type=int, default=2)
    arguments = parser.parse_args()
    failed = False
    for kind in ("deepseek-v3", "gpt2", "llama3"):
        with tempfile.TemporaryDirectory() as folder:
            seconds = trained_here(arguments.latente, arguments.text, folder, kind, arguments)
            other, other_seconds = trained_there(arguments.text, folder, arguments)
            ours = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
            a, b = (json.loads(t.to_str())["model"] for t in (ours, other))
            same_vocabulary, same_merges = a["vocab"] == b["vocab"], a["merges"] == b["merges"]
            sample = [d for d in documents(arguments.text)][:20]
            same_ids = [e.ids for e in ours.encode_batch(sample, add_special_tokens=False)] == [
                e.ids for e in other.encode_batch(sample, add_special_tokens=False)]
            print(f"{kind}: {len(a['vocab'])} tokens, vocabulary {'same' if same_vocabulary else 'DIFFERS'}, "
                  f"{len(a['merges'])} merges {'same' if same_merges else 'DIFFER'}, ids {'same' if same_ids else 'DIFFER'}; "
                  f"{seconds:.1f} s here, {other_seconds:.1f} s there", flush=True)
            if not same_merges:
                first = next((i for i, (x, y) in enumerate(zip(a["merges"], b["merges"])) if x != y), None)
                print("  first difference at merge", first, a["merges"][first:][:3], b["merges"][first:][:3])
            failed |= not (same_vocabulary and same_merges and same_ids)
    sys.exit(failed)


if __name__ == "__main__":
    main()
