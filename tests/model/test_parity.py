"""Seeded random checkpoints: our forward pass against `transformers` in float32, and C++ against the reference."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hob.engine.base import Out
from hob.models.pack import ensure_packed
from hob.native.reference import log_softmax
from tests.model.checkpoints import Shape, logits_of, make_checkpoint, write_gguf
from tests.model.runners import IMPLEMENTATIONS, ReferenceRunner, batch_of, open_runner, worst_difference

TOLERANCE = 1e-3
"""Of the logits' scale; what is left is the float16 of the KV cache."""

SHAPES = {
    "odd, grouped, tied": Shape(),
    "odd, plain, untied": Shape(hidden_size=36, num_heads=3, num_kv_heads=3, ffn_size=50, tied_head=False),
    "one KV head": Shape(hidden_size=64, num_heads=4, num_kv_heads=1, ffn_size=96, vocab_size=64),
    "head wider than its share": Shape(hidden_size=48, num_heads=2, num_kv_heads=1, head_dim=32),
    "heads of whole panels": Shape(hidden_size=192, num_heads=3, num_kv_heads=1, ffn_size=256, vocab_size=333),
    "linear rope": Shape(rope_scaling="linear"),
    "llama3 rope": Shape(hidden_size=64, num_heads=2, num_kv_heads=2, rope_scaling="llama3", tied_head=False),
    "qwen2": Shape("qwen2"),
    "qwen2, untied": Shape("qwen2", hidden_size=64, num_heads=2, num_kv_heads=1, tied_head=False),
    "qwen3": Shape("qwen3", hidden_size=48, num_heads=4, num_kv_heads=2, head_dim=32),
    "qwen3, odd heads": Shape("qwen3", hidden_size=60, num_heads=3, num_kv_heads=1),
    "gemma3": Shape("gemma3", hidden_size=40, num_heads=4, num_kv_heads=1, head_dim=64, num_layers=4),
    "olmoe": Shape(
        "olmoe", hidden_size=64, num_heads=4, num_kv_heads=4, ffn_size=32, num_experts=7, num_active_experts=3
    ),
    "qwen3moe": Shape(
        "qwen3moe", hidden_size=96, num_heads=3, num_kv_heads=1, ffn_size=64, num_experts=9, num_active_experts=2
    ),
    "gemma3, wide odd heads": Shape("gemma3", hidden_size=56, num_heads=2, num_kv_heads=2, head_dim=250),
}
# Of few experts above: with many, float16 in the cache tips a choice between two of nearly equal score somewhere.
MANY_EXPERTS = replace(SHAPES["qwen3moe"], num_experts=40, num_active_experts=4)
FAMILIES = {shape.family: name for name, shape in SHAPES.items()}
"""One shape of each."""
LENGTH = 75


def token_ids(vocab_size: int, length: int = LENGTH, seed: int = 1) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(0, vocab_size, length).tolist()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@cache
def packed_and_logits(folder: Path, name: str) -> tuple[Path, NDArray[np.float32]]:
    model = make_checkpoint(SHAPES[name])
    expected = logits_of(model, token_ids(SHAPES[name].vocab_size))
    path = folder / f"{name.replace(' ', '_')}.gguf"
    return ensure_packed(write_gguf(model, path, family=SHAPES[name].family)), expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_float32_agrees_with_transformers(folder: Path, name: str, implementation: str) -> None:
    packed, expected = packed_and_logits(folder, name)
    runner = open_runner(implementation, packed)
    ids = token_ids(SHAPES[name].vocab_size)
    assert worst_difference(runner.run(batch_of(ids)).logits, expected) < TOLERANCE


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", FAMILIES.values())
def test_token_by_token_and_in_chunks(folder: Path, name: str, implementation: str) -> None:
    """Prefill of 40, chunks across block borders, then one at a time, against one pass of transformers."""
    packed, expected = packed_and_logits(folder, name)
    runner = open_runner(implementation, packed)
    ids = token_ids(SHAPES[name].vocab_size)
    borders = [0, 40, 47, 49, 64, *range(65, LENGTH + 1)]
    rows = [runner.run(batch_of(ids[a:b], start=a)).logits for a, b in pairwise(borders)]
    assert worst_difference(np.concatenate(rows), expected) < TOLERANCE


@pytest.mark.parametrize("isa", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("name", FAMILIES.values())
def test_rows_have_the_same_bits_however_chunked(folder: Path, name: str, isa: str) -> None:
    """Past the first merge of attention (256 keys) and, in sliding layers, past chunks that are no longer seen."""
    runner = open_runner(isa, packed_and_logits(folder, name)[0])
    ids = token_ids(SHAPES[name].vocab_size, length=330)
    whole = runner.run(batch_of(ids)).logits
    for borders in ([0, 250, 255, 280, 320, 330], [0, 300, *range(301, 331)]):
        rows = [runner.run(batch_of(ids[a:b], start=a)).logits for a, b in pairwise(borders)]
        assert np.array_equal(np.concatenate(rows), whole)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_and_hidden(folder: Path, implementation: str) -> None:
    name = "odd, plain, untied"
    packed, expected = packed_and_logits(folder, name)
    runner = open_runner(implementation, packed)
    ids = token_ids(SHAPES[name].vocab_size)
    logprobs = log_softmax(expected)
    scored = runner.run(batch_of(ids, out=Out.SCORE, num_tops=3))
    wanted = logprobs[np.arange(LENGTH - 1), ids[1:]]
    assert worst_difference(scored.logprob[:-1], wanted) < TOLERANCE
    assert worst_difference(scored.top_logprobs, -np.sort(-logprobs, axis=1)[:, :3]) < TOLERANCE
    assert np.mean(scored.top_ids[:, 0] == expected.argmax(axis=1)) > 0.95  # near ties may fall either way
    hidden = runner.run(batch_of(ids, out=Out.HIDDEN)).hidden
    head = make_checkpoint(SHAPES[name]).lm_head.weight.detach().numpy()
    assert worst_difference(hidden[:, 0] @ head.T, expected) < TOLERANCE


def test_many_experts(folder: Path) -> None:
    """In float32 throughout the reference is transformers; ours is the reference, but for a rare choice tipped."""
    model, ids = make_checkpoint(MANY_EXPERTS), token_ids(MANY_EXPERTS.vocab_size)
    packed = ensure_packed(write_gguf(model, folder / "many.gguf", family=MANY_EXPERTS.family))
    exact = ReferenceRunner(packed, kv_dtype=np.float32).run(batch_of(ids)).logits
    assert worst_difference(exact, logits_of(model, ids)) < 1e-5
    expected = open_runner("reference", packed).run(batch_of(ids)).logits
    for isa in IMPLEMENTATIONS[1:]:
        by_row = np.abs(open_runner(isa, packed).run(batch_of(ids)).logits - expected).max(axis=1)
        assert np.mean(by_row < TOLERANCE * np.abs(expected).max()) > 0.85


@pytest.mark.parametrize("name", SHAPES)
def test_only_the_float16_cache_differs(folder: Path, name: str) -> None:
    """With a float32 cache the reference is transformers to rounding: nothing else hides in the tolerance above."""
    packed, expected = packed_and_logits(folder, name)
    runner = ReferenceRunner(packed, kv_dtype=np.float32)
    assert worst_difference(runner.run(batch_of(token_ids(SHAPES[name].vocab_size))).logits, expected) < 1e-5


def test_interleaving_matters(folder: Path) -> None:
    """If Q were left as it lies in the file, the logits would be far off: the tests above can fail."""
    name = "odd, grouped, tied"
    packed, expected = packed_and_logits(folder, name)
    runner = ReferenceRunner(packed)
    weights = runner.model.weights
    for layer in range(SHAPES[name].num_layers):
        query = weights[f"blk.{layer}.attn_q.weight"]
        assert isinstance(query, np.ndarray)
        halves = query.reshape(SHAPES[name].num_heads, 2, -1, query.shape[1])
        weights[f"blk.{layer}.attn_q.weight"] = halves.swapaxes(1, 2).reshape(query.shape)
    ids = token_ids(SHAPES[name].vocab_size)
    assert worst_difference(runner.run(batch_of(ids)).logits, expected) > 20 * TOLERANCE


QUANTISED = Shape(hidden_size=64, num_heads=4, num_kv_heads=2, ffn_size=96, vocab_size=101, num_layers=2)


@pytest.mark.parametrize("isa", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("quant", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_agrees_with_the_reference(folder: Path, quant: str, tied_head: bool, isa: str) -> None:
    """The same codes on both sides. Rows agree to float32 rounding, but for the rare one in which the last bit of a
    value decides how an activation is rounded to 8 bits: that is a step of 1/127, seen in the logits and in the rows
    after it. Twelve short sequences keep that apart."""
    shape = replace(QUANTISED, tied_head=tied_head)
    path = folder / f"{quant}-{tied_head}.gguf"
    packed = ensure_packed(path if path.exists() else write_gguf(make_checkpoint(shape), path, quant))
    theirs, ours = open_runner("reference", packed), open_runner(isa, packed)
    batches = [batch_of(token_ids(shape.vocab_size, length=6, seed=seed)) for seed in range(12)]
    expected = np.concatenate([theirs.run(batch).logits for batch in batches])
    found = np.concatenate([ours.run(batch).logits for batch in batches])
    by_row = np.abs(found - expected).max(axis=1) / np.abs(expected).max()
    assert np.mean(by_row < TOLERANCE) >= 0.85
    assert np.median(by_row) < 1e-5
    assert by_row.max() < 0.05


def test_quantised_is_near_float(folder: Path) -> None:
    """8 bits lose little of the float32 logits: guards the reference's own arithmetic of codes."""
    model = make_checkpoint(QUANTISED)
    ids = token_ids(QUANTISED.vocab_size, length=20)
    packed = ensure_packed(write_gguf(model, folder / "near.gguf", "Q8_0"))
    found = open_runner("reference", packed).run(batch_of(ids)).logits
    assert worst_difference(found, logits_of(model, ids)) < 0.05
