"""Speed of the tokenizer beside the Python package `tokenizers`, one thread each, in turns:

    tokenizer_bench.py BENCH_TOKENIZER TEXT TOKENIZER... [--rounds N]

Prints MB per second of CPU time, the best of the rounds. The package encodes the same pieces of about 100 kB.
"""

import argparse
import os
import re
import subprocess
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

from tokenizers import Tokenizer  # noqa: E402


def documents(data):
    while data:
        cut = data.find(b"\n", 100_000)
        size = len(data) if cut < 0 else cut + 1
        yield data[:size].decode(errors="replace")
        data = data[size:]


def theirs(tokenizer, pieces, size):
    start = time.process_time()
    ids = [tokenizer.encode(piece).ids for piece in pieces]
    middle = time.process_time()
    for some in ids:
        tokenizer.decode(some, skip_special_tokens=False)
    end = time.process_time()
    return size / (middle - start), size / (end - middle)


def ours(program, path, text):
    out = subprocess.run([program, path, text, "0.1"], check=True, capture_output=True, text=True).stdout
    return tuple(float(x) for x in re.search(r"encode ([\d.]+) MB/s, decode ([\d.]+)", out).groups())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("text")
    parser.add_argument("tokenizers", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with open(arguments.text, "rb") as file:
        data = file.read()
    pieces = list(documents(data))
    for path in arguments.tokenizers:
        file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
        tokenizer = Tokenizer.from_file(file)
        best = [0.0] * 4
        for _ in range(arguments.rounds):
            figures = (*ours(arguments.program, file, arguments.text), *theirs(tokenizer, pieces, len(data) / 1e6))
            best = [max(x, y) for x, y in zip(best, figures)]
        print(f"{path}: encode {best[0]:.2f} MB/s, the package {best[2]:.2f} ({best[0] / best[2]:.1f} times); "
              f"decode {best[1]:.2f} MB/s, the package {best[3]:.2f} ({best[1] / best[3]:.1f} times)", flush=True)


if __name__ == "__main__":
    main()
