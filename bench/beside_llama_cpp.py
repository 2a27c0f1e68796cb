#!/usr/bin/env python3
"""Latente and llama.cpp in turn on random weights of one shape: medians of the rounds, and their ratios.

    beside_llama_cpp.py LATENTE CONFIG --pairs int8:Q8_0,int4:Q4_0,f32:F32 --rounds 3 --threads 2

A round is `LATENTE bench CONFIG --json` and `peer_llama_cpp.py CONFIG` for each pair, each a process of its own. Every
row goes to standard error as it comes. Groups of 32 share a scale, as in Q8_0 and Q4_0, unless --group says otherwise."""

import argparse
import collections
import json
import pathlib
import statistics
import subprocess
import sys


def rows(command, limit):
    """The rows a benchmark prints until it ends or the limit is reached."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            text, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
            print(f"ended after {limit} s: {' '.join(command)}", file=sys.stderr)
    for line in text.splitlines():
        print(line, file=sys.stderr, flush=True)
        yield json.loads(line)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("latente")
    p.add_argument("config")
    p.add_argument("--pairs", default="int8:Q8_0,int4:Q4_0,f32:F32")
    p.add_argument("--group", default="32")
    p.add_argument("--cache", default="bf16", help="Latente's --kv-cache-dtype; llama.cpp's is float16")
    p.add_argument("--prompt", default="512")
    p.add_argument("--gen", default="128")
    p.add_argument("--depth", default="0")
    p.add_argument("--threads", default="2")
    p.add_argument("--repeat", default="3")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--limit", type=int, default=600, help="seconds for a process")
    p.add_argument("--gguf", help="llama.cpp's weights are kept in this file, with the type appended")
    args = p.parse_args()
    peer = str(pathlib.Path(__file__).with_name("peer_llama_cpp.py"))
    same = ["--prompt", args.prompt, "--gen", args.gen, "--depth", args.depth, "--threads", args.threads,
            "--repeat", args.repeat]
    found = collections.defaultdict(list)
    for _ in range(args.rounds):
        for pair in args.pairs.split(","):
            ours, theirs = pair.split(":")
            sides = {"latente": [args.latente, "bench", args.config, "--weights", ours, "--group", args.group,
                                 "--kv-cache-dtype", args.cache, "--json", *same],
                     "llama.cpp": [sys.executable, peer, args.config, "--type", theirs, *same]}
            if args.gguf:
                sides["llama.cpp"] += ["--gguf", f"{args.gguf}.{theirs}"]
            for side, command in sides.items():
                for row in rows(command, args.limit):
                    found[pair, row["kind"], row["depth"], side].append(row)

    print(f"| {'weights':12} | {'':16} | llama.cpp | Latente | ratio of medians, of rounds | of the bound |")
    print("| --- | --- | --- | --- | --- | --- |")
    for pair, kind, depth, side in list(found):
        ours = found[pair, kind, depth, "latente"]
        if side != "latente":
            continue
        theirs = found.get((pair, kind, depth, "llama.cpp"), [])
        speeds = [r["tok_s"] for r in ours]
        shares = [r["bound_share"] for r in ours if "bound_share" in r]
        text = f"| {pair:12} | {kind:7} at {depth:5} | "
        if theirs:
            peers = [r["tok_s"] for r in theirs]
            ratios = [a / b for a, b in zip(speeds, peers)]
            text += (f"{statistics.median(peers):9.1f} | {statistics.median(speeds):7.1f} | "
                     f"{statistics.median(speeds) / statistics.median(peers):.2f}, {min(ratios):.2f} to {max(ratios):.2f} | ")
        else:
            text += f"no answer | {statistics.median(speeds):7.1f} | | "
        print(text + (f"{100 * statistics.median(shares):.0f} % |" if shares else " |"))


main()
