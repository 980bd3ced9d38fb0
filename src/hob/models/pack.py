"""From a GGUF file to the packed file beside it, once.

    ensure_packed --child process--> pack: plan -> room on the disk -> tensors, one by one -> header -> rename

Packing runs in a process of its own (`python -m hob.models.pack SRC DST`), so that its memory is given back and a
hostile file can harm little. The file is written under another name and renamed when it is whole and on the disk;
that other name carries a lock, so two daemons that start at once pack once. Matrices become kernel panels
(`native.pack_tensor`); Q and K rows are put into the order in which RoPE turns dimensions (i, i + rope_dim / 2).
"""

from __future__ import annotations

import hashlib
import logging
import math
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from hob import native
from hob.errors import HobError, InternalError, ModelFileError, error_from_name
from hob.models import ggml_types as ggml
from hob.models.architectures import architecture_of, expected_shapes, read_network
from hob.models.ggml_types import GGML_TYPES
from hob.models.gguf import GgufFile, TensorInfo, open_gguf
from hob.models.network import Network
from hob.models.packed_file import FIXED, FORMAT_VERSION, MAGIC, TENSOR_ALIGNMENT, Header, PackedTensor, Source
from hob.models.packed_file import Packed as Packed
from hob.models.packed_file import data_offset_of as data_offset_of
from hob.models.packed_file import open_packed as open_packed
from hob.models.part_file import finish, locked_part, reserve, storage_errors, write_at
from hob.native.layout import Kind, packed_nbytes, rows_and_cols

log = logging.getLogger("hob.models")

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in total."""

KIND_OF_TYPE = {
    ggml.F32: Kind.F32,
    ggml.F16: Kind.F32,
    ggml.BF16: Kind.F32,
    ggml.Q4_0: Kind.Q4S,
    ggml.Q4_1: Kind.Q4M,
    ggml.Q5_0: Kind.Q8S,
    ggml.Q5_1: Kind.Q8M,
    ggml.Q8_0: Kind.Q8S,
    ggml.Q2_K: Kind.Q8S,
    ggml.Q3_K: Kind.Q8S,
    ggml.Q4_K: Kind.Q4M,
    ggml.Q5_K: Kind.Q8M,
    ggml.Q6_K: Kind.Q8S,
    ggml.IQ4_NL: Kind.Q8S,
    ggml.IQ4_XS: Kind.Q8S,
}
"""What each GGML type becomes. Q2_K, Q3_K and Q6_K are coded anew (their groups have 16 values), Q4_K, Q5_K and IQ4_XS
round their scales; the others keep every bit."""

NO_CRC = 0xFFFFFFFF
"""Stands for a CRC while the header's length is being found: the widest there is."""


def ensure_packed(gguf_path: Path | str, on_progress: Progress | None = None) -> Path:
    """The packed file of a model, made now if it is missing, stale or damaged.

    Raises ModelFileError for a file that cannot be a model, StorageError when the disk is full or read-only.
    """
    source = Path(gguf_path)
    destination = source.with_name(source.name + ".hobpack")
    reason = why_stale(source, destination)
    if reason is None:
        return destination
    log.info("packing %s: %s", source, reason)
    _run_child(source, destination, on_progress or (lambda done, total: None))
    if (reason := why_stale(source, destination)) is not None:
        raise InternalError(f"{destination} was just made and cannot be used: {reason}")
    return destination


def why_stale(source: Path, destination: Path) -> str | None:
    """Why the packed file cannot be used, or None if it can. Raises ModelFileError if there is no source."""
    try:
        stat = source.stat()
    except OSError as error:
        raise ModelFileError(f"{source}: {error.strerror}. Expected a GGUF file; see `hob list`.") from error
    if not destination.exists():
        return "it was not packed yet"
    try:
        made_from = open_packed(destination).source
    except ModelFileError as error:
        return f"the packed file is of no use: {error.message}"
    if (made_from.size, made_from.mtime_ns) != (stat.st_size, stat.st_mtime_ns):
        return f"the model changed: it has {stat.st_size} bytes, the packed file was made from {made_from.size}"
    with source.open("rb") as file:
        digest = hashlib.sha256(file.read(made_from.header_bytes)).hexdigest()
    return None if digest == made_from.header_sha256 else "the model changed: its metadata differ"


def _run_child(source: Path, destination: Path, on_progress: Progress) -> None:
    """Pack in a process of its own. Its stderr: 'progress DONE TOTAL' and 'error NAME MESSAGE', else a traceback."""
    command = [sys.executable, "-P", "-m", "hob.models.pack", str(source), str(destination)]
    other_lines = []
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                word, _, rest = line.strip().partition(" ")
                if word == "progress":
                    done, total = rest.split()
                    on_progress(int(done), int(total))
                elif word == "error":
                    name, _, message = rest.partition(" ")
                    raise error_from_name(name, message)
                else:
                    other_lines.append(line)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        tail = " / ".join(line.strip() for line in other_lines[-3:])
        raise InternalError(f"packing {source} ended with status {process.returncode}: {tail or 'no message'}")


def pack(source: Path, destination: Path, on_progress: Progress) -> None:
    """Make the packed file in this process. Returns at once if another process has just made it.

    Raises ModelFileError, or StorageError after removing what was written.
    """
    with open_gguf(source) as gguf:
        network = read_network(gguf)
        tensors = _plan(gguf, network)
        header = Header(network, _quantisation(gguf), _source(gguf), tensors)
        header_length = len(msgspec.json.encode(header))
        total_bytes = data_offset_of(header_length) + _data_bytes(tensors)
        with storage_errors(destination, total_bytes), locked_part(destination) as (part, descriptor):
            if why_stale(source, destination) is None:
                return
            reserve(part, descriptor, total_bytes)
            tensors = _write_tensors(gguf, network, tensors, descriptor, data_offset_of(header_length), on_progress)
            text = msgspec.json.encode(msgspec.structs.replace(header, tensors=tensors)).ljust(header_length)
            fixed = FIXED.pack(MAGIC, FORMAT_VERSION, header_length, total_bytes, zlib.crc32(text), 0)
            write_at(descriptor, fixed + text, 0)
            finish(part, descriptor, destination)


def _plan(gguf: GgufFile, network: Network) -> list[PackedTensor]:
    """Every tensor with its kind, shape and place: all but its bytes. Sizes follow from the types alone."""
    planned, offset, wanted = [], 0, expected_shapes(network)
    for info in (info for info in gguf.tensors.values() if info.name in wanted):
        kind = KIND_OF_TYPE.get(info.ggml_type)
        if kind is None or (len(info.shape) == 1 and kind is not Kind.F32):
            known = ", ".join(GGML_TYPES[number].name for number in KIND_OF_TYPE)
            raise ModelFileError(
                f"{gguf.path}: tensor '{info.name}' {info.shape} is {GGML_TYPES[info.ggml_type].name}. Expected one of "
                f"{known} (vectors: F32, F16, BF16). Take another quantisation of the model."
            )
        rows, cols = rows_and_cols(info.shape)
        nbytes = packed_nbytes(kind, rows, cols)
        planned.append(PackedTensor(info.name, kind, rows, cols, offset, nbytes, NO_CRC))
        offset += -(-nbytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
    return planned


def _data_bytes(tensors: list[PackedTensor]) -> int:
    end = tensors[-1].offset + tensors[-1].nbytes
    return -(-end // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT


def _quantisation(gguf: GgufFile) -> str:
    """The type of most matrix weights."""
    weights: Counter[int] = Counter()
    for info in gguf.tensors.values():
        if len(info.shape) > 1:
            weights[info.ggml_type] += math.prod(info.shape)
    return GGML_TYPES[weights.most_common(1)[0][0]].name


def _source(gguf: GgufFile) -> Source:
    header = gguf.header_bytes()
    mtime_ns = gguf.path.stat().st_mtime_ns
    return Source(gguf.path.name, gguf.size, mtime_ns, len(header), hashlib.sha256(header).hexdigest())


def _write_tensors(
    gguf: GgufFile,
    network: Network,
    tensors: list[PackedTensor],
    descriptor: int,
    data_offset: int,
    on_progress: Progress,
) -> list[PackedTensor]:
    """Pack and write each tensor; returns them with their CRCs."""
    written, done, total = [], 0, sum(tensor.nbytes for tensor in tensors)
    is_interleaved = architecture_of(gguf).interleaved_rope
    for tensor in tensors:
        info = gguf.tensors[tensor.name]
        raw = canonical_rows(gguf, info, network) if is_interleaved else bytes(gguf.tensor_data(info.name))
        try:
            kind, data = native.pack_tensor(raw, info.ggml_type, tensor.rows, tensor.cols)
        except ValueError as error:
            raise ModelFileError(f"{gguf.path}: tensor '{tensor.name}': {error}") from error
        if (kind, len(data)) != (tensor.kind, tensor.nbytes):
            raise InternalError(
                f"tensor '{tensor.name}' was packed as kind {kind}, {len(data)} bytes; "
                f"expected kind {tensor.kind}, {tensor.nbytes} bytes"
            )
        write_at(descriptor, data, data_offset + tensor.offset)
        written.append(msgspec.structs.replace(tensor, crc32=zlib.crc32(data)))
        done += tensor.nbytes
        on_progress(done, total)
    return written


def canonical_rows(gguf: GgufFile, info: TensorInfo, network: Network) -> bytes:
    """Raw bytes of a tensor, the rows of Q and K (weight or bias) in canonical order.

    Within a head the file holds dimension i and i + rope_dim / 2 as neighbours, row 2i and 2i + 1. Whole rows move, so
    quantised blocks stay as they are.
    """
    part = info.name.rpartition(".")[0].rpartition(".")[2]
    num_heads = {"attn_q": network.num_heads, "attn_k": network.num_kv_heads}.get(part)
    data = gguf.tensor_data(info.name)
    if num_heads is None:
        return bytes(data)
    order = canonical_order(network, num_heads)
    rows = np.frombuffer(data, np.uint8).reshape(len(order), -1)
    moved: bytes = rows[order].tobytes()
    return moved


def canonical_order(network: Network, num_heads: int) -> NDArray[np.intp]:
    """Which row of an interleaved Q or K matrix goes where, (num_heads * head_dim,)."""
    dims = np.arange(network.head_dim)
    dims[: network.rope_dim] = dims[: network.rope_dim].reshape(-1, 2).T.ravel()
    order: NDArray[np.intp] = (np.arange(num_heads)[:, None] * network.head_dim + dims).ravel()
    return order


def main(arguments: list[str]) -> int:
    """The child process. Exit status 1 after an 'error' line."""
    if len(arguments) != 2:
        print("usage: python -m hob.models.pack SRC.gguf DST.hobpack", file=sys.stderr)
        return 2
    try:
        pack(
            Path(arguments[0]),
            Path(arguments[1]),
            lambda done, total: print("progress", done, total, file=sys.stderr, flush=True),
        )
    except HobError as error:
        print("error", type(error).__name__, " ".join(error.message.split()), file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
