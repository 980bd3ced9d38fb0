"""The packed model file: what is in it, and how it is opened.

    0     magic "HOBPACK" and a zero byte · u32 format version · u32 header length · u64 file length · u32 CRC-32 of
          the header · u32 0
    32    header: JSON of `Header`
    4096x tensor data, each tensor at a multiple of 64 bytes; offsets count from here

`pack.py` writes it, the compute core reads the tensor data (layout: `native/layout.py`). Opening checks all that can be
checked without reading the data, which has a CRC per tensor of its own.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from hob.errors import ModelFileError
from hob.models.architectures import MAX_LAYERS, expected_shapes
from hob.models.network import Network
from hob.native.layout import Kind, packed_nbytes, rows_and_cols

MAGIC = b"HOBPACK\0"
FORMAT_VERSION = 1
FIXED = struct.Struct("<8sIIQII")
PAGE = 4096
TENSOR_ALIGNMENT = 64
MAX_HEADER_BYTES = 64 << 20
READ_BYTES = 4 << 20


class PackedTensor(msgspec.Struct, frozen=True):
    """One tensor. A vector has one row."""

    name: str
    """As in GGUF: 'blk.0.attn_q.weight'."""
    kind: int
    """Value of `native.layout.Kind`."""
    rows: int
    """Outputs, N."""
    cols: int
    """Inputs, K."""
    offset: int
    """Bytes from the start of the data."""
    nbytes: int
    crc32: int


class Source(msgspec.Struct, frozen=True):
    """The GGUF file it was made from: enough to see cheaply whether that has changed."""

    name: str
    size: int
    mtime_ns: int
    header_bytes: int
    """Length of its metadata and tensor infos."""
    header_sha256: str


class Header(msgspec.Struct, frozen=True):
    """The JSON header."""

    network: Network
    quantisation: str
    """GGML type of most matrix weights: 'Q4_1'."""
    source: Source
    tensors: list[PackedTensor]


@dataclass(frozen=True, slots=True)
class Packed:
    """An opened packed file; its data has not been read."""

    path: Path
    network: Network
    quantisation: str
    source: Source
    tensors: list[PackedTensor]
    """In the order of their data."""
    data_offset: int
    """Bytes before the tensor data."""
    total_bytes: int
    """Length of the file."""

    def tensor(self, name: str) -> PackedTensor:
        """Raises ModelFileError if there is none of that name."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise ModelFileError(f"{self.path}: no tensor '{name}' among {len(self.tensors)}")

    def read_tensor(self, tensor: PackedTensor) -> bytes:
        """The packed bytes of a tensor, (nbytes,)."""
        with self.path.open("rb") as file:
            file.seek(self.data_offset + tensor.offset)
            return file.read(tensor.nbytes)


def data_offset_of(header_length: int) -> int:
    """Where the data starts after a header of so many bytes."""
    return -(-(FIXED.size + header_length) // PAGE) * PAGE


def open_packed(path: Path | str, verify: bool = False) -> Packed:
    """Read and check the header; with `verify` the CRC of all data too (about 1 GB/s).

    Raises ModelFileError naming what is wrong, its value and what was expected.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            packed = _read(path, file)
            if verify:
                _verify_data(packed, file)
            return packed
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}. Expected a packed model.") from error


def _read(path: Path, file: BinaryIO) -> Packed:
    fixed = file.read(FIXED.size)
    if len(fixed) < FIXED.size:
        raise _damaged(path, f"{len(fixed)} bytes long; expected at least {FIXED.size}")
    magic, version, length, total_bytes, crc32, _ = FIXED.unpack(fixed)
    if magic != MAGIC:
        raise _damaged(path, f"starts with {magic!r}; expected {MAGIC!r}")
    if version != FORMAT_VERSION:
        raise _damaged(path, f"has format version {version}; this Hob reads {FORMAT_VERSION}")
    size = file.seek(0, 2)
    if size != total_bytes:
        raise _damaged(path, f"{size} bytes long; its header says {total_bytes}")
    if length > MAX_HEADER_BYTES or data_offset_of(length) > size:
        raise _damaged(path, f"header of {length} bytes in a file of {size}")
    file.seek(FIXED.size)
    text = file.read(length)
    if (found := zlib.crc32(text)) != crc32:
        raise _damaged(path, f"the header's CRC is {found:#x}; expected {crc32:#x}")
    try:
        header = msgspec.json.decode(text, type=Header)
    except msgspec.MsgspecError as error:
        raise _damaged(path, f"the header cannot be read: {error}") from error
    data_offset = data_offset_of(length)
    _check_tensors(path, header, size - data_offset)
    return Packed(path, header.network, header.quantisation, header.source, header.tensors, data_offset, total_bytes)


def _check_tensors(path: Path, header: Header, data_bytes: int) -> None:
    """All that the network needs, each inside the data, after the one before it, of the size its shape asks for."""
    if header.network.num_layers > MAX_LAYERS:  # before there is an entry for each tensor of each
        raise _damaged(path, f"has {header.network.num_layers} layers; expected at most {MAX_LAYERS}")
    missing = expected_shapes(header.network)
    end = 0
    for tensor in header.tensors:
        shape = missing.pop(tensor.name, None)
        if shape is None or rows_and_cols(shape) != (tensor.rows, tensor.cols):
            raise _damaged(path, f"tensor '{tensor.name}' is {tensor.rows} x {tensor.cols}; expected {shape}")
        if tensor.kind not in list(Kind) or tensor.nbytes != packed_nbytes(
            Kind(tensor.kind), *(tensor.rows, tensor.cols)
        ):
            raise _damaged(path, f"tensor '{tensor.name}' of kind {tensor.kind} has {tensor.nbytes} bytes")
        if tensor.offset < end or tensor.offset % TENSOR_ALIGNMENT or tensor.offset + tensor.nbytes > data_bytes:
            raise _damaged(path, f"tensor '{tensor.name}' lies at {tensor.offset}; expected {end} to {data_bytes}")
        end = tensor.offset + tensor.nbytes
    if missing:
        raise _damaged(path, f"{len(missing)} tensors are not there, '{next(iter(missing))}' first")


def _verify_data(packed: Packed, file: BinaryIO) -> None:
    for tensor in packed.tensors:
        file.seek(packed.data_offset + tensor.offset)
        left, crc32 = tensor.nbytes, 0
        while left > 0 and (data := file.read(min(left, READ_BYTES))):
            left -= len(data)
            crc32 = zlib.crc32(data, crc32)
        if left or crc32 != tensor.crc32:
            raise _damaged(packed.path, f"tensor '{tensor.name}' has CRC {crc32:#x}; expected {tensor.crc32:#x}")


def _damaged(path: Path, what: str) -> ModelFileError:
    return ModelFileError(f"{path}: {what}. Remove the file: it is made again at the next start.")
