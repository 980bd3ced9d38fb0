"""How a valid input becomes a hostile one: bytes, numbers at known places, trees of JSON, pieces of text.

Each function takes an input and a random generator and returns another input; none knows what the input is for.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Sequence
from typing import Any

Field = tuple[int, int]
"""Where a number lies: offset and width in bytes."""

NUMBERS = (0, 1, 2, 3, 7, 8, 31, 32, 255, 256, 4096, 65535, 65536, (1 << 24) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
WIDE_NUMBERS = (*NUMBERS, 1 << 32, 1 << 40, (1 << 62) // 18, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1)
FLOATS = (0.0, -0.0, 1e-45, 1e38, -1e38, float("inf"), float("-inf"), float("nan"))
ODD_NUMBERS = (-1, -(1 << 63), 0.5, -1e19, 1e308, -1e308)
VALUES: tuple[Any, ...] = (*WIDE_NUMBERS, *ODD_NUMBERS, "", "x", None, True, False, [], {}, [[]])
_PIECE = re.compile(r"\s+|\w+|.", re.DOTALL)


def change_bytes(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """One blind change: flip, overwrite, cut, remove, repeat, or a span of another input."""
    if not data:
        return rng.randbytes(8)
    start = rng.randrange(len(data))
    length = min(1 << rng.randrange(10), len(data) - start)
    span = data[start : start + length]
    match rng.randrange(7):
        case 0:
            return data[:start] + bytes([data[start] ^ 1 << rng.randrange(8)]) + data[start + 1 :]
        case 1:
            return data[:start] + rng.randbytes(length) + data[start + length :]
        case 2:
            return data[:start]
        case 3:
            return data[:start] + data[start + length :]
        case 4:
            return data[:start] + span * rng.randrange(1, 5) + data[start:]
        case 5:
            return set_number(data, (start, rng.choice((1, 2, 4, 8))), rng)
        case _:
            other = rng.choice(others)
            from_ = rng.randrange(len(other) or 1)
            return data[:start] + other[from_ : from_ + length] + data[start + length :]


def set_number(data: bytes, field: Field, rng: random.Random) -> bytes:
    """Another number at its place: an extreme one, one near the old one, or a float that is none."""
    offset, width = field
    old = int.from_bytes(data[offset : offset + width], "little")
    limit = 1 << 8 * width
    match rng.randrange(4):
        case 0:
            new = (old + rng.choice((-32, -2, -1, 1, 2, 32))) % limit
        case 1 if width in (4, 8):
            value = struct.pack("<f" if width == 4 else "<d", rng.choice(FLOATS) if width == 4 else 1e308)
            return data[:offset] + value + data[offset + width :]
        case _:
            new = rng.choice(WIDE_NUMBERS) % limit
    return data[:offset] + new.to_bytes(width, "little") + data[offset + width :]


def change_tree(tree: Any, rng: random.Random) -> Any:
    """A JSON value with one node of it replaced, removed, repeated or wrapped."""
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.1:
        return rng.choice((*VALUES, [tree], {"x": tree}, "x" * (1 << rng.randrange(12))))
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = rng.choice(keys)
    changed = tree.copy()
    match rng.randrange(8):
        case 0:
            del changed[key]
        case 1 if isinstance(changed, list):
            changed[key:key] = [tree[key]] * rng.randrange(1, 4)
        case 1:
            changed[rng.choice(("x", "", str(key) + "x"))] = tree[key]
        case 2:
            changed[key] = tree[rng.choice(keys)]
        case _:
            changed[key] = change_tree(tree[key], rng)
    return changed


def change_text(text: str, rng: random.Random, pieces: Sequence[str], others: Sequence[str]) -> str:
    """One change between whole words: remove, repeat, nest, insert a known piece, another number, another's part."""
    parts = _PIECE.findall(text)
    start = rng.randrange(len(parts) + 1)
    end = min(start + (1 << rng.randrange(7)), len(parts))
    span = parts[start:end]
    match rng.randrange(7):
        case 0:
            made = parts[:start] + parts[end:]
        case 1:
            made = parts[:start] + span * rng.choice((2, 3, 40, 400)) + parts[end:]
        case 2 | 3:
            made = [*parts[:start], rng.choice(pieces), *parts[start:]]
        case 4:
            made = [str(rng.choice(WIDE_NUMBERS)) if part.isdigit() and rng.random() < 0.5 else part for part in parts]
        case 5:
            other = _PIECE.findall(rng.choice(others))
            from_ = rng.randrange(len(other) + 1)
            made = parts[:start] + other[from_ : from_ + len(span) + 1] + parts[end:]
        case _:
            made = [*parts[:start], rng.choice(pieces), *span, rng.choice(pieces), *parts[end:]]
    return "".join(made)[: 1 << 16]
