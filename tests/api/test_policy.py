"""What policy.toml says of an app reaches the scheduler."""

from __future__ import annotations

import os
import time
from pathlib import Path

import httpx

from hob.api.app import create_app
from hob.api.services import Services
from hob.config import Config
from hob.kvcache.contexts import ContextStore
from hob.kvcache.keys import KeyRing
from hob.request import ServiceClass
from hob.service.conditions import Conditions
from hob.service.gate import GatedBackend
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


def test_contexts_of_an_app_count_with_the_bits_that_they_have(tmp_path: Path) -> None:
    path, backend = tmp_path / "policy.toml", ScriptedBackend()
    limit = 40 * backend.model.kv_bytes_per_token
    path.write_text(f'[app."{os.getuid()}/*"]\ncontext_bytes = {limit}\n')
    contexts = ContextStore(tmp_path / "contexts", KeyRing(tmp_path / "keys", {}), 8)
    policy = Policy(path)
    gated = GatedBackend(backend, policy, Conditions(lambda: policy.file.background), contexts)
    services = Services(gated, ByteTokenizer(), PlainChat(), Config(), time.time(), policy=policy, contexts=contexts)
    with Server(create_app(services), tmp_path / "hob.sock") as server, httpx.Client(base_url=server.url) as http:
        statuses = {}
        for app, kv_bits in (("exact", 16), ("fewer", 4)):
            headers = {"x-hob-app": app}
            made = http.post("/hob/v1/contexts", json={"kv_bits": kv_bits}, headers=headers).json()["id"]
            turn = {"prompt": "x" * 60, "max_tokens": 1}  # a token a byte
            replies = [http.post(f"/hob/v1/contexts/{made}/generate", json=turn, headers=headers) for _ in range(2)]
            statuses[app] = [reply.status_code for reply in replies]
    contexts.close()
    assert statuses == {"exact": [200, 429], "fewer": [200, 200]}
