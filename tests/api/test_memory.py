"""Who is shown what of the memory: the owner all, other apps the sums and their own leases."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from hob.api.app import create_app
from hob.api.services import Services
from hob.config import Config
from hob.messages import MemoryStats, ModelStats
from hob.service.apps import Apps
from tests.api.conftest import Server
from tests.api.scripted import ByteTokenizer, PlainChat, ScriptedBackend

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
