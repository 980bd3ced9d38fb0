"""What a caller sees of admission: its place while it waits, deadlines kept or refused, and the receipt."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.daemons import Daemon, hob, running, until


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """One sequence at a time, 5 ms a step."""
    with running(model="fake:5", max_running=1) as started:
        yield started


def body_of(num_prompt: int = 8, max_tokens: int = 4, **fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": [7] * num_prompt, "max_tokens": max_tokens, "temperature": 0, **fields}


@pytest.fixture
def busy(daemon: Daemon) -> Iterator[httpx.Client]:
    """Somebody else's stream of 4,000 tokens runs, and leaves at the end of the test."""
    with daemon.http() as http, daemon.http() as other:
        opened, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with other.stream("POST", "/v1/completions", json=body_of(8, 4000, stream=True)) as reply:
                for _ in reply.iter_lines():
                    opened.set()
                    if leave.is_set():
                        return

        thread = threading.Thread(target=hold)
        thread.start()
        opened.wait(10)
        yield http
        leave.set()
        thread.join()


def test_who_waits_learns_its_place_before_its_first_token(busy: httpx.Client) -> None:
    with busy.stream("POST", "/v1/completions", json=body_of(stream=True)) as reply:
        lines = reply.iter_lines()
        first = next(lines)
        assert first.startswith(": waiting, 0 ahead, first token in about ")
        busy.close()  # a waiting client may leave


def test_an_event_reader_passes_over_the_comment_and_gets_its_tokens(daemon: Daemon) -> None:
    body = body_of(stream=True, stream_options={"include_usage": True})
    with daemon.http() as first, daemon.http() as second:
        with first.stream("POST", "/v1/completions", json=body_of(8, 4000, stream=True)) as long:
            running = long.iter_lines()  # kept: httpx closes the reply when its reader is gone
            next(running)
            request = second.build_request("POST", "/v1/completions", json=body)
            reply = second.send(request, stream=True)
            lines = reply.iter_lines()
            assert next(lines).startswith(": waiting")
        rest = [line for line in lines if line]  # the long one is gone
    assert rest[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in rest[:-1]]
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    receipt = events[-1]["hob"]
    assert receipt["waited"]["ahead"] == 0
    assert receipt["waited"]["expected"] > 0
    assert receipt["seconds"]["queued"] > 0


def test_who_does_not_wait_has_no_place(daemon: Daemon) -> None:
    with daemon.http() as http:
        receipt = http.post("/v1/completions", json=body_of()).json()["hob"]
    assert "waited" not in receipt
    assert "met" not in receipt


def test_a_deadline_that_cannot_be_met_is_refused(busy: httpx.Client) -> None:
    reply = busy.post("/v1/completions", json=body_of(ttft_deadline_ms=50))
    assert reply.status_code == 503
    error = reply.json()["error"]
    assert error["code"] == "overloaded"
    assert "wanted within 0.050 s, but is expected after" in error["message"]
    assert int(reply.headers["retry-after"]) >= 1


def test_the_receipt_says_whether_deadline_and_limit_were_kept(daemon: Daemon) -> None:
    body = body_of(ttft_deadline_ms=30_000, tpot_limit_ms=10_000)
    with daemon.client() as client:
        until(lambda: client.stats()["stats"]["num_running"] == 0, "the stream before")
    with daemon.http() as http:
        reply = http.post("/v1/completions", json=body)
        assert reply.status_code == 200, reply.text
        assert reply.json()["hob"]["met"] == {"ttft_deadline": True, "tpot_limit": True}
        bad = http.post("/v1/chat/completions", json={"model": "fake", "messages": [], "tpot_limit_ms": 0})
    assert bad.status_code == 400
    assert bad.json()["error"]["param"] == "tpot_limit_ms"


def test_ps_shows_how_long_who_waits_has_to_wait(daemon: Daemon, busy: httpx.Client) -> None:
    with daemon.http() as other, other.stream("POST", "/v1/completions", json=body_of(stream=True)) as reply:
        lines = reply.iter_lines()
        assert next(lines).startswith(": waiting")
        with daemon.client() as client:
            until(lambda: client.stats()["stats"]["num_waiting"] == 1, "the second to wait")
        apps = json.loads(hob(daemon.home, "ps", "--json").stdout)["apps"]
        assert max(app["wait_s"] for app in apps) > 0
        assert "wait s" in hob(daemon.home, "ps").stdout
