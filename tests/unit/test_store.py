"""The block store: what was written is read back or is a miss, never something else."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hob.errors import StorageError
from hob.kvcache.keys import KeyRing
from hob.kvcache.slab import Slab, SlotMap, runs
from hob.kvcache.store import BlockStore

BLOCK_BYTES = 5000  # two pages with the tag
SLOT_BYTES = 8192


def key(n: int) -> bytes:
    return n.to_bytes(16, "big")


def block(n: int) -> bytes:
    return random.Random(n).randbytes(BLOCK_BYTES)


def open_store(tmp_path: Path, fingerprint: str = "model", max_bytes: int = 1 << 30, **fields: object) -> BlockStore:
    ring = KeyRing(tmp_path / "keys", {})
    return BlockStore(tmp_path / "kv", fingerprint, BLOCK_BYTES, ring, max_bytes, **fields)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlockStore]:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


def put(store: BlockStore, context_id: str, numbers: Sequence[int], app: str = "app") -> int:
    return store.write(app, context_id, [key(n) for n in numbers], {key(n): block(n) for n in numbers})


def get(store: BlockStore, numbers: Sequence[int], app: str = "app") -> list[bytes | None]:
    out = memoryview(bytearray(store.block_bytes))
    return [
        bytes(out) if is_there else None
        for piece in store.pieces(app, [key(n) for n in numbers], 16)
        for is_there in store.read(piece, out)
    ]


def slab(tmp_path: Path, app: str = "app") -> Path:
    (path,) = (tmp_path / "kv").glob("*.slab")
    return path


def num_disk_bytes(tmp_path: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in (tmp_path / "kv").glob("*.slab"))


def test_blocks_come_back_also_after_a_restart(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert put(store, "c", range(40)) == 40
    assert get(store, range(40)) == [block(n) for n in range(40)]
    assert put(store, "c", range(42)) == 2, "only what is not there yet is written"
    store.close()
    again = open_store(tmp_path)
    assert again.count("app", [key(n) for n in range(50)]) == 42
    assert get(again, range(42)) == [block(n) for n in range(42)]
    assert again.num_alarms == 0
    again.close()


def test_a_turn_lies_in_neighbouring_slots(store: BlockStore) -> None:
    put(store, "a", range(33))
    assert [len(piece.keys) for piece in store.pieces("app", [key(n) for n in range(33)], 16)] == [16, 16, 1]


def test_the_file_holds_no_plain_bytes_and_two_writes_differ(tmp_path: Path, store: BlockStore) -> None:
    store.write("app", "a", [key(1), key(2)], {key(1): bytes(BLOCK_BYTES), key(2): bytes(BLOCK_BYTES)})
    raw = slab(tmp_path).read_bytes()
    assert raw[:BLOCK_BYTES] != raw[SLOT_BYTES : SLOT_BYTES + BLOCK_BYTES]
    assert raw[:BLOCK_BYTES].count(0) < BLOCK_BYTES / 50


def test_apps_do_not_see_each_other(store: BlockStore) -> None:
    put(store, "a", range(3), app="one")
    assert store.count("two", [key(0)]) == 0
    assert get(store, range(3), app="two") == []


@pytest.mark.parametrize("offset", [0, 2500, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 15])
def test_a_flipped_bit_is_a_miss_and_an_alarm(tmp_path: Path, store: BlockStore, offset: int) -> None:
    put(store, "c", range(3))
    with slab(tmp_path).open("r+b") as file:
        file.seek(SLOT_BYTES + offset)
        byte = file.read(1)[0]
        file.seek(SLOT_BYTES + offset)
        file.write(bytes([byte ^ 4]))
    assert get(store, range(3)) == [block(0), None, block(2)]
    assert store.num_alarms == 1
    assert store.count("app", [key(0), key(1)]) == 1
    assert put(store, "c", range(3)) == 1, "it is written anew"
    assert get(store, range(3)) == [block(n) for n in range(3)]


def test_a_torn_file_is_a_miss_and_an_alarm(tmp_path: Path, store: BlockStore) -> None:
    put(store, "c", range(3))
    os.truncate(slab(tmp_path), 2 * SLOT_BYTES + 100)
    assert get(store, range(3)) == [block(0), block(1), None]
    assert store.num_alarms == 1


def test_swapped_slots_are_refused(tmp_path: Path, store: BlockStore) -> None:
    put(store, "c", range(2))
    raw = slab(tmp_path).read_bytes()
    slab(tmp_path).write_bytes(raw[SLOT_BYTES:] + raw[:SLOT_BYTES])
    assert get(store, range(2)) == [None, None]
    assert store.num_alarms == 2


def test_the_file_of_another_model_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path, "one")
    put(store, "c", range(2))
    store.close()
    other = open_store(tmp_path, "two")
    assert get(other, range(2)) == [None, None]
    assert other.num_alarms == 2
    other.close()


def test_the_file_of_another_app_is_refused(tmp_path: Path, store: BlockStore) -> None:
    put(store, "a", [7], app="one")
    theirs = slab(tmp_path).read_bytes()
    put(store, "b", [7], app="two")
    for path in (tmp_path / "kv").glob("*.slab"):
        path.write_bytes(theirs)
    assert get(store, [7], app="two") == [None]
    assert get(store, [7], app="one") == [block(7)]


def test_checks_switched_off_hand_out_the_wrong_bytes(tmp_path: Path, store: BlockStore) -> None:
    """The positive control of the tests above."""
    put(store, "c", range(2))
    raw = slab(tmp_path).read_bytes()
    slab(tmp_path).write_bytes(raw[SLOT_BYTES:] + raw[:SLOT_BYTES])
    store.is_checking = False
    first, second = get(store, range(2))
    assert first is not None
    assert second is not None
    assert first != block(0)
    assert store.num_alarms == 0


def test_dropping_a_context_frees_what_no_other_refers_to(tmp_path: Path, store: BlockStore) -> None:
    put(store, "parent", range(20))
    store.fork("app", "parent", "child")
    put(store, "child", [*range(20), *range(100, 120)])
    before = num_disk_bytes(tmp_path)
    store.drop("app", ["child"])
    assert before - num_disk_bytes(tmp_path) == 20 * SLOT_BYTES
    assert get(store, range(20)) == [block(n) for n in range(20)]
    store.drop("app", ["parent"])
    assert num_disk_bytes(tmp_path) == 0
    assert store.num_bytes == 0


def test_holes_in_the_middle_are_punched_and_used_again(tmp_path: Path, store: BlockStore) -> None:
    for i, context_id in enumerate("abc"):
        put(store, context_id, range(10 * i, 10 * i + 10))
    store.drop("app", ["b"])
    assert num_disk_bytes(tmp_path) == 20 * SLOT_BYTES
    put(store, "d", range(50, 58))
    assert slab(tmp_path).stat().st_size == 30 * SLOT_BYTES
    assert get(store, range(50, 58)) == [block(n) for n in range(50, 58)]


def test_another_app_cannot_drop_or_fork(store: BlockStore) -> None:
    put(store, "c", range(3))
    store.fork("other", "c", "stolen")
    store.drop("other", ["c"])
    assert store.count("app", [key(0)]) == 1
    assert store.count("other", [key(0)]) == 0


def test_least_recently_used_contexts_make_room(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_bytes=25 * SLOT_BYTES)
    put(store, "old", range(10))
    put(store, "new", range(10, 20))
    put(store, "old", range(10))  # used again
    put(store, "third", range(20, 30))
    assert store.num_bytes == 20 * SLOT_BYTES
    assert store.count("app", [key(0)]) == 1
    assert store.count("app", [key(10)]) == 0
    assert put(store, "huge", range(100, 200)) == 25, "what does not fit at all is left out"
    store.close()


def test_the_order_of_use_does_not_follow_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 2e9
    monkeypatch.setattr("time.time", lambda: now)
    store = open_store(tmp_path, max_bytes=25 * SLOT_BYTES)
    put(store, "old", range(10))
    now = 1e9  # set back
    put(store, "new", range(10, 20))
    store.close()
    store = open_store(tmp_path, max_bytes=25 * SLOT_BYTES)
    put(store, "third", range(20, 30))
    assert store.count("app", [key(0)]) == 0
    assert store.count("app", [key(10)]) == 1
    assert store.num_evicted == 1
    store.close()


def test_making_room_takes_nothing_from_a_prefix_that_is_shared(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_bytes=25 * SLOT_BYTES)
    put(store, "old", range(20))
    everything = [key(n) for n in [*range(10), *range(100, 110)]]
    store.write("app", "new", everything, {key(n): block(n) for n in range(100, 110)})
    assert store.count("app", everything) == 20
    assert store.num_bytes == 20 * SLOT_BYTES, "what only the other had is gone"
    store.close()


def test_what_a_turn_gives_up_goes_before_other_contexts(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_bytes=25 * SLOT_BYTES)
    put(store, "other", range(10))
    put(store, "c", range(20, 35))
    put(store, "c", [*range(20, 25), *range(40, 50)])
    assert store.num_evicted == 0
    assert store.count("app", [key(n) for n in range(10)]) == 10
    store.close()


def test_a_context_refers_to_its_last_turn_only(tmp_path: Path, store: BlockStore) -> None:
    put(store, "c", range(10))
    store.fork("app", "c", "child")
    put(store, "c", [*range(5), *range(20, 25)])
    assert store.num_bytes == 15 * SLOT_BYTES, "the child refers to all ten"
    put(store, "c", [*range(5), *range(30, 33)])
    assert store.num_bytes == 13 * SLOT_BYTES, "an earlier branch is gone"
    assert num_disk_bytes(tmp_path) == 13 * SLOT_BYTES
    store.drop("app", ["child"])
    assert get(store, [*range(5), *range(30, 33)]) == [block(n) for n in [*range(5), *range(30, 33)]]
    assert store.num_bytes == 8 * SLOT_BYTES


def test_what_happened_while_no_engine_ran_is_made_up_for(store: BlockStore) -> None:
    put(store, "parent", range(5))
    put(store, "dead", range(10, 15))
    store.reconcile({"parent": ("app", None), "child": ("app", "parent")})
    assert store.count("app", [key(10)]) == 0
    store.drop("app", ["parent"])
    assert store.count("app", [key(n) for n in range(5)]) == 5, "the child refers to them"


class FailingDisk:
    """pwritev that fails at one call, after having written a part."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, fd: int, parts: Sequence[bytes | memoryview], offset: int) -> int:
        self.left -= 1
        if self.left == 0:
            os.pwrite(fd, bytes(parts[0])[:1000], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.pwritev(fd, parts, offset)


@pytest.mark.parametrize("at", range(1, 8))
def test_a_full_disk_at_the_nth_write_loses_nothing_that_was_there(tmp_path: Path, at: int) -> None:
    store = open_store(tmp_path, write=FailingDisk(at))
    failed: list[tuple[int, str]] = []
    for i in range(6):
        try:
            put(store, f"c{i}", range(20 * i, 20 * i + 20))
        except StorageError as error:
            failed.append((i, str(error)))
    ((lost, message),) = failed
    assert "20 KV blocks of app 'app' could not be kept" in message
    store.close()
    again = open_store(tmp_path)
    for i in range(6):
        expected = [] if i == lost else [block(n) for n in range(20 * i, 20 * i + 20)]
        assert get(again, range(20 * i, 20 * i + 20)) == expected
    assert again.num_alarms == 0
    assert num_disk_bytes(tmp_path) <= 100 * SLOT_BYTES
    again.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_hole_that_cannot_be_punched_is_wasted_space_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    store = open_store(tmp_path, max_bytes=40 * SLOT_BYTES)
    put(store, "a", range(10))
    put(store, "b", range(10, 20))

    def fail(slab: Slab, stretches: object, end: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        broken.setattr(Slab, "punch", fail)
        assert put(store, "a", [*range(5), *range(20, 25)]) == 5, "five are given up, in the commit that names five"
        store.drop("app", ["b"])
        assert put(store, "c", range(30, 60)) == 30, "into the slots that were freed"
    assert get(store, [*range(5), *range(20, 25)]) == [block(n) for n in [*range(5), *range(20, 25)]]
    assert get(store, range(30, 60)) == [block(n) for n in range(30, 60)]
    assert store.num_alarms == 0
    assert len([r for r in caplog.records if "cannot be given back" in r.message]) == 1
    store.drop("app", ["c"])
    assert num_disk_bytes(tmp_path) == 10 * SLOT_BYTES, "punched with the next ones"
    store.close()
    again = open_store(tmp_path)
    assert get(again, [*range(5), *range(20, 25)]) == [block(n) for n in [*range(5), *range(20, 25)]]
    again.close()


def test_a_store_opens_whose_holes_cannot_be_punched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    put(store, "a", range(10))
    store.close()

    def fail(slab: Slab, stretches: object, end: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Slab, "punch", fail)
    again = open_store(tmp_path)
    assert get(again, range(10)) == [block(n) for n in range(10)]
    again.close()


def test_slots_that_no_row_names_are_reclaimed_at_opening(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    put(store, "c", range(10))
    with slab(tmp_path).open("ab") as file:  # what a crash between sync and commit leaves
        file.write(b"x" * 5 * SLOT_BYTES)
    store.close()
    again = open_store(tmp_path)
    assert num_disk_bytes(tmp_path) == 10 * SLOT_BYTES
    assert get(again, range(10)) == [block(n) for n in range(10)]
    again.close()


def test_a_folder_in_use_is_refused(tmp_path: Path, store: BlockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hob.kvcache.store.LOCK_TIMEOUT_S", 0.05)
    with pytest.raises(StorageError, match="cannot open the KV store"):
        open_store(tmp_path)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=40))
@settings(max_examples=150, deadline=None)
def test_slot_map_agrees_with_a_set(steps: list[tuple[bool, int]]) -> None:
    slots, held = SlotMap([]), list[list[int]]()
    for is_free, n in steps:
        if is_free and held:
            slots.free(held.pop(n % len(held)))
        else:
            got = slots.allocate(n)
            assert got == list(range(got[0], got[0] + n)), "neighbours, ascending"
            held.append(got)
        used = {slot for group in held for slot in group}
        assert sum(map(len, held)) == len(used)
        free = {slot for first, last in slots.holes for slot in range(first, last)}
        assert free | used == set(range(slots.end))
        assert not free & used
        assert SlotMap(used).holes == slots.holes


def test_runs() -> None:
    slots = [3, 4, 5, 9, 10, 2]
    assert runs([(16, slot) for slot in slots], 2) == [(0, 2), (2, 1), (3, 2), (5, 1)]
    assert runs([(16, 3), (8, 4), (8, 5)], 2) == [(0, 1), (1, 2)], "files are not neighbours"
    assert runs([], 4) == []
