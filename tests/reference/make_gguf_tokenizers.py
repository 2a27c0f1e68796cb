#!/usr/bin/env python3
"""Makes gguf/tokenizers.json: a small vocabulary, texts, and the ids that llama.cpp (package xllamacpp) gives them under
each pre-tokenizer that src/checkpoint/gguf_tokenizer.cpp knows; then, where they differ, the ids without finding special
tokens in the text. Usage: make_gguf_tokenizers.py OUT.json

The merges cross the borders that pre-tokenizers set, so that the ids show where those are."""

import json
import pathlib
import sys
import tempfile
import unicodedata
import urllib.request

import numpy as np
import xllamacpp
from gguf import GGUFWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PRE = ["deepseek-llm", "deepseek-coder", "deepseek-v3", "llama-bpe", "glm4", "chatglm-bpe", "qwen2", "gpt-2", "kimi-k2"]
# llama.cpp keeps digits together where DeepSeek's first tokenizers take them one by one; their vocabularies have no
# token of several digits, this one does.
SINGLE_DIGITS = {"deepseek-llm", "deepseek-coder"}
# Its models normalise texts, which llama.cpp leaves out.
NORMALISES = {"qwen2"}

TEXTS = """Hello, world! The quick brown fox jumps over the lazy dog.
I'm sure we've seen it; they'll say he'd be late, DON'T they? It's 'quoted' text.
  two spaces before,   three within, and trailing \x20
def f(x):\\n    return x_1 + 2*x\\n\\n\\nclass A:\\n\\tpass\\r\\n
https://example.org/a/b?c=d&e=f#g user@example.org C:\\\\path\\\\file.txt
深度求索是一家公司。今天天气很好，我们去公园吧！
ひらがなとカタカナ、漢字も混ぜて書く。テスト
한국어 문장도 하나 있습니다. 조선말
Съешь ещё этих мягких французских булок, да выпей чаю.
Το γρήγορο καφέ αλεπού πηδάει. ΑΣΦΑΛΕΙΑ Ὀδυσσεύς ὧδε
Straße naïve café résumé Ångström İstanbul ŉ ǆ ﬁn ﬂoß
ქართული ენა ᲥᲐᲠᲗᲣᲚᲘ Հայերեն Ꭰꭰ
مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดีชาวโลก
👍🏽 family: 👨‍👩‍👧‍👦 flags 🇩🇪🇫🇷 ☃️ ❤️‍🔥 ①②③ ㊿
“curly quotes” — dashes – and… ellipsis ‘single’ «guillemets» ¿qué? ¡sí!
a.b,c;d:e!f?g-h_i(j)k[l]m{n}o<p>q|r~s^t$u%v&w*x+y=z@/\\\\'"`#
!important #hashtag @mention $variable %percent ^caret &amp; *star* .dot ,comma
==== ---- **** ____ .... !!!! ???? ~~~~ ////
tabs\\tand\\t\\tmore\\n\\nblank lines\\n \\n  \\n\\r\\n\\r\\nend\\n
\\n
\u3000全角　スペース\u00a0nbsp\u2003em space\u200bzero width
e\u0301 combining a\u0323\u0302 n\u0303 \u0301 alone
<think>hidden</think> before <｜User｜>question<｜Assistant｜> after
word<think>word <think> <｜User｜ > <thinking>
 hello hello hellohello Hello HELLO
𝐁old 𝒎ath 𝟘𝟙 𐐀𐐨 𞤀𞤢 𐲀𐳀 𠀀𠀁
x² y³ ½ Ⅷ km² CO₂ ™ © ® § ¶ † ‡ • ◦ √∞≠≤≥±×÷
mixed中文and英文together混合text，标点。punct
ω Ω Å K ℵ ℃ № ⅓ ⅷ Ⴀ ⴀ ᏸ Ა Ω K
'tis 'Twas rock'n'roll y'all'd've O'Neill's 's 'S 'T 'RE 've""".split("\n")
DIGITS = ["1 12 123 1234 12345 123456 1234567", "3.14159 1,000,000 0xFF 1e-9 v2.0.1", "٣٤٥ १२३४ ๑๒ ２０２４年12月31日", "a1b22c333d4444"]
SINGLES = ["1 2 3, 4.5 a6 7b ８ ९"]

CONTROL, USER = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"], ["<think>", "</think>"]
WHOLE = ["Ġhello", "hello"]  # reached by no merge


def vocabulary(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=620, initial_alphabet=alphabet, special_tokens=CONTROL, show_progress=False, max_token_length=4
    )
    tokenizer.train_from_iterator(texts * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    merges = [" ".join(merge) for merge in model["merges"]]
    types = [3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL))
    known = set(tokens)
    extra = [(token, 1) for token in WHOLE if token not in known] + [(token, 4) for token in USER]
    tokens += [token for token, _ in extra] + [f"[PAD{len(tokens) + len(extra)}]"]
    types += [kind for _, kind in extra] + [5]
    return {"tokens": tokens, "token_type": types, "merges": merges}


def write_model(path, vocabulary, pre):
    """The smallest model that llama.cpp loads."""
    rng = np.random.default_rng(1)
    size, width, heads, rank, nope, rotary, inner = len(vocabulary["tokens"]), 8, 1, 4, 4, 4, 8
    writer = GGUFWriter(path, "deepseek2")
    for key, value in {
        "block_count": 1, "context_length": 4096, "embedding_length": width, "feed_forward_length": inner,
        "attention.head_count": heads, "attention.head_count_kv": 1, "vocab_size": size, "attention.q_lora_rank": rank,
        "attention.kv_lora_rank": rank, "attention.key_length": rank + rotary, "attention.value_length": rank,
        "attention.key_length_mla": nope + rotary, "attention.value_length_mla": nope, "rope.dimension_count": rotary,
        "leading_dense_block_count": 1, "expert_shared_count": 0, "expert_feed_forward_length": inner,
    }.items():  # fmt: skip
        writer.add_uint32(f"deepseek2.{key}", value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["token_type"])
    writer.add_token_merges(vocabulary["merges"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, shape in {
        "token_embd.weight": (size, width), "output_norm.weight": (width,), "blk.0.attn_norm.weight": (width,),
        "blk.0.attn_q_a.weight": (rank, width), "blk.0.attn_q_a_norm.weight": (rank,),
        "blk.0.attn_q_b.weight": (heads * (nope + rotary), rank), "blk.0.attn_kv_a_mqa.weight": (rank + rotary, width),
        "blk.0.attn_kv_a_norm.weight": (rank,), "blk.0.attn_k_b.weight": (heads, rank, nope),
        "blk.0.attn_v_b.weight": (heads, nope, rank), "blk.0.attn_output.weight": (width, heads * nope),
        "blk.0.ffn_norm.weight": (width,), "blk.0.ffn_gate.weight": (inner, width), "blk.0.ffn_up.weight": (inner, width),
        "blk.0.ffn_down.weight": (width, inner),
    }.items():  # fmt: skip
        writer.add_tensor(name, rng.normal(0, 1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    def __init__(self, path):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
        params.cpuparams.n_threads = 1
        self.server = xllamacpp.Server(params)

    def post(self, what, request):
        data = json.dumps(request).encode()
        url = f"{self.server.listening_address}/{what}"
        with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})) as answer:
            return json.load(answer)

    def ids(self, text, special=True):
        return self.post("tokenize", {"content": text, "add_special": special, "parse_special": special})["tokens"]

    def text(self, ids):
        return self.post("detokenize", {"tokens": ids})["content"]


def main():
    texts = [text.replace("\\n", "\n").replace("\\t", "\t").replace("\\r", "\r") for text in TEXTS]
    words = vocabulary(texts + DIGITS)
    digits = range(len(texts), len(texts) + len(DIGITS))
    singles = range(digits.stop, digits.stop + len(SINGLES))
    texts += DIGITS + SINGLES
    recorded = []
    for pre in PRE:
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory) / "model.gguf"
            write_model(path, words, pre)
            server = LlamaCpp(path)
            cases = []
            for index, text in enumerate(texts):
                left_out = index in (digits if pre in SINGLE_DIGITS else singles)
                if left_out or (pre in NORMALISES and unicodedata.normalize("NFC", text) != text):
                    cases.append(None)
                    continue
                ids, plain = server.ids(text), server.ids(text, False)
                bos = ids[:1] == [0]
                ids = ids[1:] if bos else ids
                cases.append([ids] if plain == ids else [ids, plain])
            recorded.append({"pre": pre, "adds_bos": bos, "cases": cases})
    out = pathlib.Path(sys.argv[1])
    text = json.dumps(words | {"texts": texts, "recorded": recorded}, ensure_ascii=False, separators=(",", ":"))
    out.write_text(text.replace('{"pre"', '\n{"pre"').replace("]],[[", "]],\n[[") + "\n")


if __name__ == "__main__":
    main()
