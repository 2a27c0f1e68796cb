#!/usr/bin/env python3
"""Makes recorded/tiktoken.json: a small tiktoken.model with its tokenizer_config.json, and what the package tiktoken
makes of texts with it and the pattern of Moonlight's and Kimi's tokenizers. Usage: record_tiktoken.py OUT.json
With --model DIRECTORY [TEXTS...], cases of the tiktoken.model there to standard output, as JSON.

The ranks are pairs of bytes that occur often, whatever words they cross, so that ids show where words end."""

import base64
import collections
import json
import pathlib
import random
import sys

import tiktoken

PATTERN = "|".join([
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])  # fmt: skip

TEXTS = """Hello, world! The quick brown fox jumps over the lazy dog. HELLO hello helloHELLO HelloWorld iPhone McDonald
I'm sure we've seen it; they'll say he'd be late, DON'T they? It's 'quoted' I'M WE'VE they'RE ſ'ſ
  two spaces before,   three within, and trailing \x20
def f(x):\n    return x_1 + 2*x\n\n\nclass A:\n\tpass\r\n\r\n  \n\t\n
深度求索是一家公司。今天天气很好，我们去公园吧！中文English混合 汉字abc ABC汉字 〇々〆 㐀𠀀 豈
ひらがなとカタカナ、漢字も混ぜて書く。テスト 東京タワー々
한국어 문장도 하나 있습니다. 漢字 조선말
Съешь ещё этих мягких французских булок, ДА выпей Чаю. ǅ ǆ Ǆ ʰʱ ᾭ ᾳ
مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดีชาวโลก e\u0301 E\u0301 \u0301
1 12 123 1234 12345 ３４５６ ٣٤٥٦ ½¾ Ⅷ ①②③④ 3.14159 1,000,000 v2.0.1
!!!??? ...\n ——— 「」『』 👍🏽👨‍👩‍👧‍👦 #tag @me $5 %d a/b\\c ;;\n\n::\r\n
<|im_user|>user<|im_middle|>What?<|im_end|><|im_assistant|> [BOS] x[EOS]y <|reserved_token_{hole}|>
\u3000全角　スペース\u00a0nbsp\u2003em \u200bzero""".replace("\\n", "\n").split("\n")


def random_text(rng):
    pools = ["abc XYZ", "的一是不了在人有我", "カタかな", "'sStTmMdDlLrReEvV", " \t\n\r", "0123456789０½", "!?.,;-—", "éÉßǅʰ\u0301", "한국", "👍\u200d"]
    return "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(1, 40)))


def train(text, count):
    """Byte pairs merged over the whole text, most frequent first."""
    ids, tokens = list(text), [bytes([b]) for b in range(256)]
    while len(tokens) < count:
        pairs = collections.Counter(zip(ids, ids[1:]))
        (a, b), _ = max(((p, n) for p, n in pairs.items() if len(tokens[p[0]] + tokens[p[1]]) <= 9 and tokens[p[0]] + tokens[p[1]] not in tokens),
                        key=lambda item: (item[1], item[0]))  # fmt: skip
        out, i = [], 0
        while i < len(ids):
            if i + 1 < len(ids) and (ids[i], ids[i + 1]) == (a, b):
                out.append(len(tokens))
                i += 2
            else:
                out.append(ids[i])
                i += 1
        ids = out
        tokens.append(tokens[a] + tokens[b])
    return tokens


def added(content, special):
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": special}


def encoding(tokens, config):
    first = len(tokens)
    special = {f"<|reserved_token_{i}|>": i for i in range(first, first + 256)}
    for key, token in config["added_tokens_decoder"].items():
        special = {text: i for text, i in special.items() if i != int(key)} | {token["content"]: int(key)}
    return tiktoken.Encoding("kimi", pat_str=PATTERN, mergeable_ranks={t: i for i, t in enumerate(tokens)}, special_tokens=special)


def cases(encoding, texts):
    return [[text, encoding.encode(text, allowed_special="all"), encoding.encode_ordinary(text)] for text in texts]


def main():
    rng = random.Random(5)
    if sys.argv[1] == "--model":
        folder = pathlib.Path(sys.argv[2])
        lines = (folder / "tiktoken.model").read_text().splitlines()
        tokens = [base64.b64decode(line.split()[0]) for line in lines]
        config = json.loads((folder / "tokenizer_config.json").read_text())
        texts = [text.replace("{hole}", str(len(tokens) + 9)) for text in TEXTS] + [random_text(rng) for _ in range(3000)]
        texts += [pathlib.Path(path).read_text() for path in sys.argv[3:]]
        json.dump(cases(encoding(tokens, config), texts), sys.stdout)
        return
    tokens = train("\n".join(TEXTS).encode() * 2, 640)
    names = ["[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", None, "<|im_middle|>"]
    decoder = {str(640 + i): added(name, name != "<|im_middle|>") for i, name in enumerate(names) if name}
    config = {"added_tokens_decoder": decoder, "bos_token": "[BOS]", "eos_token": "[EOS]", "tokenizer_class": "TikTokenTokenizer"}
    texts = [text.replace("{hole}", "645") for text in TEXTS] + ["\n".join(TEXTS)] + [random_text(rng) for _ in range(120)]
    model = "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))
    with open(sys.argv[1], "w") as out:
        rows = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases(encoding(tokens, config), texts))
        out.write(f'{{"model": {json.dumps(model)},\n"config": {json.dumps(config)},\n"cases": [\n{rows}\n]}}\n')


main()
