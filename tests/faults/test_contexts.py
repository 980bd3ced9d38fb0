"""Contexts through every kind of end: kill -9 of either process, damage, a full disk, a device key that changed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hob.client import Client
from hob.errors import HobError, NotFound, StorageError
from tests.daemons import Daemon, durable, running, short_folder, until

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 20}
TEXTS = [f"turn {i} " + "x" * 150 for i in range(4)]


def reply_of(turn: dict[str, Any]) -> str:
    return str(turn["choices"][0]["message"]["content"])


def undisturbed(client: Client) -> list[str]:
    context = client.create_context()
    replies = [reply_of(client.turn(context["id"], text, **GREEDY)) for text in TEXTS]
    client.delete_context(context["id"])
    return replies


def stats_of(client: Client) -> dict[str, Any]:
    stats: dict[str, Any] = client.stats()["stats"]
    return stats


def wait_written(client: Client) -> None:
    """Until the engine process has nothing more to write."""
    last = -1
    while (now := stats_of(client)["num_blocks_written"]) != last:
        last = now
        client.complete("x", max_tokens=1)  # statistics come with reports
        time.sleep(0.2)


def kill_engine(daemon: Daemon, client: Client) -> None:
    pid = daemon.engine_pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: _new_engine(daemon, client, pid), "a new engine")


def _new_engine(daemon: Daemon, client: Client, old: int) -> bool:
    with contextlib.suppress(HobError, AssertionError):
        return daemon.engine_pid != old and client.health()["status"] == "ok"
    return False


@pytest.fixture(scope="module", name="expected")
def expected_replies() -> list[str]:
    with running() as daemon, daemon.client() as client:
        return undisturbed(client)


@pytest.mark.parametrize("what", ["engine", "daemon", "polite"])
def test_a_context_goes_on_as_if_nothing_had_happened(expected: list[str], what: str) -> None:
    with running() as daemon:
        with daemon.client() as client:
            context_id = client.create_context("kept")["id"]
        for i, text in enumerate(TEXTS):
            with daemon.client() as client:
                turn = client.turn(context_id, text, **GREEDY)
                assert reply_of(turn) == expected[i]
                if what == "engine":
                    kill_engine(daemon, client)
                    continue
                if i % 2:
                    wait_written(client)
            daemon.process.send_signal(signal.SIGKILL if what == "daemon" else signal.SIGTERM)
            daemon.wait_end()
            time.sleep(0.1)
            daemon.restart()
        with daemon.client() as client:
            (found,) = client.contexts()
            assert (found["id"], found["name"], found["num_turns"]) == (context_id, "kept", len(TEXTS))
            assert stats_of(client)["num_alarms"] == 0


def test_restored_blocks_are_used_not_computed() -> None:
    with running() as daemon:
        with daemon.client() as client:
            context_id = client.create_context()["id"]
            client.turn(context_id, "x" * 2000, **GREEDY)
            wait_written(client)
        daemon.process.kill()
        daemon.wait_end()
        with daemon.restart().client() as client:
            turn = client.turn(context_id, "more", **GREEDY)
            cached = turn["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert turn["usage"]["prompt_tokens"] - cached < 64
            client.complete("x", max_tokens=1)
            assert stats_of(client)["num_blocks_read"] >= 120


def test_the_engine_killed_at_random_moments_while_it_writes(expected: list[str]) -> None:
    with running() as daemon, daemon.client() as client:
        for delay_ms in (0, 1, 3, 8):
            context_id = client.create_context()["id"]
            client.turn(context_id, TEXTS[0], **GREEDY)
            client.turn(context_id, TEXTS[1], **GREEDY)
            time.sleep(delay_ms / 1000)
            kill_engine(daemon, client)
            assert reply_of(client.turn(context_id, TEXTS[2], **GREEDY)) == expected[2]
        client.complete("x", max_tokens=1)
        assert stats_of(client)["num_alarms"] == 0, "a torn write is not named by any row"


def test_a_turn_cut_off_by_the_engines_death_leaves_the_one_before() -> None:
    with running(model="fake:5") as daemon, daemon.client() as client:
        context_id = client.create_context()["id"]
        client.turn(context_id, "Hello", **GREEDY)
        before = client.context(context_id)
        stream = client.turn(context_id, "long", stream=True, temperature=0, max_tokens=3000)
        next(stream)
        os.kill(daemon.engine_pid, signal.SIGKILL)
        with pytest.raises(HobError):
            list(stream)
        assert durable(client.context(context_id)) == durable(before)
        assert client.turn(context_id, "again", **GREEDY)["context"]["num_turns"] == 2


def test_turns_that_the_client_left_take_no_room_on_disk() -> None:
    with running(model="fake:5") as daemon, daemon.client() as client:
        context_id, other = (client.create_context()["id"] for _ in range(2))
        client.turn(context_id, TEXTS[0], **GREEDY)
        wait_written(client)
        before = client.context(context_id)
        assert before["kv"]["num_bytes"] > 0
        for i in range(3):
            stream = client.turn(context_id, f"{i} {TEXTS[1]}", stream=True, temperature=0, max_tokens=3000)
            next(stream)
            stream.close()  # type: ignore[attr-defined]
            until(lambda: stats_of(client)["num_running"] == 0, "the turn to be given up")
        client.turn(other, TEXTS[0], **GREEDY)
        until(lambda: client.context(other)["kv"]["num_bytes"], "what is written after them")
        assert client.context(context_id) == before


def test_a_turn_that_ended_at_a_stop_string_is_on_disk() -> None:
    with running(model="fake:5") as daemon:
        with daemon.client() as client:
            context_id = client.create_context()["id"]
            # The stop is its first character: the engine has gone on by the time it is told.
            stop = reply_of(client.turn(client.create_context()["id"], "x" * 500, **GREEDY))[0]
            turn = client.turn(context_id, "x" * 500, stop=stop, **(GREEDY | {"max_tokens": 1000}))
            assert turn["choices"][0]["finish_reason"] == "stop"
            until(lambda: client.context(context_id)["kv"]["num_bytes"], "its blocks")
            wait_written(client)
            assert client.context(context_id)["kv"]["num_blocks"]["16"] >= turn["context"]["num_tokens"] // 16
        daemon.process.kill()
        daemon.wait_end()
        with daemon.restart().client() as client:
            more = client.turn(context_id, "more", **GREEDY)
            cached = more["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert cached >= turn["context"]["num_tokens"] // 16 * 16


def test_damaged_files_raise_the_alarm_and_change_no_reply(expected: list[str]) -> None:
    with running() as daemon:
        with daemon.client() as client:
            context_id = client.create_context()["id"]
            for text in TEXTS[:3]:
                client.turn(context_id, text, **GREEDY)
            wait_written(client)
        daemon.process.kill()
        daemon.wait_end()
        time.sleep(0.1)
        (slab,) = daemon.home.glob("contexts/kv-*/*.slab")
        raw = bytearray(slab.read_bytes())
        raw[4096 * 5 + 3] ^= 1
        slab.write_bytes(raw)
        with daemon.restart().client() as client:
            assert reply_of(client.turn(context_id, TEXTS[3], **GREEDY)) == expected[3]
            until(lambda: _alarms(client) == 1, "the alarm")


def _alarms(client: Client) -> int:
    client.complete("x", max_tokens=1)
    return int(stats_of(client)["num_alarms"])


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 2 MB at `folder`; skips where none can be mounted."""
    folder.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    """Take what the disk has left."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def until_full(client: Client, context_id: str) -> dict[str, Any]:
    """Take turns until one fails; the context as it was before it. The database has some room of its own."""
    for _ in range(200):
        before = client.context(context_id)
        try:
            client.turn(context_id, TEXTS[1], **GREEDY)
        except StorageError:
            return before
    raise AssertionError("the disk never was full")


def test_a_full_disk_is_said_and_the_last_finished_turn_stays(expected: list[str]) -> None:
    with short_folder() as home, small_disk(home / "contexts"):
        filler = home / "contexts" / "filler"
        with Daemon(home).wait_ready() as daemon:
            with daemon.client() as client:
                context_id = client.create_context()["id"]
                assert reply_of(client.turn(context_id, TEXTS[0], **GREEDY)) == expected[0]
                fill(filler)
                before = until_full(client, context_id)
                assert durable(client.context(context_id)) == durable(before)
                assert client.chat("Hello", **GREEDY)["usage"]["completion_tokens"] == 20, "the service goes on"
            daemon.process.kill()
            daemon.wait_end()
            filler.unlink()
            with daemon.restart().client() as client:
                assert durable(client.context(context_id)) == durable(before)
                turn = client.turn(context_id, TEXTS[1], **GREEDY)
                assert turn["context"]["num_turns"] == before["num_turns"] + 1
                assert stats_of(client)["num_alarms"] == 0


def test_deleting_frees_the_bytes_on_disk() -> None:
    with running() as daemon, daemon.client() as client:
        context_id = client.create_context()["id"]
        client.turn(context_id, "x" * 2000, **GREEDY)
        wait_written(client)
        (slab,) = daemon.home.glob("contexts/kv-*/*.slab")
        assert slab.stat().st_blocks * 512 >= 120 * 4096
        client.delete_context(context_id)
        until(lambda: slab.stat().st_blocks == 0, "the bytes to be freed")
        with pytest.raises(NotFound):
            client.turn(context_id, "x", **GREEDY)


def test_a_changed_device_key_is_an_error_that_says_so() -> None:
    with running() as daemon:
        with daemon.client() as client:
            context_id = client.create_context()["id"]
            client.turn(context_id, "Hello", **GREEDY)
        daemon.process.kill()
        daemon.wait_end()
        (daemon.home / "keys" / "device.key").write_bytes(b"z" * 32)
        with daemon.restart().client() as client:
            with pytest.raises(StorageError, match="was not wrapped by this device key"):
                client.turn(context_id, "Hello", **GREEDY)
            assert client.chat("Hello", **GREEDY)["usage"]["completion_tokens"] == 20, "the rest of the service goes on"
