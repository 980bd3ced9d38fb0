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


def test_contexts_of_all_bits_come_back(default_gguf: Path) -> None:
    ensure_packed(default_gguf)
    with short_folder() as home, Daemon(home, model=default_gguf).wait_ready() as daemon:
        with daemon.client() as client:
            ids = {bits: client.create_context(kv_bits=bits)["id"] for bits in (16, 8, 4, 3)}
            for context_id in ids.values():
                client.turn(context_id, prompt=TEXT, temperature=0, max_tokens=4)
                until(lambda i=context_id: is_written(client, i), "its blocks on disk")
            kv = {bits: client.context(context_id)["kv"] for bits, context_id in ids.items()}
        assert 0.5 < kv[8]["num_bytes"] / kv[16]["num_bytes"] < 0.65
        assert 0.3 < kv[4]["num_bytes"] / kv[16]["num_bytes"] < 0.4
        assert kv[3]["num_bytes"] < kv[4]["num_bytes"]
        assert kv[3]["num_blocks"].keys() == {"16", "8", "4", "2"}
        daemon.process.send_signal(signal.SIGTERM)
        daemon.wait_end()
        daemon.restart()
        with daemon.client() as client:
            for context_id in ids.values():
                turn: dict[str, Any] = client.turn(context_id, **QUESTION)
                assert turn["hob"]["tokens"]["cached"] > 500, "read from disk, not computed"
                assert turn["choices"][0]["message"]["content"].startswith(" north past three villages")
            assert client.stats()["stats"]["num_alarms"] == 0


def is_written(client: Client, context_id: str) -> bool:
    """Whether all full blocks of a context are on disk."""
    context = client.context(context_id)
    return sum((context["kv"]["num_blocks"] or {}).values()) >= context["num_tokens"] // 16
