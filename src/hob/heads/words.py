"""Words of a text as TF-IDF counts them: a head may hold them beside the hidden states.

Words and pairs of neighbouring words, lower-cased; weights are (1 + ln count) x idf, a text's vector has length 1 over
the words that are known. Of a text that marks two things (parts.py) the words between them, with which of the two comes
first, and the three on either side count once more by themselves: that is where a relation is said. Training and
serving use these same few lines, so that they cannot drift apart.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import pairwise

from hob.heads.parts import MARKED, is_marked, plain

_WORD = re.compile(r"[\w'$£€%]+|[!?]")
_NEAR = 3
"""Words before and behind the marked things that count once more."""

Idf = dict[str, tuple[int, float]]
"""Word -> (column, inverse document frequency)."""


def words_of(text: str) -> list[str]:
    """Words and pairs of words, repeated as they occur."""
    words = _split(plain(text))
    return [*words, *_pairs(words), *(_relation_words(text) if is_marked(text) else [])]


def weights_of(text: str, idf: Idf) -> tuple[list[int], list[float]]:
    """Columns and values of a text's vector."""
    found = [(idf[word], count) for word, count in Counter(words_of(text)).items() if word in idf]
    values = [(1.0 + math.log(count)) * weight for (_, weight), count in found]
    length = math.sqrt(sum(value * value for value in values)) or 1.0
    return [column for (column, _), _ in found], [value / length for value in values]


def fit_idf(texts: list[str]) -> Idf:
    """Word -> (column, ln((1 + n) / (1 + texts with it)) + 1), columns in the words' order."""
    counts = Counter(word for text in texts for word in set(words_of(text)))
    return {
        word: (column, math.log((1 + len(texts)) / (1 + counts[word])) + 1.0)
        for column, word in enumerate(sorted(counts))
    }


def _split(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _pairs(words: list[str]) -> list[str]:
    return [f"{a} {b}" for a, b in pairwise(words)]


def _relation_words(text: str) -> list[str]:
    """Prefixed, so that they are other words than those of the text at large."""
    first, second = list(MARKED.finditer(text))[:2]
    order = f"{first[1]}{second[1]}"
    between = _split(text[first.end() : second.start()])
    before, behind = _split(text[: first.start()])[-_NEAR:], _split(text[second.end() :])[:_NEAR]
    return [
        f"distance {min(len(between), 12) // 2}",
        *(f"between {word}" for word in between),
        *(f"{order} between {word}" for word in [*between, *_pairs(between)]),
        *(f"{order} before {word}" for word in before),
        *(f"{order} behind {word}" for word in behind),
    ]
