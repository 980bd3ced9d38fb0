"""Ids equal llama.cpp's, paragraph by paragraph, on the default model's vocabulary."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from hob.models.chat import ChatEncoder, render_chat
from hob.models.gguf import open_gguf
from hob.models.tokenizer import StreamDecoder, Tokenizer
from tests.model.paragraphs import NUM_PARAGRAPHS, SEED, make_paragraphs

pytestmark = pytest.mark.weights

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "tokenizer_golden.json").read_text())
"""Written by make_tokenizer_golden.py."""
PARAGRAPHS = make_paragraphs()
DIGEST_CHARS = 16


@pytest.fixture(scope="module")
def metadata(default_gguf: Path) -> dict[str, Any]:
    with open_gguf(default_gguf) as file:
        return file.metadata


@pytest.fixture(scope="module")
def tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer(metadata)


def digest(ids: list[int]) -> str:
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:DIGEST_CHARS]


def test_paragraphs_are_those_of_the_golden_file() -> None:
    assert GOLDEN["seed"] == SEED
    assert len(PARAGRAPHS) == NUM_PARAGRAPHS == len(GOLDEN["plain"]) // DIGEST_CHARS


@pytest.mark.parametrize(("key", "parse_special"), [("plain", False), ("parse_special", True)])
def test_ids_equal_llama_cpp(tokenizer: Tokenizer, key: str, parse_special: bool) -> None:
    num_tokens, wrong = 0, []
    for i, (kind, text) in enumerate(PARAGRAPHS):
        ids = tokenizer.encode(text, parse_special=parse_special)
        num_tokens += len(ids)
        if digest(ids) != GOLDEN[key][i * DIGEST_CHARS : (i + 1) * DIGEST_CHARS]:
            wrong.append((kind, text))
    assert not wrong, f"{len(wrong)} paragraphs differ; the first: {wrong[0]!r}"
    assert parse_special or num_tokens == GOLDEN["num_tokens"]


def test_decoding_gives_the_text_back(tokenizer: Tokenizer) -> None:
    for _, text in PARAGRAPHS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_streaming_gives_the_text_back_in_whole_characters(tokenizer: Tokenizer) -> None:
    for _, text in PARAGRAPHS:
        decoder, shown = StreamDecoder(tokenizer), ""
        for token_id in tokenizer.encode(text):
            shown += decoder.feed([token_id])
            assert text.startswith(shown)
        assert shown + decoder.flush() == text


def test_default_model_says_what_ends_a_reply(tokenizer: Tokenizer) -> None:
    assert {tokenizer.token_text(i) for i in tokenizer.stop_token_ids} == {"<|im_end|>", "<|endoftext|>"}
    assert tokenizer.eos_id == 2
    assert not tokenizer.adds_bos


def test_chat_ids_equal_plain_rendering(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    """Ordinary contents: escaping changes nothing. Contents with special text: it stays text."""
    chat = ChatEncoder.from_metadata(metadata, tokenizer)
    for kind, text in PARAGRAPHS[::5]:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
        rendered = render_chat(metadata["tokenizer.chat_template"], messages)
        ids = chat.encode(messages)
        assert tokenizer.decode(ids) == rendered
        if kind == "specials":
            assert ids.count(1) == 3
        else:
            assert ids == tokenizer.encode(rendered, parse_special=True)
