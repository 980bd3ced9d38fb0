"""Reader of GGUF files (versions 2 and 3, little endian) over a read-only memory map.

    magic "GGUF" · u32 version · u64 num_tensors · u64 num_keys
    num_keys    x  key string · u32 value type · value
    num_tensors x  name string · u32 num_dims · u64 dims[], fastest first · u32 type · u64 offset
    padding to the alignment (general.alignment, 32 when absent) · tensor data; offsets count from here

A string is a u64 length and UTF-8; an array is a u32 type, a u64 count and the values. The format's description:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Files come from strangers: every count, length, type and offset is checked against the file before it is used, and
whatever is wrong ends in one ModelFileError that names the thing, its value and what was expected. This module knows
the container only; `architectures.py` knows what the keys and tensors of a model mean.
"""

from __future__ import annotations

import math
import mmap
import os
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

from hob.errors import ModelFileError
from hob.models.ggml_types import GGML_TYPES
from hob.models.gguf_cursor import ARRAY, SCALARS, STRING, Cursor

Value = int | float | str | list[Any]
"""A metadata value: bool, int, float, str, or a list of one of them."""

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 64
"""Longest tensor name the format allows."""
MAX_DIMS = 4
MAX_ARRAY_LENGTH = 1 << 24
"""Longest metadata array read: 60 times the largest vocabulary in use."""
DEFAULT_ALIGNMENT = 32
MIN_KEY_BYTES = 8 + 1 + 4 + 1
MIN_TENSOR_INFO_BYTES = 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies."""

    name: str
    shape: tuple[int, ...]
    """Row-major, as in NumPy: (N, K) for a matrix of N rows of K. The file has it reversed."""
    ggml_type: int
    """Key of `ggml_types.GGML_TYPES`."""
    offset: int
    """Bytes from the start of the file."""
    nbytes: int


@dataclass
class GgufFile:
    """An open file. Everything in it has been checked; tensor data is read when asked for. A context manager."""

    path: Path
    size: int
    """Bytes of the file."""
    version: int
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    """In the file's order."""
    data_offset: int
    """Bytes before the tensor data: header, metadata, tensor infos, padding."""
    _map: mmap.mmap = field(repr=False)

    def tensor_data(self, name: str) -> memoryview:
        """Raw bytes of a tensor, (nbytes,), read-only, as they lie in the file. Raises ModelFileError if absent."""
        info = self.tensors.get(name)
        if info is None:
            raise ModelFileError(f"{self.path}: no tensor '{name}' among {len(self.tensors)}. The model is incomplete.")
        return memoryview(self._map)[info.offset : info.offset + info.nbytes]

    def header_bytes(self) -> bytes:
        """All before the tensor data: what tells two files apart without reading their weights."""
        return self._map[: self.data_offset]

    def close(self) -> None:
        """Unmap the file; once views from `tensor_data` are gone, if any are left."""
        with suppress(BufferError):  # a view is in use: the map goes with its last one
            self._map.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open_gguf(path: Path | str) -> GgufFile:
    """Map a GGUF file and read its header. Raises ModelFileError naming what is wrong with it."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise ModelFileError(f"{path}: {size} bytes. A GGUF file has at least 24: the download is incomplete.")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}. Expected a GGUF file.") from error
    try:
        return _read(Cursor(path, mapped, size))
    except BaseException:
        with suppress(BufferError):  # the traceback may hold a view
            mapped.close()
        raise


def _read(cursor: Cursor) -> GgufFile:
    num_tensors, num_keys, version = _read_counts(cursor)
    metadata = _read_metadata(cursor, num_keys)
    alignment = _alignment(cursor, metadata)
    infos = [_read_tensor_info(cursor) for _ in range(num_tensors)]
    data_offset = -(-cursor.position // alignment) * alignment
    tensors = _place(cursor, infos, data_offset, alignment)
    return GgufFile(
        path=cursor.path,
        size=cursor.size,
        version=version,
        metadata=metadata,
        tensors=tensors,
        data_offset=min(data_offset, cursor.size),
        _map=cursor.data,
    )


def _read_counts(cursor: Cursor) -> tuple[int, int, int]:
    magic = cursor.data[: cursor.take(4, "the magic") + 4]
    if magic != MAGIC:
        raise ModelFileError(f"{cursor.path}: starts with {magic!r}. Expected {MAGIC!r}: this is not a GGUF file.")
    version = cursor.u32("the version")
    if version not in VERSIONS:
        order = " It is big-endian." if version.to_bytes(4, "little")[:2] == b"\0\0" else ""
        raise ModelFileError(f"{cursor.path}: GGUF version {version}. Expected 2 or 3, little endian.{order}")
    num_tensors = cursor.count("the number of tensors", MIN_TENSOR_INFO_BYTES)
    num_keys = cursor.count("the number of metadata keys", MIN_KEY_BYTES)
    return num_tensors, num_keys, version


def _read_metadata(cursor: Cursor, num_keys: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for i in range(num_keys):
        key = cursor.string(f"metadata key {i}", MAX_KEY_BYTES)
        if key in metadata:
            raise cursor.fail(f"metadata key '{key}' comes twice")
        metadata[key] = _read_value(cursor, key)
    return metadata


def _read_value(cursor: Cursor, key: str) -> Value:
    what = f"metadata '{key}'"
    kind = cursor.u32(f"type of {what}")
    if kind == STRING:
        return cursor.string(what)
    if kind in SCALARS:
        value: Value = cursor.numbers(kind, 1, what)[0]
        return value
    if kind != ARRAY:
        raise cursor.fail(f"{what} has value type {kind}; expected 0 to 12")
    kind = cursor.u32(f"element type of {what}")
    if kind != STRING and kind not in SCALARS:
        nested = " (an array in an array)" if kind == ARRAY else ""
        raise cursor.fail(f"{what} is an array of value type {kind}{nested}; expected 0 to 8 or 10 to 12")
    count = cursor.count(f"length of {what}", 8 if kind == STRING else SCALARS[kind].itemsize)
    if count > MAX_ARRAY_LENGTH:
        raise cursor.fail(f"length of {what} is {count}; expected at most {MAX_ARRAY_LENGTH}")
    return cursor.strings(count, what) if kind == STRING else cursor.numbers(kind, count, what)


def _alignment(cursor: Cursor, metadata: dict[str, Value]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment is {alignment!r:.40}; expected a power of two of at least 8")
    return alignment


def _read_tensor_info(cursor: Cursor) -> TensorInfo:
    """One entry, its own values checked; `offset` still counts from the data section."""
    name = cursor.string("a tensor name", MAX_NAME_BYTES)
    what = f"tensor '{name}'"
    num_dims = cursor.u32(f"number of dimensions of {what}")
    if not 1 <= num_dims <= MAX_DIMS:
        raise cursor.fail(f"{what} has {num_dims} dimensions; expected 1 to {MAX_DIMS}")
    dims = [cursor.u64(f"a dimension of {what}") for _ in range(num_dims)]
    if not all(dims):
        raise cursor.fail(f"{what} has dimensions {dims}; expected none to be 0")
    kind = cursor.u32(f"type of {what}")
    if kind not in GGML_TYPES:
        raise cursor.fail(f"{what} has the unknown type {kind}; known are {sorted(GGML_TYPES)}")
    ggml_type = GGML_TYPES[kind]
    if dims[0] % ggml_type.block_size:
        raise cursor.fail(
            f"{what} has rows of {dims[0]}; expected a multiple of {ggml_type.block_size} ({ggml_type.name})"
        )
    nbytes = math.prod(dims) // ggml_type.block_size * ggml_type.block_bytes
    return TensorInfo(name, tuple(reversed(dims)), kind, cursor.u64(f"offset of {what}"), nbytes)


def _place(cursor: Cursor, infos: list[TensorInfo], data_offset: int, alignment: int) -> dict[str, TensorInfo]:
    """Tensors by name with offsets from the start of the file: inside it, aligned, none over another."""
    tensors: dict[str, TensorInfo] = {}
    room = cursor.size - data_offset
    for info in infos:
        if info.name in tensors:
            raise cursor.fail(f"tensor '{info.name}' comes twice")
        if info.offset % alignment:
            raise cursor.fail(f"tensor '{info.name}' has offset {info.offset}; expected a multiple of {alignment}")
        if info.offset + info.nbytes > room:
            raise cursor.fail(
                f"tensor '{info.name}' {info.shape} takes {info.nbytes} bytes at {data_offset} + {info.offset}; "
                f"the file has {cursor.size}"
            )
        tensors[info.name] = replace(info, offset=data_offset + info.offset)
    in_order = sorted(tensors.values(), key=lambda info: info.offset)
    for one, other in pairwise(in_order):
        if one.offset + one.nbytes > other.offset:
            raise cursor.fail(
                f"tensor '{one.name}' ends at {one.offset + one.nbytes}, "
                f"past the start of '{other.name}' at {other.offset}"
            )
    return tensors
