"""Persistent contexts: the durable token histories of apps. What is here is the truth; KV is only an accelerator.

    create -> append, at the end of each turn -> ... -> delete          fork: a copy that goes its own way from there

A history is tokens, so the same KV can be computed again anywhere and at any time. SQLite in WAL mode with
synchronous=FULL: a turn that a client was told of survives a power cut, at one fsync per turn (0.1 to 10 ms against the
seconds of a turn). Tokens, names and opening messages are what was said, so they are encrypted with the app's key and
bound to context and turn. Owned by the API process; knows no engine, no text, no HTTP. Thread-safe.
"""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from cryptography.exceptions import InvalidTag

from hob.errors import Conflict, NotFound, RateLimited, StorageError
from hob.kvcache.keys import NONCE_BYTES, KeyRing

MAX_NAME_CHARS = 128
_FILE = "contexts.db"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS contexts (
    id TEXT PRIMARY KEY, app TEXT, model TEXT, sealed BLOB, parent TEXT, num_tokens INTEGER, num_turns INTEGER,
    created REAL, updated REAL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS contexts_by_app ON contexts (app);
CREATE TABLE IF NOT EXISTS turns (
    context TEXT, number INTEGER, sealed BLOB, PRIMARY KEY (context, number)) WITHOUT ROWID;
"""
_COLUMNS = "id, app, model, sealed, parent, num_tokens, num_turns, created, updated"


class Facts(msgspec.Struct):
    """What of a context is encrypted beside its tokens."""

    name: str = ""
    kind: str = ""
    """'chat' or 'text', set by the first turn; a history is not mixed."""
    opening: list[dict[str, Any]] = []
    """Messages that wait to open the first turn (LLMS: the system prompt)."""
    kv_bits: int = 16
    """Of a value on disk: see compression.py."""


@dataclass(frozen=True, slots=True)
class ContextRecord:
    """One context, without its tokens."""

    context_id: str
    app: str
    model: str
    """Name of the model whose tokens these are."""
    facts: Facts
    parent_id: str | None
    num_tokens: int
    num_turns: int
    created: float
    """Unix time, as is `updated`."""
    updated: float


class ContextStore:
    """All contexts of a service. Another app's context is NotFound, as one that never was."""

    def __init__(self, folder: Path, keys: KeyRing, max_contexts: int | Callable[[str], int]) -> None:
        """Opens or makes the database. `max_contexts`: per app, or what gives it for an app. Raises StorageError."""
        self._keys = keys
        self._limit = max_contexts if callable(max_contexts) else lambda app: max_contexts
        self._lock = threading.Lock()
        self._claimed: set[tuple[str, str]] = set()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / _FILE).touch(mode=0o600)
            self._database = sqlite3.connect(folder / _FILE, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.execute("PRAGMA secure_delete = ON")
            self._database.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"cannot open the contexts in '{folder}': {error}") from error

    def create(self, app: str, model: str, facts: Facts) -> ContextRecord:
        """A new, empty context. Raises RateLimited at the app's limit, StorageError."""
        return self._insert(app, model, facts, None, [])

    def fork(self, app: str, context_id: str, name: str | None = None) -> ContextRecord:
        """A copy of a context as of its last finished turn. Raises NotFound, RateLimited, StorageError."""
        parent, tokens = self.read(app, context_id)
        facts = parent.facts if name is None else msgspec.structs.replace(parent.facts, name=name)
        return self._insert(app, parent.model, facts, context_id, tokens)

    def get(self, app: str, context_id: str) -> ContextRecord:
        """Raises NotFound, StorageError."""
        with self._transaction() as database:
            return self._get(database, app, context_id)

    def records(self, app: str) -> list[ContextRecord]:
        """The app's contexts, the last used first. Raises StorageError."""
        with self._transaction() as database:
            query = f"SELECT {_COLUMNS} FROM contexts WHERE app = ? ORDER BY updated DESC, id"
            return [self._record(row) for row in database.execute(query, (app,))]

    def by_app(self) -> list[tuple[str, int, int]]:
        """App, how many contexts it keeps, and of how many tokens. Raises StorageError."""
        with self._transaction() as database:
            query = "SELECT app, count(*), sum(num_tokens) FROM contexts GROUP BY app ORDER BY app"
            return database.execute(query).fetchall()

    def read(self, app: str, context_id: str) -> tuple[ContextRecord, list[int]]:
        """A context and its tokens. Raises NotFound, StorageError."""
        with self._transaction() as database:
            record = self._get(database, app, context_id)
            rows = database.execute("SELECT number, sealed FROM turns WHERE context = ? ORDER BY number", (context_id,))
            tokens = array("i")
            for number, sealed in rows:
                tokens.frombytes(self._unseal(app, f"{context_id}/{number}", sealed))
        if len(tokens) != record.num_tokens:
            raise StorageError(f"context '{context_id}' has {len(tokens)} tokens on disk, expected {record.num_tokens}")
        return record, tokens.tolist()

    def append(self, record: ContextRecord, token_ids: list[int], facts: Facts) -> ContextRecord:
        """End a turn that began at `record`: its tokens are added as a whole or not at all.

        Raises Conflict if another turn ended since, NotFound if the context was deleted, StorageError.
        """
        context_id, number, now = record.context_id, record.num_turns, time.time()
        with self._transaction() as database:
            current = self._get(database, record.app, context_id)
            if current.num_turns != number:
                raise Conflict(f"context '{context_id}' has had another turn meanwhile. Fork it to go two ways.")
            sealed = self._seal(record.app, f"{context_id}/{number}", array("i", token_ids).tobytes())
            database.execute("INSERT INTO turns VALUES (?, ?, ?)", (context_id, number, sealed))
            database.execute(
                "UPDATE contexts SET sealed = ?, num_tokens = num_tokens + ?, num_turns = ?, updated = ? WHERE id = ?",
                (self._seal_facts(record.app, context_id, facts), len(token_ids), number + 1, now, context_id),
            )
            return self._get(database, record.app, context_id)

    @contextlib.contextmanager
    def claim(self, app: str, context_id: str) -> Iterator[None]:
        """For one turn, or for deletion: no other may begin meanwhile. In this process only. Raises Conflict.

        By app: whether another app's context is busy, and so is there, is not to be told.
        """
        if (app, context_id) in self._claimed:
            raise Conflict(
                f"context '{context_id}' is busy with a turn. Wait for it to end, or fork the context.",
                retry_after_s=1.0,
            )
        self._claimed.add((app, context_id))
        try:
            yield
        finally:
            self._claimed.discard((app, context_id))

    def delete(self, app: str, context_id: str) -> None:
        """Raises NotFound, StorageError."""
        with self._transaction() as database:
            self._get(database, app, context_id)
            database.execute("DELETE FROM turns WHERE context = ?", (context_id,))
            database.execute("DELETE FROM contexts WHERE id = ?", (context_id,))

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._database.close()

    def _insert(self, app: str, model: str, facts: Facts, parent_id: str | None, token_ids: list[int]) -> ContextRecord:
        context_id, now = f"ctx-{secrets.token_hex(12)}", time.time()
        with self._transaction() as database:
            (num_contexts,) = database.execute("SELECT count(*) FROM contexts WHERE app = ?", (app,)).fetchone()
            if num_contexts >= (limit := self._limit(app)):
                raise RateLimited(
                    f"app '{app}' has {num_contexts} contexts, the limit is {limit} (setting or policy rule "
                    "'max_contexts'). Delete one: DELETE /hob/v1/contexts/{id}."
                )
            if token_ids:
                sealed = self._seal(app, f"{context_id}/0", array("i", token_ids).tobytes())
                database.execute("INSERT INTO turns VALUES (?, 0, ?)", (context_id, sealed))
            database.execute(
                f"INSERT INTO contexts ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    context_id, app, model, self._seal_facts(app, context_id, facts), parent_id,
                    len(token_ids), bool(token_ids), now, now,
                ),
            )  # fmt: skip
            return self._get(database, app, context_id)

    def _get(self, database: sqlite3.Connection, app: str, context_id: str) -> ContextRecord:
        query = f"SELECT {_COLUMNS} FROM contexts WHERE id = ? AND app = ?"
        row = database.execute(query, (context_id, app)).fetchone()
        if row is None:
            raise NotFound(f"app '{app}' has no context '{context_id}'. See GET /hob/v1/contexts.", param="id")
        return self._record(row)

    def _record(self, row: tuple[Any, ...]) -> ContextRecord:
        context_id, app, model, sealed, *rest = row
        facts = msgspec.msgpack.decode(self._unseal(app, context_id, sealed), type=Facts)
        return ContextRecord(context_id, app, model, facts, *rest)

    def _seal_facts(self, app: str, context_id: str, facts: Facts) -> bytes:
        return self._seal(app, context_id, msgspec.msgpack.encode(facts))

    def _seal(self, app: str, what: str, data: bytes) -> bytes:
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._keys.cipher(app, "tokens").encrypt(nonce, data, f"{app}\0{what}".encode())

    def _unseal(self, app: str, what: str, sealed: bytes) -> bytes:
        try:
            cipher = self._keys.cipher(app, "tokens")
            return cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], f"{app}\0{what}".encode())
        except InvalidTag:
            raise StorageError(
                f"'{what}' of app '{app}' is damaged or was tampered with, or the device key has changed. "
                "The context cannot be read; it can be deleted."
            ) from None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                with self._database:
                    yield self._database
            except sqlite3.Error as error:
                raise StorageError(f"the contexts cannot be read or written: {error}. Is the disk full?") from error


def live_contexts(folder: Path) -> dict[str, tuple[str, str | None]]:
    """Context -> (app, parent), as another process may ask. Empty if there are none yet. Raises StorageError.

    Without the parent once a copy has had a turn of its own: then it says itself which blocks are its.
    """
    if not (folder / _FILE).exists():
        return {}
    try:
        with contextlib.closing(sqlite3.connect(f"file:{folder / _FILE}?mode=ro", uri=True, timeout=5)) as database:
            try:
                query = "SELECT id, app, CASE WHEN num_turns <= 1 THEN parent END FROM contexts"
                rows = database.execute(query).fetchall()
            except sqlite3.OperationalError as error:
                if "no such table" in str(error):
                    return {}
                raise
    except sqlite3.Error as error:
        raise StorageError(f"the contexts in '{folder}' cannot be read: {error}") from error
    return {context_id: (app, parent_id) for context_id, app, parent_id in rows}
