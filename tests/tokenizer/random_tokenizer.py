"""Small tokenizer.json files of random parts, for compare_with_tokenizers.py."""

ALPHABET = list("abcdefghijklmnopqrstuvwxyzABCDEST ,.'!-_0123456789") + ["▁", "é", "ß", "中", "文", "한", "\n", "Ġ", "Ċ"]
BYTE_LEVEL = [chr(c) for c in [*range(33, 127), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144)]]
REGEXES = [
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    r"\w+|[^\w\s]+", r"\s+", r"\S+", r"\d", r"(?=[A-Z])", r"(?<=\p{L})(?=\p{N})|x", r"(a|b)*?c", r"(?:ab|a)+?b?",
    r"\b", r"^.", r".$", r"[[:space:]]+", r"[[:punct:]]", r"\p{Han}+|\p{Hangul}", r"\p{^L}+", r"\P{L}{2,}",
    r"(?<!\s)\p{P}", r"[^a-z]{2}", r"(?>a+|b)c?", r"\h+", r"(?i)the|of|k", r"x*", r"\x{4e2d}|\u6587", r"[a-c[x-z]]",
    r"\p{Hiragana}|\p{Katakana}", r"(?:'s|\n)++", r".+?,", r"\A\s|\z", r" {2,3}", r"a{,2}b", r"\p{N}{1,3}+|\p{L}{2}+",
]
STRINGS = [" ", "-", "e", "the", "▁", "\n", "'s", "ab", "  ", "中"]
BEHAVIORS = ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]
CONTENTS = ["", " ", "▁", "x", "<y>", "é"]


def pattern(rng):
    return {"Regex": rng.choice(REGEXES)} if rng.random() < 0.7 else {"String": rng.choice(STRINGS)}


def sequence(rng, make, key):
    steps = [make(rng, False) for _ in range(rng.randint(0, 4))]
    for step in steps[1:]:
        # The package asks where in the original text a piece begins: behind a step that cuts one character that a
        # normalizer spelled as several, more than one piece is the first.
        if step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "always"
    return {"type": "Sequence", key: steps}


def normalizer(rng, nest=True):
    if nest and rng.random() < 0.3:
        return sequence(rng, normalizer, "normalizers")
    kind = rng.choice("NFC NFD NFKC NFKD Lowercase StripAccents Strip Replace Replace Prepend ByteLevel".split())
    out = {"type": kind}
    if kind == "Strip":
        out |= {"strip_left": rng.random() < 0.5, "strip_right": rng.random() < 0.5}
    if kind == "Replace":
        out |= {"pattern": pattern(rng), "content": rng.choice(CONTENTS)}
    if kind == "Prepend":
        out |= {"prepend": rng.choice(CONTENTS[1:])}  # with "" the package repeats the first character now and then
    return out


def pre_tokenizer(rng, nest=True):
    if nest and rng.random() < 0.4:
        return sequence(rng, pre_tokenizer, "pretokenizers")
    kind = rng.choice("ByteLevel ByteLevel Split Split Split Digits Metaspace Punctuation Whitespace WhitespaceSplit "
                      "CharDelimiterSplit".split())
    out = {"type": kind}
    if kind == "ByteLevel":
        out |= {"add_prefix_space": rng.random() < 0.5, "trim_offsets": True, "use_regex": rng.random() < 0.5}
    if kind == "Split":
        out |= {"pattern": pattern(rng), "behavior": rng.choice(BEHAVIORS), "invert": rng.random() < 0.3}
    if kind == "Digits":
        out |= {"individual_digits": rng.random() < 0.5}
    if kind == "Metaspace":
        out |= {"replacement": "▁", "prepend_scheme": rng.choice(("always", "first", "never")), "split": rng.random() < 0.5}
    if kind == "Punctuation":
        out |= {"behavior": rng.choice(BEHAVIORS)}
    if kind == "CharDelimiterSplit":
        out |= {"delimiter": rng.choice(" -e中")}
    return out


def decoder(rng, nest=True):
    if nest and rng.random() < 0.6:
        return sequence(rng, decoder, "decoders")
    kind = rng.choice("ByteLevel ByteFallback Fuse Strip Replace Metaspace".split())
    out = {"type": kind}
    if kind == "ByteLevel":
        out |= {"add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    if kind == "Strip":
        # The package crashes where a token is shorter than `stop`.
        out |= {"content": rng.choice(" ▁e"), "start": rng.randint(0, 2), "stop": 0}
    if kind == "Replace":
        out |= {"pattern": pattern(rng), "content": rng.choice(CONTENTS)}
    if kind == "Metaspace":
        out |= {"replacement": "▁", "prepend_scheme": rng.choice(("always", "first", "never")), "split": True}
    return out


def added_token(rng, number, taken):
    while True:
        content = rng.choice((f"<t{number}>", f"<|x{number}|>", "the", " the", "world", "中", "A B", "é", "<S>", "ſ", "  ",
                              f"tok{number}", f"<t{number}>>"))
        if content not in taken:
            taken.add(content)
            break
    flag = lambda p=0.25: rng.random() < p
    return {"id": number, "content": content, "single_word": flag(), "lstrip": flag(), "rstrip": flag(),
            "normalized": flag(0.5), "special": flag(0.5)}


def model(rng):
    style = rng.randrange(3)
    alphabet = list(ALPHABET) + (BYTE_LEVEL if style else [])
    if style == 2:
        alphabet = list(BYTE_LEVEL)
    alphabet = [c for c in dict.fromkeys(alphabet) if rng.random() < 0.97]
    prefix = rng.choice((None, None, None, "##"))
    suffix = rng.choice((None, None, None, None, "</w>"))
    tokens = ["<unk>"] + alphabet
    if prefix:
        tokens += [prefix + c for c in alphabet]
    if suffix:
        tokens += [c + suffix for c in alphabet]
    if rng.random() < 0.5:
        tokens += [f"<0x{b:02X}>" for b in range(256)]
    tokens = list(dict.fromkeys(tokens))
    known = set(tokens)
    merges = []
    for _ in range(rng.randint(0, 300)):
        a, b = rng.choice(tokens), rng.choice(tokens)
        if prefix and not b.startswith(prefix):
            continue
        if a.startswith("<") or b.startswith("<") or len(a + b) > 10:
            continue
        c = a + b[len(prefix or "") :]
        merges.append((a, b))
        if c not in known:
            known.add(c)
            tokens.append(c)
    merges = list(dict.fromkeys(merges))
    if rng.random() < 0.5 and not any(" " in a + b for a, b in merges):
        merges = [f"{a} {b}" for a, b in merges]
    if rng.random() < 0.3:
        tokens += ["Ġthe", "world", "é"]
        tokens = list(dict.fromkeys(tokens))
    return {"type": "BPE", "dropout": None, "unk_token": rng.choice((None, "<unk>")), "continuing_subword_prefix": prefix,
            "end_of_word_suffix": suffix, "fuse_unk": rng.random() < 0.5, "byte_fallback": rng.random() < 0.5,
            "ignore_merges": rng.random() < 0.3, "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges}


def post_processor(rng):
    kind = rng.randrange(4)
    if kind == 0:
        return None
    if kind == 1:
        return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    special = {name: {"id": name, "ids": ids, "tokens": [name] * len(ids)} for name, ids in (("<a>", [1]), ("<b>", [2, 3]))}
    before = [{"SpecialToken": {"id": rng.choice(("<a>", "<b>")), "type_id": 0}} for _ in range(rng.randint(0, 2))]
    after = [{"SpecialToken": {"id": rng.choice(("<a>", "<b>")), "type_id": 0}} for _ in range(rng.randint(0, 1))]
    single = before + [{"Sequence": {"id": "A", "type_id": 0}}] + after
    template = {"type": "TemplateProcessing", "single": single, "special_tokens": special,
                "pair": single + [{"Sequence": {"id": "B", "type_id": 1}}]}
    if kind == 2:
        return template
    return {"type": "Sequence", "processors": [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False,
                                                "use_regex": True}, template]}


def random_tokenizer(rng):
    bpe = model(rng)
    taken = set()
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [added_token(rng, len(bpe["vocab"]) + i, taken) for i in range(rng.randint(0, 6))],
        "normalizer": normalizer(rng) if rng.random() < 0.6 else None,
        "pre_tokenizer": pre_tokenizer(rng) if rng.random() < 0.8 else None,
        "post_processor": post_processor(rng),
        "decoder": decoder(rng) if rng.random() < 0.8 else None,
        "model": bpe,
    }
