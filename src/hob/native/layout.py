"""How weights lie in a packed file: sizes, and encode and decode in NumPy. `csrc/pack.cpp` does the same in C++.

    matrix = panels of 32 outputs, one after the other; outputs padded to 32 with zeros
    panel  = groups of 32 inputs, one after the other                         (F32: (K, 32) floats, no groups)
    group  = codes, 32 float16 d, and for kinds with a minimum 32 float16 m
    codes  = 4 bits: byte[j][c][i] of (8, 16, 4), column c in the low and column 16 + c in the high half
             8 bits: byte[j][h][c][i] of (8, 2, 16, 4), column 16 h + c                  at input 4 j + i

A vector (norm, bias) is F32 of one row: its K floats as they are. This module knows no files and no model.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PANEL = 32
"""Outputs that lie side by side."""
GROUP = 32
"""Inputs that share a scale."""


class Kind(enum.IntEnum):
    """How a weight is stored: w from its code q, its group's scale d and minimum m."""

    F32 = 0
    Q4M = 1
    """w = d * q + m, q of 0 to 15"""
    Q4S = 2
    """w = d * (q - 8)"""
    Q8S = 3
    """w = d * (q - 128), q of 0 to 255"""
    Q8M = 4
    """w = d * q + m"""

    @property
    def is_4_bit(self) -> bool:
        """Two codes in a byte."""
        return self in (Kind.Q4M, Kind.Q4S)

    @property
    def has_minimum(self) -> bool:
        """Groups carry m."""
        return self in (Kind.Q4M, Kind.Q8M)

    @property
    def zero(self) -> int:
        """The code that is subtracted from all codes."""
        return {Kind.Q4S: 8, Kind.Q8S: 128}.get(self, 0)

    @property
    def group_bytes(self) -> int:
        """Bytes of a group of 32 x 32 codes and its scales."""
        return (512 if self.is_4_bit else 1024) + (128 if self.has_minimum else 64)


def rows_and_cols(shape: tuple[int, ...]) -> tuple[int, int]:
    """Outputs and inputs of a tensor: a vector has one row, matrices of experts lie one after the other."""
    return math.prod(shape[:-1]), shape[-1]


def packed_nbytes(kind: Kind, rows: int, cols: int) -> int:
    """Bytes of a packed matrix of `rows` outputs and `cols` inputs; F32 of one row is a vector."""
    panels = -(-rows // PANEL)
    if kind is Kind.F32:
        return cols * 4 if rows == 1 else panels * cols * PANEL * 4
    return panels * (cols // GROUP) * kind.group_bytes


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantised matrix of N outputs and K inputs, G = K / 32 groups."""

    kind: Kind
    q: NDArray[np.uint8]
    """(N, K)"""
    d: NDArray[np.float16]
    """(N, G)"""
    m: NDArray[np.float16] | None = None
    """(N, G) for kinds with a minimum"""

    def dequantise(self) -> NDArray[np.float32]:
        """(N, K) weights."""
        values = (self.q.astype(np.float32) - self.kind.zero).reshape(*self.d.shape, GROUP)
        values *= self.d.astype(np.float32)[:, :, None]
        if self.m is not None:
            values += self.m.astype(np.float32)[:, :, None]
        return values.reshape(self.q.shape)


def encode(codes: Codes) -> bytes:
    """Lay a quantised matrix out in panels."""
    rows, cols = codes.q.shape
    panels, groups = -(-rows // PANEL), cols // GROUP
    padding = ((0, panels * PANEL - rows), (0, 0))
    # (panel, half, column, group, quad, input) -> (panel, group, quad, half, column, input)
    q = np.pad(codes.q, padding).reshape(panels, 2, 16, groups, 8, 4).transpose(0, 3, 4, 1, 2, 5)
    parts = [q[:, :, :, 0] | q[:, :, :, 1] << 4 if codes.kind.is_4_bit else q]
    for scales in (codes.d, codes.m):
        if scales is not None:
            parts.append(
                np.pad(scales, padding).reshape(panels, PANEL, groups).transpose(0, 2, 1).copy().view(np.uint8)
            )
    return np.concatenate([part.reshape(panels, groups, -1) for part in parts], axis=2).tobytes()


def decode(kind: Kind, data: bytes | memoryview, rows: int, cols: int) -> Codes:
    """The codes and scales of a packed quantised matrix, padding dropped."""
    panels, groups = -(-rows // PANEL), cols // GROUP
    packed = np.frombuffer(data, np.uint8).reshape(panels, groups, kind.group_bytes)
    num_code_bytes = 512 if kind.is_4_bit else 1024
    raw = packed[:, :, :num_code_bytes]
    if kind.is_4_bit:
        q = np.stack([raw & 15, raw >> 4], axis=2).reshape(panels, groups, 2, 8, 16, 4).transpose(0, 2, 4, 1, 3, 5)
    else:
        q = raw.reshape(panels, groups, 8, 2, 16, 4).transpose(0, 3, 4, 1, 2, 5)

    def scales(start: int) -> NDArray[np.float16]:
        part = np.ascontiguousarray(packed[:, :, start : start + 64]).view(np.float16)
        return part.transpose(0, 2, 1).reshape(panels * PANEL, groups)[:rows]

    minimum = scales(num_code_bytes + 64) if kind.has_minimum else None
    return Codes(kind, q.reshape(panels * PANEL, cols)[:rows], scales(num_code_bytes), minimum)


def encode_floats(weights: NDArray[np.float32]) -> bytes:
    """Lay a float matrix (N, K) out in panels of (K, 32), or a vector (K,) as it is."""
    weights = np.asarray(weights, np.float32)
    if weights.ndim == 1 or len(weights) == 1:
        return weights.tobytes()
    rows, cols = weights.shape
    panels = -(-rows // PANEL)
    padded = np.pad(weights, ((0, panels * PANEL - rows), (0, 0)))
    return padded.reshape(panels, PANEL, cols).transpose(0, 2, 1).tobytes()


def decode_floats(data: bytes | memoryview, rows: int, cols: int) -> NDArray[np.float32]:
    """(N, K) of a packed float matrix, (1, K) of a vector."""
    values = np.frombuffer(data, np.float32)
    if rows == 1:
        return values.reshape(1, cols)
    return values.reshape(-1, cols, PANEL).transpose(0, 2, 1).reshape(-1, cols)[:rows]
