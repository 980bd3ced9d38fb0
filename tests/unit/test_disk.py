"""Which stores of KV are removed: those nobody has loaded for long, and never one that is open."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hob.engine.fake import FakeEngine
from hob.kvcache.keys import KeyRing
from hob.kvcache.store import BlockStore
from hob.service.disk import STALE_S, Disk, DiskSpec, open_disk

DAY_S = 86400.0


class Home:
    """Engines of different models, one after the other or at once, over one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spec = DiskSpec(str(folder / "contexts"), str(folder / "keys"), 1 << 30)
        self.disks: list[Disk] = []

    def open(self, name: str) -> Disk:
        disk = open_disk(self.spec, FakeEngine(name=name), "")
        assert disk is not None
        self.disks.append(disk)
        return disk

    def load(self, name: str) -> Path:
        """Open and close; its folder."""
        before = set(self.stores)
        self.open(name)
        self.disks.pop().swap.close()
        (new,) = set(self.stores) - before or {max(self.stores, key=lambda p: (p / "lock").stat().st_mtime)}
        return new

    @property
    def stores(self) -> list[Path]:
        return list((self.folder / "contexts").glob("kv-*"))


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    made = Home(tmp_path)
    yield made
    for disk in made.disks:
        disk.swap.close()


def age(store: Path, seconds: float, *but: str) -> None:
    """As if nothing but these files had changed for so long."""
    then = time.time() - seconds
    for path in [*store.iterdir(), store]:
        if path.name not in but:
            os.utime(path, (then, then))


def test_what_was_not_loaded_for_long_goes(home: Home) -> None:
    old, other, _ = home.load("old"), home.load("other"), home.load("used today")
    age(old, STALE_S + DAY_S)
    age(other, STALE_S - DAY_S)
    home.load("new")
    assert not old.exists()
    assert other.exists()


def test_any_file_that_changed_lately_keeps_the_store(home: Home) -> None:
    """The index itself may not have changed: a write-ahead log is not copied into it for long."""
    old, _ = home.load("old"), home.load("used today")
    (old / "index.db-wal").touch()
    age(old, STALE_S + DAY_S, "index.db-wal")
    home.load("new")
    assert old.exists()


def test_loading_is_use(home: Home) -> None:
    old, _ = home.load("old"), home.load("used today")
    age(old, STALE_S + DAY_S)
    assert home.load("old") == old
    home.load("new")
    assert old.exists()


@pytest.mark.parametrize("fault", ["BlockIndex.holders", "BlockStore.reconcile"])
def test_a_store_that_did_not_open_can_be_opened_the_next_time(
    home: Home, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that failed for a moment: the failed attempt must not keep the lock."""
    home.load("a")
    where = "block_index" if fault.startswith("BlockIndex") else "store"

    def fail(*_: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as broken:
        broken.setattr(f"hob.kvcache.{where}.{fault}", fail)
        assert open_disk(home.spec, FakeEngine(name="a"), "") is None
    home.open("a")


def test_an_open_store_is_never_removed(home: Home) -> None:
    opened = home.open("open").swap.store
    (path,) = home.stores
    age(path, 100 * DAY_S)
    other = home.load("other")
    age(path, 100 * DAY_S)
    home.load("new")
    assert path.exists()
    assert other.exists()
    opened.write("app", "c", [b"k" * 16], {b"k" * 16: bytes(opened.block_bytes)})
    assert opened.count("app", [b"k" * 16]) == 1


@pytest.mark.parametrize("days", [365, -365])
def test_a_clock_that_jumps_makes_nothing_stale(home: Home, monkeypatch: pytest.MonkeyPatch, days: int) -> None:
    """Stale is what was left alone while others were used. A year in which none was is no such thing."""
    stores = [home.load(name) for name in ("one", "two")]
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + days * DAY_S)
    home.load("three")
    assert all(store.exists() for store in stores)


def test_a_store_that_was_removed_while_another_waited_for_it_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = KeyRing(tmp_path / "keys", {})
    first = BlockStore(tmp_path / "kv", "model", 128, ring, 1 << 20)

    def remove(seconds: float) -> None:
        """While it waits: what `remove_stale` does, which has the lock when it does it."""
        for path in (tmp_path / "kv").iterdir():
            path.unlink()
        (tmp_path / "kv").rmdir()
        first.close()

    monkeypatch.setattr("hob.kvcache.store.time.sleep", remove)
    again = BlockStore(tmp_path / "kv", "model", 128, ring, 1 << 20)
    assert again.write("app", "c", [b"k" * 16], {b"k" * 16: bytes(128)}) == 1
    again.close()
