"""The whole API under made-up requests (schemathesis, from the OpenAPI document), on a daemon with the fake engine.

Valid bodies, and bodies that break the document somewhere. Whatever comes, the answer is no 5xx, and the daemon lives.
Of the valid ones two of three are cut down to fields that contradict nothing and name what is there, or nearly all
would end at a check and not reach the engine; `test_most_kinds_of_request_are_answered` sees to that. HOB_FUZZ_CASES
sets how many a run makes for each; docs/results.md has a long one.
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

NUM_CASES = int(os.environ.get("HOB_FUZZ_CASES", "3"))
SCHEMA = schemathesis.openapi.from_dict(document())
OPERATIONS = {
    f"{operation.method.upper()} {operation.path}": operation
    for operation in (result.ok() for result in SCHEMA.get_all_operations())
    # The owner's, and it would ask other machines; and a stream that never ends.
    if operation.path not in ("/api/pull", "/hob/v1/events")
}
PLAIN = {"model", "messages", "prompt", "input", "text", "texts", "labels", "tokens", "stream", "name", "kind"}
PLAIN |= {"budget", "continuations", "examples", "rank", "max_tokens"}
SAMPLING = {"temperature", "top_p", "top_k", "min_p", "seed", "n", "stop", "presence_penalty", "frequency_penalty"}
SAMPLING |= {"repetition_penalty", "max_completion_tokens", "service_class", "logit_bias", "allow_cut"}
RUNS = [(name, GenerationMode.POSITIVE) for name in OPERATIONS] + [
    (name, GenerationMode.NEGATIVE) for name, operation in OPERATIONS.items() if operation.body
]
APP = "test"
"""Of `Daemon.client`: what it makes is there for these requests."""
ANSWERED: Counter[str] = Counter()
"""Operation -> answers of 2xx to valid bodies."""
STATUSES: Counter[int] = Counter()


def fit(body: dict[str, Any], turn: int) -> dict[str, Any]:
    """A valid body that is likely to be answered: of a model that is there, short, in two of three turns plain."""
    body = {**body, "model": "default"}
    if turn % 3:
        body = {name: value for name, value in body.items() if name in PLAIN or (turn % 3 == 1 and name in SAMPLING)}
        if body.get("messages"):
            body["messages"] = [{"role": "user", "content": str(m)[:99]} for m in body["messages"][:3]]
        if "texts" in body or "input" in body or "continuations" in body:
            body |= {name: ["a river", "a hill"] for name in ("texts", "input", "continuations") if name in body}
        if "labels" in body:
            body |= {"labels": ["yes", "no"], "text": "It rains."}
            body = {name: value for name, value in body.items() if name in ("model", "labels", "text")}
        if "examples" in body:
            body["examples"] = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(8)]
        if "name" in body:
            body["name"] = f"app{turn}"
        if isinstance(body.get("prompt"), list):
            body["prompt"] = [str(part)[:99] for part in body["prompt"][:3]]
        body.pop("logit_bias", None)
        if "budget" in body:
            body["budget"] = "4GB"
    for name in ("max_tokens", "max_completion_tokens", "top_k", "n"):
        if isinstance(body.get(name), int):
            body[name] = min(body[name], 4)
    if body.keys() >= {"max_tokens", "max_completion_tokens"}:
        del body["max_tokens"]
    return body


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running(kv_tokens=1024, max_contexts=64) as daemon:
        yield daemon
    print(f"\n{STATUSES.total()} requests: {dict(sorted(STATUSES.items()))}")


@pytest.fixture(scope="module")
def there(daemon: Daemon) -> dict[str, str]:
    """What paths may name: a context, a trained task, and a model."""
    with daemon.client() as client:
        examples = [{"text": f"{word} {i}", "label": word} for word in ("rain", "sun") for i in range(4)]
        client.train_task("there", examples)
        client.trained_task("there")
        return {"context_id": client.create_context("there")["id"], "task": "there", "name": "fake"}


@pytest.mark.parametrize(("name", "mode"), RUNS)
@pytest.mark.filterwarnings("ignore")
def test_no_request_makes_the_service_fail(
    name: str, mode: GenerationMode, daemon: Daemon, there: dict[str, str]
) -> None:
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
            case.body = fit(case.body, len(statuses))
        if case.path_parameters and not name.startswith("DELETE") and len(statuses) % 3:
            case.path_parameters |= {key: there[key] for key in case.path_parameters if key in there}
        response = case.call(base_url=base_url, headers={"X-Hob-App": APP}, timeout=60)
        statuses.append(response.status_code)
        assert response.status_code < 500, (case.as_curl_command(), response.status_code, response.content[:500])

    ask()
    print(f"{name} {mode.value}: {len(statuses)} requests, {dict(Counter(statuses))}")
    STATUSES.update(statuses)
    if mode is GenerationMode.POSITIVE:
        ANSWERED[name] = sum(status < 300 for status in statuses)
    with daemon.client() as client:
        assert client.health()["status"] == "ok"
    assert "bug " not in daemon.log, daemon.log[-3000:]


def test_most_kinds_of_request_are_answered() -> None:
    """After those above: what is nearly always refused says little about what lies behind the checks."""
    if len(ANSWERED) < len(OPERATIONS):
        pytest.skip("only some of the tests above ran")
    # What these would delete is not there: 404.
    kinds = {name: count for name, count in ANSWERED.items() if not name.startswith("DELETE")}
    assert sum(count > 0 for count in kinds.values()) >= 0.8 * len(kinds), kinds
