"""Histories of contexts: durable, private, whole."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from hob.errors import Conflict, NotFound, RateLimited, StorageError
from hob.kvcache.contexts import ContextStore, Facts, live_contexts
from hob.kvcache.keys import KeyRing


def open_contexts(tmp_path: Path, max_contexts: int = 8) -> ContextStore:
    return ContextStore(tmp_path / "contexts", KeyRing(tmp_path / "keys", {}), max_contexts)


@pytest.fixture
def contexts(tmp_path: Path) -> Iterator[ContextStore]:
    opened = open_contexts(tmp_path)
    yield opened
    opened.close()


def test_turns_add_up_and_survive(tmp_path: Path, contexts: ContextStore) -> None:
    record = contexts.create("app", "model", Facts("notes", opening=[{"role": "system", "content": "Be brief."}]))
    assert (record.num_tokens, record.num_turns) == (0, 0)
    record = contexts.append(record, [1, 2, 3], Facts("notes", "chat"))
    record = contexts.append(record, [70000, 5], record.facts)
    again = open_contexts(tmp_path)
    found, tokens = again.read("app", record.context_id)
    assert tokens == [1, 2, 3, 70000, 5]
    assert found == record
    assert found.facts == Facts("notes", "chat", [])
    again.close()


def test_a_fork_goes_its_own_way(contexts: ContextStore) -> None:
    parent = contexts.append(contexts.create("app", "m", Facts("p")), [1, 2], Facts("p", "text"))
    child = contexts.fork("app", parent.context_id, "c")
    assert child.parent_id == parent.context_id
    assert child.facts == Facts("c", "text")
    contexts.append(child, [3], child.facts)
    contexts.append(parent, [4], parent.facts)
    assert contexts.read("app", child.context_id)[1] == [1, 2, 3]
    contexts.delete("app", parent.context_id)
    assert contexts.read("app", child.context_id)[1] == [1, 2, 3]


def test_another_app_finds_nothing(contexts: ContextStore) -> None:
    record = contexts.create("app", "m", Facts())
    for act in (contexts.get, contexts.read, contexts.delete, contexts.fork):
        with pytest.raises(NotFound, match=f"app 'other' has no context '{record.context_id}'"):
            act("other", record.context_id)
    assert contexts.records("other") == []
    assert [found.context_id for found in contexts.records("app")] == [record.context_id]


def test_two_turns_from_one_state_do_not_mix(contexts: ContextStore) -> None:
    record = contexts.create("app", "m", Facts())
    contexts.append(record, [1], Facts())
    with pytest.raises(Conflict, match="another turn meanwhile"):
        contexts.append(record, [2], Facts())
    assert contexts.read("app", record.context_id)[1] == [1]
    contexts.delete("app", record.context_id)
    with pytest.raises(NotFound):
        contexts.append(record, [2], Facts())


def test_the_limit_is_per_app_and_named(tmp_path: Path) -> None:
    contexts = open_contexts(tmp_path, max_contexts=2)
    for _ in range(2):
        last = contexts.create("app", "m", Facts())
    for act in (lambda: contexts.create("app", "m", Facts()), lambda: contexts.fork("app", last.context_id)):
        with pytest.raises(RateLimited, match="has 2 contexts, the limit is 2"):
            act()
    contexts.create("other", "m", Facts())
    contexts.delete("app", last.context_id)
    contexts.create("app", "m", Facts())
    contexts.close()


def test_nothing_that_was_said_lies_plain_on_disk(tmp_path: Path, contexts: ContextStore) -> None:
    facts = Facts("my-secret-name", opening=[{"role": "system", "content": "secret prompt"}])
    contexts.append(contexts.create("app", "m", facts), [0x41414141] * 50, facts)
    raw = b"".join(path.read_bytes() for path in (tmp_path / "contexts").iterdir())
    assert b"secret" not in raw
    assert b"AAAA" not in raw
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "contexts").iterdir())


def test_moved_turns_are_refused(tmp_path: Path, contexts: ContextStore) -> None:
    one = contexts.append(contexts.create("app", "m", Facts()), [1], Facts())
    two = contexts.append(contexts.create("app", "m", Facts()), [2], Facts())
    with sqlite3.connect(tmp_path / "contexts" / "contexts.db") as database:
        database.execute(
            "UPDATE turns SET sealed = (SELECT sealed FROM turns WHERE context = ?) WHERE context = ?",
            (one.context_id, two.context_id),
        )
    database.close()
    with pytest.raises(StorageError, match="tampered"):
        contexts.read("app", two.context_id)
    contexts.delete("app", two.context_id)


def test_a_lost_turn_is_noticed(tmp_path: Path, contexts: ContextStore) -> None:
    record = contexts.append(contexts.create("app", "m", Facts()), [1], Facts())
    record = contexts.append(record, [2], Facts())
    with sqlite3.connect(tmp_path / "contexts" / "contexts.db") as database:
        database.execute("DELETE FROM turns WHERE number = 1")
    database.close()
    with pytest.raises(StorageError, match="has 1 tokens on disk, expected 2"):
        contexts.read("app", record.context_id)


def test_a_full_disk_leaves_the_last_turn(contexts: ContextStore) -> None:
    record = contexts.append(contexts.create("app", "m", Facts()), [1], Facts())
    (pages,) = contexts._database.execute("PRAGMA page_count").fetchone()
    contexts._database.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageError, match="full"):
        contexts.append(record, list(range(100_000)), Facts())
    assert contexts.read("app", record.context_id) == (record, [1])
    contexts.append(record, [2], Facts())
    assert contexts.read("app", record.context_id)[1] == [1, 2]


def test_live_contexts_as_the_engine_process_sees_them(tmp_path: Path) -> None:
    assert live_contexts(tmp_path / "contexts") == {}
    contexts = open_contexts(tmp_path)
    parent = contexts.create("app", "m", Facts())
    child = contexts.fork("app", parent.context_id)
    assert live_contexts(tmp_path / "contexts") == {
        parent.context_id: ("app", None),
        child.context_id: ("app", parent.context_id),
    }
    full = contexts.append(parent, [1, 2], Facts())
    grown = contexts.fork("app", full.context_id)
    assert live_contexts(tmp_path / "contexts")[grown.context_id] == ("app", parent.context_id)
    contexts.append(grown, [3], Facts())
    assert live_contexts(tmp_path / "contexts")[grown.context_id] == ("app", None), "it goes its own way"
    contexts.close()
