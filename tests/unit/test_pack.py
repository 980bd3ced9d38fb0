"""Packing: the same weights come out, Q and K in canonical order; stale or damaged files are made again; a full disk
leaves nothing behind."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.tiny import TinyShape, write_tiny_gguf

from hob.errors import InternalError, ModelFileError, StorageError
from hob.models.pack import ensure_packed, pack, why_stale
from hob.models.packed_file import FIXED, Packed, open_packed
from hob.native.layout import Kind, decode, decode_floats

NO_PROGRESS = lambda done, total: None  # noqa: E731


def weights_of(packed: Packed, name: str) -> NDArray[np.float32]:
    """A tensor as floats (rows, cols)."""
    tensor = packed.tensor(name)
    data, kind = packed.read_tensor(tensor), Kind(tensor.kind)
    if kind is Kind.F32:
        return decode_floats(data, tensor.rows, tensor.cols)
    return decode(kind, data, tensor.rows, tensor.cols).dequantise()


def rotate_half_order(rows: NDArray[np.float32], num_heads: int, rope_dim: int) -> NDArray[np.float32]:
    """What the llama.cpp converter does to Q and K, undone one row at a time."""
    head_dim = len(rows) // num_heads
    found = rows.copy()
    for head in range(num_heads):
        for i in range(rope_dim // 2):
            found[head * head_dim + i] = rows[head * head_dim + 2 * i]
            found[head * head_dim + rope_dim // 2 + i] = rows[head * head_dim + 2 * i + 1]
    return found


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("tied_head", [True, False])
def test_the_same_weights_come_out(tmp_path: Path, quant: str, tied_head: bool) -> None:
    shape = TinyShape(tied_head=tied_head)
    source = write_tiny_gguf(tmp_path / "tiny.gguf", quant=quant, shape=shape)
    packed = open_packed(ensure_packed(source), verify=True)
    theirs = gguf.GGUFReader(source).tensors
    assert {tensor.name for tensor in packed.tensors} == {tensor.name for tensor in theirs}
    assert packed.quantisation == quant
    assert packed.network.tied_head is tied_head
    for tensor in theirs:
        expected = np.atleast_2d(dequantize(tensor.data, tensor.tensor_type))
        for part, num_heads in (("attn_q", shape.num_heads), ("attn_k", shape.num_kv_heads)):
            if part in tensor.name:
                expected = rotate_half_order(expected, num_heads, shape.hidden_size // shape.num_heads)
        np.testing.assert_array_equal(weights_of(packed, tensor.name), expected, err_msg=tensor.name)


def test_only_rotated_dimensions_move(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    name = b"llama.rope.dimension_count"
    raw = source.read_bytes()
    source.write_bytes(raw.replace(name + struct.pack("<II", 4, 16), name + struct.pack("<II", 4, 8)))
    packed = open_packed(ensure_packed(source))
    assert packed.network.rope_dim == 8
    rows = next(tensor.data for tensor in gguf.GGUFReader(source).tensors if tensor.name == "blk.1.attn_q.weight")
    np.testing.assert_array_equal(weights_of(packed, "blk.1.attn_q.weight"), rotate_half_order(rows, 4, 8))


def test_layout_of_the_file(tmp_path: Path) -> None:
    packed = open_packed(ensure_packed(write_tiny_gguf(tmp_path / "tiny.gguf", quant="Q4_1")))
    assert packed.data_offset % 4096 == 0
    assert packed.total_bytes == packed.path.stat().st_size
    assert all(tensor.offset % 64 == 0 for tensor in packed.tensors)
    assert packed.source.name == "tiny.gguf"


def test_a_fresh_file_is_kept_and_progress_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hob.models")
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    told: list[tuple[int, int]] = []
    destination = ensure_packed(source, lambda done, total: told.append((done, total)))
    assert destination == tmp_path / "tiny.gguf.hobpack"
    assert told[-1][0] == told[-1][1] > 0
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    made = destination.stat()
    told.clear()
    assert ensure_packed(source) == destination
    assert destination.stat().st_ino == made.st_ino
    assert told == []
    assert [record.message.partition(": ")[2] for record in caplog.records] == ["it was not packed yet"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.gguf", "tiny.gguf.hobpack"]


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_stale_and_damaged_files_are_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    destination = ensure_packed(source)
    caplog.set_level(logging.INFO, "hob.models")

    def made_again(reason: str) -> None:
        caplog.clear()
        ensure_packed(source)
        assert len(caplog.records) == 1
        assert reason in caplog.records[0].message
        assert why_stale(source, destination) is None
        open_packed(destination, verify=True)

    overwrite(destination, 8, struct.pack("<I", 99))
    made_again("has format version 99; this Hob reads 1")
    os.truncate(destination, 10_000)
    made_again("10000 bytes long; its header says")
    os.truncate(destination, 0)
    made_again("0 bytes long; expected at least 32")
    overwrite(destination, 50, b"\0")
    made_again("the header's CRC is")
    write_tiny_gguf(source, quant="F16")
    made_again("the model changed: it has")
    stat = source.stat()
    raw = source.read_bytes()
    source.write_bytes(raw.replace(b"<|im_start|>", b"<|im_xxxxx|>"))
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    made_again("its metadata differ")


def test_damaged_data_is_found_on_request(tmp_path: Path) -> None:
    destination = ensure_packed(write_tiny_gguf(tmp_path / "tiny.gguf"))
    packed = open_packed(destination)
    tensor = packed.tensors[3]
    overwrite(destination, packed.data_offset + tensor.offset + 5, b"\x55")
    open_packed(destination)
    with pytest.raises(ModelFileError, match=f"tensor '{tensor.name}' has CRC 0x"):
        open_packed(destination, verify=True)


@pytest.fixture(scope="module")
def packed_bytes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = ensure_packed(write_tiny_gguf(tmp_path_factory.mktemp("flip") / "tiny.gguf"))
    return path, path.read_bytes()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_flipped_header_byte_is_found(packed_bytes: tuple[Path, bytes], data: st.DataObject) -> None:
    path, raw = packed_bytes
    header_length = FIXED.unpack_from(raw)[2]
    at = data.draw(st.integers(0, FIXED.size - 5) | st.integers(FIXED.size, FIXED.size + header_length - 1))
    flipped = bytearray(raw)
    flipped[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(flipped)
    with pytest.raises(ModelFileError, match="Remove the file"):
        open_packed(path)


def test_errors_of_the_child_come_back_as_they_are(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    os.truncate(source, 20_000)
    with pytest.raises(ModelFileError, match=r"tensor 'token_embd.weight' .*the file has 20000"):
        ensure_packed(source)
    with pytest.raises(ModelFileError, match="No such file"):
        ensure_packed(tmp_path / "none.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_an_unsupported_type_is_named(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf", quant="MXFP4")
    with pytest.raises(ModelFileError, match=r"'token_embd.weight' \(259, 64\) is MXFP4. Expected one of F32, F16"):
        ensure_packed(source)


def test_a_child_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(InternalError, match="ended with status 1"):
        ensure_packed(source)


def test_what_a_killed_packer_left_is_taken_over(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    part = tmp_path / "tiny.gguf.hobpack.part"
    part.write_bytes(b"left over" * 1_000_000)
    open_packed(ensure_packed(source), verify=True)
    assert not part.exists()


def test_two_at_once(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(ensure_packed(source))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    open_packed(found[0], verify=True)
    assert len(list(tmp_path.iterdir())) == 2


def test_too_little_room_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=12_345))
    with pytest.raises(StorageError, match=r"No space left.* needs \d\d\d,\d\d\d bytes; .* has 12,345 free"):
        pack(source, tmp_path / "out.hobpack", NO_PROGRESS)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the file's size stands for a disk that fills up after the check."""
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    limit = (50_000, resource.RLIM_INFINITY)
    done = subprocess.run(
        [sys.executable, "-m", "hob.models.pack", str(source), str(tmp_path / "out.hobpack")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "error StorageError cannot write" in done.stderr
    assert "It needs" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_full_disk(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o size=300k none {disk} && head -c 200000 /dev/zero > {disk}/filler && "
        f"{sys.executable} -m hob.models.pack {source} {disk}/out.hobpack; status=$?; ls {disk}; exit $status"
    )
    can_mount = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(disk)], capture_output=True)
    if can_mount.returncode != 0:
        pytest.skip("a disk of its own needs a user namespace")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error StorageError" in done.stderr
    assert "No space left on device" in done.stderr
    assert done.stdout.split() == ["filler"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "tiny.gguf.hobpack.part").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*tiny.gguf.hobpack: Is a directory"):
        ensure_packed(source)
