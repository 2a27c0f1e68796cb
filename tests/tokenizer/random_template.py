"""Random conversations and random template programs, for compare_with_jinja2.py."""
WORDS = ["a", "Hello", "  two words ", "é", "日本語", "<tag> & 'q' \"d\"", "x\ny\n", "", "</think>", "<think>\nhm\n</think>\nyes",
         "tab\there", "😀 ok", "0", "12", "a,b,,c", "Straße", "user", "tool", "\\n{{", "\u2028", "  "]
ROLES = ["system", "user", "assistant", "tool", "ipython"]


def text(rng):
    return "".join(rng.choice(WORDS) for _ in range(rng.choice([1, 1, 2, 3])))


def scalar(rng):
    return rng.choice([None, True, False, 0, 1, -3, 7, 2.5, -0.0, 1e16, 1e-7, 123456789012, text(rng), text(rng)])


def value(rng, depth=2):
    kind = rng.random()
    if depth == 0 or kind < 0.5:
        return scalar(rng)
    if kind < 0.75:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice(["a", "b", "name", "B", "é", "items", "x y"]): value(rng, depth - 1) for _ in range(rng.randrange(4))}


def call(rng):
    arguments = {"city": text(rng), "days": rng.randrange(9)} if rng.random() < 0.7 else text(rng)
    return {"id": rng.choice(["abcdefghi", "call_1"]), "type": "function",
            "function": {"name": rng.choice(["get_weather", "search"]), "arguments": arguments}}


def message(rng, role):
    out = {"role": role, "content": text(rng)}
    if role == "assistant" and rng.random() < 0.25:
        out["content"] = rng.choice([None, "", text(rng)])
        out["tool_calls"] = [call(rng) for _ in range(rng.choice([1, 1, 2]))]
    if role == "assistant" and rng.random() < 0.2:
        out["reasoning_content"] = text(rng)
    if rng.random() < 0.06:
        out["content"] = value(rng)
    return out


def schema(rng, depth=2):
    kind = rng.choice(["string", "integer", "object", "array", ["string", "null"]])
    out = {"type": kind}
    if kind == "object" and depth:
        names = rng.sample(["city", "Days", "unit", "where"], rng.randrange(1, 4))
        out["properties"] = {name: schema(rng, depth - 1) for name in names}
        out["required"] = names[:1]
    elif kind == "array":
        out["items"] = schema(rng, max(depth - 1, 0))
    elif kind == "string" and rng.random() < 0.4:
        out["enum"] = ["c", "f\"", "é"]
    if rng.random() < 0.2:
        out["default"] = scalar(rng)
    return out


def context(rng):
    roles = ["system"] if rng.random() < 0.5 else []
    for _ in range(rng.randrange(0, 4)):
        roles += rng.choice([["user", "assistant"], ["user"], ["user", "assistant", "tool", "assistant"]])
    if rng.random() < 0.1:
        roles = [rng.choice(ROLES) for _ in range(rng.randrange(5))]
    out = {"messages": [message(rng, role) for role in roles], "bos_token": "<s>", "eos_token": "</s>"}
    if rng.random() < 0.8:
        out["add_generation_prompt"] = rng.random() < 0.5
    if rng.random() < 0.4:
        out["tools"] = [{"type": "function", "function": {"name": "get_weather", "description": text(rng),
                                                          "parameters": schema(rng)}} for _ in range(rng.choice([1, 2]))]
    for name in ["thinking", "enable_thinking"]:
        if rng.random() < 0.3:
            out[name] = rng.random() < 0.5
    if rng.random() < 0.2:
        out["builtin_tools"] = ["code_interpreter", "search"]
    return out


FILTERS = ["trim", "upper", "lower", "title", "capitalize", "length", "list", "string", "first", "last", "sort", "unique|list",
           "tojson", "tojson(indent=2)", "int", "float", "items|list", "dictsort", "reverse|list", "default('d')",
           "default('d', true)", "join('-')", "join", "replace('a', 'bb')", "map('upper')|list", "map('string')|join(',')",
           "select|list", "reject|list", "select('string')|list", "reject('none')|list", "select('defined')|list",
           "selectattr('role')|list", "selectattr('role', 'equalto', 'user')|list", "rejectattr('a', 'defined')|list",
           "map(attribute='role')|list", "map(attribute='content', default='-')|list", "abs", "round", "round(1)",
           "sum", "min", "max", "indent(2)", "safe", "e", "trim('a ')", "sort(reverse=true)", "int(5)", "count",
           "tojson(sort_keys=true)", "tojson(ensure_ascii=true)", "sort(attribute='role')|list", "tojson(separators=(',', ':'))",
           "indent(width=1, first=true)", "float(1.5)", "unique(attribute='role')|list", "nosuch"]
TESTS = ["defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number", "boolean", "true", "false",
         "integer", "float", "odd", "even", "divisibleby(2)", "divisibleby 3", "in ['user', 1, 'a']", "eq(1)", "equalto 'user'",
         "ne none", "gt(0)", "lt 2", "ge(1)", "le(1)", "sameas(none)", "sameas true", "lower", "upper", "callable", "not none",
         "not string", "nosuch"]
METHODS = ["strip()", "lstrip()", "rstrip('\\n')", "split()", "split(',')", "split('a', 1)", "rsplit(None, 1)", "startswith('a')",
           "endswith('d')", "startswith(('<', 'x'))", "upper()", "lower()", "title()", "capitalize()", "replace('a', 'X')",
           "replace('', '.')", "replace('a', 'b', 1)", "find('o')", "count('a')", "index('e')", "splitlines()", "join(['p', 'q'])",
           "isdigit()", "isalpha()", "isspace()", "islower()", "items()", "keys()", "values()", "get('a')", "get('role', 'none')",
           "copy()", "append(1)", "pop()", "update({})", "removeprefix('a')", "removesuffix('d')", "partition('o')", "nosuch()",
           "zfill(4)", "format(n, s, a=xs, b=d)", "format(f, a=m)", "ljust(6)", "rjust(6, '*')", "__class__", "mro()", "split('')", "rfind('l')", "strip('ab ')", "isupper()"]
NAMES = ["messages", "bos_token", "n", "s", "f", "xs", "d", "t", "u", "ns", "m", "ns.a", "ns.b", "d.a", "m.role", "m.content",
         "messages[0]", "messages[-1].content", "xs[0]", "d['a']", "undefined_name", "loop.index", "loop.last", "loop"]
LOOP = ["index", "index0", "revindex", "revindex0", "first", "last", "length", "previtem", "nextitem", "cycle('o', 'e')",
        "changed(x)", "depth", "nosuch"]


class Writer:
    def __init__(self, rng):
        self.rng = rng
        self.loops = 0
        self.macros = []

    def literal(self):
        return self.rng.choice(["1", "0", "-2", "3", "2.5", "1e3", "'a'", "\"it's\"", "'x\\ny'", "true", "False", "none", "''", "[]",
                                "{}", "[1, 'b', none]", "{'a': 1, 'b': [2]}", "(1, 2)", "'日本'", "'{}|{:>4}'", "'{0!r:<6}{a[0]}'",
                                "'{:05}{b}'", "'{{{a}:{:.2}'", "range(3)", "('a',)", "1_000"])

    def expr(self, depth=3):
        rng = self.rng
        if depth == 0 or rng.random() < 0.2:
            return rng.choice(NAMES) if rng.random() < 0.65 else self.literal()
        a = self.expr(depth - 1)
        kind = rng.randrange(17)
        if kind < 3:
            return f"({a})|{rng.choice(FILTERS)}"
        if kind == 3:
            return f"({a}) is {rng.choice(TESTS)}"
        if kind < 6:
            return f"({a}).{rng.choice(METHODS)}"
        b = self.expr(depth - 1)
        if kind == 6:
            return f"{a} ~ {b}"
        if kind == 7:
            return f"{a} {rng.choice(['+', '-', '*', '/', '//', '%', '**'])} {b}" if rng.random() < 0.5 else f"{a} + {b}"
        if kind == 8:
            return f"({a} {rng.choice(['==', '!=', '<', '<=', '>', '>=', 'in', 'not in'])} {b})"
        if kind == 9:
            return f"({a} {rng.choice(['and', 'or'])} {b})"
        if kind == 10:
            return f"({a} if {b}" + (f" else {self.expr(depth - 1)})" if rng.random() < 0.8 else ")")
        if kind == 11:
            return rng.choice([f"(not {a})", f"(-{a})", f"[{a}, {b}]", f"{{'k': {a}, 'a': {b}}}", f"({a}, {b})"])
        if kind == 12:
            bound = lambda: rng.choice(["", "0", "1", "-1", "2", "n", "-2"])
            step = rng.choice(["", "", ":", ":-1", ":2"])
            # Of a name: jinja2 folds slices of constants at compile time, where their errors become Undefined.
            return f"{rng.choice(['s', 'xs', 'messages', 'd', 'ns.a', 'u'])}[{bound()}:{bound()}{step}]"
        if kind == 13:
            return f"({a})[{rng.choice(['0', '-1', repr('a'), '1', repr('role'), 'n', 'none', '5'])}]"
        if kind == 14 and self.macros:
            return f"{rng.choice(self.macros)}({rng.choice(['', a, f'{a}, {b}', f'q={a}', f'p={a}, q={b}', f'{a}, {b}, 3'])})"
        if kind == 15:
            return rng.choice(["loop." + rng.choice(LOOP), f"namespace(a={a}, b={b})", f"dict(a={a})", "range(n)", "range(1, 7, 2)"])
        return f"{a} < {b} <= {self.expr(depth - 1)}"

    def space(self):
        return self.rng.choice(["", "", "", "-", "+"])

    def tag(self, body):
        return "{%" + self.space() + " " + body + " " + self.rng.choice(["", "", "-", "+"]) + "%}"

    def data(self):
        return self.rng.choice(["\n", "  \n", " x ", "\n  ", "text", "{# note #}", "\n\n", "{#- c -#}\n", "{% raw %} {{ x }} {% endraw %}", "é"])

    def block(self, depth):
        return "".join(self.statement(depth) for _ in range(self.rng.choice([1, 1, 2, 3])))

    def statement(self, depth):
        rng = self.rng
        kind = rng.randrange(22)
        if depth == 0 or kind < 7:
            return rng.choice(["{{ ", "{{- "]) + self.expr() + rng.choice([" }}", " -}}"]) + self.data()
        if kind < 10:
            return self.tag(f"set {rng.choice(['s', 'n', 't', 'u', 'xs', 'ns.a', 'ns.b', 'm', 'messages'])} = {self.expr(2)}") + self.data()
        if kind == 10:
            return self.tag(f"set {rng.choice(['s, t', 'n, u'])} = {rng.choice([self.expr(2), '(1, 2)', 'xs'])}")
        if kind == 11:
            return self.tag(rng.choice(["set s", "set t | upper", "set u | trim | replace('a', 'n')"])) + self.block(depth - 1) + self.tag("endset")
        if kind < 15:
            out = self.tag("if " + self.expr(2)) + self.block(depth - 1)
            if rng.random() < 0.4:
                out += self.tag("elif " + self.expr(2)) + self.block(depth - 1)
            if rng.random() < 0.5:
                out += self.tag("else") + self.block(depth - 1)
            return out + self.tag("endif") + self.data()
        if kind < 19:
            target, source = rng.choice([("m", "messages"), ("x", "xs"), ("k, v", "d.items()"), ("k, v", "d|items"), ("x", self.expr(2)),
                                         ("m", "messages[::-1]"), ("x", "range(4)"), ("c", "s"), ("k", "d"), ("x", "xs|select")])
            self.loops += 1
            body = self.block(depth - 1)
            if rng.random() < 0.3:
                body += self.tag("if " + self.expr(1)) + self.tag(rng.choice(["break", "continue"])) + self.tag("endif")
            body += rng.choice(["", "{{ loop.index }}", "{{ loop.last }}"])
            self.loops -= 1
            condition = " if " + self.expr(2) if rng.random() < 0.25 else ""
            other = self.tag("else") + self.block(depth - 1) if rng.random() < 0.3 else ""
            return self.tag(f"for {target} in {source}{condition}") + body + other + self.tag("endfor")
        if kind == 19:
            name = rng.choice(["f1", "f2"])
            body = self.block(depth - 1) + rng.choice(["", "{{ p }}{{ q }}", "{{ caller() if caller else '' }}", "{{ varargs }}{{ kwargs }}"])
            self.macros.append(name)
            return self.tag(f"macro {name}({rng.choice(['', 'p', 'p, q=1', 'p=s, q=p', 'q=[n]'])})") + body + self.tag("endmacro")
        if kind == 20:
            return rng.choice([
                lambda: self.tag("with " + rng.choice(["s = " + self.expr(2), "t = s, s = t", ""])) + self.block(depth - 1) + self.tag("endwith"),
                lambda: self.tag("filter " + rng.choice(["upper", "trim", "replace('a', s)", "upper | trim"])) + self.block(depth - 1) + self.tag("endfilter"),
                lambda: self.tag("generation") + self.block(depth - 1) + self.tag("endgeneration")])()
        if self.macros:
            head = rng.choice(["", "(p)"])
            return self.tag(f"call{head} {rng.choice(self.macros)}({rng.choice(['', '1', 'q=n'])})") + self.block(depth - 1) + self.tag("endcall")
        return self.data()


def program(rng):
    writer = Writer(rng)
    head = "{% set ns = namespace(a=1, b='z') %}" if rng.random() < 0.7 else ""
    source = head + "".join(writer.statement(3) for _ in range(rng.randrange(1, 5)))
    variables = context(rng)
    variables.update(n=rng.choice([0, 1, 2, 3]), s=text(rng), f=rng.choice([0.5, 3.0, 1e20]),
                     xs=[scalar(rng) for _ in range(rng.randrange(4))], d=value(rng), t=scalar(rng))
    if not isinstance(variables["d"], dict):
        variables["d"] = {"a": variables["d"], "b": text(rng)}
    return {"source": source, "context": variables}
