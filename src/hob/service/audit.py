"""Who did what: one row per request in SQLite, written by a thread of its own, in files that are put aside by size.

    audit.db, audit.1.db (the one before), audit.2.db ...      0600, in a folder for the owner alone

No text of prompts or replies is in it unless the owner turns that on. A row that cannot be written is counted and told
once, and the request goes on: an audit log is no reason to stop answering.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from hob.service.policy import AuditRules

log = logging.getLogger("hob.audit")

GATHER_S = 0.25
"""Rows that come within this time are written together."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    time REAL, app TEXT, uid INTEGER, pid INTEGER, endpoint TEXT, status INTEGER, code TEXT, class TEXT,
    prompt_tokens INTEGER, cached_tokens INTEGER, output_tokens INTEGER, ms REAL, body TEXT)
"""


class Entry(msgspec.Struct, array_like=True, frozen=True):
    """One request. The order is the table's."""

    time: float
    """Unix time of its end."""
    app: str
    uid: int | None
    pid: int | None
    endpoint: str
    status: int
    code: str | None
    """Of the error, if it ended with one."""
    service_class: str | None
    prompt_tokens: int
    cached_tokens: int | None
    output_tokens: int
    ms: float
    body: str | None = None
    """What was sent, where the owner wants it kept."""


class AuditLog:
    """The log of one service. `note` never waits and never raises."""

    def __init__(self, folder: Path, rules_of: Callable[[], AuditRules]) -> None:
        self._folder = folder
        self._rules_of = rules_of
        self._entries: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.num_lost = 0

    def note(self, entry: Entry) -> None:
        """Write it down soon."""
        if not self._rules_of().enabled:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
            self._thread.start()
        self._entries.put(entry)

    def close(self) -> None:
        """Write what is left and end."""
        if self._thread is not None:
            self._entries.put(None)
            self._thread.join(5.0)
            self._thread = None

    def _run(self) -> None:
        is_open = True
        while is_open:
            batch = [self._entries.get()]
            if batch[0] is not None:
                time.sleep(GATHER_S)
            with contextlib.suppress(queue.Empty):
                while True:
                    batch.append(self._entries.get_nowait())
            is_open = None not in batch
            self._write([entry for entry in batch if entry is not None])

    def _write(self, entries: list[Entry]) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self._folder / "audit.db"
            path.touch(mode=0o600)
            with contextlib.closing(sqlite3.connect(path)) as database, database:
                database.execute(_SCHEMA)
                rows = [msgspec.to_builtins(entry) for entry in entries]
                database.executemany(f"INSERT INTO requests VALUES ({', '.join('?' * 13)})", rows)
            if path.stat().st_size > self._rules_of().max_bytes:
                self._put_aside(path)
        except (OSError, sqlite3.Error) as error:
            if not self.num_lost:
                log.error("the audit log cannot be written: %s. Requests go on without.", error)
            self.num_lost += len(entries)

    def _put_aside(self, path: Path) -> None:
        """audit.db -> audit.1.db -> audit.2.db ...; the last one goes."""
        num_files = self._rules_of().num_files
        for old in self._folder.glob("audit.*.db"):
            number = int(old.name.split(".")[1]) if old.name.split(".")[1].isdigit() else 0
            if number >= max(num_files, 1):
                old.unlink()
        for number in range(num_files - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                (self._folder / f"audit.{number}.db").rename(self._folder / f"audit.{number + 1}.db")
        if num_files:
            path.rename(self._folder / "audit.1.db")
        else:
            path.unlink()


def read_last(folder: Path, count: int) -> list[Entry]:
    """The newest entries of the present file, the newest last."""
    path = folder / "audit.db"
    if not path.exists():
        return []
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT * FROM requests ORDER BY rowid DESC LIMIT ?", (count,)).fetchall()
    return [Entry(*row) for row in reversed(rows)]
