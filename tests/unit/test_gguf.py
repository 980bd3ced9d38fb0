"""The GGUF reader: what it reads, and that damage of every kind ends in one error that names the numbers."""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.tiny import TinyShape, write_tiny_gguf

from hob.errors import ModelFileError
from hob.models.architectures import read_network
from hob.models.gguf import open_gguf

U32, U64, STRING, ARRAY, BOOL, U8 = 4, 10, 8, 9, 7, 0
F32, Q4_0 = 0, 2


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def key(name: str, kind: int, payload: bytes) -> bytes:
    return text(name) + u32(kind) + payload


def tensor(name: str, dims: list[int], kind: int = F32, offset: int = 0) -> bytes:
    return text(name) + u32(len(dims)) + b"".join(u64(d) for d in dims) + u32(kind) + u64(offset)


def file_of(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = bytes(64),
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file piece by piece: right unless told otherwise."""
    keys = [key("general.architecture", STRING, text("llama"))] if keys is None else keys
    tensors = [tensor("a", [16])] if tensors is None else tensors
    counts = u64(len(tensors) if num_tensors is None else num_tensors) + u64(
        len(keys) if num_keys is None else num_keys
    )
    header = magic + u32(version) + counts + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data


HUGE = 1 << 63

HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "short": (b"GGUF\3\0\0\0", "8 bytes"),
    "magic": (file_of(magic=b"PK\3\4"), "Expected b'GGUF'"),
    "version 1": (file_of(version=1), "version 1. Expected 2 or 3"),
    "big-endian": (file_of(version=3 << 24), "big-endian"),
    "2^63 tensors": (file_of(num_tensors=HUGE), "number of tensors is 9223372036854775808; the .* at most"),
    "2^63 keys": (file_of(num_keys=HUGE), "number of metadata keys is 9223372036854775808; the .* at most"),
    "one key too many": (file_of(num_keys=2), "fetch it again"),
    "one tensor too many": (file_of(num_tensors=2), "fetch it again"),
    "key of 2^63 bytes": (file_of([u64(HUGE) + b"x" * 40]), "is 9223372036854775808 bytes long; expected 1 to 65535"),
    "empty key": (file_of([key("", U32, u32(1)), b" " * 20]), "key 0 is 0 bytes long"),
    "key not UTF-8": (file_of([text(b"\xff\xfe") + u32(U32) + u32(1)]), "not UTF-8: byte 0 is 0xff"),
    "key twice": (file_of([key("a", U32, u32(1))] * 2), "'a' comes twice"),
    "string of 2^63 bytes": (file_of([key("a", STRING, u64(HUGE))]), "'a' takes 9223372036854775808 bytes .* file has"),
    "string not UTF-8": (file_of([key("a", STRING, text(b"ok\x80"))]), "not UTF-8: byte 2 is 0x80"),
    "value type": (file_of([key("a", 13, u32(1))]), "value type 13; expected 0 to 12"),
    "bool of 2": (file_of([key("a", BOOL, b"\2")]), "bool of value 2; expected 0 or 1"),
    "array of 2^63": (file_of([key("a", ARRAY, u32(U8) + u64(HUGE))]), "length of metadata 'a' is 9223372036854775808"),
    "array of 2^63 strings": (file_of([key("a", ARRAY, u32(STRING) + u64(HUGE))]), "'a' is 9223372036854775808"),
    "array past the end": (file_of([key("a", ARRAY, u32(U64) + u64(99))]), "length of metadata 'a' is 99; .* at most"),
    "array over the limit": (
        file_of([key("a", ARRAY, u32(U8) + u64((1 << 24) + 1))], data=bytes(17 << 20)),
        "length of metadata 'a' is 16777217; expected at most 16777216",
    ),
    "array in an array": (file_of([key("a", ARRAY, u32(ARRAY) + u64(1))]), "an array in an array"),
    "array of unknown": (file_of([key("a", ARRAY, u32(77) + u64(1))]), "array of value type 77"),
    "array string too long": (
        file_of([key("a", ARRAY, u32(STRING) + u64(2) + text("ok") + u64(1 << 40))]),
        r"'a'\[1\] takes 1099511627776 bytes",
    ),
    "array string not UTF-8": (
        file_of([key("a", ARRAY, u32(STRING) + u64(2) + text("ok") + text(b"\xc3"))]),
        r"'a'\[1\] is not UTF-8: byte 0 is 0xc3",
    ),
    "alignment 24": (file_of([key("general.alignment", U32, u32(24))]), "alignment is 24; expected a power of two"),
    "alignment 4": (file_of([key("general.alignment", U32, u32(4))]), "alignment is 4; expected a power of two"),
    "alignment 0": (file_of([key("general.alignment", U32, u32(0))]), "alignment is 0; expected"),
    "alignment 2^31": (file_of([key("general.alignment", U32, u32(1 << 31))]), "takes 64 bytes at 2147483648"),
    "alignment text": (file_of([key("general.alignment", STRING, text("32"))]), "alignment is '32'"),
    "tensor name empty": (file_of(tensors=[tensor("", [16])]), "tensor name is 0 bytes long"),
    "tensor name long": (file_of(tensors=[tensor("n" * 65, [16])]), "tensor name is 65 bytes long; expected 1 to 64"),
    "tensor twice": (file_of(tensors=[tensor("a", [8]), tensor("a", [8], offset=32)]), "'a' comes twice"),
    "no dimensions": (file_of(tensors=[tensor("a", [])]), "'a' has 0 dimensions; expected 1 to 4"),
    "5 dimensions": (file_of(tensors=[tensor("a", [1] * 5)]), "'a' has 5 dimensions; expected 1 to 4"),
    "2^32 - 1 dimensions": (
        file_of(tensors=[text("a") + u32(0xFFFFFFFF) + bytes(40)]),
        "'a' has 4294967295 dimensions",
    ),
    "zero dimension": (file_of(tensors=[tensor("a", [4, 0])]), r"dimensions \[4, 0\]; expected none to be 0"),
    "2^63 dimension": (file_of(tensors=[tensor("a", [HUGE])]), "takes 36893488147419103232 bytes"),
    "product wraps 2^64": (
        file_of(tensors=[tensor("a", [1 << 32, 1 << 32, 16])]),
        "takes 1180591620717411303424 bytes",
    ),
    "tensor type": (file_of(tensors=[tensor("a", [16], kind=4)]), "'a' has the unknown type 4"),
    "tensor type 2^31": (file_of(tensors=[tensor("a", [16], kind=1 << 31)]), "unknown type 2147483648"),
    "half a block": (
        file_of(tensors=[tensor("a", [48], kind=Q4_0)]),
        r"rows of 48; expected a multiple of 32 \(Q4_0\)",
    ),
    "offset past the end": (file_of(tensors=[tensor("a", [16], offset=64)]), r"takes 64 bytes at \d+ \+ 64; the file"),
    "offset 2^64 - 32": (file_of(tensors=[tensor("a", [16], offset=(1 << 64) - 32)]), "18446744073709551584"),
    "offset not aligned": (file_of(tensors=[tensor("a", [4], offset=8)]), "offset 8; expected a multiple of 32"),
    "overlap": (
        file_of(tensors=[tensor("a", [16]), tensor("b", [4], offset=32)]),
        r"'a' ends at \d+, past the start of 'b'",
    ),
    "data cut off": (file_of(data=bytes(63)), r"takes 64 bytes at \d+ \+ 0; the file has"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    raw, message = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(raw)
    with pytest.raises(ModelFileError, match=message) as caught:
        open_gguf(path)
    assert str(path) in caught.value.message


def test_the_undamaged_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "whole.gguf"
    path.write_bytes(file_of())
    with open_gguf(path) as file:
        assert file.metadata == {"general.architecture": "llama"}
        assert file.tensors["a"].shape == (16,)
        assert bytes(file.tensor_data("a")) == bytes(64)
        with pytest.raises(ModelFileError, match="no tensor 'b' among 1"):
            file.tensor_data("b")


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="No such file"):
        open_gguf(tmp_path / "none.gguf")
    with pytest.raises(ModelFileError, match="directory"):
        open_gguf(tmp_path)


def test_all_value_types(tmp_path: Path) -> None:
    path = tmp_path / "values.gguf"
    written: dict[str, Any] = {
        "u8": 200, "i8": -100, "u16": 60000, "i16": -30000, "u32": 4_000_000_000, "i32": -2_000_000_000,
        "u64": (1 << 64) - 1, "i64": -(1 << 63), "f32": 0.5, "f64": 0.1, "yes": True, "text": "grüße 🐢",
    }  # fmt: skip
    kinds = ["UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "UINT64", "INT64", "FLOAT32", "FLOAT64", "BOOL"]
    out = gguf.GGUFWriter(path, "llama")
    for (name, value), kind in zip(written.items(), [*kinds, "STRING"], strict=True):
        out.add_key_value(name, value, gguf.GGUFValueType[kind])
    arrays: dict[str, list[Any]] = {
        "ints": [1, -2, 3],
        "floats": [0.5, 1.5],
        "bools": [True, False],
        "texts": ["a", ""],
    }
    for name, values in arrays.items():
        out.add_array(name, values)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.close()
    with open_gguf(path) as file:
        for name, value in (written | arrays).items():
            assert file.metadata[name] == value
            assert type(file.metadata[name]) is type(value)


def test_tensors_as_the_gguf_package_writes_them(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", quant="Q4_1")
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with open_gguf(path) as file:
        assert list(file.tensors) == list(theirs)
        for name, info in file.tensors.items():
            assert info.ggml_type == theirs[name].tensor_type
            assert info.shape == tuple(reversed([int(size) for size in theirs[name].shape]))
            assert bytes(file.tensor_data(name)) == theirs[name].data.tobytes()


def test_other_alignment(tmp_path: Path) -> None:
    path = tmp_path / "aligned.gguf"
    keys = [key("general.alignment", U32, u32(256))]
    values = np.arange(16, dtype=np.float32)
    path.write_bytes(file_of(keys, data=values.tobytes(), alignment=256))
    with open_gguf(path) as file:
        assert file.data_offset == 256
        assert np.frombuffer(file.tensor_data("a"), np.float32).tolist() == values.tolist()


def test_views_outlive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "whole.gguf"
    path.write_bytes(file_of(data=b"x" * 64))
    with open_gguf(path) as file:
        view = file.tensor_data("a")
    assert bytes(view) == b"x" * 64


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    """Cut anywhere: header, each key, each tensor info, padding, data."""
    whole = file_of(
        [key("a", U32, u32(1)), key("b", ARRAY, u32(STRING) + u64(2) + text("xy") + text("z")), key("c", BOOL, b"\1")],
        [tensor("a", [4]), tensor("b", [4, 2], offset=32)],
    )
    path = tmp_path / "cut.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFileError):
            open_gguf(path).close()
    path.write_bytes(whole)
    open_gguf(path).close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    path = write_tiny_gguf(tmp_path_factory.mktemp("flip") / "tiny.gguf", shape=TinyShape(num_layers=1))
    with open_gguf(path) as file:
        return path, path.read_bytes(), file.data_offset


def what_is_wrong(path: Path) -> str | None:
    try:
        with open_gguf(path) as file:
            read_network(file)
            for name in file.tensors:
                file.tensor_data(name)
    except ModelFileError as error:
        return error.message
    return None


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_are_an_error_or_harmless(tiny: tuple[Path, bytes, int], data: st.DataObject) -> None:
    path, raw, data_offset = tiny
    damaged = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, data_offset - 1))] = data.draw(st.integers(0, 255))
    path = path.with_name("flipped.gguf")
    path.write_bytes(damaged)
    message = what_is_wrong(path)
    assert message is None or str(path) in message


def test_a_large_vocabulary_is_read_fast(tmp_path: Path) -> None:
    """262,144 tokens, their types and scores: about 0.1 s; 18 s with the gguf package."""
    num = 262_144
    tokens = b"".join(text(f"tok{i}") for i in range(num))
    keys = [
        key("tokenizer.ggml.tokens", ARRAY, u32(STRING) + u64(num) + tokens),
        key("tokenizer.ggml.merges", ARRAY, u32(STRING) + u64(num) + tokens),
        key("tokenizer.ggml.token_type", ARRAY, u32(5) + u64(num) + bytes(4 * num)),
    ]
    path = tmp_path / "large.gguf"
    path.write_bytes(file_of(keys))
    start = time.perf_counter()
    with open_gguf(path) as file:
        elapsed = time.perf_counter() - start
        found = file.metadata["tokenizer.ggml.tokens"]
    assert isinstance(found, list)
    assert (len(found), found[-1]) == (num, "tok262143")
    assert elapsed < 1.0


# ---- what a model must have ----


def damaged_model(tmp_path: Path, change: Callable[[gguf.GGUFWriter], None], name: str = "llama") -> Path:
    """The metadata of a llama, changed, with an embedding and nothing else."""
    path = tmp_path / "model.gguf"
    out = gguf.GGUFWriter(path, name)
    out.add_block_count(1)
    out.add_context_length(64)
    out.add_embedding_length(8)
    out.add_feed_forward_length(16)
    out.add_head_count(2)
    out.add_head_count_kv(1)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_tensor("token_embd.weight", np.zeros((10, 8), np.float32))
    change(out)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def set_key(name: str, value: Any, kind: str) -> Callable[[gguf.GGUFWriter], None]:
    def change(out: gguf.GGUFWriter) -> None:
        out.kv_data[0].pop(name, None)
        out.add_key_value(name, value, gguf.GGUFValueType[kind])

    return change


WRONG = {
    "heads": (set_key("llama.attention.head_count", 3, "UINT32"), "a divisor of|a multiple of the 3 heads"),
    "no heads": (set_key("llama.attention.head_count", 0, "UINT32"), "head_count is 0. Expected a whole number of 1"),
    "heads as text": (set_key("llama.attention.head_count", "2", "STRING"), "head_count is '2'"),
    "too many layers": (set_key("llama.block_count", 1 << 31, "UINT32"), "block_count is 2147483648. Expected"),
    "eps": (set_key("llama.attention.layer_norm_rms_epsilon", float("nan"), "FLOAT32"), "epsilon is nan"),
    "theta": (set_key("llama.rope.freq_base", -1.0, "FLOAT32"), "freq_base is -1.0. Expected a positive"),
    "rope dim": (set_key("llama.rope.dimension_count", 6, "UINT32"), "dimension_count is 6. .* head's 4"),
    "yarn": (set_key("llama.rope.scaling.type", "yarn", "STRING"), "'yarn'. Expected 'linear' or 'none'"),
    "soft caps": (
        set_key("llama.attn_logit_softcapping", 50.0, "FLOAT32"),
        "attn_logit_softcapping is 50.0. Expected none",
    ),
    "capped head": (set_key("llama.final_logit_softcapping", 30.0, "FLOAT32"), "final_logit_softcapping is 30.0"),
    "window": (
        set_key("llama.attention.sliding_window", 63, "UINT32"),
        "sliding_window is 63. Expected none, 0, or at least the context's 64: .*change the answers. Windows of gemma3",
    ),
    "window as text": (set_key("llama.attention.sliding_window", "all", "STRING"), "sliding_window is 'all'. Expected"),
    "experts": (set_key("llama.expert_count", 8, "UINT32"), "expert_count"),
    "tokens": (set_key("tokenizer.ggml.tokens", ["x"] * 11, "ARRAY"), "10 rows. Expected 11"),
    "incomplete": (lambda out: None, r"no tensor '.*' .*incomplete"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_models_are_refused(tmp_path: Path, case: str) -> None:
    change, message = WRONG[case]
    with open_gguf(damaged_model(tmp_path, change)) as file, pytest.raises(ModelFileError, match=message):
        read_network(file)


@pytest.mark.parametrize(("family", "window"), [("llama", 0), ("llama", 64), ("qwen2", 1000), ("gemma3", 8)])
def test_a_window_that_hides_nothing_or_is_computed_is_taken(tmp_path: Path, family: str, window: int) -> None:
    """Nothing but the tensors is missed then."""
    change = set_key(f"{family}.attention.sliding_window", window, "UINT32")
    path = damaged_model(tmp_path, change, name=family)
    with open_gguf(path) as file, pytest.raises(ModelFileError, match="no tensor '.*' .*incomplete"):
        read_network(file)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_window_of_other_families_is_refused(tmp_path: Path, family: str) -> None:
    path = damaged_model(tmp_path, set_key(f"{family}.attention.sliding_window", 8, "UINT32"), name=family)
    with open_gguf(path) as file, pytest.raises(ModelFileError, match=f"{family}.attention.sliding_window is 8"):
        read_network(file)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    path = damaged_model(tmp_path, lambda out: None, name="bert")
    with open_gguf(path) as file, pytest.raises(ModelFileError, match="architecture is 'bert'. Supported: .*llama"):
        read_network(file)


def test_a_tensor_the_network_lacks_is_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"blk.1.ffn_gate.weight", b"blk.9.ffn_gate.weight"))
    with open_gguf(path) as file, pytest.raises(ModelFileError, match="no tensor 'blk.1.ffn_gate.weight'"):
        read_network(file)
    patched = raw.replace(text("llama.block_count") + u32(U32) + u32(2), text("llama.block_count") + u32(U32) + u32(1))
    assert patched != raw
    path.write_bytes(patched)
    with open_gguf(path) as file, pytest.raises(ModelFileError, match="9 tensors .* 'blk.1.attn_norm.weight' first"):
        read_network(file)


def test_network_of_a_tiny_model(tmp_path: Path) -> None:
    with open_gguf(write_tiny_gguf(tmp_path / "tiny.gguf")) as file:
        network = read_network(file)
    assert (network.num_layers, network.hidden_size, network.num_heads, network.num_kv_heads) == (2, 64, 4, 2)
    assert (network.head_dim, network.rope_dim, network.ffn_size, network.vocab_size) == (16, 16, 96, 259)
    assert network.tied_head
    assert not network.qkv_bias
    assert network.rms_eps == pytest.approx(1e-5)


def test_the_map_is_read_only(tmp_path: Path) -> None:
    with open_gguf(write_tiny_gguf(tmp_path / "tiny.gguf")) as file:
        view = file.tensor_data("output_norm.weight")
        assert view.readonly
        assert isinstance(view.obj, mmap.mmap)
