"""The reference itself, against definitions written out one element at a time. What holds here holds for the compute
core too, through `test_kernels.py`."""

from __future__ import annotations

import cmath
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.model.runners import batch_of

from hob.engine.base import BLOCK_SIZE, Out
from hob.models.network import Network
from hob.native import layout, reference, reference_sampling
from hob.native.layout import Codes, Kind
from hob.request import SamplingParams

Floats = NDArray[np.float32]
QUANTISED = [kind for kind in Kind if kind is not Kind.F32]


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_codes(kind: Kind, rows: int, cols: int, seed: int = 0) -> Codes:
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 16 if kind.is_4_bit else 256, (rows, cols)).astype(np.uint8)
    scales = rng.standard_normal((2, rows, cols // 32)).astype(np.float16)
    return Codes(kind, q, scales[0], scales[1] if kind.has_minimum else None)


# ---- layout ----


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("rows", [1, 32, 70])
def test_each_code_and_scale_lies_where_the_layout_says(kind: Kind, rows: int) -> None:
    cols = 96
    codes = random_codes(kind, rows, cols)
    packed = layout.encode(codes)
    assert len(packed) == layout.packed_nbytes(kind, rows, cols)
    code_bytes = 512 if kind.is_4_bit else 1024
    for n in range(rows):
        for k in range(cols):
            column, j, i = n % 32, k % 32 // 4, k % 4
            group = (n // 32 * (cols // 32) + k // 32) * kind.group_bytes
            if kind.is_4_bit:
                found = packed[group + 64 * j + column % 16 * 4 + i] >> (4 if column >= 16 else 0) & 15
            else:
                found = packed[group + 128 * j + 64 * (column // 16) + column % 16 * 4 + i]
            assert found == codes.q[n, k]
            for start, scales in ((code_bytes, codes.d), (code_bytes + 64, codes.m)):
                if scales is not None:
                    at = group + start + 2 * column
                    assert np.frombuffer(packed[at : at + 2], np.float16)[0] == scales[n, k // 32]


@pytest.mark.parametrize("kind", QUANTISED)
def test_decode_undoes_encode(kind: Kind) -> None:
    codes = random_codes(kind, 70, 96)
    found = layout.decode(kind, layout.encode(codes), 70, 96)
    np.testing.assert_array_equal(found.q, codes.q)
    np.testing.assert_array_equal(found.d, codes.d)
    if codes.m is not None:
        assert found.m is not None
        np.testing.assert_array_equal(found.m, codes.m)


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_weight_is_what_its_kind_says(kind: Kind) -> None:
    codes = random_codes(kind, 3, 64)
    weights = codes.dequantise()
    for n, k in ((0, 0), (1, 31), (2, 63), (2, 32)):
        q, d = int(codes.q[n, k]), float(codes.d[n, k // 32])
        m = 0.0 if codes.m is None else float(codes.m[n, k // 32])
        expected = {
            Kind.Q4M: d * q + m,
            Kind.Q8M: d * q + m,
            Kind.Q4S: d * (q - 8),
            Kind.Q8S: d * (q - 128),
        }[kind]
        assert weights[n, k] == pytest.approx(expected, rel=1e-5)


def test_floats_lie_in_panels_and_vectors_as_they_are() -> None:
    weights = normal(33, 5)
    packed = np.frombuffer(layout.encode_floats(weights), np.float32)
    assert packed[(0 * 5 + 3) * 32 + 7] == weights[7, 3]
    assert packed[(1 * 5 + 4) * 32 + 0] == weights[32, 4]
    assert packed[(1 * 5 + 4) * 32 + 1] == 0
    np.testing.assert_array_equal(layout.decode_floats(packed.tobytes(), 33, 5), weights)
    assert layout.encode_floats(weights[0]) == weights[0].tobytes()


# ---- functions ----


def test_activations_are_rounded_to_the_nearest_of_255_steps() -> None:
    x = normal(3, 64)
    x[1, 32:] = 0
    q, s = reference.quantise_activations(x)
    assert np.abs(q).max() == 127
    assert s[1, 1] == 0
    assert not q[1, 32:].any()
    for r in range(3):
        for k in range(64):
            step = np.abs(x[r, k // 32 * 32 : k // 32 * 32 + 32]).max() / 127
            assert s[r, k // 32] == pytest.approx(step, rel=1e-6)
            assert abs(q[r, k] * step - x[r, k]) <= step * 0.5001


@pytest.mark.parametrize("kind", QUANTISED)
def test_linear_is_the_product_of_what_the_codes_mean(kind: Kind) -> None:
    x, codes = normal(3, 96, seed=1), random_codes(kind, 5, 96)
    q, s = reference.quantise_activations(x)
    meant = (q.reshape(3, 3, 32) * s[:, :, None].astype(np.float64)).reshape(3, 96)
    expected = meant @ codes.dequantise().astype(np.float64).T
    np.testing.assert_allclose(reference.linear(x, codes), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_rms_norm() -> None:
    x, weight = normal(2, 7), normal(7, seed=1)
    found = reference.rms_norm(x, weight, 0.01)
    for r in range(2):
        rms = math.sqrt(sum(float(v) ** 2 for v in x[r]) / 7 + 0.01)
        for i in range(7):
            assert found[r, i] == pytest.approx(x[r, i] / rms * weight[i], rel=1e-5)


def network(**changes: object) -> Network:
    sizes = {"num_layers": 1, "hidden_size": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "ffn_size": 8}
    return Network(**{"architecture": "llama", "vocab_size": 10, "context_length": 99, **sizes, **changes})  # type: ignore[arg-type]


def test_rope_turns_pairs_as_complex_numbers() -> None:
    net = network(rope_dim=6, rope_theta=100.0, rope_scale=2.0, rope_factors=[1.0, 4.0, 8.0])
    x, position = normal(3, 2, 8), np.array([0, 5, 11], np.int32)
    found = reference.rope(x, reference.rope_angles(net, position))
    for r, p in enumerate(position):
        for i, factor in enumerate(net.rope_factors):
            angle = p / 2.0 * 100.0 ** (-2 * i / 6) / factor
            turned = complex(x[r, 1, i], x[r, 1, i + 3]) * cmath.exp(1j * angle)
            assert found[r, 1, i] == pytest.approx(turned.real, abs=1e-6)
            assert found[r, 1, i + 3] == pytest.approx(turned.imag, abs=1e-6)
    np.testing.assert_array_equal(found[..., 6:], x[..., 6:])


def test_attention_weighs_what_a_row_sees() -> None:
    query, keys, values = normal(2, 4, 8), normal(9, 2, 8, seed=1), normal(9, 2, 8, seed=2)
    lengths = np.array([3, 9], np.int32)
    found = reference.attention(query, keys, values, lengths, scale=0.5)
    for r in range(2):
        for head in range(4):
            seen = range(lengths[r])
            weights = [math.exp(0.5 * float(query[r, head] @ keys[t, head // 2])) for t in seen]
            expected = sum(w * values[t, head // 2] for w, t in zip(weights, seen, strict=True)) / sum(weights)
            np.testing.assert_allclose(found[r, head], expected, rtol=1e-4, atol=1e-5)


def test_a_pool_of_codes_rounds_each_head_by_itself() -> None:
    pool, slots = reference.KvPool(network(num_layers=2), 3, np.int8), np.array([5, 2 * BLOCK_SIZE + 1])
    keys, values = normal(2, 2, 8), normal(2, 2, 8, seed=1)
    keys[0, 1] *= 1000
    values[1, 0] = 0
    pool.write(1, slots, keys, values)
    for found, given in zip(pool.read(1, slots), (keys, values), strict=True):
        steps = np.abs(given).max(axis=2, keepdims=True) / 127
        assert (np.abs(found - given) <= 0.51 * steps).all()
    assert np.abs(pool.keys[1, 0, 5]).max(axis=1).tolist() == [127, 127]


def test_the_pool_keeps_slots_apart() -> None:
    pool = reference.KvPool(network(num_layers=2), num_blocks=3)
    slots = np.array([5, 2 * BLOCK_SIZE + 1])
    keys, values = normal(2, 2, 8), normal(2, 2, 8, seed=1)
    pool.write(1, slots, keys, values)
    found_keys, found_values = pool.read(1, slots[::-1])
    np.testing.assert_array_equal(found_keys, keys.astype(np.float16)[::-1])
    np.testing.assert_array_equal(found_values, values.astype(np.float16)[::-1])
    assert np.count_nonzero(pool.keys) == keys.size
    assert not pool.keys[0].any()
    np.testing.assert_array_equal(pool.values[1, 2, 1], values[1].astype(np.float16))


def test_log_softmax() -> None:
    logits = np.array([[1.0, 2.0, 1000.0], [0.0, 0.0, 0.0]], np.float32)
    np.testing.assert_allclose(reference.log_softmax(logits)[1], [math.log(1 / 3)] * 3, rtol=1e-6)
    np.testing.assert_allclose(reference.log_softmax(logits)[0], [-999, -998, 0])


def test_batches_of_the_tests_are_right() -> None:
    batch = batch_of([4, 5, 6], start=17, out=Out.SCORE)
    assert batch.index.tolist() == [17, 18, 19]
    assert batch.target.tolist() == [5, 6, 0]


# ---- sampling ----

LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32))


def frequencies(params: SamplingParams, token_ids: list[int] | None = None, num_generated: int = 0) -> list[float]:
    """How often each token is drawn over 4,000 positions."""
    drawn = [
        reference_sampling.sample(LOGITS, params, 0, position, token_ids or [], num_generated)
        for position in range(4000)
    ]
    return [drawn.count(token) / len(drawn) for token in range(len(LOGITS))]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), [0.4, 0.3, 0.15, 0.1, 0.05]),
        (SamplingParams(temperature=0.0), [1, 0, 0, 0, 0]),
        (SamplingParams(temperature=0.5), [0.561, 0.316, 0.079, 0.035, 0.009]),
        (SamplingParams(top_k=2), [4 / 7, 3 / 7, 0, 0, 0]),
        (SamplingParams(top_p=0.6), [4 / 7, 3 / 7, 0, 0, 0]),
        (SamplingParams(top_p=0.75), [0.471, 0.353, 0.176, 0, 0]),
        (SamplingParams(min_p=0.3), [0.471, 0.353, 0.176, 0, 0]),
        (SamplingParams(top_k=3, min_p=0.5, top_p=0.5), [1, 0, 0, 0, 0]),
        (SamplingParams(logit_bias={0: -100.0, 4: 100.0}), [0, 0, 0, 0, 1]),
    ],
)
def test_filters_leave_the_right_shares(params: SamplingParams, expected: list[float]) -> None:
    assert frequencies(params) == pytest.approx(expected, abs=0.03)


def test_penalties_count_prompt_and_output_as_they_should() -> None:
    history = [3, 0, 0, 1]  # 3 and 0 are prompt, 0 and 1 are output
    row = np.array([2.0, 2.0, 2.0, -2.0, 2.0], np.float32)
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5)
    reference_sampling.adjust(row, params, history, num_generated=2)
    assert row.tolist() == [0.25, 0.25, 2.0, -4.0, 2.0]


def test_a_draw_depends_on_seed_sample_and_position_alone() -> None:
    draws = {(s, n, p): reference_sampling.uniform(s, n, p) for s in range(8) for n in range(8) for p in range(64)}
    assert len(set(draws.values())) == len(draws)
    assert all(0 <= value < 1 for value in draws.values())
    assert np.mean(list(draws.values())) == pytest.approx(0.5, abs=0.02)
    assert draws[3, 1, 4] == reference_sampling.uniform(3, 1, 4)
    neighbours = [(draws[s, 0, p], draws[s, 0, p + 1]) for s in range(8) for p in range(63)]
    assert abs(np.corrcoef(np.array(neighbours).T)[0, 1]) < 0.15
