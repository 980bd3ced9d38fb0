"""How a KV block's values lie in memory, as csrc/kernels.h says, and how to get at them. NumPy on one block's bytes.

For each layer keys of all heads, then values; D dimensions, the 16 tokens of a block:

    f16    keys (D, 16), values (16, D), float16
    q8     keys (D / 4, 16, 4), values (4, D, 4), int8: quads of dimensions and of tokens, D filled up to 16; behind
           each a float16 scale for each token: x = code * scale of its token
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hob.kvcache.pool import BLOCK_SIZE

Floats = NDArray[np.float32]
VALUE_BITS = {"f16": 16, "q8": 8}
"""By kv_type: bits of a value in memory."""
MOST = 127
"""The largest code."""


@dataclass(frozen=True, slots=True)
class KvShape:
    """What a block holds."""

    num_layers: int
    num_heads: int
    head_dim: int
    kv_type: str = "f16"


class Format(Protocol):
    """One way to lie."""

    num_bytes: int
    """Of a block."""

    def load(self, block: bytes | memoryview) -> tuple[Floats, Floats]:
        """Keys (layers, heads, D, 16) and values (layers, heads, 16, D)."""
        ...

    def store(self, keys: Floats, values: Floats, out: memoryview) -> None:
        """The other way, into a block."""
        ...


def format_of(shape: KvShape) -> Format:
    """That of a pool."""
    return Halves(shape) if shape.kv_type == "f16" else Codes(shape)


class Halves:
    """f16."""

    def __init__(self, shape: KvShape) -> None:
        self._shape = shape
        self.num_bytes = 4 * shape.num_layers * shape.num_heads * BLOCK_SIZE * shape.head_dim

    def load(self, block: bytes | memoryview) -> tuple[Floats, Floats]:
        """See Format."""
        keys, values = self._parts(block)
        return keys.astype(np.float32), values.astype(np.float32)

    def store(self, keys: Floats, values: Floats, out: memoryview) -> None:
        """See Format."""
        to_keys, to_values = self._parts(out)
        to_keys[:], to_values[:] = keys, values

    def _parts(self, block: bytes | memoryview) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        layers, heads, dim = self._shape.num_layers, self._shape.num_heads, self._shape.head_dim
        both = np.frombuffer(block, np.float16).reshape(layers, 2, heads, -1)
        shape = (layers, heads, dim, BLOCK_SIZE)
        return both[:, 0].reshape(shape), both[:, 1].reshape(layers, heads, BLOCK_SIZE, dim)


class Codes:
    """q8."""

    def __init__(self, shape: KvShape) -> None:
        self._shape = shape
        self._filled = -(-shape.head_dim // 16) * 16
        self._head_bytes = BLOCK_SIZE * (self._filled + 2)
        self.num_bytes = 2 * shape.num_layers * shape.num_heads * self._head_bytes

    def load(self, block: bytes | memoryview) -> tuple[Floats, Floats]:
        """See Format."""
        codes, scales = self._parts(block)
        layers, _, heads, _ = codes.shape
        keys = codes[:, 0].view(np.int8).reshape(layers, heads, -1, BLOCK_SIZE, 4).swapaxes(3, 4)
        values = codes[:, 1].view(np.int8).reshape(layers, heads, BLOCK_SIZE // 4, -1, 4).swapaxes(3, 4)
        dim = self._shape.head_dim
        of_keys, of_values = scales.astype(np.float32).transpose(1, 0, 2, 3)
        return (
            keys.reshape(layers, heads, -1, BLOCK_SIZE)[:, :, :dim] * of_keys[:, :, None],
            values.reshape(layers, heads, BLOCK_SIZE, -1)[..., :dim] * of_values[..., None],
        )

    def store(self, keys: Floats, values: Floats, out: memoryview) -> None:
        """See Format."""
        codes, scales = self._parts(out)
        layers, _, heads, _ = codes.shape
        for part, x in enumerate((keys.swapaxes(2, 3), values)):
            scale = (np.abs(x).max(axis=3) / np.float32(MOST)).astype(np.float16)
            inverse = np.divide(np.float32(1), scale, out=np.zeros(scale.shape, np.float32), where=scale > 0)
            rounded = np.rint(np.clip(x * inverse[..., None], -MOST, MOST)).astype(np.int8)
            filled = np.zeros((layers, heads, BLOCK_SIZE, self._filled), np.int8)
            filled[..., : self._shape.head_dim] = rounded
            if part == 0:
                quads = filled.reshape(layers, heads, BLOCK_SIZE, -1, 4).swapaxes(2, 3)
            else:
                quads = filled.reshape(layers, heads, BLOCK_SIZE // 4, 4, -1).swapaxes(3, 4)
            codes[:, part] = quads.reshape(layers, heads, -1).view(np.uint8)
            scales[:, part] = scale

    def _parts(self, block: bytes | memoryview) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
        """Views: codes (layers, 2, heads, 16 * filled), scales (layers, 2, heads, 16)."""
        shape = (self._shape.num_layers, 2, self._shape.num_heads, self._head_bytes)
        every = np.frombuffer(block, np.uint8).reshape(shape)
        cut = BLOCK_SIZE * self._filled
        return every[..., :cut], every.view(np.float16)[..., cut // 2 :]
