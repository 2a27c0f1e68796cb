"""Random JSON schemas, documents that they admit in the form that src/grammar writes (json_schema.h), and changed ones.
"""

import copy
import json
import random

KEYS = ["a", "b", "ab", "name", "é", "中文", 'q"uote', "back\\slash", "", "a b", "x1"]
TEXTS = ["", "a", "ab", "abc", "hello world", "é", "中文", 'say "hi"', "tab\tend", "line\nend", "\\", "/", "\u0001", "😀😀", "2024-02-29"]
PATTERNS = {  # pattern -> texts that match
    "^[a-z]+$": ["abc", "z"],
    "^(foo|bar)-\\d{2,3}$": ["foo-12", "bar-999"],
    "^\\w+\\s?$": ["abc_1", "x "],
    "b.d": ["bad", "xxbodyy", "b\"d"],
    "^[^a-c\"]*$": ["xyz", "d\n"],
    "^(?:[A-Z][a-z]*,)*end$": ["end", "Ab,C,end"],
    "x$|^y": ["ax", "yb"],
    "^\\u00e9{1,3}\\x41?$": ["éé", "éA"],
}
FORMATS = {
    "date": ["2024-02-29", "1999-12-31", "2000-02-29"],
    "uuid": ["123e4567-e89b-12d3-a456-426614174000"],
    "ipv4": ["127.0.0.1", "255.255.255.255"],
}


class RandomSchema:
    def __init__(self, rng, everything=True):
        """everything: also what src/grammar narrows in ways that `document` does not foresee."""
        self.rng = rng
        self.everything = everything
        self.definitions = {}

    def pick(self, values):
        return self.rng.choice(list(values))

    def whole(self):
        for name in self.rng.sample(["node", "item/x", "leaf"], self.rng.randint(0, 2)):
            self.definitions[name] = None
        for name in self.definitions:
            self.definitions[name] = self.guarded(2)
        schema = self.schema(3)
        if self.definitions and isinstance(schema, dict):
            schema = {**schema, "$defs": self.definitions}
        return schema

    def guarded(self, depth):
        """A schema that a reference may lead back to: an object or a list in which everything can be left out."""
        if self.rng.random() < 0.5:
            return {"type": "object", "properties": {key: self.schema(depth) for key in self.rng.sample(KEYS, 2)}}
        return {"type": "array", "items": self.schema(depth)}

    def schema(self, depth):
        kind = self.rng.random()
        if depth > 0 and kind < 0.45:
            more = [self.conditional, self.dependent, self.patterned, self.set] if self.everything else []
            return self.pick([self.object, self.array, self.either, self.all, *more])(depth - 1)
        if kind < 0.52 and self.definitions:
            return {"$ref": "#/$defs/" + self.pick(self.definitions).replace("/", "~1")}
        if kind < 0.55:
            return self.pick([True, {}, {"description": "anything"}])
        if kind < 0.62:
            return {"enum": [self.value(1) for _ in range(self.rng.randint(1, 6))]}
        if kind < 0.65:
            return {"const": self.value(1)}
        if kind < 0.7:
            return {"type": self.rng.sample(["string", "integer", "null", "boolean", "object", "array", "number"], self.rng.randint(1, 3))}
        return self.pick([self.string, self.integer, self.number, lambda: {"type": self.pick(["boolean", "null"])}])()

    def string(self):
        kind = self.rng.randint(0, 7 if self.everything else 4)
        schema = {"type": "string"}
        if kind == 0:
            schema["pattern"] = self.pick(PATTERNS)
        elif kind == 1:
            schema["format"] = self.pick(FORMATS)
        elif kind == 2:
            schema["minLength"] = self.rng.randint(0, 4)
            if self.rng.random() < 0.7:
                schema["maxLength"] = schema["minLength"] + self.pick([0, 1, 5, 100])
        elif kind == 5:
            schema["pattern"] = self.pick(PATTERNS)
            schema[self.pick(["minLength", "maxLength"])] = self.rng.randint(1, 5)
        elif kind == 6:
            schema["not"] = self.pick([{"const": self.pick(TEXTS)}, {"enum": self.rng.sample(TEXTS, 3)}, {"minLength": 4},
                                       {"pattern": self.pick(PATTERNS)}])
            if self.rng.random() < 0.4:
                schema[self.pick(["minLength", "maxLength"])] = self.rng.randint(1, 3)
        elif kind == 7:
            schema["allOf"] = [{"pattern": pattern} for pattern in self.rng.sample(list(PATTERNS), 2)]
        return schema

    def integer(self):
        schema = {"type": "integer"}
        low = self.pick([-1000, -101, -10, -1, 0, 1, 5, 10, 99, 12345])
        if self.rng.random() < 0.6:
            schema[self.pick(["minimum", "exclusiveMinimum"])] = low
        if self.rng.random() < 0.6:
            schema[self.pick(["maximum", "exclusiveMaximum"])] = low + self.pick([2, 3, 10, 90, 1000, 123456])
        if self.everything and self.rng.random() < 0.25:
            schema["multipleOf"] = self.pick([2, 3, 5, 7, 10, 100, 2.5])
        if self.everything and self.rng.random() < 0.15:
            schema["not"] = self.pick([{"const": low + 1}, {"enum": [0, 1, low]}, {"minimum": low + 5}])
        return schema

    def number(self):
        schema = self.integer()
        schema["type"] = "number"
        for key in list(schema):
            if key not in ("type", "not", "multipleOf") and self.rng.random() < 0.5:
                schema[key] += self.pick([0.5, 0.25, 0.125])
        if "multipleOf" in schema:
            schema["multipleOf"] = self.pick([3, 0.5, 0.25, 1.125])
        return schema

    def object(self, depth):
        schema = {"type": "object"} if self.rng.random() < 0.8 else {}
        keys = self.rng.sample(KEYS, self.rng.randint(0, 5))
        schema["properties"] = {key: self.schema(depth) for key in keys}
        if self.rng.random() < 0.7:
            schema["required"] = [key for key in keys if self.rng.random() < 0.5]
            if self.rng.random() < 0.1:
                schema["required"].append("needed")
        if "needed" not in schema.get("required", []) and self.rng.random() < 0.6:
            schema["additionalProperties"] = self.pick([False, True, self.schema(0)])
        return schema

    def array(self, depth):
        schema = {"type": "array"}
        if self.rng.random() < 0.8:
            schema["items"] = self.schema(depth)
        if self.rng.random() < 0.3:
            schema["prefixItems"] = [self.schema(depth) for _ in range(self.rng.randint(1, 3))]
            if self.rng.random() < 0.3:
                schema["items"] = False
        if self.rng.random() < 0.5:
            schema["minItems"] = self.rng.randint(0, 3)
        if self.rng.random() < 0.5:
            schema["maxItems"] = schema.get("minItems", 0) + self.rng.randint(0, 3)
        return schema

    def either(self, depth):
        schemas = [self.schema(depth) for _ in range(self.rng.randint(1, 3))]
        return {self.pick(["anyOf", "anyOf", "oneOf"]): schemas}

    def conditional(self, depth):
        base = {"type": "object", "required": ["name"],
                "properties": {"name": {"enum": ["a", "b", 1]}, "a": self.schema(depth), "b": self.string()}}
        test = self.pick([{"properties": {"name": {"const": "a"}}}, {"required": ["a"]}, {"not": {"required": ["b"]}},
                          {"properties": {"name": {"enum": ["b", 1]}}, "required": ["a"]},
                          {"anyOf": [{"properties": {"b": {"minLength": 2}}, "required": ["b"]}, {"required": ["a"]}]}])
        branches = [{"required": ["b"]}, {"properties": {"b": {"minLength": 1}}}, {"properties": {"a": False}}, True,
                    {"properties": {"x1": self.integer()}, "required": ["x1"]}]
        if self.rng.random() < 0.2:
            return {**base, "not": test}
        return {**base, "if": test, **{key: self.pick(branches) for key in ("then", "else") if self.rng.random() < 0.7}}

    def dependent(self, depth):
        keys = self.rng.sample(KEYS, 3)
        schema = {"type": "object", "properties": {key: self.schema(depth) for key in keys}}
        if self.rng.random() < 0.6:
            return {**schema, "dependentRequired": {keys[0]: [keys[1]], keys[2]: self.rng.sample(keys, 2)}}
        return {**schema, "dependentSchemas": {keys[0]: {"required": keys[1:2], "properties": {keys[2]: False}}}}

    def patterned(self, depth):
        patterns = self.rng.sample(["^a", "b$", "^[a-z]*$", "é|中", "^x\\d", "\""], self.rng.randint(1, 3))
        schema = {"type": "object", "patternProperties": {pattern: self.schema(depth) for pattern in patterns}}
        if self.rng.random() < 0.5:
            schema["properties"] = {key: self.schema(depth) for key in self.rng.sample(KEYS, 2)}
        if self.rng.random() < 0.5:
            schema["additionalProperties"] = self.pick([False, True, self.schema(0)])
        return schema

    def set(self, depth):
        schema = {"type": "array", "uniqueItems": True, "items": {"enum": [self.value(1) for _ in range(self.rng.randint(1, 6))]}}
        if self.rng.random() < 0.5:
            schema["minItems"] = self.rng.randint(0, 2)
        if self.rng.random() < 0.5:
            schema["maxItems"] = schema.get("minItems", 0) + self.rng.randint(0, 3)
        return schema

    def all(self, depth):
        first = {"type": "object", "properties": {"a": self.schema(depth), "b": self.string()}}
        second = {"properties": {"x1": self.integer()}, "required": self.rng.sample(["a", "x1"], self.rng.randint(0, 2))}
        if self.rng.random() < 0.4:
            return {**first, "anyOf": [second, {"required": ["b"]}]}
        return {"allOf": [first, second]}

    # Documents

    def value(self, depth):
        kind = self.rng.randint(0, 8 if depth > 0 else 6)
        if kind == 0:
            return self.pick([None, True, False])
        if kind <= 2:
            return self.pick([0, 1, -1, 7, 10, 42, -17, 100, 12345])
        if kind == 3:
            return self.pick([0.5, -1.25, 3.75, 1e3, 12.0625])
        if kind <= 6:
            return self.pick(TEXTS)
        if kind == 7:
            return [self.value(depth - 1) for _ in range(self.rng.randint(0, 3))]
        return {key: self.value(depth - 1) for key in self.rng.sample(KEYS, self.rng.randint(0, 3))}

    def document(self, schema, depth=6):
        """Tries to satisfy the schema; the caller checks."""
        if schema is True or schema == {}:
            return self.value(1)
        if depth < 0 or schema is False:
            return self.pick([None, {}, [], "", 0])
        if "$ref" in schema:
            return self.document(self.definitions[schema["$ref"][8:].replace("~1", "/")], depth - 1)
        if "allOf" in schema and "pattern" in schema["allOf"][0]:
            return self.text(self.pick(schema["allOf"]))
        if "allOf" in schema:
            first, second = schema["allOf"]
            return self.document({**first, **second, "properties": {**first["properties"], **second["properties"]}}, depth)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                part = self.pick(schema[key])
                if "properties" in schema:
                    part = {**schema, **(part if isinstance(part, dict) else {}),
                            "properties": {**schema["properties"], **part.get("properties", {})}}
                    part.pop(key)
                return self.document(part, depth)
        if "const" in schema:
            return copy.deepcopy(schema["const"])
        if "enum" in schema:
            return copy.deepcopy(self.pick(schema["enum"]))
        type_ = schema.get("type", "object" if "properties" in schema else None)
        if isinstance(type_, list):
            type_ = self.pick(type_)
        if type_ == "object":
            return self.members(schema, depth)
        if type_ == "array":
            return self.elements(schema, depth)
        if type_ == "string":
            return self.text(schema)
        if type_ in ("integer", "number"):
            return self.quantity(schema, type_)
        return {"boolean": self.pick([True, False]), "null": None}.get(type_, self.value(1))

    def members(self, schema, depth):
        out = {}
        for key, value in schema.get("properties", {}).items():
            if key in schema.get("required", []) or self.rng.random() < 0.25 + 0.1 * depth:
                if value is not False:
                    out[key] = self.document(value, depth - 1)
        for key in schema.get("required", []):
            if key not in out:
                out[key] = self.value(1)
        by_pattern = list(schema.get("patternProperties", {}).values())
        if by_pattern:
            for key in self.rng.sample(["a1", "ab", "xb", "é", "x1", 'q"', "B"], 3):
                out[key] = self.document(self.pick(by_pattern), depth - 1)
        more = schema.get("additionalProperties", False if schema.get("properties") or by_pattern else True)
        if more is not False and self.rng.random() < 0.5:
            for key in self.rng.sample(["other", "abc", "n", 'q"', "z\\"], 2):
                if key not in schema.get("properties", {}):
                    out[key] = self.document(more, depth - 1)
        return out

    def elements(self, schema, depth):
        first = schema.get("prefixItems", [])
        most = schema.get("maxItems", schema.get("minItems", 0) + 3)
        count = self.rng.randint(schema.get("minItems", 0), most)
        if schema.get("items") is False:
            count = min(count, len(first))
        schemas = [first[i] if i < len(first) else schema.get("items", True) for i in range(count)]
        return [self.document(one, depth - 1) for one in schemas]

    def text(self, schema):
        if "pattern" in schema:
            return self.pick(PATTERNS[schema["pattern"]] + self.pick(list(PATTERNS.values())))
        if "format" in schema:
            return self.pick(FORMATS[schema["format"]])
        least = schema.get("minLength", 0)
        length = self.rng.randint(least, schema.get("maxLength", least + 8))
        return self.pick(TEXTS) if not {"minLength", "maxLength"} & set(schema) else "".join(
            self.pick(["a", "é", "😀", '"', "\n", "z"]) for _ in range(length))

    def quantity(self, schema, type_):
        low = schema.get("minimum", schema.get("exclusiveMinimum", None))
        high = schema.get("maximum", schema.get("exclusiveMaximum", None))
        low = (high - 50 if high is not None else -500) if low is None else low
        high = low + 1000 if high is None else high
        if "multipleOf" in schema and self.rng.random() < 0.7:
            value = schema["multipleOf"] * self.rng.randint(int(low / schema["multipleOf"]), int(high / schema["multipleOf"]))
            return int(value) if value == int(value) else value
        if type_ == "integer":
            return self.rng.randint(low + ("exclusiveMinimum" in schema), high - ("exclusiveMaximum" in schema))
        if self.rng.random() < 0.4:
            return self.rng.randint(int(low), int(high))
        return self.pick([low, high, round(self.rng.uniform(low, high), self.rng.randint(1, 6))])

    def changed(self, value):
        """Another document near this one."""
        value = copy.deepcopy(value)
        if isinstance(value, dict) and value and self.rng.random() < 0.7:
            key = self.pick(value)
            kind = self.rng.randint(0, 3)
            if kind == 0:
                del value[key]
            elif kind == 1:
                value[self.pick(KEYS)] = self.value(1)
            else:
                value[key] = self.changed(value[key])
            return value
        if isinstance(value, list) and value and self.rng.random() < 0.8:
            index = self.rng.randrange(len(value))
            kind = self.rng.randint(0, 3)
            if kind == 0:
                del value[index]
            elif kind == 1:
                value.append(self.pick(value))
            else:
                value[index] = self.changed(value[index])
            return value
        if isinstance(value, str) and value and self.rng.random() < 0.7:
            at = self.rng.randrange(len(value))
            return value[:at] + self.pick(["", "x", "0", "é"]) + value[at + self.rng.randint(0, 1):]
        if isinstance(value, (int, float)) and not isinstance(value, bool) and self.rng.random() < 0.8:
            return value + self.pick([-1, 1, 10, -1000, 0.5, 0.03125])
        return self.value(1)


def write(rng, value):
    """One of the spellings with the whitespace that src/grammar allows."""
    style = rng.randint(0, 3)
    if style == 0:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if style == 1:
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False, indent=rng.choice([0, 1, 2]))
