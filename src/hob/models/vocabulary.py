"""A model's vocabulary as its GGUF metadata gives it, checked: tokens, their types, the special ones.

A file comes from a stranger: every list and id is checked before use, and what is wrong ends in one ModelFileError.
This module knows metadata keys; how text becomes ids is `tokenizer.py`'s.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hob.errors import ModelFileError

MAX_TOKENS = 1 << 22
MAX_TOKEN_CHARS = 1 << 12


class TokenType(enum.IntEnum):
    """GGUF's tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    """Steers the model and is no text: never read out of a user's text."""
    USER_DEFINED = 4
    """Text that is always cut out as this one token."""
    UNUSED = 5
    BYTE = 6
    """SentencePiece's '<0x0A>' stands for one byte."""


END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<turn|>",
    "<EOT>",
    "_<EOT>",
    "<｜end▁of▁sentence｜>",
)
"""Texts of tokens that end a reply wherever they are in a vocabulary; files often name only one of theirs."""

_STOP_KEYS = ("eos", "eot", "eom")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """V tokens. Ids are places in `tokens`."""

    tokens: list[str]
    """(V,) as stored: byte-level alphabet or U+2581 for spaces, not yet text."""
    types: list[int]
    """(V,) values of TokenType."""
    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    """End of turn, where the file names one."""
    unknown_id: int | None
    stop_ids: tuple[int, ...]
    """All that end a reply, ascending."""

    def ids_of(self, *types: TokenType) -> list[int]:
        """Ids of all tokens of these types."""
        return [i for i, kind in enumerate(self.types) if kind in types]


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """Check and collect. Raises ModelFileError naming the key, its value and what was expected."""
    tokens = string_list(metadata, "tokens")
    if not 1 <= len(tokens) <= MAX_TOKENS:
        raise _wrong("tokens", f"has {len(tokens)} entries", f"1 to {MAX_TOKENS}")
    if (longest := max(map(len, tokens))) > MAX_TOKEN_CHARS:
        raise _wrong("tokens", f"has a token of {longest} characters", f"at most {MAX_TOKEN_CHARS}")
    types = _types(metadata, len(tokens))
    by_key = {key: _special_id(metadata, key, len(tokens)) for key in ("bos", *_STOP_KEYS, "unknown")}
    stops = {by_key[key] for key in _STOP_KEYS} - {None}
    at = {text: i for i, text in enumerate(tokens)}
    for text in END_OF_TURN:
        if (found := at.get(text)) is not None:
            stops.add(found)
            types[found] = TokenType.CONTROL  # some files call it normal text; it would then show in replies
    return Vocabulary(
        tokens=tokens,
        types=types,
        bos_id=by_key["bos"],
        eos_id=by_key["eos"],
        eot_id=by_key["eot"],
        unknown_id=by_key["unknown"],
        stop_ids=tuple(sorted(i for i in stops if i is not None)),
    )


def string_list(metadata: Mapping[str, Any], name: str) -> list[str]:
    """A list of strings under tokenizer.ggml. Raises ModelFileError if it is absent or anything else."""
    found = metadata.get(f"tokenizer.ggml.{name}")
    if found is None:
        raise _wrong(name, "is missing", "a list of strings")
    if not isinstance(found, list) or (found and not isinstance(found[0], str)):
        raise _wrong(name, f"is {found!r:.40}", "a list of strings")
    return found


def flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    """A yes or no under tokenizer.ggml. Raises ModelFileError if it is anything else."""
    found = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(found, bool):
        raise _wrong(name, f"is {found!r:.40}", "true or false")
    return found


def _types(metadata: Mapping[str, Any], num_tokens: int) -> list[int]:
    found = metadata.get("tokenizer.ggml.token_type")
    if found is None:
        return [int(TokenType.NORMAL)] * num_tokens
    if not isinstance(found, list) or len(found) != num_tokens:
        what = f"has {len(found)} entries" if isinstance(found, list) else f"is {found!r:.40}"
        raise _wrong("token_type", what, f"one for each of the {num_tokens} tokens")
    return list(found)


def _special_id(metadata: Mapping[str, Any], key: str, num_tokens: int) -> int | None:
    found = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if found is None or found == 0xFFFFFFFF:  # -1 as the format's unsigned number: none
        return None
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < num_tokens:
        raise _wrong(f"{key}_token_id", f"is {found!r:.40}", f"a token id below {num_tokens}")
    return found


def _wrong(name: str, what: str, expected: str) -> ModelFileError:
    return ModelFileError(f"tokenizer.ggml.{name} {what}. Expected {expected}: the model file is damaged.")
