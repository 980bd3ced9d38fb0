"""The whole API under made-up requests (schemathesis, from the OpenAPI document), on a daemon with the fake engine.

Valid bodies, and bodies that break the document somewhere. Whatever comes, the answer is no 5xx, and the daemon lives.
HOB_FUZZ_CASES sets how many a run makes for each; the run recorded in docs/results.md made 8,509 requests.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from hob.api.openapi import document
from tests.daemons import Daemon, running

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    import schemathesis
    from schemathesis import GenerationMode

NUM_CASES = int(os.environ.get("HOB_FUZZ_CASES", "5"))
SCHEMA = schemathesis.openapi.from_dict(document())
OPERATIONS = {
    f"{operation.method.upper()} {operation.path}": operation
    for operation in (result.ok() for result in SCHEMA.get_all_operations())
    if operation.path != "/api/pull"  # the owner's, and it would ask other machines
}
PLAIN = {"model", "messages", "prompt", "input", "text", "texts", "labels", "tokens", "stream", "name", "kind"}
RUNS = [(name, GenerationMode.POSITIVE) for name in OPERATIONS] + [
    (name, GenerationMode.NEGATIVE) for name, operation in OPERATIONS.items() if operation.body
]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running(kv_tokens=1024, max_contexts=8) as daemon:
        yield daemon


@pytest.mark.parametrize(("name", "mode"), RUNS)
@pytest.mark.filterwarnings("ignore")
def test_no_request_makes_the_service_fail(name: str, mode: GenerationMode, daemon: Daemon) -> None:
    operation = OPERATIONS[name]
    statuses: list[int] = []
    base_url = f"http://127.0.0.1:{daemon.state.port}"

    @seed(1)
    @settings(
        max_examples=NUM_CASES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body["model"] = "default"  # else nearly all of them would end at a model that is not there,
            if len(statuses) % 2:  # or at one of many options
                case.body = {name: value for name, value in case.body.items() if name in PLAIN}
                if case.body.get("messages"):
                    case.body["messages"] = [{"role": "user", "content": str(m)} for m in case.body["messages"][:3]]
        response = case.call(base_url=base_url, timeout=60)
        statuses.append(response.status_code)
        assert response.status_code < 500, (case.as_curl_command(), response.status_code, response.content[:500])

    ask()
    print(f"{name} {mode.value}: {len(statuses)} requests, {dict(Counter(statuses))}")
    with daemon.client() as client:
        assert client.health()["status"] == "ok"
    assert "bug " not in daemon.log, daemon.log[-3000:]
