"""A vocabulary in which every wrong cut shows: it merges the byte pairs of the paragraphs wherever they meet.

A trained vocabulary hides differences (one without tokens of two digits cannot tell apart who keeps digits together).
This one has a token for each frequent pair of neighbouring bytes, spaces, digits and line ends included, and some
whole words that no merge leads to, for models that take whole pieces first.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from tests.model.paragraphs import make_paragraphs

NUM_PAIRS = 4000
WORDS = ["Ġkettle", "kettle", "Ġriver", "engine", "Ġmeasures", "123", "ĠHIS", "Ġ==", "return"]


def byte_alphabet() -> list[str]:
    """GPT-2's character for each byte, by the rule: printable ones stand for themselves, others follow U+0100."""
    others = iter(range(256, 512))
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    return [chr(byte if byte in kept else next(others)) for byte in range(256)]


def cut_metadata(pre: str) -> dict[str, Any]:
    """GGUF metadata of that vocabulary under a name of `tokenizer.ggml.pre`."""
    alphabet = byte_alphabet()
    pairs: Counter[tuple[int, int]] = Counter()
    for _, text in make_paragraphs():
        raw = text.encode()
        pairs.update(itertools.pairwise(raw))
    chosen = sorted(pairs, key=lambda pair: (-pairs[pair], pair))[:NUM_PAIRS]
    merges = [f"{alphabet[a]} {alphabet[b]}" for a, b in chosen]
    special = ["<|im_start|>", "<|im_end|>"]
    tokens = [*special, *alphabet, *(merge.replace(" ", "") for merge in merges), *WORDS]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(special) + [1] * (len(tokens) - len(special)),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def score_metadata() -> dict[str, Any]:
    """GGUF metadata of a SentencePiece vocabulary: the frequent strings of the paragraphs, scored by frequency."""
    counts: Counter[str] = Counter()
    for _, text in make_paragraphs():
        spaced = text.replace(" ", "\u2581")
        for length in range(1, 7):
            counts.update(spaced[i : i + length] for i in range(len(spaced) - length + 1))
    frequent = sorted((s for s in counts if len(s) > 1), key=lambda s: (-counts[s] * len(s), s))[:6000]
    chars = sorted((s for s in counts if len(s) == 1), key=lambda s: (-counts[s], s))[:600]
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*head, *frequent, *chars]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(head) + [-float(i) for i in range(len(tokens) - len(head))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - len(head)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
