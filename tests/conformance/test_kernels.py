"""The compute core against `native/reference.py`: each kernel, whole models, the sampler; every instruction set here.

Two kinds of assertion. Against the reference, whose order of additions differs, values agree within a tolerance.
Against itself the core must be exact: a row has the same bits however it is batched, chunked or split over threads.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.tiny import TinyShape, write_tiny_gguf

from hob import native
from hob.engine.base import Batch, Out
from hob.engine.local import NO_LOGPROB
from hob.models import ggml_types as ggml
from hob.models.ggml_types import GGML_TYPES
from hob.models.pack import KIND_OF_TYPE, Packed, ensure_packed, open_packed
from hob.native import _core, layout, reference, reference_sampling
from hob.request import SamplingParams

Floats = NDArray[np.float32]
ISAS = native.available_isas()
QUANTISED = [layout.Kind.Q4M, layout.Kind.Q4S, layout.Kind.Q8S, layout.Kind.Q8M]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def normal(seed: int, *shape: int, scale: float = 1.0) -> Floats:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def random_codes(kind: layout.Kind, n: int, k: int, seed: int) -> layout.Codes:
    """All codes are used, the extremes too: where 8-bit products overflow 16 bits, they do so here."""
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 16 if kind.is_4_bit else 256, (n, k)).astype(np.uint8)
    q[0] = q.dtype.type(0)
    q[-1] = 15 if kind.is_4_bit else 255
    groups = (n, k // layout.GROUP)
    minimum = rng.standard_normal(groups).astype(np.float16) if kind.has_minimum else None
    return layout.Codes(kind, q, (rng.random(groups) * 0.1).astype(np.float16), minimum)


def close(got: Floats, expected: Floats, rtol: float = 1e-3) -> None:
    """Within `rtol` of the row's largest value: sums of many terms have no small ones to be relative to."""
    assert got.shape == expected.shape
    scale = np.abs(expected).max(axis=-1, keepdims=True) + 1e-6
    assert float((np.abs(got - expected) / scale).max(initial=0.0)) < rtol


def mostly_close(got: Floats, expected: Floats) -> None:
    """What quantised models can promise: a last bit of difference can turn an 8-bit code of an activation, a step of
    1 / 127, and all rows that see its row then differ. So: all agree to 5 %, and their mean to 1 %."""
    close(got, expected, 0.05)
    error = np.abs(got - expected).max(axis=-1) / np.abs(expected).max(axis=-1)
    assert float(error.mean()) < 0.01


# ---- kernels ----


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("n", "k"), [(2, 32), (32, 64), (33, 96), (65, 576), (100, 1536)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 13])
def test_quantised_linear(isa: str, kind: layout.Kind, n: int, k: int, rows: int) -> None:
    codes = random_codes(kind, n, k, seed=n + k)
    x = normal(rows, rows, k)
    x[0, :32] = 0.0
    x[-1, 32:64] = np.where(np.arange(len(x[-1, 32:64])) % 2 == 0, 1.0, -1.0)
    close(_core.kernel_linear(isa, kind, layout.encode(codes), n, k, x), reference.linear(x, codes))


@pytest.mark.parametrize(("n", "k"), [(2, 1), (31, 7), (33, 33), (64, 100)])
@pytest.mark.parametrize("rows", [1, 5, 6, 8])
def test_float_linear(isa: str, n: int, k: int, rows: int) -> None:
    weights, x = normal(1, n, k), normal(2, rows, k)
    close(_core.kernel_linear(isa, layout.Kind.F32, layout.encode_floats(weights), n, k, x), x @ weights.T, 1e-5)


@pytest.mark.parametrize("kind", [layout.Kind.F32, *QUANTISED], ids=lambda kind: kind.name)
def test_linear_gives_a_row_the_same_bits_beside_any_others(isa: str, kind: layout.Kind) -> None:
    n, k = 40, 160
    data = (
        layout.encode_floats(normal(1, n, k)) if kind is layout.Kind.F32 else layout.encode(random_codes(kind, n, k, 3))
    )
    x = normal(4, 20, k)
    together = _core.kernel_linear(isa, kind, data, n, k, x)
    for first in range(20):
        for count in (1, 2, 3, 4, 5):
            part = _core.kernel_linear(isa, kind, data, n, k, x[first : first + count])
            assert np.array_equal(part, together[first : first + count])


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite_disturb_no_other_row(isa: str, value: float) -> None:
    """And overflow nothing on the way, which the sanitizer's run sees: model files can hold weights that make them."""
    codes = random_codes(layout.Kind.Q8S, 40, 96, seed=1)
    x = normal(1, 5, 96)
    expected = _core.kernel_linear(isa, layout.Kind.Q8S, layout.encode(codes), 40, 96, x)
    x[2, 32:64:3] = value
    x[2, 63] = 1e30
    got = _core.kernel_linear(isa, layout.Kind.Q8S, layout.encode(codes), 40, 96, x)
    assert np.array_equal(np.delete(got, 2, axis=0), np.delete(expected, 2, axis=0))


@pytest.mark.skipif("amx" not in ISAS, reason="this CPU has no AMX")
@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("k", [32, 192, 224, 576])
def test_linear_tiles_give_the_bits_of_avx512(kind: layout.Kind, k: int) -> None:
    data, x = layout.encode(random_codes(kind, 70, k, seed=k)), normal(5, 101, k)
    expected = _core.kernel_linear("avx512", kind, data, 70, k, x)
    for rows in (1, 12, 16, 17, 19, 28, 29, 32, 33, 48, 49, 65, 101):
        assert np.array_equal(_core.kernel_linear("amx", kind, data, 70, k, x[:rows]), expected[:rows])


@pytest.mark.parametrize("size", [1, 31, 32, 33, 576, 1000])
def test_rms_norm(isa: str, size: int) -> None:
    x, weight = normal(1, 3, size, scale=5.0), normal(2, size)
    close(_core.kernel_rms_norm(isa, x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), 1e-5)


def test_silu(isa: str) -> None:
    gate, up = np.linspace(-100, 100, 32 * 50, dtype=np.float32).reshape(50, 32), normal(1, 50, 32)
    with np.errstate(over="ignore"):
        expected = reference.silu(gate) * up
    np.testing.assert_allclose(_core.kernel_gate_mul(isa, "silu", gate, up), expected, rtol=2e-6, atol=1e-30)


def test_gelu(isa: str) -> None:
    """Against the definition in float64: by its tanh, float32 loses all digits where the result is near 0."""
    gate, up = np.linspace(-40, 40, 32 * 50, dtype=np.float32).reshape(50, 32), normal(1, 50, 32)
    x = gate.astype(np.float64)
    expected = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) * up
    got = _core.kernel_gate_mul(isa, "gelu_tanh", gate, up)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(got, reference.gelu_tanh(gate) * up, rtol=2e-5, atol=1e-6)


def test_an_unknown_activation_is_refused(isa: str) -> None:
    with pytest.raises(ValueError, match="activation is 'relu', expected 'silu' or 'gelu_tanh'"):
        _core.kernel_gate_mul(isa, "relu", normal(1, 1, 32), normal(2, 1, 32))


@pytest.mark.parametrize(("dim", "half"), [(64, 32), (64, 16), (40, 20), (6, 3), (128, 64), (34, 17)])
def test_rope(isa: str, dim: int, half: int) -> None:
    x, angles = normal(1, 5, dim), np.random.default_rng(2).random((5, half)) * 100
    got = _core.kernel_rope(isa, x, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
    np.testing.assert_allclose(got, reference.rope(x[:, None], angles)[:, 0], rtol=1e-6, atol=1e-6)


@dataclass(frozen=True)
class Heads:
    heads: int
    kv_heads: int
    dim: int


SHAPES = [
    Heads(9, 3, 64),
    Heads(4, 4, 32),
    Heads(3, 1, 20),
    Heads(32, 1, 16),
    Heads(2, 2, 128),
    Heads(5, 5, 7),
    Heads(2, 1, 80),
]


def as_stored(x: Floats, kv_type: str) -> Floats:
    """(T, B, D) as the cache gives it back."""
    if kv_type == "f16":
        return x.astype(np.float16).astype(np.float32)
    codes, scale = reference.quantise_heads(x)
    return codes * scale.astype(np.float32)[:, :, None]


TOLERANCE = {"f16": 1e-4, "q8": 1e-3}
"""With 8-bit codes, queries and weights are rounded to 16 bits of their largest: scores of 60 are off by 0.0003."""


@pytest.mark.parametrize("kv_type", ["f16", "q8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 33, 256, 257, 530])
def test_attention(isa: str, shape: Heads, tokens: int, kv_type: str) -> None:
    rows = min(tokens, 11)
    query = normal(1, rows, shape.heads, shape.dim)
    keys, values = normal(2, tokens, shape.kv_heads, shape.dim), normal(3, tokens, shape.kv_heads, shape.dim)
    lengths = np.arange(tokens - rows + 1, tokens + 1, dtype=np.int32)
    got = _core.kernel_attention(isa, query, keys, values, lengths, False, 0, kv_type)
    expected = reference.attention(query, as_stored(keys, kv_type), as_stored(values, kv_type), lengths, 1.0)
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE[kv_type], atol=TOLERANCE[kv_type])
    assert np.array_equal(got, _core.kernel_attention(isa, query, keys, values, lengths, True, 0, kv_type))
    for r in range(rows):
        alone = _core.kernel_attention(isa, query[r : r + 1], keys, values, lengths[r : r + 1], False, 0, kv_type)
        assert np.array_equal(alone[0], got[r])


@pytest.mark.parametrize(("kv_type", "dim"), [("f16", 32), ("q8", 64)])
@pytest.mark.parametrize("tokens", [1, 33, 257, 530, 600])
@pytest.mark.parametrize("window", [1, 20, 64, 256, 300, 1000])
def test_sliding_attention(isa: str, tokens: int, window: int, kv_type: str, dim: int) -> None:
    """A row's bits do not tell which keys before its window were looked at for the sake of another row."""
    rows = min(tokens, 11)
    query, keys, values = normal(1, rows, 4, dim), normal(2, tokens, 2, dim), normal(3, tokens, 2, dim)
    lengths = np.linspace(max(1, tokens - 70), tokens, rows).astype(np.int32)
    got = _core.kernel_attention(isa, query, keys, values, lengths, False, window, kv_type)
    expected = reference.attention(query, as_stored(keys, kv_type), as_stored(values, kv_type), lengths, 1.0, window)
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE[kv_type], atol=TOLERANCE[kv_type])
    assert np.array_equal(got, _core.kernel_attention(isa, query, keys, values, lengths, True, window, kv_type))
    for r in range(rows):
        alone = _core.kernel_attention(isa, query[r : r + 1], keys, values, lengths[r : r + 1], False, window, kv_type)
        assert np.array_equal(alone[0], got[r])


@pytest.mark.skipif("amx" not in ISAS, reason="this CPU has no AMX")
@pytest.mark.parametrize("dim", [64, 128, 192])
@pytest.mark.parametrize("tokens", [1, 20, 100, 256, 300, 700])
def test_attention_over_codes_gives_the_bits_of_avx512(dim: int, tokens: int) -> None:
    """Whole numbers: tiles and vectors may add them in any order."""
    rows = min(tokens, 45)
    query, keys, values = normal(1, rows, 3, dim, scale=3.0), normal(2, tokens, 1, dim), normal(3, tokens, 1, dim)
    keys[tokens // 2] *= 1000.0
    values[tokens // 3], query[0] = 0.0, 0.0
    lengths = np.arange(tokens - rows + 1, tokens + 1, dtype=np.int32)
    for window in (0, 50):
        vectors, tiles = (
            _core.kernel_attention(name, query, keys, values, lengths, False, window, "q8")
            for name in ("avx512", "amx")
        )
        assert np.array_equal(vectors, tiles)
        assert np.isfinite(vectors).all()


@pytest.mark.parametrize("place", ["query", "keys", "values"])
@pytest.mark.parametrize("kv_type", ["f16", "q8"])
def test_attention_passes_on_what_is_not_a_number(isa: str, kv_type: str, place: str) -> None:
    """Codes cannot hold it, so scales do: else the check of finiteness would miss it."""
    query, keys, values = normal(1, 8, 1, 64), normal(2, 40, 1, 64), normal(3, 40, 1, 64)
    {"query": query, "keys": keys, "values": values}[place][5, 0, 33] = np.nan
    got = _core.kernel_attention(isa, query, keys, values, np.full(8, 40, np.int32), False, 0, kv_type)
    assert np.isnan(got[5]).any()


def test_a_head_of_zeros_is_stored_as_zeros(isa: str) -> None:
    query, zeros = normal(1, 2, 1, 64), np.zeros((3, 1, 64), np.float32)
    got = _core.kernel_attention(isa, query, normal(2, 3, 1, 64), zeros, np.full(2, 3, np.int32), False, 0, "q8")
    assert np.array_equal(got, np.zeros_like(query))


def test_attention_survives_large_scores_and_clamps_what_float16_cannot_hold(isa: str) -> None:
    query, keys = np.full((1, 1, 16), 100.0, np.float32), normal(1, 40, 1, 16, scale=50.0)
    values = np.full((40, 1, 16), 1e6, np.float32)
    got = _core.kernel_attention(isa, query, keys, values, np.array([40], np.int32), False)
    np.testing.assert_allclose(got, 65504.0, rtol=1e-6)


# ---- packing ----


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("n", [2, 32, 45])
def test_packing_keeps_the_weights(name: str, n: int) -> None:
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    ggml_type = GGMLQuantizationType[name]
    raw = quants.quantize(normal(1, n, 96), ggml_type)
    kind, data = native.pack_tensor(raw.tobytes(), int(ggml_type), n, 96)
    assert kind == KIND_OF_TYPE[int(ggml_type)]
    if kind == layout.Kind.F32:
        got = layout.decode_floats(data, n, 96)
    else:
        got = layout.decode(layout.Kind(kind), data, n, 96).dequantise()
    np.testing.assert_allclose(got, quants.dequantize(raw, ggml_type), rtol=1e-6, atol=1e-6)


SCALES = {
    ggml.Q2_K: [80, 82],
    ggml.Q3_K: [108],
    ggml.Q4_K: [0, 2],
    ggml.Q5_K: [0, 2],
    ggml.Q6_K: [208],
    ggml.IQ4_XS: [0],
}
"""Bytes of a block at which its float16 scales lie; all others may be anything."""


@pytest.mark.parametrize("ggml_type", SCALES, ids=lambda number: GGML_TYPES[number].name)
def test_packing_blocks_of_256_rounds_little(ggml_type: int) -> None:
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    raw = np.random.default_rng(1).integers(0, 256, (5, 2, GGML_TYPES[ggml_type].block_bytes)).astype(np.uint8)
    for at in SCALES[ggml_type]:
        raw[:, :, at : at + 2] = np.array([0.01], np.float16).view(np.uint8)
    expected = quants.dequantize(raw.reshape(5, -1), GGMLQuantizationType(ggml_type))
    kind, data = native.pack_tensor(raw.tobytes(), ggml_type, 5, 512)
    got = layout.decode(layout.Kind(kind), data, 5, 512).dequantise()
    groups = np.abs(expected.reshape(5, 16, 32)).max(axis=2).repeat(32, axis=1)
    assert float((np.abs(got - expected) / np.maximum(groups, 1e-9)).max()) < 0.005


def test_packing_iq4_nl_keeps_every_bit() -> None:
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    raw = np.random.default_rng(1).integers(0, 256, (33, 3, 18)).astype(np.uint8)
    raw[:, :, :2] = normal(1, 33, 3).astype(np.float16)[:, :, None].view(np.uint8)
    kind, data = native.pack_tensor(raw.tobytes(), ggml.IQ4_NL, 33, 96)
    expected = quants.dequantize(raw.reshape(33, -1), GGMLQuantizationType.IQ4_NL)
    assert np.array_equal(layout.decode(layout.Kind(kind), data, 33, 96).dequantise(), expected)


@pytest.mark.parametrize(
    ("size", "ggml_type", "n", "k", "message"),
    [
        (39, ggml.Q4_1, 2, 32, "39 bytes, expected 40"),
        (40, ggml.Q4_1, 2, 33, "multiple of 32"),
        (40, 99, 2, 32, "type 99 is not supported"),
        (40, ggml.Q4_1, 0, 32, "0 x 32"),
        (20, ggml.Q4_1, 1, 32, "vectors must be"),
        (8, ggml.F32, 2**40, 2**40, "not a matrix"),
    ],
)
def test_packing_refuses(size: int, ggml_type: int, n: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.pack_tensor(bytes(size), ggml_type, n, k)


# ---- whole models ----

MODELS = {
    "F32": ("F32", TinyShape()),
    "Q4_0": ("Q4_0", TinyShape()),
    "Q4_1": ("Q4_1", TinyShape(tied_head=False)),
    "Q5_0": ("Q5_0", TinyShape()),
    "Q5_1": ("Q5_1", TinyShape(hidden_size=128, num_heads=4, num_kv_heads=4)),
    "Q8_0": ("Q8_0", TinyShape(hidden_size=192, num_heads=6, num_kv_heads=2, ffn_size=160)),
    "odd": ("F32", TinyShape(num_layers=3, hidden_size=42, num_heads=3, num_kv_heads=1, ffn_size=75, tied_head=False)),
    "one head": ("F32", TinyShape(num_layers=1, hidden_size=20, num_heads=1, num_kv_heads=1, ffn_size=33)),
}
VOCAB = 259


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Packed]:
    folder = tmp_path_factory.mktemp("kernels")
    made = {}
    for i, (name, (quant, shape)) in enumerate(MODELS.items()):
        made[name] = open_packed(ensure_packed(write_tiny_gguf(folder / f"{i}.gguf", seed=i, quant=quant, shape=shape)))
    return made


class Native:
    """A model of the core with a pool, driven by batches."""

    def __init__(
        self,
        packed: Packed,
        isa: str,
        num_threads: int = 1,
        memory: str = "copy",
        kv_type: str = "f16",
        **changes: Any,
    ) -> None:
        network = dataclasses.asdict(packed.network) | changes
        tensors = [(t.name, t.kind, t.rows, t.cols, t.offset, t.nbytes) for t in packed.tensors]
        self.model = native.Model(str(packed.path), packed.data_offset, network, tensors, isa, num_threads, memory)
        self.pool = native.KvPool(self.model, 80, kv_type)
        self.workspace = native.Workspace(self.model, 300)

    def step(self, batch: Batch) -> bool:
        fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        return native.forward(self.model, self.pool, self.workspace, **fields)[0]

    def logits(self, batch: Batch) -> Floats:
        assert self.step(batch)
        return native.logits(self.workspace)


def tokens(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def make_batch(*sequences: tuple[list[int], int, list[int]], out: Out = Out.LOGITS, num_tops: int = 0) -> Batch:
    """Each sequence: its tokens, the index of the first, its block table. Every row owes `out`."""
    index = np.concatenate([np.arange(start, start + len(ids), dtype=np.int32) for ids, start, _ in sequences])
    return Batch(
        token=np.array([token for ids, _, _ in sequences for token in ids], np.int32),
        position=index,
        index=index,
        out=np.full(len(index), int(out), np.uint8),
        target=np.array([t for ids, _, _ in sequences for t in [*ids[1:], 0]], np.int32),
        row_start=np.cumsum([0] + [len(ids) for ids, _, _ in sequences]).astype(np.int32),
        table_start=np.cumsum([0] + [len(table) for _, _, table in sequences]).astype(np.int32),
        blocks=np.array([block for _, _, table in sequences for block in table], np.int32),
        adapter=np.zeros(len(sequences), np.int32),
        num_tops=num_tops,
    )


@pytest.mark.parametrize(("num_threads", "num_pieces"), [(2, 7), (2, 64), (8, 40)])
def test_late_threads_hold_up_nothing_and_change_nothing(num_threads: int, num_pieces: int) -> None:
    expected, none = _core.pool_trial(1, 300, num_pieces, 0)
    assert none == 0
    got, repeated = _core.pool_trial(num_threads, 300, num_pieces, 12)
    assert got == expected
    assert repeated > 0


@pytest.mark.parametrize("num_threads", [2, 5])
def test_no_thread_is_left_asleep(num_threads: int) -> None:
    """One that was, was missing for as long as the model was there, and the model could not be closed."""
    assert _core.pool_attendance(num_threads, 2000) == num_threads


def test_a_caller_without_a_core_is_called_over() -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) > 1:
        assert _core.pool_calls(len(allowed), 20) > 0
    assert os.sched_getaffinity(0) == allowed
    assert _core.pool_calls(len(allowed) + 1, 20) == 0, "threads that keep to no core have none to give"


def test_threads_keep_to_the_cores_that_the_caller_is_not_on(files: dict[str, Packed]) -> None:
    allowed, others = os.sched_getaffinity(0), set(os.listdir("/proc/self/task"))
    core = Native(files["Q4_1"], "portable", len(allowed))
    threads = [int(thread) for thread in set(os.listdir("/proc/self/task")) - others]
    assert len(threads) == len(allowed) - 1
    try:
        for place in [*allowed, *allowed]:
            os.sched_setaffinity(0, {place})
            core.step(make_batch((tokens(3, place), 0, [1])))
            kept = [os.sched_getaffinity(thread) for thread in threads]
            assert sorted(kept, key=min) == [{other} for other in sorted(allowed - {place})]
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize("name", ["Q4_1", "odd", "F32"])
def test_more_threads_than_cores_give_the_same_bits(files: dict[str, Packed], isa: str, name: str) -> None:
    alone, crowd = (Native(files[name], isa, num_threads) for num_threads in (1, 12))
    for step in range(12):
        work = make_batch((tokens(3, step), 3 * step, [1, 2, 3]), (tokens(1, 99 + step), step, [4]))
        assert np.array_equal(alone.logits(work), crowd.logits(work))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_model_agrees_with_the_reference(files: dict[str, Packed], isa: str, name: str, num_threads: int) -> None:
    core = Native(files[name], isa, num_threads)
    expected = reference.Model(files[name])
    agree = close if MODELS[name][0] == "F32" else mostly_close
    pool = reference.KvPool(files[name].network, 80)
    for work in (
        make_batch((tokens(70, 1), 0, [3, 1, 4, 10, 5]), (tokens(5, 2), 0, [2])),  # many rows
        make_batch((tokens(10, 3), 70, [3, 1, 4, 10, 5]), (tokens(10, 4), 5, [2])),  # few rows
    ):
        agree(core.logits(work), expected.forward(pool, work).logits)
    scored = make_batch((tokens(60, 5), 0, [20, 21, 22, 23]), out=Out.SCORE, num_tops=4)
    assert core.step(scored)
    want = expected.forward(pool, scored)
    logprob, top_ids, top_logprobs = native.scores(core.workspace)
    for got, expected_ in ((logprob[:, None], want.logprob[:, None]), (top_logprobs, want.top_logprobs)):
        error = np.abs(got - expected_).max(axis=-1)
        # amx: queries of 16 bits turn a code over in most rows of these random weights
        assert float(np.quantile(error, 0.25)) < (0.05 if isa == "amx" else 1e-3)
        assert float(error.max()) < (1e-3 if agree is close else 0.5)
    assert (top_ids[:, 0] == want.top_ids[:, 0]).mean() > 0.95
    for length in (30, 40):  # few rows and many
        hidden = make_batch((tokens(length, 6), 0, [30, 31, 32]), out=Out.HIDDEN)
        hidden.layers = np.arange(files[name].network.num_layers + 1, dtype=np.int32)
        assert core.step(hidden)
        want_hidden = expected.forward(pool, hidden).hidden
        got = native.hidden(core.workspace).reshape(want_hidden.shape)
        for layer in hidden.layers:
            agree(got[:, layer], want_hidden[:, layer])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kv_type", ["f16", "q8"])
def test_density_is_the_attention_of_the_measured_row(
    files: dict[str, Packed], isa: str, name: str, kv_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, table = files[name], [3, 1, 4, 10, 5]
    net, expected = packed.network, np.zeros(len(table))
    attention = reference.attention

    def spy(query: Floats, keys: Floats, values: Floats, lengths: Any, scale: float, window: int = 0) -> Floats:
        for head, row in enumerate(query[-1]):
            scores = scale * keys[: lengths[-1], head // (net.num_heads // net.num_kv_heads)] @ row
            scores[: max(lengths[-1] - window, 0) if window else 0] = -np.inf
            weights = np.exp(scores - scores.max())
            sums = np.add.reduceat(weights / weights.sum(), range(0, lengths[-1], 16))
            expected[: len(sums)] += sums / (net.num_heads * net.num_layers)
        return attention(query, keys, values, lengths, scale, window)

    core, model = Native(packed, isa, 2, kv_type=kv_type), reference.Model(packed)
    pool = reference.KvPool(net, 80, np.float16 if kv_type == "f16" else np.int8)
    monkeypatch.setattr(reference, "attention", spy)
    for start, length in ((0, 70), (70, 3)):  # many rows, then few
        work = make_batch((tokens(length, start), start, table))
        work.measured = length - 1
        expected[:] = 0
        model.forward(pool, work)
        assert core.step(work)
        mass = native.density(core.pool, core.workspace, np.array(table, np.int32))
        assert mass.sum() == pytest.approx(1, abs=1e-4)
        assert np.abs(mass - expected).max() < 0.02
    assert expected.max() - expected.min() > 0.05, "the rows differ enough to tell"


def test_density_is_of_a_row_that_was_measured(files: dict[str, Packed]) -> None:
    core, work = Native(files["odd"], ISAS[0]), make_batch((tokens(20, 1), 0, [3, 1]))
    work.measured = 20
    with pytest.raises(ValueError, match="measured is 20, expected -1 or a row"):
        core.step(work)
    work.measured = -1
    assert core.step(work)
    with pytest.raises(ValueError, match="no row of the last step was measured"):
        native.density(core.pool, core.workspace, np.array([3, 1], np.int32))
    work.measured = 19
    assert core.step(work)
    with pytest.raises(ValueError, match="sees 20 keys, the table has 1 blocks"):
        native.density(core.pool, core.workspace, np.array([3], np.int32))
    with pytest.raises(ValueError, match="block 99"):
        native.density(core.pool, core.workspace, np.array([3, 99], np.int32))


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "odd"])
def test_rows_have_the_same_bits_in_any_company(files: dict[str, Packed], isa: str, name: str) -> None:
    ids, table = tokens(290, 1), list(range(19))
    cores = [Native(files[name], isa, 1), Native(files[name], isa, 2), Native(files[name], isa, 3, "map")]
    whole = cores[0].logits(make_batch((ids, 0, table)))
    for core in cores:
        assert np.array_equal(whole, core.logits(make_batch((ids, 0, table))))
        company = [(tokens(n, n), 0, [60 + i]) for i, n in enumerate((3, 16, 1))]
        for chunk in (1, 23, 24, 25, 100):
            for start in range(200 if chunk == 1 else 0, 290, chunk):
                part = core.logits(make_batch(company[0], (ids[start : start + chunk], start, table), *company[1:]))
                assert np.array_equal(part[3:-17], whole[start : start + chunk])


def test_rows_that_owe_nothing_change_nothing(files: dict[str, Packed], isa: str) -> None:
    core, ids = Native(files["Q4_1"], isa, 2), tokens(280, 1)
    for length in (9, 280):
        work = make_batch((ids[:length], 0, list(range(18))))
        whole = core.logits(work)
        work.out[:] = 0
        work.out[[4, length - 1]] = Out.LOGITS
        assert np.array_equal(core.logits(work), whole[[4, length - 1]])


def test_a_step_can_be_stopped_and_done_again(files: dict[str, Packed]) -> None:
    core = Native(files["Q8_0"], ISAS[0])
    work = make_batch((tokens(300, 1), 0, list(range(19))))
    whole = core.logits(work)
    is_over = threading.Event()

    def keep_asking() -> None:
        while not is_over.is_set():
            native.request_stop(core.workspace)

    asking = threading.Thread(target=keep_asking)
    asking.start()
    done = [core.step(work) for _ in range(5)]
    is_over.set()
    asking.join()
    assert not all(done)
    assert np.array_equal(core.logits(work), whole)


def test_a_value_that_is_not_finite_is_named_with_its_layer(files: dict[str, Packed], isa: str) -> None:
    core = Native(files["F32"], isa)
    ids = tokens(20, 1)
    core.step(make_batch((ids, 0, [0, 1])))
    block = np.frombuffer(core.pool.read(0), np.float16).copy()
    block[len(block) // 2 :] = np.nan  # the keys and values of the second of two layers
    core.pool.write(0, block.tobytes())
    with pytest.raises(RuntimeError, match="after the attention of layer 1"):
        core.step(make_batch((ids[:1], 20, [0, 1])))


def change(name: str, at: int, value: int) -> Any:
    def apply(work: Batch) -> None:
        getattr(work, name)[at] = value

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change("token", 1, VOCAB), "row 1: token 259 is not in the vocabulary of 259"),
        (change("token", 0, -1), "token -1"),
        (change("index", 3, 48), "row 3: index 48 is outside its block table of 3 blocks"),
        (change("index", 2, 0), "row 2: index 0 does not ascend"),
        (change("position", 0, -5), "position is -5"),
        (change("blocks", 0, 80), "block 80 is not in the pool of 80"),
        (change("blocks", 0, -1), "block -1"),
        (change("out", 0, 9), "out is 9"),
        (change("row_start", 1, 3), "row_start ends at 3, expected 4"),
        (change("table_start", 1, 9), "table_start ends at 9, expected at most 3"),
        (change("adapter", 0, 1), "adapter 1 is not loaded"),
    ],
)
def test_wrong_batches_are_refused(files: dict[str, Packed], spoil: Any, message: str) -> None:
    core = Native(files["F32"], ISAS[-1])
    work = make_batch((tokens(4, 1), 0, [0, 1, 2]))
    work.position = work.index.copy()
    spoil(work)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        core.step(work)


def test_shapes_of_arrays_are_checked(files: dict[str, Packed]) -> None:
    core = Native(files["F32"], ISAS[-1])
    work = make_batch((tokens(4, 1), 0, [0]))
    work.target = work.target[:2]
    with pytest.raises(ValueError, match="target has 2 values, expected 4"):
        core.step(work)
    with pytest.raises(ValueError, match="301 rows, expected 1..300"):
        core.step(make_batch((tokens(301, 1), 0, list(range(20)))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn_size": 128}, r"ffn_gate.weight has shape 96 x 64, the network needs 128 x 64"),
        ({"num_layers": 3}, "blk.2.attn_norm.weight is missing"),
        ({"num_heads": 3}, "multiple of num_kv_heads"),
        ({"qk_norm": True}, "blk.0.attn_q_norm.weight is missing"),
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"logit_softcap": 30.0}, "logit_softcap is not supported"),
        ({"sliding_window": 8}, "sliding_window and sliding_layers go together"),
        ({"sliding_window": 8, "sliding_layers": [True]}, "1 sliding_layers, expected 2"),
        ({"rope_dim": 7}, "rope_dim is 7"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_networks_that_do_not_fit_the_file_are_refused(
    files: dict[str, Packed], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Native(files["F32"], ISAS[-1], **changes)


def test_a_truncated_file_is_refused(files: dict[str, Packed], tmp_path: Path) -> None:
    cut = tmp_path / "cut.hobpack"
    cut.write_bytes(Path(files["F32"].path).read_bytes()[:-100])
    with pytest.raises(ValueError, match="of a data part of"):
        Native(dataclasses.replace(files["F32"], path=cut), ISAS[-1])


def test_an_instruction_set_that_is_not_there_is_refused(files: dict[str, Packed]) -> None:
    with pytest.raises(ValueError, match="isa 'sse9' is not available here. Available: portable"):
        Native(files["F32"], "sse9")


def test_blocks_are_copied_slot_by_slot(files: dict[str, Packed]) -> None:
    core = Native(files["F32"], ISAS[-1])
    core.step(make_batch((tokens(16, 1), 0, [0])))
    core.pool.copy(0, 1, 5)
    net = files["F32"].network
    got, source = (
        np.frombuffer(core.pool.read(i), np.uint16).reshape(net.num_layers, 2, net.num_kv_heads, -1) for i in (1, 0)
    )
    keys, source_keys = (b[:, 0].reshape(net.num_layers, net.num_kv_heads, net.head_dim, 16) for b in (got, source))
    values, source_values = (b[:, 1].reshape(net.num_layers, net.num_kv_heads, 16, net.head_dim) for b in (got, source))
    assert np.array_equal(keys[..., :5], source_keys[..., :5])
    assert np.array_equal(values[:, :, :5], source_values[:, :, :5])
    assert not keys[..., 5:].any()
    assert not values[:, :, 5:].any()
    with pytest.raises(ValueError, match="block 80"):
        core.pool.read(80)
    with pytest.raises(ValueError, match="3 bytes, expected"):
        core.pool.write(0, b"abc")


# ---- sampling ----


def draw(
    core: Native,
    params: SamplingParams,
    rows: int = 1,
    position: int = 0,
    sample_index: int = 0,
    history: list[int] | None = None,
    num_generated: int = 0,
    mask: NDArray[np.uint8] | None = None,
    *,
    has_logprob: bool = True,
) -> tuple[NDArray[np.int32], Floats, list[list[int]]]:
    """The same parameters for each row; row i draws at position + i."""

    def full(value: float, dtype: Any) -> NDArray[Any]:
        return np.full(rows, value, dtype)

    ids = history or []
    ids_out, logprobs, starts, top_ids, _ = native.sample(
        core.workspace,
        temperature=full(params.temperature, np.float32),
        top_k=full(params.top_k, np.int32),
        top_p=full(params.top_p, np.float32),
        min_p=full(params.min_p, np.float32),
        repetition=full(params.repetition_penalty, np.float32),
        presence=full(params.presence_penalty, np.float32),
        frequency=full(params.frequency_penalty, np.float32),
        seed=full(params.seed, np.uint64),
        sample_index=full(sample_index, np.int32),
        position=np.arange(position, position + rows, dtype=np.int32),
        num_logprobs=full((params.logprobs or 0) if has_logprob else NO_LOGPROB, np.int32),
        history=np.array(ids * rows, np.int32),
        history_start=(np.arange(rows + 1) * len(ids)).astype(np.int32),
        num_generated=full(num_generated, np.int32),
        bias_ids=np.array([*params.logit_bias] * rows, np.int32),
        bias_values=np.array([*params.logit_bias.values()] * rows, np.float32),
        bias_start=(np.arange(rows + 1) * len(params.logit_bias)).astype(np.int32),
        mask=mask,
    )
    return ids_out, logprobs, [top_ids[a:b].tolist() for a, b in itertools.pairwise(starts)]


PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.3, seed=2**64 - 1),
    SamplingParams(temperature=1.5, top_k=1),
    SamplingParams(temperature=1.5, top_k=7),
    SamplingParams(temperature=1.0, top_k=100, seed=4),
    SamplingParams(temperature=1.0, top_k=500),
    SamplingParams(temperature=1.0, top_p=0.5),
    SamplingParams(temperature=3.0, top_p=0.99),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=2.0, min_p=0.02, top_p=0.8, top_k=40, seed=5),
    SamplingParams(temperature=0.7, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, logit_bias={5: 4.0, 9: -100.0}),
]


@pytest.mark.parametrize("params", PARAMS, ids=range(len(PARAMS)))
def test_the_sampler_agrees_with_the_reference(files: dict[str, Packed], isa: str, params: SamplingParams) -> None:
    core = Native(files["Q8_0"], isa, 2)
    logits = core.logits(make_batch((tokens(250, 1), 0, list(range(16)))))
    history = [*tokens(40, 9), 1, 1, 2]
    ids, logprobs, _ = draw(core, params, rows=250, position=3, sample_index=2, history=history, num_generated=10)
    expected = [reference_sampling.sample(row, params, 2, 3 + i, history, 10) for i, row in enumerate(logits)]
    assert (ids == expected).mean() > 0.99  # a number on the edge between two tokens may fall to either side
    np.testing.assert_allclose(logprobs, reference.log_softmax(logits)[np.arange(250), ids], rtol=1e-4, atol=1e-4)
    bare, zeros, _ = draw(core, params, 250, 3, 2, history, 10, has_logprob=False)
    assert np.array_equal(bare, ids)
    assert not zeros.any()


@pytest.mark.parametrize("has_logprob", [True, False])
def test_a_logit_that_is_no_number_is_noticed(
    files: dict[str, Packed], tmp_path: Path, isa: str, has_logprob: bool
) -> None:
    packed, data = files["F32"], bytearray(files["F32"].path.read_bytes())
    head = packed.tensor("token_embd.weight" if packed.network.tied_head else "output.weight")
    at = packed.data_offset + head.offset
    data[at : at + 4] = np.float32(np.nan).tobytes()  # of token 0
    path = tmp_path / "broken.packed"
    path.write_bytes(data)
    core = Native(dataclasses.replace(packed, path=path), isa)
    core.step(make_batch(([5, 6, 7], 0, [0])))
    for params in (PARAMS[0], PARAMS[1], PARAMS[4]):
        with pytest.raises(RuntimeError, match="no token can be chosen: the logits are not finite"):
            draw(core, params, rows=3, has_logprob=has_logprob)


@pytest.mark.parametrize("params", PARAMS, ids=range(len(PARAMS)))
def test_the_masked_sampler_agrees_with_the_reference(
    files: dict[str, Packed], isa: str, params: SamplingParams
) -> None:
    """Rows that allow few tokens, half of them, all, and all but the last; bits past the vocabulary say nothing."""
    core = Native(files["Q8_0"], isa, 2)
    logits = core.logits(make_batch((tokens(120, 1), 0, list(range(8)))))
    vocab = logits.shape[1]
    rng = np.random.default_rng(5)
    bits = rng.random((120, 36 * 8)) < np.resize([0.02, 0.5, 1.0, 1.0], 120)[:, None]
    bits[3::4, vocab - 1] = False
    bits[:, 40] = True  # none is empty
    masks = np.packbits(bits, axis=1, bitorder="little")
    ids, _, _ = draw(core, params, rows=120, position=3, mask=masks)
    assert bits[np.arange(120), ids].all()
    expected = [reference_sampling.sample(row, params, 0, 3 + i, [], 0, masks[i]) for i, row in enumerate(logits)]
    assert (ids == expected).mean() > 0.98
    open_rows, _, _ = draw(core, params, rows=120, position=3)
    assert ids[2::4].tolist() == open_rows[2::4].tolist()


def test_equal_logits_go_to_the_lowest_id(files: dict[str, Packed], isa: str) -> None:
    core = Native(files["F32"], isa)
    core.step(make_batch((tokens(1, 1), 0, [0])))
    top = native.logits(core.workspace).max() + 10
    flat = {i: float(top - value) for i, value in enumerate(native.logits(core.workspace)[0]) if i in (17, 40, 200)}
    mask = np.zeros(33, np.uint8)
    for i in flat:
        mask[i // 8] |= 1 << i % 8
    equal = SamplingParams(temperature=0.0, logit_bias=dict.fromkeys(flat, 1e9))  # float32 has no room for the rest
    assert draw(core, equal, mask=mask)[0].tolist() == [17]


def test_a_mask_forbids(files: dict[str, Packed], isa: str) -> None:
    core = Native(files["F32"], isa)
    core.step(make_batch((tokens(2, 1), 0, [0])))
    mask = np.zeros((2, 33), np.uint8)
    mask[:, 4] = 0b100  # token 34 only
    for params in PARAMS:
        if 9 not in params.logit_bias:
            assert draw(core, params, rows=2, mask=mask)[0].tolist() == [34, 34]
    with pytest.raises(RuntimeError, match="no token can be chosen"):
        draw(core, PARAMS[0], rows=2, mask=np.zeros((2, 33), np.uint8))


def test_likeliest_tokens_come_in_order(files: dict[str, Packed], isa: str) -> None:
    core = Native(files["F32"], isa)
    logits = core.logits(make_batch((tokens(9, 1), 0, [0])))
    for k in (1, 3, 20, 100):
        tops = draw(core, SamplingParams(temperature=0.0, logprobs=k), rows=9)[2]
        assert tops == np.argsort(-logits, axis=1, kind="stable")[:, :k].tolist()


def test_draws_follow_the_distribution(files: dict[str, Packed], isa: str) -> None:
    core = Native(files["F32"], isa, 2)
    logits = core.logits(make_batch((tokens(1, 1), 0, [0])))[0]
    params = SamplingParams(temperature=1.2, top_k=12, seed=11)
    kept = np.argsort(-logits)[:12]
    weights = np.exp(logits[kept].astype(np.float64) / 1.2)
    drawn = [int(draw(core, params, position=i)[0][0]) for i in range(6000)]
    counts = np.array([drawn.count(int(token)) for token in kept])
    assert counts.sum() == 6000
    expected = weights / weights.sum() * 6000
    chi_square = float(((counts - expected) ** 2 / expected)[expected > 5].sum())
    assert chi_square < 40  # 11 degrees of freedom: exceeded by chance in 4 of 100,000 runs; the seed is fixed


def test_the_random_number_is_the_references() -> None:
    for seed, sample_index, position in ((0, 0, 0), (2**64 - 1, 3, 100), (12345, 0, 2**31 - 1)):
        got = native.uniform(seed, sample_index, position)
        assert got == reference_sampling.uniform(seed, sample_index, position)
        assert 0 <= got < 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(temperature=-1.0), "temperature is -1"),
        (SamplingParams(temperature=float("nan")), "temperature is nan"),
        (SamplingParams(top_k=-1), "top_k is -1"),
        (SamplingParams(min_p=1.5), "min_p is 1.5"),
        (SamplingParams(repetition_penalty=0.0), "repetition_penalty is 0"),
        (SamplingParams(logit_bias={VOCAB: 1.0}), "not in the vocabulary of 259"),
        (SamplingParams(logprobs=1000), "num_logprobs is 1000"),
    ],
)
def test_wrong_draws_are_refused(files: dict[str, Packed], params: SamplingParams, message: str) -> None:
    core = Native(files["F32"], ISAS[-1])
    core.step(make_batch((tokens(1, 1), 0, [0])))
    with pytest.raises(ValueError, match=message):
        draw(core, params)
    with pytest.raises(ValueError, match="2 draws for a step with 1 rows of logits"):
        draw(core, SamplingParams(), rows=2)
