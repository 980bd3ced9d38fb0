"""What policy.toml says of an app reaches the scheduler."""

from __future__ import annotations

import os
import time
from pathlib import Path

import httpx

from hob.api.app import create_app
from hob.api.services import Services
from hob.config import Config
from hob.request import ServiceClass
from hob.service.policy import Policy
from tests.api.conftest import Server
from tests.api.scripted import ByteTokenizer, PlainChat, ScriptedBackend


def test_weight_and_class_of_an_app_reach_its_requests(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(f'[app."{os.getuid()}/notes"]\nweight = 2.5\nservice_class = "background"\n')
    backend = ScriptedBackend()
    services = Services(backend, ByteTokenizer(), PlainChat(), Config(), time.time(), policy=Policy(path))
    body = {"model": "", "prompt": "Hi", "max_tokens": 1}
    with Server(create_app(services), tmp_path / "hob.sock") as server, httpx.Client(base_url=server.url) as http:
        for app in ("notes", "other"):
            assert http.post("/v1/completions", json=body, headers={"x-hob-app": app}).status_code == 200
    asked = [(request.weight, request.service_class) for request in backend.requests]
    assert asked == [(2.5, ServiceClass.BACKGROUND), (1.0, ServiceClass.STANDARD)]
