"""Every way of cutting and merging text gives llama.cpp's ids. Needs no weights: the vocabularies are made here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hob.models.pretokenizers import PRE_TOKENIZERS
from hob.models.tokenizer import Tokenizer
from tests.model.cut_vocabulary import cut_metadata, score_metadata
from tests.model.paragraphs import make_paragraphs

GOLDEN: dict[str, str] = json.loads((Path(__file__).parent / "tokenizer_golden.json").read_text())["variants"]
TEXTS = [text for _, text in make_paragraphs()]


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    return cut_metadata("gpt-2")


CASED = ("tekken", "gpt-4o", "llama4")
"""Patterns that tell capitals from small letters: llama.cpp says 'a letter that is not a-z' where the models' own say
'a capital', and leaves out combining marks. Ours are the models' own."""


def ids_digest(tokenizer: Tokenizer) -> str:
    ids = [i for text in TEXTS for i in [*tokenizer.encode(text, add_bos=False), -1]]
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", [name for name in PRE_TOKENIZERS if name not in CASED])
def test_cuts_as_llama_cpp(metadata: dict[str, Any], name: str) -> None:
    assert ids_digest(Tokenizer({**metadata, "tokenizer.ggml.pre": name})) == GOLDEN[name]


@pytest.mark.parametrize("name", CASED)
def test_cuts_as_llama_cpp_but_for_its_capitals(
    metadata: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = PRE_TOKENIZERS[name]
    pattern = ours.patterns[0]
    pattern = pattern.replace(r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"(?:(?=\p{L})[^a-z])")
    pattern = pattern.replace(r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"(?:(?=\p{L})[^A-Z])")
    assert ids_digest(Tokenizer({**metadata, "tokenizer.ggml.pre": name})) != GOLDEN[name]
    monkeypatch.setitem(PRE_TOKENIZERS, name, replace(ours, patterns=(pattern,)))
    assert ids_digest(Tokenizer({**metadata, "tokenizer.ggml.pre": name})) == GOLDEN[name]


def test_sentencepiece_merges_as_llama_cpp() -> None:
    tokenizer = Tokenizer(score_metadata())
    assert ids_digest(tokenizer) == GOLDEN["sentencepiece"]
    assert all(tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text for text in TEXTS)


def test_vocabulary_tells_the_ways_apart() -> None:
    """Names with unlike patterns have unlike ids, or the test above would prove nothing."""
    ways: dict[Any, set[str]] = {}
    for name, cut in PRE_TOKENIZERS.items():
        ways.setdefault((cut.patterns, cut.ignore_merges), set()).add(GOLDEN[name])
    assert all(len(hashes) == 1 for hashes in ways.values())
    assert len(set().union(*ways.values())) == len(ways)
