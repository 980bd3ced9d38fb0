"""KV blocks on disk: the second level of the prefix cache, under the same chained keys. One model's blocks per store.

    <folder>/index.db           SQLite: key -> slot and nonce, by app; which context refers to which keys
            /<app's hash>.slab  the app's blocks, one slot each: the block as it lay in memory, AES-256-GCM, tag last

A block is accepted only if it was written for this key, this app and this model: all three are authenticated with the
bytes, so a torn, tampered, swapped or foreign slot is a miss (the block is computed again) and raises `num_alarms`.
Crash-safe: slots are written and synced before the rows that name them commit, and rows are deleted before their slots
are used again; what a crash leaves in between is unnamed and is punched out at the next opening.

Reads may run in several threads; writes and deletes come from one. It knows no engine and no policy (swap.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hob.errors import StorageError
from hob.kvcache.block_index import BlockIndex, Entry, HolderRow, Key
from hob.kvcache.keys import NONCE_BYTES, TAG_BYTES, KeyRing, sync_folder
from hob.kvcache.slab import Slab, SlotMap, Write, runs, slot_bytes_for

log = logging.getLogger("hob.store")

LOCK_TIMEOUT_S = 3.0
"""How long to wait for a dying engine process to let go of the folder."""
WRITE_RUN = 16
"""Blocks encrypted and written at a time: bounds the writer's memory."""


@dataclass(slots=True)
class Shelf:
    """One app's blocks."""

    slab: Slab
    slots: SlotMap
    cipher: AESGCM
    entries: dict[Key, Entry] = field(default_factory=dict)
    num_refs: dict[Key, int] = field(default_factory=dict)


@dataclass(slots=True)
class Holder:
    """A context, as far as the store is concerned."""

    app: str
    last_use: float
    tail: Key | None = None
    """Key of its unfinished last block, which the next turn's replaces."""
    keys: dict[Key, None] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class Piece:
    """Neighbouring slots to be read at once: `keys[i]` lies in entries[i]."""

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
    ) -> None:
        """`fingerprint` names model, KV format and arithmetic: blocks of another one are never accepted."""
        self.block_bytes = block_bytes
        self.slot_bytes = slot_bytes_for(block_bytes + TAG_BYTES)
        self.max_bytes = max_bytes
        self.num_alarms = 0
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
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_fd = _lock(folder)
            self._index = BlockIndex(folder / "index.db")
            self._load()
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"cannot open the KV store '{folder}': {error}") from error

    # ---- questions ----

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots in use."""
        with self._lock:
            return self._num_bytes()

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

    def missing(self, app: str, keys: Sequence[Key]) -> list[Key]:
        """Those of the keys that are not there."""
        with self._lock:
            shelf = self._shelves.get(app)
            return list(keys) if shelf is None else [key for key in keys if key not in shelf.entries]

    def pieces(self, app: str, keys: Sequence[Key], longest: int) -> list[Piece]:
        """The leading keys that are there, cut into neighbouring slots of at most `longest`."""
        with self._lock:
            shelf = self._shelves.get(app)
            entries = [] if shelf is None else [shelf.entries.get(key) for key in keys]
        found = [entry for entry in entries[: entries.index(None) if None in entries else None] if entry is not None]
        cuts = runs([entry.slot for entry in found], longest)
        return [Piece(app, list(keys[i : i + n]), found[i : i + n]) for i, n in cuts]

    # ---- reading: any thread ----

    def read(self, piece: Piece, buffer: bytearray | None = None) -> list[memoryview | None]:
        """The blocks of a piece; None for one that is gone or was refused.

        They lie in `buffer`, which must hold them all; None makes a new one, whose pages cost as much as reading them.
        """
        plain = memoryview(bytearray(len(piece.keys) * self.block_bytes) if buffer is None else buffer)
        shelf = self._shelf(piece.app)
        try:
            raw = shelf.slab.read(piece.entries[0].slot, len(piece.entries))
        except OSError as error:
            log.error("cannot read '%s': %s", shelf.slab.path, error)
            raw = memoryview(b"")
        blocks: list[memoryview | None] = []
        for i, (key, entry) in enumerate(zip(piece.keys, piece.entries, strict=True)):
            sealed = raw[i * self.slot_bytes : i * self.slot_bytes + self.block_bytes + TAG_BYTES]
            block = plain[i * self.block_bytes : (i + 1) * self.block_bytes]
            blocks.append(block if self._open(piece.app, shelf, key, entry, sealed, block) else None)
        return blocks

    def _open(self, app: str, shelf: Shelf, key: Key, entry: Entry, sealed: memoryview, block: memoryview) -> bool:
        """Decrypt one block. False: it is not what the index says."""
        try:
            shelf.cipher.decrypt_into(entry.nonce, sealed, self._label(app, key), block)
            return True
        except (InvalidTag, ValueError):
            with self._lock:
                if shelf.entries.get(key) is not entry:
                    return False  # freed while it was read, and perhaps written over: nobody's fault
                if not self.is_checking:
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

    def _label(self, app: str, key: Key) -> bytes:
        """What is authenticated beside the bytes."""
        return b"\0".join((key.hex().encode(), app.encode(), self._fingerprint))

    # ---- writing: one thread ----

    def write(
        self, app: str, context_id: str, keys: Sequence[Key], blocks: Mapping[Key, bytes], tail: Key | None = None
    ) -> int:
        """A turn of a context ended with these keys: keep `blocks`, and let the context refer to all that are there.

        tail: the one of the keys whose block is unfinished; the context's earlier one is given up.
        Returns how many blocks were written. Makes room by giving up least recently used contexts' blocks.
        """
        new = self.missing(app, [key for key in keys if key in blocks])
        try:
            shelf = self._shelf(app)
            self._bury()
            self._make_room(context_id, len(new))
            new = new[: max(self.max_bytes - self.num_bytes, 0) // self.slot_bytes]
            with self._lock:
                slots = shelf.slots.allocate(len(new)) if new else []
            try:
                entries = self._write_slots(app, shelf, new, slots, blocks)
                self._commit_turn(app, context_id, keys, entries, tail)
            except (OSError, sqlite3.Error):
                with self._lock:
                    shelf.slots.free(slots)
                with contextlib.suppress(OSError):
                    shelf.slab.punch(shelf.slots.holes, shelf.slots.end)
                raise
        except (OSError, sqlite3.Error) as error:
            what = f"{len(new)} KV blocks of app '{app}'"
            raise StorageError(f"{what} could not be kept in '{self._folder}': {error}") from error
        return len(new)

    def _write_slots(
        self, app: str, shelf: Shelf, keys: list[Key], slots: list[int], blocks: Mapping[Key, bytes]
    ) -> dict[Key, Entry]:
        entries = {key: Entry(slot, secrets.token_bytes(NONCE_BYTES)) for key, slot in zip(keys, slots, strict=True)}
        for start, count in runs(slots, WRITE_RUN):
            sealed = [
                shelf.cipher.encrypt(entries[key].nonce, blocks[key], self._label(app, key))
                for key in keys[start : start + count]
            ]
            shelf.slab.write(slots[start], sealed)
        if keys:
            shelf.slab.sync()
        return entries

    def _commit_turn(
        self, app: str, context_id: str, keys: Sequence[Key], entries: Mapping[Key, Entry], tail: Key | None
    ) -> None:
        now, shelf = time.time(), self._shelves[app]
        with self._lock:
            holder = self._holders.get(context_id) or Holder(app, now)
            refs = [k for k in dict.fromkeys(keys) if k not in holder.keys and (k in entries or k in shelf.entries)]
            stale = [k for k in holder.keys if k == holder.tail and k not in keys]
            gone = [k for k in stale if shelf.num_refs[k] == 1]
        self._index.end_turn(HolderRow(context_id, app, now, tail), entries, refs, stale, gone)
        with self._lock:
            shelf.entries.update(entries)
            self._refer(context_id, app, refs, now, tail)
            for key in stale:
                del self._holders[context_id].keys[key]
        self._release(app, dict.fromkeys(stale, 1), gone)

    def fork(self, app: str, parent_id: str, child_id: str) -> None:
        """The child's history is the parent's: it refers to the same blocks."""
        with self._lock:
            parent = self._holders.get(parent_id)
            if parent is None or parent.app != app or child_id in self._holders:
                return
            keys, tail, now = list(parent.keys), parent.tail, time.time()
        with self._index_change():
            self._index.add_holder(HolderRow(child_id, app, now, tail), keys)
        with self._lock:
            self._refer(child_id, app, keys, now, tail)

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
            shelf.slab.close()
        os.close(self._lock_fd)

    # ---- inside ----

    def _num_bytes(self) -> int:
        return sum(len(shelf.entries) for shelf in self._shelves.values()) * self.slot_bytes

    @contextlib.contextmanager
    def _index_change(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"the index of the KV store '{self._folder}' cannot be changed: {error}") from error

    def _shelf(self, app: str) -> Shelf:
        with self._lock:
            if app not in self._shelves:
                path = self._folder / f"{blake2b(app.encode(), digest_size=16).hexdigest()}.slab"
                self._shelves[app] = Shelf(
                    Slab(path, self.slot_bytes, self._write), SlotMap([]), self._keys.cipher(app, "kv")
                )
                sync_folder(self._folder)
            return self._shelves[app]

    def _load(self) -> None:
        """Read the index; reclaim what it does not name."""
        taken: set[tuple[str, int]] = set()
        for app, key, entry in self._index.blocks():
            self._shelf(app).entries[key] = entry
            if (app, entry.slot) in taken:
                self._refuse(app, key, entry)
            taken.add((app, entry.slot))
        for row in self._index.holders():
            self._shelf(row.app)
            self._holders[row.context_id] = Holder(row.app, row.last_use, row.tail)
        for context_id, key in self._index.refs():
            if holder := self._holders.get(context_id):
                self._refer(context_id, holder.app, [key], holder.last_use, holder.tail)
        self._bury()
        for app, shelf in self._shelves.items():
            unnamed = [key for key in shelf.entries if key not in shelf.num_refs]
            self._index.delete(app, unnamed)
            for key in unnamed:
                del shelf.entries[key]
            shelf.slots = SlotMap(entry.slot for entry in shelf.entries.values())
            shelf.slab.punch(shelf.slots.holes, shelf.slots.end)

    def _bury(self) -> None:
        """Delete the rows of refused blocks and free their slots."""
        with self._lock:
            refused, self._refused = self._refused, []
        self._index.delete_refused(refused)
        with self._lock:
            for app, _, entry in refused:
                slots = self._shelves[app].slots
                if slots.end:  # not while loading, which makes the map from what is left
                    slots.free([entry.slot])

    def _refer(self, context_id: str, app: str, keys: Iterable[Key], now: float, tail: Key | None) -> None:
        holder = self._holders.setdefault(context_id, Holder(app, now))
        holder.last_use, holder.tail = now, tail
        num_refs = self._shelves[app].num_refs
        for key in keys:
            if key not in holder.keys:
                holder.keys[key] = None
                num_refs[key] = num_refs.get(key, 0) + 1

    def _make_room(self, context_id: str, num_blocks: int) -> None:
        """Give up the blocks of least recently used contexts, but not of this one."""
        with self._lock:
            order = sorted((h.last_use, i) for i, h in self._holders.items() if i != context_id)
        for _, victim in order:
            if self.num_bytes + num_blocks * self.slot_bytes <= self.max_bytes:
                return
            log.info("the KV store is full (%d bytes): blocks of context %s are given up", self.max_bytes, victim)
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
            shelf.slots.free(e.slot for key in gone if (e := shelf.entries.pop(key, None)) is not None)
        if gone:
            shelf.slab.punch(shelf.slots.holes, shelf.slots.end)


def _lock(folder: Path) -> int:
    """One engine process at a time. Waits a little for one that is dying."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise
            time.sleep(0.02)
