"""Compares the C++ tokenizer with the Python package `tokenizers` on random hostile text: ids, and text decoded with
and without special tokens; and text decoded from random ids.

    compare_with_tokenizers.py TEST_PROGRAM --tokenizer tokenizer.json [...] --strings 1000000 [--seed N]
    compare_with_tokenizers.py TEST_PROGRAM --configurations 2000    # small tokenizers of random parts

TEST_PROGRAM is the built test_tokenizer. Exit status 1 on any difference.
"""

import argparse
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile

from tokenizers import Tokenizer

from hostile_text import hostile
from random_tokenizer import random_tokenizer

BATCH = 20000


class Answers:
    def __init__(self, data):
        self.data, self.at = data, 0

    def number(self):
        self.at += 4
        return struct.unpack_from("<I", self.data, self.at - 4)[0]

    def bytes(self):
        size = self.number()
        self.at += size
        return self.data[self.at - size : self.at]

    def ids(self):
        data = self.bytes()
        return list(struct.unpack(f"<{len(data) // 4}i", data))


def ask(program, requests):
    """requests: (kind, bytes)"""
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name) for name in ("requests", "answers")]
        with open(paths[0], "wb") as file:
            for kind, data in requests:
                file.write(struct.pack("<II", kind, len(data)) + data)
        run = subprocess.run([program, "--gtest_filter=Oracle.AnswersRequests"], capture_output=True,
                             env={**os.environ, "LATENTE_ORACLE_REQUESTS": paths[0], "LATENTE_ORACLE_ANSWERS": paths[1]})
        if run.returncode:
            print(run.stdout.decode(errors="replace")[-3000:], run.stderr.decode(errors="replace")[-1000:])
            sys.exit("the test program failed")
        with open(paths[1], "rb") as file:
            return Answers(file.read())


class Comparison:
    def __init__(self):
        self.strings = self.id_lists = self.differences = self.panics = 0

    def differ(self, what, given, expected, found):
        self.differences += 1
        if self.differences <= 10:
            print(f"DIFFERENCE in {what}: {ascii(given)}\n  expected {ascii(expected)}\n  found    {ascii(found)}")

    def of_package(self, call):
        """None where the package panics."""
        try:
            return call()
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            self.panics += 1
            return None

    def decoded(self, answers, tokenizer, ids, given):
        for skip in (False, True):
            expected = self.of_package(lambda: tokenizer.decode(ids, skip_special_tokens=skip))
            found = answers.bytes().decode()
            if expected is not None and expected != found:
                self.differ(f"decode, skip_special={skip}", given, expected, found)

    def encoded(self, answers, tokenizer, text, flags):
        self.strings += 1
        expected = self.of_package(lambda: tokenizer.encode(text, add_special_tokens=bool(flags & 2)).ids)
        found = answers.ids()
        if expected is not None and expected != found:
            self.differ(f"encode, flags {flags}", text, expected, found)
        self.decoded(answers, tokenizer, found, found)


def compare_file(program, path, folder, count, rng, result):
    tokenizer = Tokenizer.from_file(path)
    # A copy, without the tokenizer_config.json beside it, which the package does not read.
    copy = os.path.join(folder, "tokenizer.json")
    shutil.copyfile(path, copy)
    tokens = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    tokens = tokens[:3] + [t for t in tokens if "hold" not in t] * 3 + tokens
    size = tokenizer.get_vocab_size()
    for start in range(0, count, BATCH):
        number = min(BATCH, count - start)
        texts = [(1 | rng.choice((0, 2, 4, 4, 4, 6)), hostile(rng, tokens)) for _ in range(number)]
        id_lists = [[rng.randrange(size + 20) for _ in range(rng.randint(0, 20))] for _ in range(number // 10)]
        requests = [(0, copy.encode())] + [(flags, text.encode()) for flags, text in texts]
        requests += [(8, struct.pack(f"<{len(ids)}i", *ids)) for ids in id_lists]
        answers = ask(program, requests)
        answers.number()
        for flags, text in texts:
            tokenizer.encode_special_tokens = not flags & 4
            result.encoded(answers, tokenizer, text, flags)
        for ids in id_lists:
            result.id_lists += 1
            result.decoded(answers, tokenizer, ids, ids)
    print(f"{path}: {result.strings} strings and {result.id_lists} id lists so far, {result.differences} differences",
          flush=True)


def compare_configurations(program, count, rng, result):
    refused = {"both": 0, "ours": 0, "theirs": 0}
    reasons = {}
    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, count, 100):
            requests, plan = [], []
            for i in range(start, min(start + 100, count)):
                value = random_tokenizer(rng)
                path = os.path.join(folder, f"{i % 100}.json")
                with open(path, "w") as file:
                    json.dump(value, file)
                try:
                    tokenizer = result.of_package(lambda: Tokenizer.from_file(path))
                except Exception:
                    tokenizer = None
                plan.append((value, tokenizer, []))
                requests.append((0, path.encode()))
            first = ask(program, requests)
            requests = []
            for i, (value, tokenizer, texts) in enumerate(plan):
                loaded = first.number() != 0xFFFFFFFF
                if not loaded:
                    reason = first.bytes().decode().split(": ", 1)[1][:60]
                    reasons[reason] = reasons.get(reason, 0) + 1
                if not loaded or tokenizer is None:
                    refused["both" if not loaded and tokenizer is None else "theirs" if loaded else "ours"] += 1
                    plan[i] = None
                    continue
                tokens = [token["content"] for token in value["added_tokens"]]
                requests.append((0, os.path.join(folder, f"{i}.json").encode()))
                for _ in range(40):
                    texts.append((1 | rng.choice((0, 2, 4, 6)), hostile(rng, tokens, 8)))
                    requests.append((texts[-1][0], texts[-1][1].encode()))
            answers = ask(program, requests)
            for value, tokenizer, texts in filter(None, plan):
                answers.number()
                before = result.differences
                for flags, text in texts:
                    tokenizer.encode_special_tokens = not flags & 4
                    result.encoded(answers, tokenizer, text, flags)
                if before < result.differences < 20:
                    print("   in", json.dumps({k: v for k, v in value.items() if k != "model"}))
                    print("     ", json.dumps({k: v for k, v in value["model"].items() if k not in ("vocab", "merges")}))
    print(f"{count} configurations, {result.strings} strings, {result.differences} differences; "
          f"the package panicked {result.panics} times; refused: {refused}")
    for reason, number in sorted(reasons.items(), key=lambda item: -item[1])[:12]:
        print(f"  {number:6} {reason}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--tokenizer", action="append", default=[])
    parser.add_argument("--strings", type=int, default=20000, help="for each tokenizer")
    parser.add_argument("--configurations", type=int, default=0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    arguments = parser.parse_args()
    print("seed", arguments.seed)
    rng = random.Random(arguments.seed)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the package's panics
    sys.stderr = sys.stdout
    result = Comparison()
    for path in arguments.tokenizer:
        with tempfile.TemporaryDirectory() as folder:
            compare_file(arguments.program, path, folder, arguments.strings, rng, result)
    if arguments.configurations:
        compare_configurations(arguments.program, arguments.configurations, rng, result)
    sys.exit(result.differences > 0)


if __name__ == "__main__":
    main()
