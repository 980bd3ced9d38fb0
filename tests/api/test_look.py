"""What the owner sees: overview, event stream, metrics. And that nobody else does."""

from __future__ import annotations

import json

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hob.service import identity
from tests.api.conftest import Server, wait_for
from tests.api.scripted import ScriptedBackend

GOOD = {"model": "default", "messages": [{"role": "user", "content": "Hi"}]}
OWNER_ONLY = ["/hob/v1/overview", "/hob/v1/events", "/metrics"]


def test_overview_has_what_the_page_draws(http: httpx.Client) -> None:
    http.post("/v1/chat/completions", json=GOOD, headers={"x-hob-class": "interactive"})
    state = http.get("/hob/v1/overview").json()
    assert state["models"][0]["name"] == "scripted"
    assert state["memory"]["pss_bytes"] > 0
    assert "processes" in {part["name"] for part in state["memory"]["parts"]}
    assert set(state["series"]) >= {"time", "ttft_ms", "output_tok_s"}


def test_requests_in_flight_are_seen_with_their_class(
    http: httpx.Client, server: Server, backend: ScriptedBackend
) -> None:
    backend.delay_s = 0.2
    with http.stream("POST", "/v1/chat/completions", json={**GOOD, "stream": True, "service_class": "background"}):
        requests = httpx.get(server.url + "/hob/v1/overview").json()["requests"]
    assert [(r["endpoint"], r["class"]) for r in requests] == [("/v1/chat/completions", "background")]


def test_events_go_on_until_the_client_leaves(http: httpx.Client, server: Server) -> None:
    with http.stream("GET", "/hob/v1/events") as stream:
        lines = (line for line in stream.iter_lines() if line)
        first, second = (json.loads(next(lines)[6:]) for _ in range(2))
    assert second["time"] > first["time"]
    wait_for(lambda: not httpx.get(server.url + "/hob/v1/overview").json()["requests"])


def test_metrics_parse_and_count(http: httpx.Client) -> None:
    def count() -> float:
        families = {f.name: f for f in text_string_to_metric_families(http.get("/metrics").text)}
        assert {"hob_in_flight", "hob_ttft_seconds", "hob_kv_blocks", "hob_steps"} <= set(families)
        labels = {"endpoint": "/v1/chat/completions", "status": "200"}
        return sum(sample.value for sample in families["hob_requests"].samples if sample.labels == labels)

    before = count()
    http.post("/v1/chat/completions", json=GOOD)
    http.get("/v1/models/x")
    assert count() == before + 1
    assert 'endpoint="/v1/models/{name}",status="404"' in http.get("/metrics").text


@pytest.mark.parametrize("path", OWNER_ONLY)
def test_only_the_owner_sees_everybody(path: str, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity.Caller, "is_owner", property(lambda self: False))
    reply = http.get(path)
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "permission_denied")


def test_a_browser_needs_a_session(http: httpx.Client, server: Server) -> None:
    own = {"origin": server.url, "sec-fetch-site": "same-origin"}
    assert http.get("/health", headers=own).json()["error"]["param"] == "Cookie"
    path = http.post("/hob/v1/dashboard", json={}).json()["path"]
    entered = http.get(path, headers={"sec-fetch-site": "none"})
    assert (entered.status_code, entered.headers["location"]) == (303, "/")
    assert http.get("/health", headers=own).status_code == 200  # httpx keeps the cookie
    page = http.get("/", headers={"sec-fetch-site": "none"})
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text.replace("http://www.w3.org/2000/svg", "")
    assert http.get(path, headers={"sec-fetch-site": "cross-site"}).status_code == 403
