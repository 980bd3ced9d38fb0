"""Fewer bits for KV on disk: how far a block is from what it was, who gets how many, and that no other sees it."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.unit.test_scheduler import prompt, solo
from tests.unit.test_swap import World, restored

from hob.errors import StorageError
from hob.kvcache.compression import EXACT, LEVELS, Codec, levels_of, stored_share
from hob.kvcache.formats import KvShape, format_of
from hob.kvcache.keys import KeyRing
from hob.kvcache.store import BlockStore
from hob.request import Request, SamplingParams

L, H, D = 3, 4, 32
SHAPE = KvShape(L, H, D)
NUM_VALUES = 2 * L * H * D * 16
CODEC = Codec(SHAPE)


def values(seed: int, scale: float = 1.0) -> NDArray[np.float16]:
    return (scale * np.random.default_rng(seed).standard_normal(NUM_VALUES)).astype(np.float16)


def there_and_back(block: NDArray[np.float16], bits: int) -> NDArray[np.float16]:
    data, out = CODEC.encode(block.tobytes(), bits), bytearray(2 * NUM_VALUES)
    assert len(data) == CODEC.num_bytes(bits)
    CODEC.decode(data, bits, memoryview(out))
    return np.frombuffer(out, np.float16)


# ---- one block ----


@given(st.integers(0, 1000), st.sampled_from([8, 4, 2]), st.sampled_from([1e-2, 1.0, 3000.0]))
@settings(max_examples=60, deadline=None)
def test_values_are_off_by_half_a_step_at_most(seed: int, bits: int, scale: float) -> None:
    block = values(seed, scale)
    layers = block.astype(np.float64).reshape(L, 2, H, -1)
    error = np.abs(there_and_back(block, bits).astype(np.float64).reshape(layers.shape) - layers)
    for part, width in ((0, 16), (1, D)):  # keys share a scale by channel, values by token
        groups = layers[:, part].reshape(-1, width)
        span = np.ptp(groups, axis=1, keepdims=True)
        rounding = 2e-3 * np.abs(groups).max(axis=1, keepdims=True) + 1e-7  # of the scales, float16 too
        assert (error[:, part].reshape(-1, width) <= 0.5 * span / (2**bits - 1) + rounding).all()


def test_a_channel_that_is_large_throughout_costs_the_others_nothing() -> None:
    block = values(1).reshape(L, 2, H, -1)
    keys = block[:, 0].reshape(L, H, D, 16)
    loud = block.copy()
    loud[:, 0].reshape(L, H, D, 16)[:, :, 5] += 1000
    quiet = [c for c in range(D) if c != 5]
    back = there_and_back(loud.ravel(), 4).reshape(L, 2, H, -1)[:, 0].reshape(L, H, D, 16)
    assert np.abs(back[:, :, quiet].astype(float) - keys[:, :, quiet]).max() < 0.25


def test_constant_blocks_stay_as_they_are() -> None:
    for value in (0.0, -3.5):
        block = np.full(NUM_VALUES, value, np.float16)
        for bits in (8, 4, 2):
            assert np.array_equal(there_and_back(block, bits), block)


def test_fewer_bits_take_less() -> None:
    sizes = [Codec(KvShape(30, 3, 64)).num_bytes(bits) for bits in LEVELS]
    assert sizes == [368_640, 213_120, 120_960, 74_880]
    assert Codec(KvShape(30, 3, 64, "q8")).num_bytes(EXACT) == 190_080


@pytest.mark.parametrize("kv_type", ["f16", "q8"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_what_a_context_is_taken_for_is_near_what_it_takes(head_dim: int, kv_type: str) -> None:
    codec, num_blocks = Codec(KvShape(4, 2, head_dim, kv_type)), 100
    for bits in (16, 8, 4, 3):
        taken = sum(map(codec.num_bytes, codec.levels(bits, [i / 100 for i in range(num_blocks)], num_blocks)))
        exact = num_blocks * codec.num_bytes(16)
        assert taken <= stored_share(bits, kv_type) * exact <= 1.1 * taken


@pytest.mark.parametrize("dim", [7, 32, 64, 80])
def test_both_ways_to_lie_hold_the_same_values(dim: int) -> None:
    """What one format loads the other stores: in q8 to half a code, and from then on with no loss."""
    halves, codes = format_of(KvShape(2, 3, dim)), format_of(KvShape(2, 3, dim, "q8"))
    rng = np.random.default_rng(dim)
    block = rng.standard_normal(halves.num_bytes // 2).astype(np.float16).tobytes()
    keys, values = halves.load(block)
    back = bytearray(len(block))
    halves.store(keys, values, memoryview(back))
    assert back == block
    out = bytearray(codes.num_bytes)
    codes.store(keys, values, memoryview(out))
    loaded = codes.load(out)
    for x, y, axis in ((keys, loaded[0], 2), (values, loaded[1], 3)):
        largest = np.abs(x).max(axis=axis, keepdims=True)
        assert (np.abs(x - y) <= 0.51 * largest / 127).all()
    again = bytearray(codes.num_bytes)
    codes.store(*loaded, memoryview(again))
    assert np.allclose(codes.load(again)[0], loaded[0], rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 2])
def test_codes_of_8_bits_lose_bits_as_halves_do(bits: int) -> None:
    shape = KvShape(L, H, D, "q8")
    form, codec, fine = format_of(shape), Codec(shape), format_of(SHAPE)
    block, coded = values(3), bytearray(form.num_bytes)
    form.store(*fine.load(block.tobytes()), memoryview(coded))
    out = bytearray(form.num_bytes)
    codec.decode(codec.encode(coded, bits), bits, memoryview(out))
    there = fine.load(there_and_back(block, bits).tobytes())
    for ours, theirs, exact in zip(form.load(out), there, fine.load(block.tobytes()), strict=True):
        assert np.abs(ours - exact).mean() < 1.1 * np.abs(theirs - exact).mean()


# ---- who gets how many ----


@given(st.lists(st.floats(0, 1), max_size=80), st.integers(0, 80))
def test_the_densest_keep_most(density: list[float], num_blocks: int) -> None:
    for kv_bits in (8, 4):
        assert levels_of(kv_bits, density, num_blocks) == [kv_bits] * num_blocks
    levels = levels_of(3, density, num_blocks)
    assert len(levels) == num_blocks
    known = [*density[:num_blocks], *[2.0] * (num_blocks - len(density))]
    for i, j in ((i, j) for i in range(num_blocks) for j in range(num_blocks) if known[i] > known[j]):
        assert levels[i] >= levels[j]
    if num_blocks >= 20:
        assert set(levels) == {8, 4, 2}
        assert 2.8 <= sum(levels) / num_blocks <= 3.6


# ---- the store ----


def open_store(folder: Path, max_bytes: int = 1 << 30, codec: Codec | None = CODEC) -> BlockStore:
    return BlockStore(folder / "kv", "model", 2 * NUM_VALUES, KeyRing(folder / "keys", {}), max_bytes, codec=codec)


def key(n: int) -> bytes:
    return n.to_bytes(16, "big")


def put(store: BlockStore, context: str, levels: dict[int, int], bits: int = 3) -> int:
    """Write block n of `values(n)` with levels[n] bits."""
    return store.write(
        "app",
        context,
        [key(n) for n in levels],
        {key(n): values(n).tobytes() for n in levels},
        levels={key(n): level for n, level in levels.items()},
        bits=bits,
    )


def get(store: BlockStore, count: int) -> list[bytes | None]:
    pieces, out = store.pieces("app", [key(n) for n in range(count)], 16), memoryview(bytearray(store.block_bytes))
    return [bytes(out) if is_there else None for piece in pieces for is_there in store.read(piece, out)]


def expected(levels: dict[int, int]) -> list[bytes]:
    blocks = [values(n) if level == EXACT else there_and_back(values(n), level) for n, level in levels.items()]
    return [block.tobytes() for block in blocks]


MIXED = {0: 8, 1: 8, 2: 4, 3: 2, 4: 2, 5: 4, 6: 16, 7: 2}


def test_blocks_of_all_bits_come_back_in_order_also_after_a_restart(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert put(store, "c", MIXED) == 8
    for _ in range(2):
        assert get(store, 8) == expected(MIXED)
        kept = store.kept("app", "c")
        assert kept is not None
        assert (kept.bits, kept.num_blocks, kept.num_bytes) == (3, {2: 3, 4: 2, 8: 2, 16: 1}, store.num_bytes)
        assert store.kept("other", "c") is None
        store.close()
        store = open_store(tmp_path)
    assert store.num_alarms == 0
    store.close()


def test_bits_only_get_fewer_and_the_room_comes_back(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    put(store, "c", dict.fromkeys(range(8), 8))
    before = store.num_bytes
    assert put(store, "c", dict.fromkeys(range(8), 16)) == 0
    assert put(store, "c", {n: (2 if n < 4 else 8) for n in range(8)}) == 4
    assert get(store, 8) == expected({n: (2 if n < 4 else 8) for n in range(8)})
    assert store.num_bytes < before
    store.drop("app", ["c"])
    assert store.num_bytes == 0
    assert all(path.stat().st_size == 0 for path in (tmp_path / "kv").glob("*.slab"))
    store.close()


def test_what_was_tampered_with_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    put(store, "c", dict.fromkeys(range(4), 4))
    (path,) = (tmp_path / "kv").glob("*.4.slab")
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"torn")
    assert [block is None for block in get(store, 4)] == [True, False, False, False]
    assert store.num_alarms == 1
    put(store, "c", dict.fromkeys(range(4), 4))
    assert get(store, 4) == expected(dict.fromkeys(range(4), 4))
    store.close()


def test_the_bits_in_the_index_are_authenticated(tmp_path: Path) -> None:
    """An 8-bit block that the index calls one of 4 bits would be read as other numbers."""
    store = open_store(tmp_path)
    put(store, "c", {0: 8, 1: 4})
    store.close()
    (narrow,), (wide,) = (list((tmp_path / "kv").glob(f"*.{bits}.slab")) for bits in (4, 8))
    narrow.write_bytes(wide.read_bytes())
    with sqlite3.connect(tmp_path / "kv" / "index.db") as database:
        database.execute("DELETE FROM blocks WHERE bits = 4")
        database.execute("UPDATE blocks SET bits = 4")
    store = open_store(tmp_path)
    assert get(store, 1) == [None]
    assert store.num_alarms == 1
    store.close()


def test_those_with_the_most_bits_are_given_up_first_of_these_the_least_recently_used(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    pages = {bits: store._slot_bytes(bits) for bits in LEVELS}
    store.close()
    full = {"old 8": 8, "old 16": 16, "new 16": 16, "new 8": 8}
    store = open_store(tmp_path, max_bytes=4 * sum(pages[bits] for bits in full.values()))
    for i, (name, bits) in enumerate(full.items()):
        put(store, name, {100 * i + n: bits for n in range(4)}, bits=bits)
    left, number = list(full), 1000
    for gone in ("old 16", "new 16", "old 8", "new 8"):
        assert [name for name in full if store.kept("app", name) is not None] == left
        left.remove(gone)
        for num_blocks in (
            1,
            4 * pages[full[gone]] // pages[2] - 1,
        ):
            assert put(store, f"small {number}", {number + n: 2 for n in range(num_blocks)}) == num_blocks
            assert [name for name in full if store.kept("app", name) is not None] == left
            number += 100
    store.close()


def test_an_index_from_before_there_were_bits_is_read(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    put(store, "c", dict.fromkeys(range(3), 16), bits=16)
    store.close()
    with sqlite3.connect(tmp_path / "kv" / "index.db") as database:
        for table in ("blocks", "holders"):
            database.execute(f"ALTER TABLE {table} DROP COLUMN bits")
    store = open_store(tmp_path)
    assert get(store, 3) == expected(dict.fromkeys(range(3), 16))
    put(store, "d", {5: 4})
    store.close()
    with pytest.raises(StorageError, match="cannot have them"):
        open_store(tmp_path, codec=None)


# ---- under the scheduler ----


def turn(world: World, name: str, token_ids: list[int], kv_bits: int, context: str = "c", max_tokens: int = 8) -> None:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    request = Request(name, "app", token_ids, sampling=sampling, context_id=context, kv_bits=kv_bits)
    world.scheduler.add(request, world.clock())
    world.run()


@pytest.mark.parametrize("kv_bits", [8, 4, 3])
def test_a_context_with_fewer_bits_comes_back_changed_and_no_other_sees_it(tmp_path: Path, kv_bits: int) -> None:
    """The fake engine's KV is digests of all that was before: a lost bit in the last one changes what follows."""
    world = World(tmp_path, num_blocks=128)
    history = prompt(409, 1)  # whole blocks are computed: an unfinished one would be kept as it is
    turn(world, "small", history, kv_bits)
    assert world.tokens["small"] == solo(history).tokens["solo", 0], "live KV is exact"
    turn(world, "exact", history, 16, context="d")
    longer = history + prompt(30, 2)
    world.restart()
    turn(world, "small again", longer, kv_bits)
    assert restored(world.last["small again"]) > 390
    assert world.tokens["small again"] != solo(longer).tokens["solo", 0], "it would be the same if bits were not lost"
    turn(world, "exact again", longer, 16, context="d")
    turn(world, "new", longer, 16, context="e")
    for name in ("exact again", "new"):
        assert world.tokens[name] == solo(longer).tokens["solo", 0]
    assert world.scheduler.placement.prefixes.num_alarms == 0
    world.swap.close()


def test_blocks_get_fewer_bits_when_others_get_more_attention(tmp_path: Path) -> None:
    world = World(tmp_path, num_blocks=256)
    history = prompt(320, 1)
    turn(world, "one", history, 3)
    first = world.swap.store.kept("app", "c")
    history += world.tokens["one"] + prompt(1500, 2)
    turn(world, "two", history, 3)
    second = world.swap.store.kept("app", "c")
    assert first is not None
    assert second is not None
    for kept, num_blocks in ((first, 20), (second, 114)):
        levels = {bits: count for bits, count in kept.num_blocks.items() if bits != EXACT}
        assert abs(sum(levels.values()) - num_blocks) <= 1
        assert set(levels) == {8, 4, 2}
        assert sum(bits * count for bits, count in levels.items()) / sum(levels.values()) < 3.7
    world.restart()
    turn(world, "three", history + world.tokens["two"], 3)
    assert restored(world.last["three"]) > 1800
    world.swap.close()


def test_a_preempted_sequence_of_such_a_context_goes_on(tmp_path: Path) -> None:
    world = World(tmp_path, num_blocks=24)
    for i in range(3):
        sampling = SamplingParams(max_tokens=60, temperature=0.0)
        request = Request(f"r{i}", "app", prompt(100, i), sampling=sampling, context_id=f"c{i}", kv_bits=3)
        world.scheduler.add(request, world.clock())
    world.run()
    assert world.scheduler.placement.num_preemptions > 0
    assert [len(world.tokens[f"r{i}"]) for i in range(3)] == [60] * 3
    world.swap.close()
