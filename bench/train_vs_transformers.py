#!/usr/bin/env python3
"""Training speed beside transformers: the same config.json, batch and text length, AdamW; in float32 on all cores, or
with --device cuda in bfloat16 (there: autocast over float32 weights) with and without torch.compile.

    train_vs_transformers.py --latente build/release/apps/latente/latente --text FILE \
        bench/configs/5m.json:16x256 bench/configs/42m.json:8x512 bench/configs/150m.json:4x1024
    train_vs_transformers.py --device cuda … bench/configs/360m.json:16x1024

The two take turns, several rounds; figures are medians over steps. transformers runs with each of its expert
implementations and attentions once, and then with the fastest."""

import argparse
import json
import os
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time


def transformers_steps(device, config_path, sequences, length, steps, settings):
    """Seconds of each step after the first ones, and the peak memory, in a process of its own."""
    warm_up = 1 if device == "cpu" else 5
    code = f"""
import json, sys, time, resource, torch
torch.set_float32_matmul_precision("high")
from transformers import AutoConfig, AutoModelForCausalLM
torch.set_num_threads({os.cpu_count()})
raw = json.load(open({str(config_path)!r})); raw["num_nextn_predict_layers"] = 0
config = AutoConfig.for_model(**raw)
config.use_cache = False
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation={settings["attention"]!r},
                                         experts_implementation={settings["experts"]!r})
model.to({device!r}).train()
run = torch.compile(model) if {bool(settings.get("compile"))} else model
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
times = []
for step in range({steps} + {warm_up}):
    ids = torch.randint(0, config.vocab_size, ({sequences}, {length}), device={device!r})
    start = time.perf_counter()
    with torch.autocast("cuda", torch.bfloat16, enabled={device != "cpu"}):
        loss = run(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()
    times.append(time.perf_counter() - start)
used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if {device == "cpu"}
        else torch.cuda.max_memory_allocated())
print(json.dumps([times[{warm_up}:], used]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if run.returncode != 0:
        return None, run.stderr.strip().splitlines()[-1:]
    return json.loads(run.stdout.strip().splitlines()[-1])


def latente_steps(args, config_path, sequences, length, steps, out):
    """Tokens a second of each step after the first, the plan's estimate and the peak memory."""
    options = f"""
out = "{out}/run"
steps = {steps + 5}
device = "{args.device}"
[model]
dtype = "{"f32" if args.device == "cpu" else "bf16"}"
config = "{config_path}"
tokenizer = "{out}/tokenizer"
[data]
files = ["{args.text}"]
cache = "{out}/cache"
[batch]
tokens = {sequences * length}
length = {length}
sequences = {sequences}
[validation]
every = 0
batches = 1
[save]
every = 0
[log]
tensorboard = false
"""
    (out / "run.toml").write_text(options)
    run = subprocess.run([args.latente, "train", str(out / "run.toml"), "--overwrite"], capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(run.stderr)
    rows = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "speed/tokens_per_second" in row][-steps:]
    peak = [row["speed/share_of_peak"] for row in rows]
    estimate = re.search(r"memory\s+([\d.]+ \w+) =", run.stderr).group(1)
    used = re.search(r"at most ([\d.]+ \w+) were used", run.stderr).group(1)
    return [row["speed/tokens_per_second"] for row in rows], statistics.median(peak), estimate, used


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", help="CONFIG:SEQUENCESxLENGTH")
    parser.add_argument("--latente", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--setting", action="append",
                        help="ATTENTION,EXPERTS[,compile] of transformers to try, instead of all; may be repeated")
    args = parser.parse_args()
    args.text = str(pathlib.Path(args.text).resolve())
    print("| config | batch | transformers tok/s (setting) | Latente tok/s | ratio | share of FMA peak | memory: transformers, "
          "Latente, estimate |\n|---|---|---|---|---|---|---|")
    for shape in args.shapes:
        path, batch = shape.split(":")
        path = pathlib.Path(path).resolve()
        sequences, length = map(int, batch.split("x"))
        tokens = sequences * length
        with tempfile.TemporaryDirectory() as directory:
            out = pathlib.Path(directory)
            vocabulary = json.loads(path.read_text())["vocab_size"]
            subprocess.run([args.latente, "tokenizer", "train", args.text, "--vocab-size", str(vocabulary), "--out",
                            str(out / "tokenizer")], check=True, capture_output=True)
            settings = [{"attention": a, "experts": e} for a in ("sdpa", "eager")
                        for e in ("grouped_mm", "batched_mm", "eager")]
            if args.device == "cuda":
                settings = [s | {"compile": c} for s in settings[:1] for c in (False, True)]
            if args.setting:
                settings = [dict(zip(("attention", "experts", "compile"), setting.split(",")))
                            for setting in args.setting]
            tried = []
            for setting in settings:
                times, memory = (transformers_steps(args.device, path, sequences, length, 2, setting)
                                 if settings[1:] else ([0], 0))
                if times:
                    tried.append((min(times), setting))
            best = min(tried, key=lambda item: item[0])[1]
            theirs, ours, memory = [], [], 0
            for _ in range(args.rounds):
                times, memory = transformers_steps(args.device, path, sequences, length, args.steps, best)
                if not times:
                    sys.exit(str(memory))
                theirs += [tokens / seconds for seconds in times]
                print(f"transformers {statistics.median(theirs[-len(times):]):,.0f} tok/s, {memory / 2**30:.2f} GiB",
                      file=sys.stderr, flush=True)
                speeds, peak, estimate, used = latente_steps(args, path, sequences, length, args.steps, out)
                ours += speeds
                print(f"Latente {statistics.median(speeds):,.0f} tok/s, {used}", file=sys.stderr, flush=True)
            a, b = statistics.median(theirs), statistics.median(ours)
            print(f"| {path.stem} | {batch} | {a:,.0f} ({', '.join(k if v is True else v for k, v in best.items() if v)}) | {b:,.0f} | {b / a:.2f} | "
                  f"{100 * peak:.0f} % | {memory / 2**30:.2f} GiB, {used}, {estimate} |", flush=True)


if __name__ == "__main__":
    main()
