"""1,000 paragraphs by seed, to compare tokenizers on: English, code, emoji, Chinese, long runs of spaces, oddities.

Made from templates of our own. Imports nothing but the standard library: the script that asks llama.cpp runs in
another environment.
"""

from __future__ import annotations

import random
from collections.abc import Callable

NUM_PARAGRAPHS = 1000
SEED = 20240607

_NOUNS = [
    "kettle",
    "hearth",
    "river",
    "engine",
    "cache",
    "ledger",
    "window",
    "orchard",
    "thermometer",
    "colleague",
    "mountain",
    "pangolin",
    "Zürich",
    "café",
]
_VERBS = [
    "holds",
    "measures",
    "forgets",
    "carries",
    "couldn't",
    "we'll",
    "they've",
    "I'd",
    "it's",
    "repaints",
    "re-evaluates",
    "outnumbers",
    "sings",
]
_SMALL = [
    "the",
    "a",
    "one",
    "every",
    "HIS",
    "their",
    "12",
    "3.14",
    "1,000,000",
    "42nd",
    "§7",
    "no.",
    "№",
    "½",
    "and/or",
    "(perhaps)",
    "—",
    '"quoted"',
    "'single'",
    "it’s",
]
_HANZI = (
    "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后"
    "小么心多天而能好都然没日于起还发成事只作当想看文无开手十用主行方又如前所本见经头面公同三已老从动两长"
    "知民样现分将外但身些与高意进把法此实回二理美点月明其种声全工己话儿者向情部正名定女问力机给等几很业最"
    "间新什打便位因重被走电四第门相次东政海口使教西再平真听世气信北少关并内加化由却代军产入先山五太水万市"
    "眼体别处总才场师书比住员九笑性通目华报立马命张活难神数件安表原车白应路期叫死常提感金何更反合放做系计"
    "或司利受光王果亲界及今京务制解各任至清物台象记边共风战干接它许八特觉望直服毛林题建南度统色字请交爱让"
    "认算论百吃义科怎元社术结六功指思非流每青管夫连远资队跟带花快条院变联言权往展该领传近留红治决周保达办"
    "运武半候七必城父强步完革深区即求品士转量空甚众技轻程告江语英基派满式李息写呢识极令黄德收脸钱党倒未持"
    "取设始版双历越史商千片容研像找友孩站广改议形委早房音火际则首单据导影失拿网香似斯专石若兵弟谁校读志飞"
    "观争究包组造落视济喜离虽坏兴切"
)
_MARKS = "，。！？；：「」《》（）、…"
_EMOJI = ["🦙", "🔥", "👍🏽", "👩\u200d💻", "🇨🇭", "❤️", "🧑🏿\u200d🚀", "☕", "😀😃😄", "🏳️\u200d🌈", "⏱️", "🫖", "1️⃣", "✈"]
_OTHER = [
    "Привет мир",
    "γειά σου κόσμε",
    "שלום עולם",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "こんにちは世界 カタカナ",
    "안녕하세요 세계",
    "สวัสดี",
    "Tiếng Việt",
    "naïve façade",
    "Ⅷ ٣٤ ७८ ②",
]
_CODE = (
    'def {a}_{b}({a}: int = {n}) -> list[str]:\n{t}return [f"{{{a}!r}}" for _ in range({n})]\n',
    "for (int {a} = 0; {a} < {n}; ++{a}) {{\n{t}{b}[{a}] += *ptr->{a} << 0x{n:x};\n}}\n",
    "SELECT {a}, COUNT(*) FROM {b}_table WHERE id >= {n} AND name LIKE '%{a}%';\n",
    '{{"{a}": [{n}, -{n}e-5, null], "{b}": {{"{a}{n}": true}}}}',
    "#!/bin/sh\nset -eu\r\n{t}grep -rn '{a}' \"${{{b}:-/tmp}}\" | awk '{{print ${n}}}' > /dev/null 2>&1\r\n",
    '<div class="{a}-{b}" id={n}>\n{t}<!-- {a} -->&nbsp;</div>\n',
    "fn {a}<'a, T: {b}>(x: &'a mut T) -> Option<u{n}> {{ todo!(\"{a}::{b}\") }} // {n}%",
)

_BLOCKS = (
    (0x20, 0x7E),  # Latin, Greek, Cyrillic
    (0xA0, 0x17F),
    (0x370, 0x377),
    (0x391, 0x3A1),
    (0x3B1, 0x3FF),
    (0x400, 0x4FF),
    (0x300, 0x36F),  # combining marks
    (0x5D0, 0x5EA),  # Hebrew, Arabic, Devanagari, Thai
    (0x620, 0x669),
    (0x905, 0x939),
    (0xE01, 0xE3A),
    (0x2010, 0x205E),  # punctuation, arrows, circled numbers
    (0x2190, 0x21FF),
    (0x2460, 0x24FF),
    (0x3041, 0x3096),  # Japanese, Chinese, Korean
    (0x4E00, 0x9FA5),
    (0xAC00, 0xD7A3),
    (0x1D400, 0x1D454),  # beyond 16 bits
    (0x1F600, 0x1F64F),
)


def _english(rng: random.Random) -> str:
    words = [rng.choice(_NOUNS + _VERBS + _SMALL) for _ in range(rng.randint(8, 60))]
    ends = [", ", ". ", "; ", "?\n", "!", " ", " ", " ", " ", "...", "\n\n", " - ", "'"]
    return "".join(word + rng.choice(ends) for word in words).capitalize()


def _code(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randint(1, 4)):
        a, b = rng.choice(_NOUNS), rng.choice(_NOUNS).upper()
        indent = rng.choice(["    ", "\t", "\t\t", "  ", " " * rng.randint(1, 40)])
        lines.append(rng.choice(_CODE).format(a=a, b=b, n=rng.randint(0, 99999), t=indent))
    return "".join(lines)


def _chinese(rng: random.Random) -> str:
    sentences = ["".join(rng.choice(_HANZI) for _ in range(rng.randint(2, 25))) for _ in range(rng.randint(1, 6))]
    return "".join(
        part + rng.choice(_MARKS) + rng.choice(["", "", " ", "\n", "　", "2024年", "GPU"]) for part in sentences
    )


def _emoji(rng: random.Random) -> str:
    return "".join(
        rng.choice(_EMOJI + _NOUNS) + rng.choice(["", " ", "  ", "\n", "!"]) for _ in range(rng.randint(3, 30))
    )


def _spaces(rng: random.Random) -> str:
    blanks = [" ", " ", " ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u2003", "\u2028", "\x0b", "\x85", "\u200b"]
    parts = []
    for _ in range(rng.randint(2, 8)):
        parts.append(rng.choice(blanks) * rng.choice([1, 2, 3, 5, 8, 16, 33, 64, 129, 300]))
        parts.append(rng.choice([*_NOUNS, *_SMALL, "", ".", "\n", "中"]))
    return "".join(parts)


def _mixed(rng: random.Random) -> str:
    parts = [_english, _code, _chinese, _emoji, _spaces]
    texts = [rng.choice(_OTHER), rng.choice(parts)(rng)[:80], rng.choice(_OTHER), rng.choice(parts)(rng)[-80:]]
    return rng.choice(["", " ", "\n"]).join(texts)


def _specials(rng: random.Random) -> str:
    marks = [
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<repo_name>",
        "<file_sep>",
        "<|im_",
        "end|>",
        "<",
        "|>",
        " ",
    ]
    return "".join(rng.choice(marks + _NOUNS + ["user\n"]) for _ in range(rng.randint(2, 16)))


def _any_character(rng: random.Random) -> str:
    """Letters, marks, digits and signs of the scripts that have been in Unicode since version 8."""
    chars = []
    for _ in range(rng.randint(5, 60)):
        first, last = rng.choice(_BLOCKS)
        chars.append(chr(rng.randint(first, last)))
    return "".join(chars)


KINDS: dict[str, tuple[Callable[[random.Random], str], int]] = {
    "english": (_english, 200),
    "code": (_code, 200),
    "chinese": (_chinese, 150),
    "emoji": (_emoji, 100),
    "spaces": (_spaces, 150),
    "mixed": (_mixed, 80),
    "specials": (_specials, 40),
    "any character": (_any_character, 80),
}
"""Name -> (maker, how many)."""


def make_paragraphs() -> list[tuple[str, str]]:
    """(kind, text) of each paragraph; the same on every machine and Python."""
    rng = random.Random(SEED)
    return [(kind, make(rng)) for kind, (make, count) in KINDS.items() for _ in range(count)]
