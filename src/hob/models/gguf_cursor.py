"""A place in a GGUF file that never leaves it: reads its primitive values and checks each against the bytes left.

Knows numbers, strings and counts; `gguf.py` knows in which order they come.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hob.errors import ModelFileError

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
BOOL, STRING, ARRAY = 7, 8, 9


@dataclass
class Cursor:
    """A place in the file that never leaves it."""

    path: Path
    data: mmap.mmap
    size: int
    position: int = 0

    def fail(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {what}. The file is damaged or not what it says: fetch it again.")

    def take(self, num_bytes: int, what: str) -> int:
        """Step over bytes, and return where they begin."""
        left = self.size - self.position
        if num_bytes > left:
            raise self.fail(f"{what} takes {num_bytes} bytes at offset {self.position}; the file has {left} left")
        self.position += num_bytes
        return self.position - num_bytes

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.data, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.data, self.take(8, what))[0])

    def count(self, what: str, least_bytes: int) -> int:
        """A u64 count of things that take at least so many bytes each."""
        count, left = self.u64(what), self.size - self.position
        if count > left // least_bytes:
            raise self.fail(f"{what} is {count}; the {left} bytes left hold at most {left // least_bytes}")
        return count

    def string(self, what: str, longest: int | None = None) -> str:
        length = self.u64(f"length of {what}")
        if longest is not None and not 0 < length <= longest:
            raise self.fail(f"{what} is {length} bytes long; expected 1 to {longest}")
        start = self.take(length, what)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8: byte {error.start} is {error.object[error.start]:#x}") from None

    def numbers(self, kind: int, count: int, what: str) -> list[Any]:
        dtype = SCALARS[kind]
        start = self.take(count * dtype.itemsize, what)
        values = np.frombuffer(self.data, dtype, count, start)
        if kind != BOOL:
            return list(values.tolist())
        if count and (highest := int(values.max())) > 1:
            raise self.fail(f"{what} is a bool of value {highest}; expected 0 or 1")
        return list(values.astype(bool).tolist())

    def strings(self, count: int, what: str) -> list[str]:
        """Many strings, 0.2 us each: a vocabulary may have 262,144, so the loop calls nothing of ours."""
        data, size, unpack, found = self.data, self.size, _U64.unpack_from, list[str]()
        position = self.position
        try:
            while len(found) < count:
                start = position + 8
                end = start + unpack(data, position)[0]
                if end > size:
                    break
                found.append(data[start:end].decode())
                position = end
        except (struct.error, UnicodeDecodeError):
            pass
        self.position = position
        if len(found) < count:
            self.string(f"{what}[{len(found)}]")  # the one at fault, read slowly: raises with its numbers
        return found
