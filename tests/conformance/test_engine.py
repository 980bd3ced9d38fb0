"""The engine contract, over every engine: ours per instruction set and thread count, and the fake.

Same row, same bits: whatever else is in the batch, however it was chunked, on any number of threads. So the tests
use `==`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.tiny import TinyShape, write_tiny_gguf

from hob import native
from hob.config import EngineConfig
from hob.engine.base import Batch, Draw, Engine, Out
from hob.engine.fake import FakeEngine
from hob.engine.local import LocalEngine
from hob.errors import HobError, ModelFileError
from hob.models.pack import ensure_packed
from hob.models.packed_file import FIXED, data_offset_of, open_packed
from hob.request import SamplingParams

NUM_BLOCKS = 64
MAX_ROWS = 256
MakeEngine = Callable[[], Engine]

LOCAL = [
    f"{isa}-{threads}-{quant}-f16" for isa in native.available_isas() for threads in (1, 2) for quant in ("F32", "Q4_1")
]
LOCAL += [f"{isa}-2-wide-q8" for isa in native.available_isas()]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    shape = TinyShape(tied_head=True)
    files = {q: write_tiny_gguf(folder / f"{q}.gguf", quant=q, shape=shape) for q in ("F32", "Q4_1")}
    wide_heads = TinyShape(hidden_size=128, num_heads=2, num_kv_heads=1)  # that fill tiles
    files["wide"] = write_tiny_gguf(folder / "wide.gguf", shape=wide_heads)
    return {name: ensure_packed(file) for name, file in files.items()}


@pytest.fixture(params=["fake", *LOCAL])
def engine(request: pytest.FixtureRequest, packed: dict[str, Path]) -> Iterator[Engine]:
    made: Engine
    if request.param == "fake":
        made = FakeEngine(vocab_size=259, max_rows=MAX_ROWS)
    else:
        isa, threads, quant, kv_type = request.param.split("-")
        made = LocalEngine(
            "tiny", packed[quant], EngineConfig(isa=isa, threads=int(threads), kv_type=kv_type), MAX_ROWS
        )
    made.open_pool(NUM_BLOCKS)
    yield made
    made.close()


def tokens(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 259, length).tolist()


def batch(*sequences: tuple[list[int], int, list[int]], out: Out = Out.LOGITS, num_tops: int = 0) -> Batch:
    """Each sequence: its tokens, the index of the first, its block table. Every row owes `out`."""
    index = np.concatenate([np.arange(start, start + len(ids), dtype=np.int32) for ids, start, _ in sequences])
    token = np.array([token for ids, _, _ in sequences for token in ids], np.int32)
    targets = [[*ids[1:], 0] for ids, _, _ in sequences]
    return Batch(
        token=token,
        position=index,
        index=index,
        out=np.full(len(index), int(out), np.uint8),
        target=np.array([t for ids in targets for t in ids], np.int32),
        row_start=np.cumsum([0] + [len(ids) for ids, _, _ in sequences]).astype(np.int32),
        table_start=np.cumsum([0] + [len(table) for _, _, table in sequences]).astype(np.int32),
        blocks=np.array([block for _, _, table in sequences for block in table], np.int32),
        adapter=np.zeros(len(sequences), np.int32),
        num_tops=num_tops,
    )


def run(engine: Engine, work: Batch) -> NDArray[np.float32]:
    assert engine.forward(work).is_done
    return engine.logits()


def solo(engine: Engine, ids: list[int], table: list[int]) -> NDArray[np.float32]:
    return run(engine, batch((ids, 0, table)))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_chunked_equals_whole(engine: Engine, length: int, chunk: int) -> None:
    ids = tokens(length, 0)
    whole = solo(engine, ids, list(range(7)))
    table = list(range(20, 27))
    parts = [run(engine, batch((ids[i : i + chunk], i, table))) for i in range(0, length, chunk)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_batched_equals_solo(engine: Engine) -> None:
    lengths = [1, 5, 16, 31, 40, 64]
    prompts = [tokens(n, n) for n in lengths]
    tables = [list(range(8 * i, 8 * i + 4)) for i in range(len(prompts))]
    together = run(engine, batch(*((ids, 0, table) for ids, table in zip(prompts, tables, strict=True))))
    alone = [solo(engine, ids, [60, 61, 62, 63]) for ids in prompts]
    assert np.array_equal(together, np.concatenate(alone))


def test_long_contexts_merge_at_fixed_places(engine: Engine) -> None:
    ids = tokens(600, 1)
    table = list(range(38))
    for start in range(0, 600, 200):
        last = run(engine, batch((ids[start : start + 200], start, table)))[-1]
    for start in range(0, 512, 256):
        run(engine, batch((ids[start : start + 256], start, table)))
    for i in range(512, 600):
        again = run(engine, batch((ids[i : i + 1], i, table)))[-1]
    assert np.array_equal(last, again)


def test_a_step_may_be_repeated(engine: Engine) -> None:
    ids, table = tokens(30, 2), [5, 6]
    first = solo(engine, ids, table)
    assert np.array_equal(first, solo(engine, ids, table))
    run(engine, batch((ids[10:20], 10, table)))
    assert np.array_equal(first[-1], run(engine, batch((ids[29:], 29, table)))[0])


def test_lost_blocks_in_the_middle_can_be_computed_again(engine: Engine) -> None:
    ids, table = tokens(48, 3), [1, 2, 3]
    whole = solo(engine, ids, table)
    engine.write_block(2, engine.read_block(50))
    run(engine, batch((ids[16:32], 16, table)))
    assert np.array_equal(whole[-1], run(engine, batch((ids[47:], 47, table)))[0])


def test_blocks_read_and_written_elsewhere_give_the_same(engine: Engine) -> None:
    ids = tokens(33, 4)
    whole = solo(engine, ids, [0, 1, 2])
    for source, destination in ((0, 40), (1, 30)):
        data = engine.read_block(source)
        assert len(data) == engine.block_bytes
        engine.write_block(destination, data)
    assert np.array_equal(whole[-1], run(engine, batch((ids[32:], 32, [40, 30, 9])))[0])


@pytest.mark.parametrize("num_shared", [1, 8, 15])
def test_a_fork_copies_part_of_a_block(engine: Engine, num_shared: int) -> None:
    ids, other = tokens(16 + num_shared, 5), tokens(10, 6)
    solo(engine, ids, [0, 1])
    engine.copy_block(1, 7, num_shared)
    forked = run(engine, batch((other, 16 + num_shared, [0, 7, 8])))
    assert np.array_equal(forked, solo(engine, ids + other, [10, 11, 12])[-10:])


def test_sequences_share_blocks_in_one_step(engine: Engine) -> None:
    prefix, tails = tokens(32, 7), [tokens(3, 8), tokens(9, 9)]
    solo(engine, prefix, [0, 1])
    together = run(engine, batch((tails[0], 32, [0, 1, 2]), (tails[1], 32, [0, 1, 3])))
    alone = [solo(engine, prefix + tail, [10, 11, 12])[32:] for tail in tails]
    assert np.array_equal(together, np.concatenate(alone))


def test_scores_are_log_softmax_of_the_logits(engine: Engine) -> None:
    ids = tokens(50, 10)
    logits = solo(engine, ids, [0, 1, 2, 3]).astype(np.float64)
    engine.forward(batch((ids, 0, [0, 1, 2, 3]), out=Out.SCORE, num_tops=5))
    scores = engine.scores()
    expected = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    np.testing.assert_allclose(scores.logprob[:-1], expected[np.arange(49), ids[1:]], rtol=1e-4, atol=1e-4)
    assert np.array_equal(scores.top_ids, np.argsort(-logits, axis=1, kind="stable")[:, :5])
    np.testing.assert_allclose(
        scores.top_logprobs, np.take_along_axis(expected, scores.top_ids, 1), rtol=1e-4, atol=1e-4
    )


def test_hidden_rows(engine: Engine) -> None:
    ids = tokens(20, 11)
    engine.forward(batch((ids, 0, [0, 1]), out=Out.HIDDEN))
    hidden = engine.hidden()
    assert hidden.shape == (20, 1, engine.info.hidden_size)
    engine.forward(batch((ids[:7], 0, [4]), out=Out.HIDDEN))
    assert np.array_equal(hidden[:7], engine.hidden())


def layers_of(engine: Engine, ids: list[int], layers: list[int], *company: list[int]) -> NDArray[np.float32]:
    """States of a sequence after `layers`, alone or in company."""
    others = [(other, 0, [40 + 4 * i + k for k in range(4)]) for i, other in enumerate(company)]
    work = batch((ids, 0, [0, 1, 2, 3]), *others, out=Out.HIDDEN)
    work.layers = np.array(layers, np.int32)
    assert engine.forward(work).is_done
    return engine.hidden()[: len(ids)]


@pytest.mark.parametrize("length", [3, 50])
def test_states_of_several_layers_come_from_one_pass(engine: Engine, length: int) -> None:
    ids, last = tokens(length, 13), engine.info.num_layers
    every = layers_of(engine, ids, list(range(last + 1)))
    assert every.shape == (length, last + 1, engine.info.hidden_size)
    for layer in range(last + 1):
        assert np.array_equal(every[:, [layer]], layers_of(engine, ids, [layer]))
        assert layer == 0 or not np.array_equal(every[:, layer - 1], every[:, layer])
    assert np.array_equal(every, layers_of(engine, ids, list(range(last + 1)), tokens(40, 14), tokens(2, 15)))
    assert np.array_equal(every[:, [last]], layers_of(engine, ids, []))
    assert np.array_equal(every[:1], layers_of(engine, ids[:1], list(range(last + 1))))


@pytest.mark.parametrize("length", [3, 50])
def test_a_pass_may_end_at_a_layer(engine: Engine, length: int) -> None:
    ids = tokens(length, 13)
    work = batch((ids, 0, [0, 1, 2, 3]), out=Out.HIDDEN)
    work.layers, work.depth = np.array([0, 1], np.int32), 1
    assert engine.forward(work).is_done
    assert np.array_equal(engine.hidden(), layers_of(engine, ids, [0, 1]))


def test_a_pass_that_ends_early_owes_nothing_else(engine: Engine) -> None:
    if engine.info.num_layers == 1:
        pytest.skip("the fake has one layer")
    for out, layers, depth in ((Out.LOGITS, [1], 1), (Out.HIDDEN, [2], 1), (Out.HIDDEN, [], 1), (Out.HIDDEN, [1], 99)):
        work = batch((tokens(3, 16), 0, [0]), out=out)
        work.layers, work.depth = np.array(layers, np.int32), depth
        with pytest.raises(ValueError, match="depth"):
            engine.forward(work)


def test_layers_that_are_not_there_are_refused(engine: Engine) -> None:
    if isinstance(engine, FakeEngine):
        pytest.skip("the fake trusts its batch")
    for layers in ([engine.info.num_layers + 1], [1, 0], [1, 1], [-1]):
        with pytest.raises(ValueError, match="layers"):
            layers_of(engine, tokens(3, 16), layers)


def draw(engine: Engine, params: SamplingParams, position: int = 10, sample_index: int = 0) -> int:
    return engine.sample([Draw(params, sample_index, position, tokens(10, 12), 3)])[0].token_id


def test_sampling_is_a_function_of_seed_sample_and_position(engine: Engine) -> None:
    run(engine, batch((tokens(10, 12)[-1:], 0, [0])))
    params = SamplingParams(temperature=2.0, seed=7)
    assert len({draw(engine, params) for _ in range(5)}) == 1
    seeds = {draw(engine, SamplingParams(temperature=2.0, seed=seed)) for seed in range(40)}
    assert len(seeds) > 5
    if not isinstance(engine, FakeEngine):
        assert len({draw(engine, params, position=p) for p in range(40)}) > 5
    assert len({draw(engine, params, sample_index=i) for i in range(40)}) > 5


def test_greedy_takes_the_most_likely(engine: Engine) -> None:
    logits = run(engine, batch((tokens(10, 12), 0, [0])))
    sampled = engine.sample([Draw(SamplingParams(temperature=0.0, logprobs=3), 0, i, [], 0) for i in range(10)])
    assert [s.token_id for s in sampled] == logits.argmax(1).tolist()
    assert [[t for t, _ in s.tops] for s in sampled] == np.argsort(-logits, 1, kind="stable")[:, :3].tolist()


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_draws_tell_what_scores_tell(engine: Engine, temperature: float) -> None:
    """Of the token drawn and of the likeliest, whatever the temperature; and nothing where nobody asked."""
    ids = tokens(10, 12)
    run(engine, batch((ids, 0, [0])))
    params = [SamplingParams(temperature=temperature, seed=i, logprobs=3) for i in range(10)]
    sampled = engine.sample([Draw(each, 0, i, [], 0) for i, each in enumerate(params)])
    assert engine.sample([Draw(SamplingParams(temperature=0.0), 0, i, [], 0) for i in range(10)])[0].tops == []
    work = batch((ids, 0, [0]), out=Out.SCORE, num_tops=3)
    work.target = np.array([s.token_id for s in sampled], np.int32)
    assert engine.forward(work).is_done
    scores = engine.scores()
    np.testing.assert_allclose([s.logprob for s in sampled], scores.logprob, rtol=1e-5, atol=1e-6)
    assert [[t for t, _ in s.tops] for s in sampled] == scores.top_ids.tolist()
    np.testing.assert_allclose([[p for _, p in s.tops] for s in sampled], scores.top_logprobs, rtol=1e-5, atol=1e-6)
    assert {dict(s.tops)[s.token_id] == s.logprob for s in sampled if s.token_id in dict(s.tops)} <= {True}


def test_a_mask_is_kept_to_and_an_open_one_changes_nothing(engine: Engine) -> None:
    run(engine, batch((tokens(3, 12), 0, [0])))
    draws = [Draw(SamplingParams(temperature=1.0, seed=i), 0, i, [], 0) for i in range(3)]
    masks = np.full((3, 36), 0xFF, np.uint8)
    masks[1] = 0
    masks[1, 5] = 0b1000
    free, masked = engine.sample(draws), engine.sample(draws, masks)
    assert masked[1].token_id == 43
    assert [masked[0].token_id, masked[2].token_id] == [free[0].token_id, free[2].token_id]
    masks[2] = 0
    with pytest.raises(RuntimeError, match="no token can be chosen"):
        engine.sample(draws, masks)


def test_wrong_batches_are_refused(engine: Engine) -> None:
    with pytest.raises((ValueError, HobError), match="vocab"):
        engine.forward(batch(([259], 0, [0])))


def with_network(path: Path, **changed: object) -> Path:
    """A copy of a packed file that says something else of its network, its CRC made right."""
    raw = path.read_bytes()
    magic, version, length, _, _, rest = FIXED.unpack_from(raw)
    header = json.loads(raw[FIXED.size : FIXED.size + length])
    header["network"] |= changed
    text, body = json.dumps(header).encode(), raw[data_offset_of(length) :]
    start = data_offset_of(len(text))
    fixed = FIXED.pack(magic, version, len(text), start + len(body), zlib.crc32(text), rest)
    copy = path.with_name("changed.hobpack")
    copy.write_bytes((fixed + text).ljust(start, b"\0") + body)
    return copy


def test_layers_beyond_all_reason_are_refused_before_each_is_looked_for(packed: dict[str, Path]) -> None:
    """Else a header of 2 kB has a table made of billions of tensors."""
    assert open_packed(with_network(packed["F32"], num_layers=2)).network.num_layers == 2
    with pytest.raises(ModelFileError, match="has 4294967295 layers; expected at most"):
        open_packed(with_network(packed["F32"], num_layers=2**32 - 1))


@pytest.mark.parametrize(
    "changed", [{"context_length": 2**31}, {"context_length": -(2**62)}, {"sliding_window": 2**40}]
)
def test_a_number_that_the_core_cannot_hold_is_a_fault_of_the_file(
    packed: dict[str, Path], changed: dict[str, int]
) -> None:
    """Not of the program: the core refuses it as all else that does not fit."""
    engine = LocalEngine("tiny", with_network(packed["F32"], context_length=96), EngineConfig(threads=1), MAX_ROWS)
    assert engine.info.context_length == 96
    engine.close()
    with pytest.raises(ModelFileError, match=f"'{next(iter(changed))}' is of another type, or a number out of range"):
        LocalEngine("tiny", with_network(packed["F32"], **changed), EngineConfig(threads=1), MAX_ROWS)
