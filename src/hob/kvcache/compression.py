"""KV blocks with fewer bits: what a context that asks for it has on disk. What comes back is not the same any more.

    16 bits   as it lies in memory; the default
     8, 4     each value on a linear scale of 256 or 16 steps
     3        8, 4 or 2 bits by how much attention a block gets, 3.2 on average

The last is LLMS's "tolerance-aware compression" (arXiv:2403.11805): blocks that are looked at much keep more bits. With
LLMS's shares, 4 bits on average, it cost 3.5 % of perplexity where 4 bits for all cost 0.3 % at the same size; so it is
for less room than that, with shares of its own. docs/results.md has the figures. Keys share
a scale by channel over the 16 tokens of a block, values by token over the channels of a head, because keys have
channels that are large throughout and values have none (KIVI, arXiv:2402.02750). NumPy on one block's bytes; knows no
files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hob.kvcache.formats import VALUE_BITS, KvShape, format_of
from hob.kvcache.pool import BLOCK_SIZE

EXACT = 16
"""As it lies in memory, whatever that is: of KV kept in 8 bits, what asks for 8 is exact."""
LEVELS = (16, 8, 4, 2)
"""Bits of a value that a block may have."""
MIXED = 3
"""What a context asks for to have bits by attention."""
SHARES = (0.05, 0.5)
"""Of MIXED: of the blocks that get 8, and 8 or 4. The first block is looked at most, by every row (attention sinks)."""

SCALES_BITS = 1.3
"""What scales add to a value: 4 bytes for each 16 keys and for each 64 values or more (a head)."""

Floats = NDArray[np.float32]


def levels_of(
    kv_bits: int, density: Sequence[float], num_blocks: int, shares: tuple[float, float] = SHARES
) -> list[int]:
    """Bits for each block of a context. Blocks without a density, the newest, count as the densest."""
    if kv_bits != MIXED:
        return [kv_bits] * num_blocks
    known = [*density[:num_blocks], *[float("inf")] * (num_blocks - len(density))]
    order = sorted(range(num_blocks), key=lambda i: -known[i])
    num_8, num_4 = (math.ceil(share * num_blocks) for share in shares)
    levels = [2] * num_blocks
    for place, i in enumerate(order[:num_4]):
        levels[i] = 8 if place < num_8 else 4
    return levels


def stored_share(kv_bits: int, kv_type: str) -> float:
    """What a context that asks for so many bits takes on disk, beside one that is kept as it is. 4: 0.33 of 'f16'."""
    value_bits = VALUE_BITS[kv_type]
    if kv_bits >= value_bits:
        return 1.0
    densest, dense = SHARES
    mean = kv_bits if kv_bits != MIXED else 8 * densest + 4 * (dense - densest) + 2 * (1 - dense)
    return (mean + SCALES_BITS) / value_bits


class Codec:
    """Turns blocks of one model into fewer bytes and back. Thread-safe."""

    def __init__(self, shape: KvShape) -> None:
        self._shape = shape
        self._format = format_of(shape)
        pairs = shape.num_layers * shape.num_heads
        self._num_values = pairs * BLOCK_SIZE * shape.head_dim
        """Of the keys, and of the values."""
        self._num_key_scales, self._num_value_scales = pairs * shape.head_dim, pairs * BLOCK_SIZE

    def num_bytes(self, bits: int) -> int:
        """Of a block."""
        if bits == EXACT:
            return self._format.num_bytes
        return 2 * self._num_values * bits // 8 + 4 * (self._num_key_scales + self._num_value_scales)

    def levels(self, kv_bits: int, density: Sequence[float], num_blocks: int) -> list[int]:
        """Bits for each block of a context. As many as a value has in memory, or more: the block stays as it is."""
        most = VALUE_BITS[self._shape.kv_type]
        return [bits if bits < most else EXACT for bits in levels_of(kv_bits, density, num_blocks)]

    def encode(self, block: bytes | memoryview, bits: int) -> bytes:
        """A block with fewer bits."""
        keys, values = self._format.load(block)
        key_scales, key_codes = _quantise(keys.reshape(-1, BLOCK_SIZE), bits)
        value_scales, value_codes = _quantise(values.reshape(-1, self._shape.head_dim), bits)
        codes = np.concatenate([key_codes.ravel(), value_codes.ravel()]).reshape(8 // bits, -1)
        packed = codes[0].copy()
        for i in range(1, len(codes)):
            packed |= codes[i] << (bits * i)
        return b"".join([key_scales.tobytes(), value_scales.tobytes(), packed.tobytes()])

    def decode(self, data: bytes | memoryview, bits: int, out: memoryview) -> None:
        """The block that `encode` made of one, near the original, into `out`."""
        at = 4 * self._num_key_scales
        end = at + 4 * self._num_value_scales
        key_scales = np.frombuffer(data[:at], np.float16).reshape(2, -1)
        value_scales = np.frombuffer(data[at:end], np.float16).reshape(2, -1)
        packed = np.frombuffer(data[end:], np.uint8)
        codes = np.empty((8 // bits, len(packed)), np.uint8)
        for i in range(len(codes)):
            np.bitwise_and(packed >> (bits * i), (1 << bits) - 1, out=codes[i])
        keys, values = codes.reshape(2, -1)
        heads = (self._shape.num_layers, self._shape.num_heads)
        with np.errstate(invalid="ignore", over="ignore"):
            self._format.store(
                _restored(key_scales, keys).reshape(*heads, -1, BLOCK_SIZE),
                _restored(value_scales, values).reshape(*heads, BLOCK_SIZE, -1),
                out,
            )


def _quantise(x: Floats, bits: int) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    """x (n, k) -> lows and steps (2, n), codes (n, k)."""
    most = (1 << bits) - 1
    with np.errstate(invalid="ignore", over="ignore"):  # a fake engine's values are no numbers
        low = x.min(axis=1).astype(np.float16)
        step = ((x.max(axis=1) - low) / most).astype(np.float16)
        step[step == 0] = 1
        x = (x - low.astype(np.float32)[:, None]) / step.astype(np.float32)[:, None]
        codes = np.clip(np.rint(x), 0, most).astype(np.uint8)
    return np.stack([low, step]), codes


def _restored(scales: NDArray[np.float16], codes: NDArray[np.uint8]) -> Floats:
    low, step = scales.astype(np.float32)
    values = codes.reshape(len(low), -1).astype(np.float32)
    values *= step[:, None]
    values += low[:, None]
    return values
