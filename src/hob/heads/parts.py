"""A text in parts with named spans: what /hob/v1/features pools over.

    "The <e1>company</e1> makes <e2>chairs</e2>."  ->  ("The", text) (" company", text e1) (" makes", text) ...

The first token that a model reads gets a state that hardly depends on what it says, nearly all of it in one value: the
rest of the text looks there when it looks for nothing. So a lead without meaning goes before the text and stays outside
its spans. Each part is tokenised by itself, so a span's tokens are known without offsets. A blank before a mark goes to
the part behind it, as vocabularies write words with the blank in front.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MARKS = ("e1", "e2")
"""Marks that a text may carry: the two things whose relation is asked for."""
TEXT = "text"
"""The span of all that is the text's own."""
LEAD = "\n"
MARKED = re.compile(r"<(e1|e2)>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a text and the spans it belongs to."""

    text: str
    spans: tuple[str, ...] = ()


def is_marked(text: str) -> bool:
    """Whether both marks are in it, each around something."""
    return {match[1] for match in MARKED.finditer(text) if match[2].strip()} == set(MARKS)


def parts_of(text: str, lead: str = "") -> list[Part]:
    """The parts of a text behind a lead. Without both marks it is one part, which stands for both marked things."""
    parts = [Part(lead)] if lead else []
    if not is_marked(text):
        return [*parts, Part(text, (TEXT, *MARKS))]
    at, blank = 0, ""
    for match in MARKED.finditer(text):
        before = blank + text[at : match.start()]
        blank = " " if before.endswith(" ") else ""
        if before.rstrip(" "):
            parts.append(Part(before.rstrip(" "), (TEXT,)))
        parts.append(Part(blank + match[2].strip(), (TEXT, match[1])))
        at, blank = match.end(), ""
    if text[at:].strip():
        parts.append(Part(text[at:], (TEXT,)))
    return parts


def plain(text: str) -> str:
    """The text without marks."""
    return MARKED.sub(lambda match: match[2], text) if is_marked(text) else text
