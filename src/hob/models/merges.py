"""From a piece of text to ids by merging: one class per `tokenizer.ggml.model`, over the `tokenizers` library.

    gpt2    bytes in a printable alphabet, cut by a pattern, merged by rank
    llama   SentencePiece: characters, merged by score; what is not in the vocabulary falls back to bytes

Special tokens are cut out before (`tokenizer.py`); nothing here sees them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from tokenizers import Regex
from tokenizers import Tokenizer as Library
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from hob.errors import ModelFileError
from hob.models.pretokenizers import pre_tokenizer
from hob.models.vocabulary import TokenType, Vocabulary, flag, string_list


class Merges(Protocol):
    """How one kind of vocabulary makes ids of text, and bytes of its tokens."""

    add_bos: bool
    """Texts begin with the BOS token."""
    add_space_prefix: bool
    """Texts are encoded as if a space stood before them, which decoding takes away."""

    def encode(self, text: str, *, after_special: bool) -> list[int]:
        """Ids of a piece without special tokens; `after_special`: it begins the text or follows a special token."""
        ...

    def token_bytes(self, text: str, kind: int) -> bytes:
        """Bytes of a token of the vocabulary of that type."""
        ...


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte -> the byte: itself where printable, else U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_SPACE = "\u2581"
"""SentencePiece's space."""
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
"""The library's own thread pool has nothing to do here (one text at a time) and warns when the process forks."""
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class ByteMerges:
    """tokenizer.ggml.model 'gpt2': byte-level BPE."""

    add_space_prefix = False

    def __init__(self, vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> None:
        """Raises ModelFileError for an unknown pre-tokenizer or merges that do not fit the vocabulary."""
        cut = pre_tokenizer(str(metadata.get("tokenizer.ggml.pre", "default")))
        self.add_bos = flag(metadata, "add_bos_token", cut.add_bos)
        merges = [_split_merge(line) for line in string_list(metadata, "merges")]
        self._library = _build(vocabulary, merges, ignore_merges=cut.ignore_merges)
        splits = [Split(Regex(pattern), "isolated") for pattern in cut.patterns]
        self._library.pre_tokenizer = Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])

    def encode(self, text: str, *, after_special: bool) -> list[int]:
        """Ids of a piece."""
        return _encode(self._library, text)

    def token_bytes(self, text: str, kind: int) -> bytes:
        """One byte per character of the alphabet; a character outside it stands for itself."""
        try:
            return bytes([_BYTE_OF[char] for char in text])
        except KeyError:
            return b"".join(bytes([_BYTE_OF[c]]) if c in _BYTE_OF else c.encode() for c in text)


def _split_merge(line: str) -> tuple[str, str]:
    """'left right' -> both. The left part may itself begin with a space."""
    at = line.find(" ", 1)
    if at < 0 or at + 1 == len(line):
        raise ModelFileError(
            f"tokenizer.ggml.merges has the entry {line!r:.40}. Expected two parts and a space between."
        )
    return line[:at], line[at + 1 :]


def _build(vocabulary: Vocabulary, merges: list[tuple[str, str]], **options: Any) -> Library:
    """A library tokenizer from objects: 0.11 s for 49k tokens, no slower than from JSON and without its text."""
    ids = {text: i for i, text in enumerate(vocabulary.tokens)}
    try:
        # Without its cache of words: that is one for all apps, so that the time of a text tells one what another sent,
        # and it grows to 26 MB that nobody reserved. Encoding takes 1.0 us a token instead of 0.85.
        return Library(BPE(vocab=ids, merges=merges, cache_capacity=0, **options))
    except Exception as error:  # the library raises bare Exception
        raise ModelFileError(f"the merges do not fit the vocabulary: {error}. The model file is damaged.") from error


def _encode(library: Library, text: str) -> list[int]:
    """Ids of one text. As a batch of one, because only then does the library release the GIL while it works."""
    ids: list[int] = library.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


class ScoreMerges:
    """tokenizer.ggml.model 'llama': SentencePiece BPE. The pair whose union scores highest is merged first."""

    def __init__(self, vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> None:
        """Raises ModelFileError if the scores are missing or not one for each token."""
        self.add_bos = flag(metadata, "add_bos_token", True)
        self.add_space_prefix = flag(metadata, "add_space_prefix", True)
        unknown = None if vocabulary.unknown_id is None else vocabulary.tokens[vocabulary.unknown_id]
        merges = _merges_by_score(vocabulary, _scores(metadata, len(vocabulary.tokens)))
        self._library = _build(vocabulary, merges, byte_fallback=True, unk_token=unknown)

    def encode(self, text: str, *, after_special: bool) -> list[int]:
        """Ids of a piece."""
        prefix = _SPACE if self.add_space_prefix and after_special else ""
        return _encode(self._library, prefix + text.replace(" ", _SPACE))

    def token_bytes(self, text: str, kind: int) -> bytes:
        """A byte token's byte, else the text with its spaces."""
        if kind == TokenType.BYTE and (match := _BYTE_TOKEN.fullmatch(text)):
            return bytes([int(match[1], 16)])
        return text.replace(_SPACE, " ").encode()


def _scores(metadata: Mapping[str, Any], num_tokens: int) -> list[float]:
    found = metadata.get("tokenizer.ggml.scores")
    if not isinstance(found, list) or len(found) != num_tokens:
        what = f"has {len(found)} entries" if isinstance(found, list) else f"is {found!r:.40}"
        raise ModelFileError(f"tokenizer.ggml.scores {what}. Expected one for each of the {num_tokens} tokens.")
    return found


def _merges_by_score(vocabulary: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """All ways to make a token of two others, best score first. Special tokens are never made of text."""
    tokens, types = vocabulary.tokens, vocabulary.types
    not_text = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE)
    usable = {text for text, kind in zip(tokens, types, strict=True) if kind not in not_text}
    merges = []
    for i in sorted(range(len(tokens)), key=lambda i: -scores[i]):
        if (text := tokens[i]) in usable:
            cuts = range(1, len(text))
            merges += [(text[:k], text[k:]) for k in cuts if text[:k] in usable and text[k:] in usable]
    return merges


MERGE_MODELS: dict[str, Callable[[Vocabulary, Mapping[str, Any]], Merges]] = {"gpt2": ByteMerges, "llama": ScoreMerges}
"""By tokenizer.ggml.model."""
