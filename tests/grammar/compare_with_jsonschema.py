"""Compares JSON schemas compiled to grammars with the Python package `jsonschema`: random schemas, documents of both
kinds, and documents written by random walks through admitted tokens.

    compare_with_jsonschema.py TEST_PROGRAM [--schemas 1500] [--seed 1]

TEST_PROGRAM is the built test_grammar. Exit status 1 if something invalid is matched or written. Valid documents that
are not matched are counted: those that only satisfy a part of a schema that src/grammar narrows (json_schema.h), such
as types that are not mentioned.
"""

import argparse
import decimal
import json
import os
import random
import subprocess
import sys
import tempfile

from schema_cases import cases, validator_of


class Unjudged(Exception):
    """jsonschema computes with doubles, which do not hold this number."""


def exact(text):
    """A number with a point or an exponent: whole ones as they are, not as the next double."""
    value = decimal.Decimal(text)
    if value == value.to_integral_value():
        return whole(value)
    if decimal.Decimal(repr(float(text))) != value:
        raise Unjudged
    return float(text)


def whole(text):
    if int(float(text)) != int(text):
        raise Unjudged
    return int(text)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--schemas", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    found = list(cases(random.Random(options.seed), options.schemas))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "schemas.jsonl")
        with open(path, "w") as file:
            file.writelines(json.dumps(case, ensure_ascii=False) + "\n" for case in found)
        subprocess.run([options.program, "--gtest_filter=Oracle.*"], check=True, stdout=subprocess.DEVNULL,
                       env={**os.environ, "LATENTE_SCHEMAS": path})
        answers = [json.loads(line) for line in open(path + ".answers")]
    valid = invalid = missed = wrong = written = refused = unjudged = 0
    for case, answer in zip(found, answers, strict=True):
        if "error" in answer:
            refused += 1
            print(f"refused: {answer['error']}\n  {case['schema']}")
            continue
        for (text, is_valid), matched in zip(case["documents"], answer["matches"], strict=True):
            valid += is_valid
            invalid += not is_valid
            missed += is_valid and not matched
            if matched and not is_valid:
                wrong += 1
                print(f"matched: {text}\n  {case['schema']}")
        validator = validator_of(json.loads(case["schema"]))
        for text in answer["written"]:
            written += 1
            try:
                if not validator.is_valid(json.loads(text, parse_float=exact, parse_int=whole)):
                    wrong += 1
                    print(f"written: {text}\n  {case['schema']}")
            except Unjudged:
                unjudged += 1
    print(f"{len(found)} schemas: {valid} valid documents ({missed} not matched), {invalid} invalid ones, {written} written ({unjudged} with numbers "
          f"beyond doubles), {refused} refused; "
          f"{wrong} wrong")
    sys.exit(1 if wrong else 0)


main()
