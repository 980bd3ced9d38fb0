"""Keep what users wrote from being read as special tokens, without changing the ids of anything else.

A rendered chat is text in which '<|im_end|>' of the template must become a token and '<|im_end|>' of a message must
not. So before rendering, one character of every place in the messages that could become part of a special token is
swapped for a stand-in (a private-use character that occurs nowhere in them); after the rendered text is cut at special
tokens, the stand-ins are swapped back. Texts keep their length, blanks and words, templates see no difference unless
they look for that character, and each piece is encoded as the very text it is: merges across the border of template
and message come out as in plain rendering, for every text.

Swapped are, for a special token T:

    T itself anywhere in a text          the first character
    a beginning of T that ends a text    its first character (the template or the next text might go on with the rest)
    an end of T that begins a text       its first character

What is left: a template that takes text out of the middle of a message could join what was apart. And a text wholly
inside a token, such as the role in '<|' + role + '|>', is the template's to use: roles are checked in `chat.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from hob.errors import InvalidRequest

_PRIVATE_USE = range(0xF0000, 0x10FFFE)
"""Planes 15 and 16. Two code points at the end of each are no characters; Python and UTF-8 take them all the same."""


class Escaper:
    """For one vocabulary's special tokens. Immutable."""

    def __init__(self, tokens: Iterable[str]) -> None:
        """`tokens`: texts of the special tokens."""
        texts = sorted(set(tokens) - {""}, key=lambda text: (-len(text), text))
        self._chars = sorted(set("".join(texts)))
        self._whole = re.compile("(?=" + "|".join(map(re.escape, texts)) + ")") if texts else None
        self._beginnings = {text[:i] for text in texts for i in range(1, len(text))}
        self._ends = {text[i:] for text in texts for i in range(1, len(text))}
        self._longest = max(map(len, texts), default=1) - 1
        self._lasts = {text[-1] for text in self._beginnings}
        self._firsts = {text[0] for text in self._ends}

    def places(self, text: str) -> set[int]:
        """Which characters of a text to swap."""
        if self._whole is None:
            return set()
        found = {match.start() for match in self._whole.finditer(text)}
        reach = range(1, min(self._longest, len(text)) + 1)
        if text[-1:] in self._lasts:
            found.update(len(text) - i for i in reach if text[-i:] in self._beginnings)
        if text[:1] in self._firsts and any(text[:i] in self._ends for i in reach):
            found.add(0)
        return found

    def escape(self, values: list[Any]) -> tuple[list[Any], Stand]:
        """JSON-like values with their texts (dict keys too) escaped, and what swaps them back.

        Raises InvalidRequest if the texts use up the whole private-use area.
        """
        if not any(self.places(text) for text in _texts(values)):
            return values, Stand({})
        stand = Stand(self._stand_ins(values))
        return [self._swap(value, stand) for value in values], stand

    def _stand_ins(self, values: list[Any]) -> dict[str, str]:
        """Special tokens' characters -> characters that occur in none of the texts."""
        used = {char for text in _texts(values) for char in set(text) if ord(char) >= _PRIVATE_USE.start}
        free = (char for char in map(chr, _PRIVATE_USE) if char not in used)
        stand_ins = dict(zip(self._chars, free, strict=False))
        if len(stand_ins) < len(self._chars):
            raise InvalidRequest(
                f"the messages hold {len(used)} different private-use characters. Expected some unused."
            )
        return stand_ins

    def _swap(self, value: Any, stand: Stand) -> Any:
        if isinstance(value, str):
            places = self.places(value)
            return "".join(stand.swap(c) if i in places else c for i, c in enumerate(value)) if places else value
        if isinstance(value, dict):
            return {self._swap(key, stand): self._swap(item, stand) for key, item in value.items()}
        return [self._swap(item, stand) for item in value] if isinstance(value, list) else value


class Stand:
    """Which stand-in is which character."""

    def __init__(self, stand_ins: dict[str, str]) -> None:
        self._stand_ins = stand_ins
        self._back = str.maketrans({stand_in: char for char, stand_in in stand_ins.items()})

    def swap(self, char: str) -> str:
        """The stand-in of a character."""
        return self._stand_ins[char]

    def restore(self, text: str) -> str:
        """Text as it was."""
        return text.translate(self._back) if self._stand_ins else text


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
