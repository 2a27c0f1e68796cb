"""Writes tests/grammar/recorded/schemas.json: random schemas (random_schema.py) with documents that the Python package
`jsonschema` finds valid or not, for json_schema_test.cpp. Valid ones are those written as src/grammar writes them.

    record_cases.py [SEED [COUNT]] [--lines]    # --lines: to standard output, a schema a line
"""

import json
import os
import random
import sys

import jsonschema

from random_schema import RandomSchema, write

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "recorded")


def relaxed(schema):
    """oneOf as anyOf, as src/grammar takes it."""
    if isinstance(schema, list):
        return [relaxed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {"anyOf" if key == "oneOf" else key: value if key in ("enum", "const") else relaxed(value) for key, value in schema.items()
}

def cases(rng, count):
    while count > 0:
        maker = RandomSchema(rng)
        schema = maker.whole()
        validator = jsonschema.Draft202012Validator(relaxed(schema), format_checker=jsonschema.FormatChecker(["date", "uuid", "ipv4"]))
        documents = {}
        for _ in range(12):
            document = maker.document(schema)
            text = write(rng, document)
            if validator.is_valid(document):
                documents[text] = True
            for _ in range(2):
                document = maker.changed(document)
                if not validator.is_valid(document):
                    documents[write(rng, document)] = False
            at = rng.randrange(len(text) + 1)
            broken = text[:at] + rng.choice(["", " ", ",", '"', "}", "]", "0", "\n\n", "\t"]) + text[at + rng.randint(0, 1):]
            try:
                json.loads(broken)
            except json.JSONDecodeError:
                documents[broken] = False
        if True in documents.values():
            yield {"schema": json.dumps(schema, ensure_ascii=False), "documents": list(documents.items())}
            count -= 1


def main():
    arguments = [a for a in sys.argv[1:] if a != "--lines"]
    seed, count = (int(a) for a in (arguments + ["1", "150"][len(arguments):])[:2])
    found = cases(random.Random(seed), count)
    if "--lines" in sys.argv:
        for case in found:
            print(json.dumps(case, ensure_ascii=False))
        return
    os.makedirs(FOLDER, exist_ok=True)
    with open(os.path.join(FOLDER, "schemas.json"), "w") as file:
        file.write("[\n" + ",\n".join(json.dumps(case, ensure_ascii=False) for case in found) + "\n]\n")


main()
