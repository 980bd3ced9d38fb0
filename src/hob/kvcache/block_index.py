"""The block store's index: which key lies in which slot, and which context refers to which keys. SQLite, rows only.

Each method is one transaction: all of it is on the disk when it returns, or nothing of it is.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

Key = bytes

_SCHEMA = """
CREATE TABLE IF NOT EXISTS blocks (
    app TEXT, key BLOB, slot INTEGER, nonce BLOB, bits INTEGER NOT NULL DEFAULT 16, PRIMARY KEY (app, key))
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS refs (context TEXT, key BLOB, PRIMARY KEY (context, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS holders (
    context TEXT PRIMARY KEY, app TEXT, last_use REAL, bits INTEGER NOT NULL DEFAULT 16) WITHOUT ROWID;
"""


@dataclass(slots=True, frozen=True)
class Entry:
    """Where a block lies."""

    slot: int
    nonce: bytes
    bits: int = 16
    """Of a value; blocks of different bits lie in different files."""


@dataclass(slots=True, frozen=True)
class HolderRow:
    """A context as of its last turn."""

    context_id: str
    app: str
    last_use: float
    """A number that is higher than that of any use before."""
    bits: int = 16
    """What it asked for: see compression.py."""


class BlockIndex:
    """All methods raise sqlite3.Error. One thread at a time."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = WAL")
        # FULL: a lost commit would leave rows whose slots hold other blocks already: safe, but a false alarm.
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.executescript(_SCHEMA)
        for table in ("blocks", "holders"):  # made before blocks had bits
            if "bits" not in [row[1] for row in self._database.execute(f"PRAGMA table_info({table})")]:
                self._database.execute(f"ALTER TABLE {table} ADD COLUMN bits INTEGER NOT NULL DEFAULT 16")

    def blocks(self) -> Iterable[tuple[str, Key, Entry]]:
        """All blocks: app, key, place."""
        for app, key, *entry in self._database.execute("SELECT app, key, slot, nonce, bits FROM blocks"):
            yield app, key, Entry(*entry)

    def holders(self) -> Iterable[HolderRow]:
        """All contexts."""
        for row in self._database.execute("SELECT context, app, last_use, bits FROM holders"):
            yield HolderRow(*row)

    def refs(self) -> Iterable[tuple[str, Key]]:
        """All references: context, key."""
        yield from self._database.execute("SELECT context, key FROM refs")

    def end_turn(
        self,
        holder: HolderRow,
        entries: Mapping[Key, Entry],
        refs: Iterable[Key],
        stale: Iterable[Key],
        gone: Iterable[Key],
    ) -> None:
        """Add a turn's blocks and references; take out the context's `stale` references and the app's `gone` blocks."""
        context_id, app = holder.context_id, holder.app
        with self._database as database:
            rows = [(app, key, entry.slot, entry.nonce, entry.bits) for key, entry in entries.items()]
            database.executemany("INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?, ?)", rows)
            database.executemany("DELETE FROM refs WHERE context = ? AND key = ?", [(context_id, k) for k in stale])
            self._delete(app, gone)
            self._refer(holder, refs)

    def add_holder(self, holder: HolderRow, keys: Iterable[Key]) -> None:
        """A context that refers to blocks which are there."""
        with self._database:
            self._refer(holder, keys)

    def drop(self, context_ids: Iterable[str], gone: Mapping[str, Iterable[Key]]) -> None:
        """Delete contexts, and by app the blocks that lose their last reference."""
        ids = [(context_id,) for context_id in context_ids]
        with self._database as database:
            database.executemany("DELETE FROM refs WHERE context = ?", ids)
            database.executemany("DELETE FROM holders WHERE context = ?", ids)
            for app, keys in gone.items():
                self._delete(app, keys)

    def delete(self, app: str, keys: Iterable[Key]) -> None:
        """Delete blocks."""
        with self._database:
            self._delete(app, keys)

    def delete_refused(self, refused: Iterable[tuple[str, Key, Entry]]) -> None:
        """Delete blocks, unless they lie elsewhere by now."""
        rows = [(app, key, entry.slot, entry.bits) for app, key, entry in refused]
        with self._database as database:
            database.executemany("DELETE FROM blocks WHERE app = ? AND key = ? AND slot = ? AND bits = ?", rows)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _delete(self, app: str, keys: Iterable[Key]) -> None:
        self._database.executemany("DELETE FROM blocks WHERE app = ? AND key = ?", [(app, key) for key in keys])

    def _refer(self, holder: HolderRow, keys: Iterable[Key]) -> None:
        row = (holder.context_id, holder.app, holder.last_use, holder.bits)
        self._database.executemany("INSERT OR IGNORE INTO refs VALUES (?, ?)", [(holder.context_id, k) for k in keys])
        # By name: an index that was made earlier has more columns.
        self._database.execute("INSERT OR REPLACE INTO holders (context, app, last_use, bits) VALUES (?, ?, ?, ?)", row)
