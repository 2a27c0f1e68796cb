"""Writes what bench_grammar reads: schemas with documents that are valid against them, and two grammars with texts.

    grammar_documents.py TEXT.txt FOLDER      # English, for the documents' words
"""

import json
import pathlib
import random
import sys

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "born": {"type": "string", "format": "date"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue", "dark red"]}, "maxItems": 4},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street"],
        },
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TEXTS = {"type": "array", "items": {"type": "string", "minLength": 10, "maxLength": 200}}
TREE = {
    "type": "object",
    "properties": {"value": {"type": "number"}, "children": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["value"],
}
ARITHMETIC = """root ::= expr
expr ::= term (ws ("+" | "-") ws term)*
term ::= factor (ws ("*" | "/") ws factor)*
factor ::= number | name | "(" ws expr ws ")"
number ::= [0-9]+ ("." [0-9]+)?
name ::= [a-z] [a-z0-9_]*
ws ::= " "?
"""
LINES = 'root ::= (line "\\n")* line\nline ::= [^\\n]*\n'


class Documents:
    def __init__(self, words):
        self.all, self.rng = words, random.Random(4)

    def words(self, count):
        at = self.rng.randrange(len(self.all) - count)
        return " ".join(self.all[at:at + count])

    def value(self, depth):
        kind = self.rng.randint(0, 7 if depth else 4)
        if kind == 0:
            return self.rng.choice([None, True, False])
        if kind == 1:
            return self.rng.randint(-1000, 10**6)
        if kind == 2:
            return round(self.rng.uniform(-100, 1000), self.rng.randint(1, 5))
        if kind <= 4:
            return self.words(self.rng.randint(1, 12))
        if kind == 5:
            return [self.value(depth - 1) for _ in range(self.rng.randint(0, 4))]
        return self.object(depth - 1, self.rng.randint(1, 5))

    def object(self, depth, members):
        return {self.words(1): self.value(depth) for _ in range(members)}

    def person(self):
        r = self.rng.randint
        return {
            "name": self.words(2), "age": r(0, 150), "email": f"a.b{r(0, 999)}@example.org",
            "born": f"19{r(0, 99):02}-0{r(1, 9)}-1{r(0, 9)}", "tags": self.rng.sample(["red", "green", "blue", "dark red"], 2),
            "address": {"street": self.words(4), "zip": f"{r(0, 99999):05}"},
        }

    def tree(self, depth):
        out = {"value": round(self.rng.uniform(-9, 9), 3)}
        if depth:
            out["children"] = [self.tree(depth - 1) for _ in range(self.rng.randint(0, 3))]
        return out

    def expression(self, depth):
        if depth == 0:
            return self.rng.choice(["x", "rate", "42", "3.14", "total_sum"])
        operator = self.rng.choice([" + ", "*", " / ", "-"])
        return self.rng.choice(["(%s)", "%s"]) % (self.expression(depth - 1) + operator + self.expression(depth - 1))

    def write(self, value):
        return json.dumps(value, ensure_ascii=False, **self.rng.choice([{"indent": 2}, {}, {"separators": (",", ":")}]))


def main():
    make = Documents(open(sys.argv[1], errors="replace").read().split())
    folder = pathlib.Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    cases = [
        ("any JSON object", "json", [make.object(3, 5) for _ in range(60)]),
        ("a person's record", PERSON, [make.person() for _ in range(60)]),
        ("texts of limited length", TEXTS, [[make.words(make.rng.randint(8, 30))[:200] for _ in range(5)] for _ in range(30)]),
        ("a recursive tree", TREE, [make.tree(4) for _ in range(30)]),
    ]
    with open(folder / "schemas.jsonl", "w") as file:
        for name, schema, values in cases:
            documents = [make.write(value) for value in values]
            file.write(json.dumps({"name": name, "schema": schema, "documents": documents}, ensure_ascii=False) + "\n")
    for name, grammar, texts in [("arithmetic", ARITHMETIC, [make.expression(4) for _ in range(40)]),
                                 ("lines", LINES, [make.words(30) for _ in range(20)]),
                                 ("json", None, [json.dumps(make.object(2, 1), ensure_ascii=False) for _ in range(60)])]:
        if grammar:
            (folder / f"{name}.gbnf").write_text(grammar)
        (folder / f"{name}.gbnf.txt").write_text("\n".join(texts) + "\n")


main()
