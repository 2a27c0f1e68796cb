"""Random text that tokenizers get wrong: every plane of Unicode, marks, joiners, white space, digits, tokens."""

SPACES = " \t\n\r\v\f\x85\xa0\u1680\u2000\u2003\u2007\u2028\u2029\u202f\u205f\u3000\u200b\u200c\u200d\u2060\ufeff"
MARKS = "\u0300\u0301\u0308\u030a\u0323\u0327\u0345\u0483\u05b0\u064b\u0670\u093c\u094d\u0e31\u1ab0\u1dc0\u20d0\u3099\u309a\ufe0f\ufe20"
EMOJI = ["👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "1️⃣", "🫠", "❤️", "☃", "🧑🏿‍🚀", "🪿", "🫨"]
WORDS = """the of and don't I'm we've they'll he'd it's DON'T I'LL you'RE hello world naïve café résumé Straße ſ'ſ
'ſ K's ǅ ﬁ ﬂ İstanbul ΑΣ ς ŉ ½ Ⅷ ² ٣٤ १२३ ๑๒ 𝟘𝟙 ㊿ 中文字符 日本語 カタカナ ひらがな 한국어 조선말 ᄒ ᅡ ᆫ Ω Å ﷺ ㎏ ﬃ ™ ①
import def return class() {x} == != ->  // /* */ <b> &amp; http://a.b/c?d=e#f 3.14159 1,000,000 12345678 0xFF 1e-9
__init__ snake_case camelCase ... --- *** ``` \\n \\u0041 ▁ ▁▁ <s> </s> <unk> <0x41> <0xE4> Ġ Ċ ÃŃ""".split()
ALPHABETS = [(0x20, 0x7E), (0x20, 0x7E), (0x00, 0x1F), (0x80, 0xFF), (0x100, 0x24F), (0x250, 0x36F), (0x370, 0x52F),
             (0x590, 0x6FF), (0x900, 0xDFF), (0xE00, 0xEFF), (0x10A0, 0x11FF), (0x1E00, 0x1FFF), (0x2000, 0x206F),
             (0x2070, 0x2BFF), (0x3000, 0x30FF), (0x3100, 0x4DBF), (0x4E00, 0x9FFF), (0xA000, 0xABFF),
             (0xAC00, 0xD7FF), (0xE000, 0xF8FF), (0xF900, 0xFFFF), (0x10000, 0x107FF), (0x10800, 0x11FFF),
             (0x16000, 0x1BFFF), (0x1D000, 0x1D7FF), (0x1E000, 0x1F9FF), (0x1FA00, 0x2FFFF), (0x30000, 0x3FFFF),
             (0xE0000, 0xE0FFF), (0xF0000, 0x10FFFF), (0, 0x10FFFF)]


def character(rng, low, high):
    while True:
        c = rng.randint(low, high)
        if not 0xD800 <= c <= 0xDFFF:
            return chr(c)


def piece(rng, tokens):
    kind = rng.randrange(12)
    if kind <= 1:
        return rng.choice(WORDS)
    if kind == 2:
        return rng.choice((" ", " ", "  ", "\n", "\n\n", "\r\n", "\t", "   \n  ")) * rng.choice((1, 1, 1, 2, 5))
    if kind == 3:
        return "".join(rng.choice(SPACES) for _ in range(rng.randint(1, 6)))
    if kind == 4:
        return "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 9)))
    if kind == 5:
        return rng.choice("aeouAEnsſKΩ가ㄱ한か") + "".join(rng.choice(MARKS) for _ in range(rng.randint(1, 4)))
    if kind == 6:
        return rng.choice(EMOJI)
    if kind == 7 and tokens:
        token = rng.choice(tokens)
        if rng.random() < 0.2:
            cut = rng.randint(0, len(token))
            token = token[:cut] + rng.choice(("", " ", "x")) + token[cut:]
        return token
    if kind == 8:
        return rng.choice(("'s", "'S", "'t", "'LL", "'ve", "'RE", "'d", "'M", "’s", "'ſ", "!?", "...", "=>", "#!", "__"))
    if kind == 9:
        return rng.choice("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,;:!?-_()[]{}<>|~^$%&*+=@/\\'\"`#") * (
            rng.choice((1, 1, 2, 3, 17)))
    low, high = rng.choice(ALPHABETS)
    return "".join(character(rng, low, high) for _ in range(rng.randint(1, 6)))


def hostile(rng, tokens, longest=14):
    out = ""
    for _ in range(rng.randint(0, longest)):
        out += piece(rng, tokens)
        if rng.random() < 0.3:
            out += " "
    return out
