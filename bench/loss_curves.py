#!/usr/bin/env python3
"""Loss curves of runs of `latente train` in one picture, and how far they are apart.

    loss_curves.py --out curves.png "CPU float32=runs/cpu" "CUDA bfloat16=runs/bf16" …

Above: the training loss, a running mean over --window steps. Below: its difference from the first run's, with the
band in which differences of two runs of the same kind lie, if two of the labels are alike but for a trailing " (n)"."""

import argparse
import json
import pathlib
import re
import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def losses(directory):
    rows = [json.loads(line) for line in (pathlib.Path(directory) / "metrics.jsonl").read_text().splitlines()]
    training = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    validation = [row["validation/loss"] for row in rows if "validation/loss" in row]
    return training, validation[-1] if validation else float("nan")


def running_mean(values, window):
    return [statistics.fmean(values[max(0, i - window + 1):i + 1]) for i in range(len(values))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="LABEL=DIRECTORY")
    parser.add_argument("--out", required=True)
    parser.add_argument("--window", type=int, default=20)
    args = parser.parse_args()
    runs = {label: losses(directory) for label, directory in (run.rsplit("=", 1) for run in args.runs)}
    first = next(iter(runs))
    steps = sorted(set.intersection(*(set(training) for training, _ in runs.values())))
    half = steps[len(steps) // 2:]

    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, height_ratios=[3, 2])
    print("| run | loss of the last step | mean, second half | difference from the first run | validation |\n"
          "|---|---|---|---|---|")
    for i, (label, (training, validation)) in enumerate(runs.items()):
        values = [training[step] for step in steps]
        above.plot(steps, running_mean(values, args.window), label=label, color=f"C{i}", linewidth=1.2)
        difference = [training[step] - runs[first][0][step] for step in steps]
        if label != first:
            below.plot(steps, running_mean(difference, args.window), label=label, color=f"C{i}", linewidth=1.2)
        apart = statistics.fmean(training[step] - runs[first][0][step] for step in half)
        print(f"| {label} | {values[-1]:.4f} | {statistics.fmean(training[step] for step in half):.4f} | {apart:+.4f} | "
              f"{validation:.4f} |")
    for label in runs:
        again = re.sub(r" \(\d+\)$", "", label)
        if again != label and again in runs:
            noise = [abs(runs[label][0][step] - runs[again][0][step]) for step in steps]
            band = running_mean(noise, 2 * args.window)
            below.fill_between(steps, [-x for x in band], band, alpha=0.15, color="gray", linewidth=0,
                               label=f"two runs of {again} apart")
    above.set_ylabel(f"training loss (mean of {args.window} steps)")
    above.legend()
    below.set_ylabel(f"difference from {first}")
    below.set_xlabel("step")
    below.axhline(0, color="black", linewidth=0.6)
    below.legend()
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
