"""Contexts with fewer bits on the real model: they take less room, come back, and go on in the same vein."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from hob.client import Client
from hob.models.pack import ensure_packed
from tests.daemons import Daemon, short_folder, until

pytestmark = [pytest.mark.weights, pytest.mark.slow]

TEXT = "The river rises in the hills above the town and runs north past three villages to the sea. " * 30
QUESTION = {"prompt": " The river rises in the hills above the town and runs", "temperature": 0, "max_tokens": 8}


@pytest.mark.parametrize("kv_type", ["f16", "q8"])
def test_contexts_of_all_bits_come_back(default_gguf: Path, kv_type: str) -> None:
    ensure_packed(default_gguf)
    with short_folder() as home, Daemon(home, model=default_gguf, kv_type=kv_type).wait_ready() as daemon:
        with daemon.client() as client:
            ids = {bits: client.create_context(kv_bits=bits)["id"] for bits in (16, 8, 4, 3)}
            for context_id in ids.values():
                client.turn(context_id, prompt=TEXT, temperature=0, max_tokens=4)
                until(lambda i=context_id: is_written(client, i), "its blocks on disk")
            kv = {bits: client.context(context_id)["kv"] for bits, context_id in ids.items()}
        share = {bits: kv[bits]["num_bytes"] / kv[16]["num_bytes"] for bits in ids}
        if kv_type == "f16":
            assert 0.5 < share[8] < 0.65
            assert 0.3 < share[4] < 0.4
            assert kv[3]["num_blocks"].keys() == {"16", "8", "4", "2"}
        else:
            assert share[8] == 1, "as it lies"
            assert 0.6 < share[4] < 0.7
            assert kv[3]["num_blocks"].keys() == {"16", "4", "2"}
        assert share[3] < share[4]
        daemon.process.send_signal(signal.SIGTERM)
        daemon.wait_end()
        daemon.restart()
        with daemon.client() as client:
            for bits, context_id in ids.items():
                turn: dict[str, Any] = client.turn(context_id, **QUESTION)
                assert turn["hob"]["tokens"]["cached"] > 500, f"{bits}: computed, not read from disk\n{daemon.log}"
                assert turn["choices"][0]["message"]["content"].startswith(" north past three villages")
            assert client.stats()["stats"]["num_alarms"] == 0


def test_kv_of_8_bits_comes_back_as_it_was_and_is_never_read_as_16(default_gguf: Path) -> None:
    """Drawn at a high temperature, so that a small difference of the distributions shows."""
    question = QUESTION | {"temperature": 1.5, "seed": 7, "max_tokens": 40}

    def ask(daemon: Daemon, context_id: str) -> tuple[str, int, int]:
        with daemon.client() as client:
            turn: dict[str, Any] = client.turn(context_id, **question)
            assert client.stats()["stats"]["num_alarms"] == 0
            read = client.stats()["stats"]["num_blocks_read"]
            return turn["choices"][0]["message"]["content"], turn["hob"]["tokens"]["cached"], read

    def end(daemon: Daemon) -> None:
        daemon.process.send_signal(signal.SIGTERM)
        daemon.wait_end()

    ensure_packed(default_gguf)
    with short_folder() as home:
        with Daemon(home, model=default_gguf, kv_type="q8").wait_ready() as daemon:
            with daemon.client() as client:
                ids = [client.create_context()["id"] for _ in range(3)]
                for context_id in ids:
                    client.turn(context_id, prompt=TEXT, temperature=0, max_tokens=4)
                    until(lambda i=context_id: is_written(client, i), "its blocks on disk")
            said, _, num_read = ask(daemon, ids[0])
            assert num_read == 0
            end(daemon)
            daemon.restart()
            said_again, num_cached, num_read = ask(daemon, ids[1])
            assert (said_again, num_cached > 500, num_read > 30) == (said, True, True), "read from disk, not computed"
            end(daemon)
        with Daemon(home, model=default_gguf, kv_type="f16").wait_ready() as daemon:
            _, num_cached, num_read = ask(daemon, ids[2])
            assert (num_cached, num_read) == (0, 0)
            end(daemon)


def is_written(client: Client, context_id: str) -> bool:
    """Whether all full blocks of a context are on disk."""
    context = client.context(context_id)
    return sum((context["kv"]["num_blocks"] or {}).values()) >= context["num_tokens"] // 16
