"""Writes tests/infer/recorded/samplers.json: what the logits processors of transformers (5.17 or later) make of random
logits, for sampler_test.cpp. They run in float64 and in transformers' own order; between them stand OpenAI's presence
and frequency penalties, by the formula of its API reference: logits[j] -= count[j] * frequency + (count[j] > 0) *
presence, where count[j] is how often token j was sampled. Needs torch, transformers.

    record_samplers.py [--seed N]
"""

import argparse
import json
import os
import random

import torch
from transformers.generation import logits_process as transformers

PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "recorded", "samplers.json")


def probabilities(case):
    """Token -> probability, or None where rounding could decide which tokens are kept."""
    scores = torch.tensor([case["logits"]], dtype=torch.float32).double()
    ids = torch.tensor([case["tokens"]], dtype=torch.long)
    bias = [[[int(token)], value] for token, value in case["logit_bias"].items()]
    if bias:
        scores = transformers.SequenceBiasLogitsProcessor(bias)(ids, scores)
    if case["repetition_penalty"] != 1:
        scores = transformers.RepetitionPenaltyLogitsProcessor(case["repetition_penalty"])(ids, scores)
    for token in set(case["tokens"][case["prompt"] :]):
        count = case["tokens"][case["prompt"] :].count(token)
        scores[0, token] -= count * case["frequency_penalty"] + (count > 0) * case["presence_penalty"]
    if case["temperature"] == 0:
        return {int(scores[0].argmax()): 1.0}
    scores = transformers.TemperatureLogitsWarper(case["temperature"])(ids, scores)
    kept = scores
    for shift in (-1e-6, 0, 1e-6):
        chain = []
        if case["top_k"]:
            chain.append(transformers.TopKLogitsWarper(case["top_k"]))
        if case["top_p"] < 1:
            chain.append(transformers.TopPLogitsWarper(case["top_p"] + shift))
        if case["min_p"]:
            chain.append(transformers.MinPLogitsWarper(case["min_p"] * (1 + shift)))
        if case["typical_p"] < 1:
            chain.append(transformers.TypicalLogitsWarper(case["typical_p"] + shift))
        out = scores
        for warper in chain:
            out = warper(ids, out)
        if shift == -1e-6:
            kept = out
        elif not torch.equal(kept, out):
            return None
    p = kept.softmax(-1)[0]
    return {token: p[token].item() for token in range(len(p)) if p[token] > 0}


def one_case(rng, which):
    size = rng.randint(8, 60)
    on = lambda name, chance=0.5: which == name or (which == "all" and rng.random() < chance)
    case = {
        "logits": [torch.tensor(rng.gauss(0, 2), dtype=torch.float32).item() for _ in range(size)],
        "tokens": [rng.randrange(min(size, 12)) for _ in range(rng.randint(1, 14))],
        "temperature": rng.choice([0.3, 0.8, 1.0, 1.0, 1.7]),
        "top_k": rng.randint(1, 20) if on("top_k") else 0,
        "top_p": round(rng.uniform(0.05, 0.99), 3) if on("top_p") else 1.0,
        "min_p": round(rng.uniform(0.005, 0.5), 3) if on("min_p") else 0.0,
        "typical_p": round(rng.uniform(0.05, 0.99), 3) if on("typical_p") else 1.0,
        "repetition_penalty": round(rng.uniform(0.6, 2.0), 3) if on("repetition_penalty") else 1.0,
        "presence_penalty": round(rng.uniform(-2, 2), 3) if on("presence_penalty") else 0.0,
        "frequency_penalty": round(rng.uniform(-2, 2), 3) if on("frequency_penalty") else 0.0,
        "logit_bias": {},
    }
    case["prompt"] = rng.randint(0, len(case["tokens"]))
    if on("logit_bias"):
        case["logit_bias"] = {str(token): round(rng.uniform(-5, 5), 2) for token in rng.sample(range(size), 3)}
    if which == "greedy":
        case["temperature"] = 0.0
        case["repetition_penalty"] = round(rng.uniform(0.8, 1.5), 3)
    return case


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    rng = random.Random(parser.parse_args().seed)
    kinds = ["temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
             "frequency_penalty", "logit_bias", "greedy", "all", "all", "all", "all"]
    cases = []
    while len(cases) < 12 * len(kinds):
        case = one_case(rng, kinds[len(cases) % len(kinds)])
        case["probabilities"] = probabilities(case)
        if case["probabilities"] is not None:
            cases.append(case)
    with open(PATH, "w") as file:
        file.write("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")


if __name__ == "__main__":
    main()
