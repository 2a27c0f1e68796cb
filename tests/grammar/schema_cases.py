"""Random schemas with documents, and what the Python package `jsonschema` says of them."""

import json
import re

import jsonschema

from random_schema import RandomSchema, write


def python_pattern(pattern):
    """One of random_schema's for Python's re, to which \\w and \\d are more than ASCII and $ may stand before a line break."""
    return re.sub(r"(?<!\\)\$", r"\\Z", pattern.replace(r"\w", "[A-Za-z0-9_]").replace(r"\d", "[0-9]"))


def relaxed(schema):
    """oneOf as anyOf, as src/grammar takes it."""
    if isinstance(schema, list):
        return [relaxed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out = {}
    for key, value in schema.items():
        if key == "pattern" and isinstance(value, str):
            out[key] = python_pattern(value)
        elif key == "patternProperties":
            out[key] = {python_pattern(name): relaxed(part) for name, part in value.items()}
        else:
            out["anyOf" if key == "oneOf" else key] = value if key in ("enum", "const") else relaxed(value)
    return out


def validator_of(schema):
    checker = jsonschema.FormatChecker(["date", "uuid", "ipv4"])
    return jsonschema.Draft202012Validator(relaxed(schema), format_checker=checker)


def cases(rng, count, everything=True):
    while count > 0:
        maker = RandomSchema(rng, everything)
        schema = maker.whole()
        validator = validator_of(schema)
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
