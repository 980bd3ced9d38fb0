"""Memory and models over HTTP: who is shown what, and how soon a model is needed that is not there."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from hob.api.app import create_app
from hob.api.services import ServedModel, Services
from hob.api.shelf import Installed, Library, ModelShelf
from hob.config import Config
from hob.messages import MemoryStats, ModelInfo, ModelSpec, ModelStats, Need
from hob.request import ServiceClass
from hob.service.apps import Apps
from tests.api.conftest import Server
from tests.api.scripted import MODEL, ByteTokenizer, PlainChat, ScriptedBackend

BUSY = {"num_running": 3, "num_waiting": 2, "idle_s": 7.0, "accounts": {"kv": 5}, "num_bytes": 5}
PATHS = ("/hob/v1/memory", "/hob/v1/stats")


@pytest.mark.parametrize("path", PATHS)
def test_no_app_learns_what_others_hold_and_do(tmp_path: Path, path: str) -> None:
    backend, apps = ScriptedBackend(), Apps(tmp_path / "apps.json")
    key = apps.add_key("guest")
    models = [
        ModelStats("scripted", "ready", leases=["1000/secret-app"], rank=4, is_pinned=True, **BUSY),
        ModelStats("other", "ready", leases=["1000/secret-app", "key:guest/app"], rank=2, **BUSY),
    ]
    backend.memory = MemoryStats(100, 10, 1, models)
    services = Services(backend, ByteTokenizer(), PlainChat(), Config(), time.time(), apps=apps)
    with Server(create_app(services), tmp_path / "hob.sock") as server, httpx.Client(base_url=server.url) as http:

        def seen(**headers: str) -> Any:
            told = http.get(path, headers=headers).json()
            return told["stats"]["memory"] if path.endswith("stats") else told

        owners, guests = seen(), seen(authorization=f"Bearer {key}")
        shown = http.get("/api/ps", headers={"authorization": f"Bearer {key}"}).json()["models"]
    assert [model["leases"] for model in owners["models"]] == [models[0].leases, models[1].leases]
    assert owners["models"][0]["num_running"] == 3
    assert "secret-app" not in str(guests)
    assert (guests["budget_bytes"], guests["reserved_bytes"]) == (100, 10)
    assert [(m["name"], m["state"], m["rank"], m["is_pinned"]) for m in guests["models"]] == [
        ("scripted", "ready", 0, False),
        ("other", "ready", 2, False),
    ]
    assert [m["leases"] for m in guests["models"]] == [[], ["key:guest/app"]]
    assert not any(model[name] for model in guests["models"] for name in BUSY)
    assert [model["name"] for model in shown] == ["scripted"]


class SlowLoads(ScriptedBackend):
    """Loads any model, in 0.2 s."""

    needs: list[Need]

    async def load(self, spec: ModelSpec, need: Need) -> ModelInfo:
        """See Backend."""
        self.needs.append(need)
        await asyncio.sleep(0.2)
        return msgspec.structs.replace(MODEL, name=spec.name)


def test_a_deadline_runs_from_the_call_and_is_told_with_its_class_to_who_loads_the_model(tmp_path: Path) -> None:
    backend, reads = SlowLoads(), []
    backend.needs = []
    library = Library(
        lambda: [Installed("other", 1, 0)],
        lambda name: name,
        lambda name: ModelSpec(name, ""),
        lambda name: reads.append(name) or (ByteTokenizer(), PlainChat()),  # type: ignore[func-returns-value]
    )
    default = ServedModel("scripted", 0)
    shelf = ModelShelf(backend, library, default)
    services = Services(backend, ByteTokenizer(), PlainChat(), Config(), time.time(), [default], shelf=shelf)
    message = [{"role": "user", "content": "Hi"}]
    urgent = {"service_class": "interactive", "ttft_deadline_ms": 9000}
    with Server(create_app(services), tmp_path / "s") as server, httpx.Client(base_url=server.url) as http:
        start = time.monotonic()
        with ThreadPoolExecutor() as pool:
            job = {"model": "other", "prompt": "Hi", "service_class": "background"}
            first = pool.submit(http.post, "/v1/completions", json=job)
            time.sleep(0.1)
            chat = http.post("/v1/chat/completions", json={"model": "other", "messages": message, **urgent})
        assert first.result().status_code == chat.status_code == 200
    assert [need.service_class for need in backend.needs] == [ServiceClass.BACKGROUND, ServiceClass.INTERACTIVE]
    assert backend.needs[0].due_s is None
    due_s, arrived_s = backend.needs[1].due_s, backend.requests[-1].arrived_s
    assert due_s is not None
    assert arrived_s is not None
    assert start < arrived_s < time.monotonic() - 0.2, "the time of loading is in it"
    assert abs(due_s - arrived_s - 9) < 0.01
    assert reads == ["other"], "the tokenizer is read once"
