"""Writes tests/grammar/recorded/schemas.json: random schemas (random_schema.py) with documents that the Python package
`jsonschema` finds valid or not, for json_schema_test.cpp. Valid ones are those written as src/grammar writes them.

    record_cases.py [SEED [COUNT]]
"""

import json
import os
import random
import sys

from schema_cases import cases

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "recorded")


def main():
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 120
    os.makedirs(FOLDER, exist_ok=True)
    with open(os.path.join(FOLDER, "schemas.json"), "w") as file:
        lines = [json.dumps(case, ensure_ascii=False) for case in cases(random.Random(seed), count, everything=False)]
        file.write("[\n" + ",\n".join(lines) + "\n]\n")


main()
