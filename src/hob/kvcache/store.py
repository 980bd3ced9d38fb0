"""KV blocks on disk: the second level of the prefix cache, under the same chained keys. One model's blocks per store.

    <folder>/index.db           SQLite: key -> slot and nonce, by app; which context refers to which keys
            /<app's hash>.slab  the app's blocks, one slot each: the block as it lay in memory, AES-256-GCM, tag last
            /<app's hash>.4.slab  those of 4 bits a value (compression.py), likewise 8 and 2: made when there are any

A block is accepted only if it was written for this key, this app and this model: all three are authenticated with the
bytes, so a torn, tampered, swapped or foreign slot is a miss (the block is computed again) and raises `num_alarms`.
Crash-safe: slots are written and synced before the rows that name them commit, and rows are deleted before their slots
are used again; what a crash leaves in between is unnamed and is punched out at the next opening. Once rows are
committed nothing that fails takes them back: a hole that cannot be punched is wasted space.

Reads may run in several threads; writes and deletes come from one. It knows no engine and no policy (swap.py).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import shutil
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hob.durable import sync_folder
from hob.errors import StorageError
from hob.kvcache.block_index import BlockIndex, Entry, HolderRow, Key
from hob.kvcache.compression import EXACT, LEVELS, Codec
from hob.kvcache.keys import NONCE_BYTES, TAG_BYTES, KeyRing
from hob.kvcache.slab import Slab, SlotMap, Write, runs, slot_bytes_for

log = logging.getLogger("hob.store")

LOCK_TIMEOUT_S = 3.0
"""How long to wait for a dying engine process to let go of the folder."""
WRITE_RUN = 16
"""Blocks encrypted and written at a time: bounds the writer's memory."""


@dataclass(slots=True)
class Drawer:
    """One app's blocks of one number of bits: a file."""

    slab: Slab
    slots: SlotMap


@dataclass(slots=True)
class Shelf:
    """One app's blocks."""

    cipher: AESGCM
    drawers: dict[int, Drawer] = field(default_factory=dict)
    """By bits."""
    entries: dict[Key, Entry] = field(default_factory=dict)
    num_refs: dict[Key, int] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Of all slots in use: those that could not be freed yet as well."""
        return sum(drawer.slots.num_used * drawer.slab.slot_bytes for drawer in self.drawers.values())

    def free(self, entries: Iterable[Entry]) -> None:
        """Take their slots back."""
        by_bits: dict[int, list[int]] = {}
        for entry in entries:
            by_bits.setdefault(entry.bits, []).append(entry.slot)
        for bits, slots in by_bits.items():
            self.drawers[bits].slots.free(slots)

    def punch(self) -> None:
        """Give the bytes of free slots back to the file system. Raises OSError."""
        for drawer in self.drawers.values():
            drawer.slab.punch(drawer.slots.holes, drawer.slots.end)


@dataclass(slots=True, frozen=True)
class Kept:
    """What is on disk of a context."""

    bits: int
    """What it asked for."""
    num_bytes: int
    num_blocks: dict[int, int]
    """By bits: what its blocks have."""


@dataclass(slots=True)
class Holder:
    """A context, as far as the store is concerned."""

    app: str
    last_use: float
    """See HolderRow."""
    bits: int = EXACT
    """What it asked for."""
    keys: dict[Key, None] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class Piece:
    """Neighbouring slots of one file, to be read at once: `keys[i]` lies in entries[i]."""

    app: str
    keys: list[Key]
    entries: list[Entry]


class BlockStore:
    """See the module. All methods raise StorageError where a disk fails, and leave memory and disk in agreement."""

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        block_bytes: int,
        keys: KeyRing,
        max_bytes: int,
        write: Write = os.pwritev,
        codec: Codec | None = None,
    ) -> None:
        """`fingerprint` names model, KV format and arithmetic: blocks of another one are never accepted.

        codec: makes blocks of fewer bits. None: all are kept as they are.
        """
        self.block_bytes = block_bytes
        self.slot_bytes = slot_bytes_for(block_bytes + TAG_BYTES)
        self.codec = codec
        self.max_bytes = max_bytes
        self.num_alarms = 0
        self.num_evicted = 0
        """Contexts whose blocks were given up to make room."""
        self.num_punch_errors = 0
        self.is_checking = True
        """Off: tags are not looked at. A test hook, to show that the checks are what stops a leak."""
        self._folder = folder
        self._fingerprint = fingerprint.encode()
        self._keys = keys
        self._write = write
        self._lock = threading.Lock()
        self._shelves: dict[str, Shelf] = {}
        self._holders: dict[str, Holder] = {}
        self._refused: list[tuple[str, Key, Entry]] = []  # by readers; the writing thread frees their slots
        self._last_use = 0.0
        """Of all contexts. A count, because clocks are set back; it goes on from Unix times in older indexes."""
        with contextlib.ExitStack() as undo:  # else the next attempt would wait for our own lock
            try:
                self._lock_fd = _lock(folder)
                undo.callback(os.close, self._lock_fd)
                self._index = BlockIndex(folder / "index.db")
                undo.pop_all()
                undo.callback(self.close)
                self._load()
            except (OSError, sqlite3.Error) as error:
                raise StorageError(f"cannot open the KV store '{folder}': {error}") from error
            undo.pop_all()

    # ---- questions ----

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots in use."""
        with self._lock:
            return sum(shelf.num_bytes for shelf in self._shelves.values())

    def count(self, app: str, keys: Sequence[Key]) -> int:
        """How many leading keys are there."""
        with self._lock:
            shelf = self._shelves.get(app)
            if shelf is None:
                return 0
            for i, key in enumerate(keys):
                if key not in shelf.entries:
                    return i
            return len(keys)

    def missing(self, app: str, keys: Sequence[Key], levels: Mapping[Key, int] | None = None) -> list[Key]:
        """Those of the keys that are not there, or with more bits than `levels` wants."""
        with self._lock:
            shelf = self._shelves.get(app)
            if shelf is None:
                return list(keys)
            entries = [shelf.entries.get(key) for key in keys]
            wanted = [(levels or {}).get(key, EXACT) for key in keys]
        return [k for k, e, bits in zip(keys, entries, wanted, strict=True) if e is None or e.bits > bits]

    def kept(self, app: str, context_id: str) -> Kept | None:
        """What is there of a context. None: nothing."""
        with self._lock:
            holder, shelf = self._holders.get(context_id), self._shelves.get(app)
            if holder is None or shelf is None or holder.app != app:
                return None
            levels = Counter(entry.bits for key in holder.keys if (entry := shelf.entries.get(key)) is not None)
            num_bytes = sum(count * self._slot_bytes(bits) for bits, count in levels.items())
            return Kept(holder.bits, num_bytes, dict(sorted(levels.items())))

    def pieces(self, app: str, keys: Sequence[Key], longest: int) -> list[Piece]:
        """The leading keys that are there, cut into neighbouring slots of at most `longest`."""
        with self._lock:
            shelf = self._shelves.get(app)
            entries = [] if shelf is None else [shelf.entries.get(key) for key in keys]
        found = [entry for entry in entries[: entries.index(None) if None in entries else None] if entry is not None]
        cuts = runs([(entry.bits, entry.slot) for entry in found], longest)
        return [Piece(app, list(keys[i : i + n]), found[i : i + n]) for i, n in cuts]

    # ---- reading: any thread ----

    def read(self, piece: Piece, block: memoryview) -> Iterator[bool]:
        """Each block of a piece in turn, in `block`; False for one that is gone or was refused.

        One at a time: what is copied on before the next comes is still in the core's own cache.
        """
        bits = piece.entries[0].bits
        shelf, slab = self._shelf(piece.app), self._drawer(piece.app, bits).slab
        num_bytes, stride = self._stored_bytes(bits), slab.slot_bytes
        try:
            raw = slab.read(piece.entries[0].slot, len(piece.entries))
        except OSError as error:
            log.error("cannot read '%s': %s", slab.path, error)
            raw = memoryview(b"")
        for i, (key, entry) in enumerate(zip(piece.keys, piece.entries, strict=True)):
            sealed = raw[i * stride : i * stride + num_bytes + TAG_BYTES]
            yield self._open(piece.app, shelf, key, entry, sealed, block)

    def _open(self, app: str, shelf: Shelf, key: Key, entry: Entry, sealed: memoryview, block: memoryview) -> bool:
        """Decrypt one block, and give it its bits back. False: it is not what the index says."""
        try:
            if entry.bits == EXACT:
                shelf.cipher.decrypt_into(entry.nonce, sealed, self._label(app, key, EXACT), block)
            else:
                fewer = shelf.cipher.decrypt(entry.nonce, sealed, self._label(app, key, entry.bits))
                self._codec().decode(fewer, entry.bits, block)
            return True
        except (InvalidTag, ValueError):
            with self._lock:
                if shelf.entries.get(key) is not entry:
                    return False  # freed while it was read, and perhaps written over: nobody's fault
                if not self.is_checking and entry.bits == EXACT:
                    block[:] = self._open_unchecked(shelf, entry, sealed)
                    return True
                self._refuse(app, key, entry)
            log.error("KV block %s of app '%s' is torn or was tampered with; it is computed again", key.hex(), app)
            return False

    def _refuse(self, app: str, key: Key, entry: Entry) -> None:
        self.num_alarms += 1
        self._refused.append((app, key, entry))
        del self._shelves[app].entries[key]

    def _open_unchecked(self, shelf: Shelf, entry: Entry, sealed: memoryview) -> bytes:
        """What a store without authentication would hand out (test hook)."""
        whole = bytes(sealed[: self.block_bytes]).ljust(self.block_bytes, b"\0")
        return shelf.cipher.encrypt(entry.nonce, whole, None)[: self.block_bytes]  # GCM's stream is its own inverse

    def _label(self, app: str, key: Key, bits: int) -> bytes:
        """What is authenticated beside the bytes."""
        parts = [key.hex().encode(), app.encode(), self._fingerprint]
        return b"\0".join(parts if bits == EXACT else [*parts, str(bits).encode()])

    # ---- writing: one thread ----

    def write(
        self,
        app: str,
        context_id: str,
        keys: Sequence[Key],
        blocks: Mapping[Key, bytes],
        levels: Mapping[Key, int] | None = None,
        bits: int = EXACT,
    ) -> int:
        """A turn of a context ended with these keys: keep `blocks`, and let the context refer to all that are there.

        It refers to no others any more: an earlier turn's unfinished block goes, and a turn that was given up.
        levels: bits of those that are to have fewer than 16; what is there with more is replaced. bits: what the
        context asked for. Returns how many blocks were written. Makes room by giving up blocks of contexts with the
        most bits, of these the least recently used first (LLMS: they give back the most).
        """
        levels = levels or {}
        new = self.missing(app, [key for key in keys if key in blocks], levels)
        try:
            shelf = self._shelf(app)
            self._bury()
            row = HolderRow(context_id, app, self._next_use(), bits)
            self._make_room(row, keys, sum(self._slot_bytes(levels.get(key, EXACT)) for key in new))
            places = self._allocate(app, self._fitting(new, levels), levels)
            try:
                self._write_slots(app, shelf, places, blocks)
                self._commit_turn(row, keys, places)
            except (OSError, sqlite3.Error):
                with self._lock:
                    shelf.free(places.values())
                self._punch(shelf)
                raise
        except (OSError, sqlite3.Error) as error:
            what = f"{len(new)} KV blocks of app '{app}'"
            raise StorageError(f"{what} could not be kept in '{self._folder}': {error}") from error
        return len(places)

    def _fitting(self, keys: Sequence[Key], levels: Mapping[Key, int]) -> list[Key]:
        """The first of the keys, as far as there is room for their blocks."""
        room, fitting = self.max_bytes - self.num_bytes, list[Key]()
        for key in keys:
            room -= self._slot_bytes(levels.get(key, EXACT))
            if room < 0:
                break
            fitting.append(key)
        return fitting

    def _allocate(self, app: str, keys: Sequence[Key], levels: Mapping[Key, int]) -> dict[Key, Entry]:
        """A place for each key: neighbours among those of the same bits."""
        places = {}
        for bits in LEVELS:
            some = [key for key in keys if levels.get(key, EXACT) == bits]
            if some:
                drawer = self._drawer(app, bits)
                with self._lock:
                    slots = drawer.slots.allocate(len(some))
                for key, slot in zip(some, slots, strict=True):
                    places[key] = Entry(slot, secrets.token_bytes(NONCE_BYTES), bits)
        return places

    def _write_slots(self, app: str, shelf: Shelf, places: Mapping[Key, Entry], blocks: Mapping[Key, bytes]) -> None:
        keys = list(places)  # by bits, and ascending among them
        for start, count in runs([(place.bits, place.slot) for place in places.values()], WRITE_RUN):
            first = places[keys[start]]
            sealed = [
                shelf.cipher.encrypt(
                    places[key].nonce, self._with_bits(blocks[key], first.bits), self._label(app, key, first.bits)
                )
                for key in keys[start : start + count]
            ]
            shelf.drawers[first.bits].slab.write(first.slot, sealed)
        for bits in {place.bits for place in places.values()}:
            shelf.drawers[bits].slab.sync()

    def _with_bits(self, block: bytes, bits: int) -> bytes:
        return block if bits == EXACT else self._codec().encode(block, bits)

    def _commit_turn(self, row: HolderRow, keys: Sequence[Key], places: Mapping[Key, Entry]) -> None:
        """Raises sqlite3.Error if nothing of it is committed, and nothing once it is: `places` are named then."""
        app, context_id = row.app, row.context_id
        wanted = set(keys)
        shelf = self._shelves[app]
        with self._lock:
            holder = self._holders.get(context_id) or Holder(app, row.last_use)
            refs = [k for k in dict.fromkeys(keys) if k not in holder.keys and (k in places or k in shelf.entries)]
            stale = [k for k in holder.keys if k not in wanted]
            gone = [k for k in stale if shelf.num_refs[k] == 1]
        self._index.end_turn(row, places, refs, stale, gone)
        with self._lock:
            replaced = [entry for key in places if (entry := shelf.entries.get(key)) is not None]
            shelf.entries.update(places)
            shelf.free(replaced)
            self._refer(row, refs)
            for key in stale:
                del self._holders[context_id].keys[key]
        self._release(app, dict.fromkeys(stale, 1), gone)
        if replaced and not gone:
            self._punch(shelf)

    def fork(self, app: str, parent_id: str, child_id: str) -> None:
        """The child's history is the parent's: it refers to the same blocks."""
        with self._lock:
            parent = self._holders.get(parent_id)
            if parent is None or parent.app != app or child_id in self._holders:
                return
            keys, row = list(parent.keys), HolderRow(child_id, app, self._next_use(), parent.bits)
        with self._index_change():
            self._index.add_holder(row, keys)
        with self._lock:
            self._refer(row, keys)

    def drop(self, app: str, context_ids: Iterable[str]) -> None:
        """Contexts are gone: free the blocks that no other one refers to."""
        with self._lock:
            ids = [i for i in context_ids if i in self._holders and self._holders[i].app == app]
        if ids:
            with self._index_change():
                self._drop(ids)

    def reconcile(self, live: Mapping[str, tuple[str, str | None]]) -> None:
        """At start: make up for what was missed while no engine ran. live: context -> (app, parent)."""
        with self._lock:
            dead = [i for i, holder in self._holders.items() if i not in live or live[i][0] != holder.app]
        for child_id, (app, parent_id) in live.items():
            if parent_id is not None:
                self.fork(app, parent_id, child_id)
        if dead:
            with self._index_change():
                self._drop(dead)

    def close(self) -> None:
        """Close all files."""
        self._index.close()
        for shelf in self._shelves.values():
            for drawer in shelf.drawers.values():
                drawer.slab.close()
        os.close(self._lock_fd)

    # ---- inside ----

    def _stored_bytes(self, bits: int) -> int:
        """Of a block on disk, without its tag."""
        return self.block_bytes if bits == EXACT else self._codec().num_bytes(bits)

    def _slot_bytes(self, bits: int) -> int:
        return slot_bytes_for(self._stored_bytes(bits) + TAG_BYTES)

    def _codec(self) -> Codec:
        if self.codec is None:
            raise StorageError(f"blocks of fewer bits in '{self._folder}', but this engine's KV cannot have them")
        return self.codec

    @contextlib.contextmanager
    def _index_change(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"the index of the KV store '{self._folder}' cannot be changed: {error}") from error

    def _shelf(self, app: str) -> Shelf:
        with self._lock:
            if app not in self._shelves:
                self._shelves[app] = Shelf(self._keys.cipher(app, "kv"))
            return self._shelves[app]

    def _drawer(self, app: str, bits: int) -> Drawer:
        shelf = self._shelf(app)
        with self._lock:
            if bits not in shelf.drawers:
                name = blake2b(app.encode(), digest_size=16).hexdigest() + ("" if bits == EXACT else f".{bits}")
                slab = Slab(self._folder / f"{name}.slab", self._slot_bytes(bits), self._write)
                shelf.drawers[bits] = Drawer(slab, SlotMap([]))
                sync_folder(self._folder)
            return shelf.drawers[bits]

    def _load(self) -> None:
        """Read the index; reclaim what it does not name."""
        taken: set[tuple[str, int, int]] = set()
        for app, key, entry in self._index.blocks():
            self._drawer(app, entry.bits)
            self._shelf(app).entries[key] = entry
            if (app, entry.bits, entry.slot) in taken:
                self._refuse(app, key, entry)
            taken.add((app, entry.bits, entry.slot))
        rows = {row.context_id: row for row in self._index.holders()}
        self._last_use = max((row.last_use for row in rows.values()), default=0.0)
        for row in rows.values():
            self._drawer(row.app, EXACT)
            self._refer(row, [])
        for context_id, key in self._index.refs():
            if context_id in rows:
                self._refer(rows[context_id], [key])
        self._bury()
        for app, shelf in self._shelves.items():
            unnamed = [key for key in shelf.entries if key not in shelf.num_refs]
            self._index.delete(app, unnamed)
            for key in unnamed:
                del shelf.entries[key]
            for bits, drawer in shelf.drawers.items():
                drawer.slots = SlotMap(entry.slot for entry in shelf.entries.values() if entry.bits == bits)
            self._punch(shelf)

    def _bury(self) -> None:
        """Delete the rows of refused blocks and free their slots."""
        with self._lock:
            refused = list(self._refused)
        self._index.delete_refused(refused)
        with self._lock:
            del self._refused[: len(refused)]
            for app, _, entry in refused:
                slots = self._shelves[app].drawers[entry.bits].slots
                if slots.end:  # not while loading, which makes the map from what is left
                    slots.free([entry.slot])

    def _refer(self, row: HolderRow, keys: Iterable[Key]) -> None:
        holder = self._holders.setdefault(row.context_id, Holder(row.app, row.last_use))
        holder.last_use, holder.bits = row.last_use, row.bits
        num_refs = self._shelves[row.app].num_refs
        for key in keys:
            if key not in holder.keys:
                holder.keys[key] = None
                num_refs[key] = num_refs.get(key, 0) + 1

    def _next_use(self) -> float:
        self._last_use += 1
        return self._last_use

    def _make_room(self, row: HolderRow, keys: Sequence[Key], num_bytes: int) -> None:
        """Give up the blocks of the contexts with the most bits, of these the least recently used, but not this one.

        Its own go first that its turn gives up; and those of its keys that only others refer to are its own first.
        """
        if self.num_bytes + num_bytes <= self.max_bytes:
            return
        self._commit_turn(row, keys, {})
        with self._lock:
            order = sorted((-h.bits, h.last_use, i) for i, h in self._holders.items() if i != row.context_id)
        for *_, victim in order:
            if self.num_bytes + num_bytes <= self.max_bytes:
                return
            log.info("the KV store is full (%d bytes): blocks of context %s are given up", self.max_bytes, victim)
            self.num_evicted += 1
            self._drop([victim])

    def _drop(self, context_ids: list[str]) -> None:
        """First the rows, then memory, then the bytes."""
        with self._lock:
            losses: dict[str, dict[Key, int]] = {}
            for context_id in context_ids:
                holder = self._holders[context_id]
                lost = losses.setdefault(holder.app, {})
                for key in holder.keys:
                    lost[key] = lost.get(key, 0) + 1
            gone = {a: [k for k, n in lost.items() if self._shelves[a].num_refs[k] == n] for a, lost in losses.items()}
        self._index.drop(context_ids, gone)
        for context_id in context_ids:
            del self._holders[context_id]
        for app, lost in losses.items():
            self._release(app, lost, gone[app])

    def _release(self, app: str, lost: Mapping[Key, int], gone: Sequence[Key]) -> None:
        """Take references away, and give up the slots of keys that have none left."""
        shelf = self._shelves[app]
        with self._lock:
            for key, count in lost.items():
                shelf.num_refs[key] -= count
            for key in gone:
                del shelf.num_refs[key]
            shelf.free([e for key in gone if (e := shelf.entries.pop(key, None)) is not None])
        if gone:
            self._punch(shelf)

    def _punch(self, shelf: Shelf) -> None:
        """Give back what free slots take on the disk. What cannot be given back now is with the next ones."""
        try:
            shelf.punch()
        except OSError as error:
            if not self.num_punch_errors:
                log.error("freed KV blocks in '%s' cannot be given back to the disk: %s", self._folder, error)
            self.num_punch_errors += 1


def last_use(folder: Path) -> float:
    """Unix time at which anything of a store was written, or when it was opened. Raises OSError.

    Of all its files: what is in a write-ahead log changes the index itself only when that is closed.
    """
    times = [0.0]
    for path in (folder, *folder.iterdir()):
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times)


def remove_store(folder: Path) -> bool:
    """Remove a store and all its blocks, unless somebody has it open. Raises OSError."""
    descriptor = _try_lock(folder)
    if descriptor is None:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)
    return True


def _lock(folder: Path) -> int:
    """One engine process at a time. Waits a little for one that is dying."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (descriptor := _try_lock(folder)) is not None:
            os.utime(descriptor)  # to be loaded is to be used
            return descriptor
        if time.monotonic() > deadline:
            raise BlockingIOError(errno.EWOULDBLOCK, "another process has it open")
        time.sleep(0.02)


def _try_lock(folder: Path) -> int | None:
    """None: somebody has it open, or has just removed it."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:
            return descriptor
    except BlockingIOError:
        pass
    os.close(descriptor)
    return None
