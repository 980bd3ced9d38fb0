"""A text in parts with named spans: what /hob/v1/features pools over.

    "The <e1>company</e1> makes <e2>chairs</e2>."  ->  ("The", all) (" company", all e1) (" makes", all) ...

Each part is tokenised by itself, so a span's tokens are known without offsets. A blank before a mark goes to the part
behind it, as vocabularies write words with the blank in front.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MARKS = ("e1", "e2")
"""Marks that a text may carry: the two things whose relation is asked for."""
MARKED = re.compile(r"<(e1|e2)>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a text and the spans it belongs to."""

    text: str
    spans: tuple[str, ...] = ()


def is_marked(text: str) -> bool:
    """Whether both marks are in it, each around something."""
    return {match[1] for match in MARKED.finditer(text) if match[2].strip()} == set(MARKS)


def parts_of(text: str) -> list[Part]:
    """The parts of a text, at least one. Without both marks it is one part, which stands for both marked things."""
    if not is_marked(text):
        return [Part(text, MARKS)]
    parts: list[Part] = []
    at, blank = 0, ""
    for match in MARKED.finditer(text):
        before = blank + text[at : match.start()]
        blank = " " if before.endswith(" ") else ""
        if before.rstrip(" "):
            parts.append(Part(before.rstrip(" ")))
        parts.append(Part(blank + match[2].strip(), (match[1],)))
        at, blank = match.end(), ""
    if text[at:].strip():
        parts.append(Part(text[at:]))
    return parts


def plain(text: str) -> str:
    """The text without marks."""
    return MARKED.sub(lambda match: match[2], text) if is_marked(text) else text
