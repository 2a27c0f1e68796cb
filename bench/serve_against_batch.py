#!/usr/bin/env python3
"""What HTTP costs: `latente serve` under streaming clients beside `latente batch`, the same engine without it, in turn with the
same prompts, tokens and places. The engine computes with one thread on one core; sockets and the client have another.

    serve_against_batch.py LATENTE MODEL PROMPTS.jsonl --rounds 5 --clients 16 --end 0

--end: the token that ends a text, which is banned so that all have as many. Standard library alone."""

import argparse
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile

LOAD = pathlib.Path(__file__).with_name("serve_load.py")


def batch(args, folder):
    out = folder / "answers.jsonl"
    out.unlink(missing_ok=True)
    done = subprocess.run(["taskset", "-c", args.engine, args.latente, "batch", args.model, "--in", args.prompts, "--out", out, "--threads", "1",
                           "--parallel", str(args.clients), "-n", str(args.tokens), "-t", "0", "--logit-bias", f"{args.end}=-100"],
                          capture_output=True, text=True, check=True)
    return float(re.findall(r"([\d.]+) tok/s", done.stderr)[-1])


def load(args, port):
    done = subprocess.run(["taskset", "-c", args.rest, sys.executable, LOAD, str(port), args.prompts, "--clients", str(args.clients),
                           "--requests", str(args.requests), "--tokens", str(args.tokens), "--end", str(args.end)],
                          capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def tasks_of(process):
    return sorted(pathlib.Path(f"/proc/{process.pid}/task").iterdir(), key=lambda task: int(task.name))


def seconds(task):
    fields = (task / "stat").read_text().rsplit(") ", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def serve(args):
    process = subprocess.Popen([args.latente, "serve", args.model, "--port", "0", "--threads", "1", "--parallel", str(args.clients),
                                "--access-log", ""], stderr=subprocess.PIPE, text=True)
    port = int(re.search(r":(\d+);", process.stderr.readline()).group(1))
    process.stderr.readline()
    for task in tasks_of(process):  # the engine's is made last
        os.sched_setaffinity(int(task.name), {int(args.engine if task == tasks_of(process)[-1] else args.rest)})
    found = load(args, port)
    if max(tasks_of(process), key=seconds) != tasks_of(process)[-1]:
        raise SystemExit("the last thread was not the engine's")
    process.send_signal(signal.SIGTERM)
    if process.wait() != 0:
        raise SystemExit(f"the server ended with {process.returncode}")
    return found["tokens_per_second"], found["client_cpu"]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("latente")
    p.add_argument("model")
    p.add_argument("prompts")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--clients", type=int, default=16)
    p.add_argument("--tokens", type=int, default=128)
    p.add_argument("--end", type=int, default=0)
    p.add_argument("--engine", default="0", help="its core")
    p.add_argument("--rest", default="1", help="the core of everything else")
    args = p.parse_args()
    args.requests = sum(1 for _ in open(args.prompts))
    without, with_http = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            without.append(batch(args, pathlib.Path(folder)))
            rate, client = serve(args)
            with_http.append(rate)
            print(f"without HTTP {without[-1]:.0f} tokens/s, with {rate:.0f} ({100 * rate / without[-1]:.1f} %), client {client} of a core", flush=True)
    a, b = statistics.median(without), statistics.median(with_http)
    print(f"medians: {a:.0f}, {b:.0f} tokens/s: {100 * b / a:.1f} %")


main()
