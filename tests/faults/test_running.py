"""What happens to a running daemon: processes die, clients vanish, bodies are monstrous. It goes on, and says why."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import httpx
import pytest

from hob.errors import DaemonUnreachable, EngineUnavailable
from hob.memory import is_running
from tests.daemons import Daemon, running, until

CHAT = {"model": "default", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}


@pytest.fixture(scope="module")
def slow() -> Iterator[Daemon]:
    """A daemon whose steps take 5 ms: there is time to die in the middle."""
    with running(model="fake:5") as daemon:
        yield daemon


def free_blocks(daemon: Daemon) -> tuple[int, int]:
    with daemon.client() as client:
        stats = client.stats()["stats"]
    return stats["num_free_blocks"], stats["num_blocks"]


def test_an_engine_killed_in_the_middle_ends_the_stream_with_an_error_and_is_replaced(slow: Daemon) -> None:
    engine = slow.engine_pid
    with slow.client() as client:
        stream = client.chat("hello", stream=True, max_tokens=4000)
        for _ in range(5):
            next(stream)
        os.kill(engine, signal.SIGKILL)
        with pytest.raises(EngineUnavailable, match=rf"pid {engine}.*SIGKILL"):
            list(stream)
        assert client.chat("hello", max_tokens=3)["usage"]["completion_tokens"] == 3
    assert slow.engine_pid != engine
    assert slow.process.poll() is None


def test_a_step_that_hangs_ends_with_an_error_and_the_engine_is_replaced() -> None:
    """Steps of an hour. Two seconds are far more than an engine needs to start, so nothing here depends on speed."""
    with running(model="fake:3600000", watchdog_s=2) as daemon, daemon.client() as client:
        engine = daemon.engine_pid
        with pytest.raises(EngineUnavailable, match=rf"pid {engine}\) died: a step hung"):
            client.chat("hello", max_tokens=3)
        until(lambda: daemon.log.count("ready in") == 2, "another engine")
        assert "a step hangs" in daemon.log
        assert daemon.process.poll() is None


def test_a_daemon_killed_in_the_middle_takes_its_engine_along_and_can_be_restarted() -> None:
    with running(model="fake:5") as daemon:
        engine = daemon.engine_pid
        with daemon.client() as client:
            stream = client.chat("hello", stream=True, max_tokens=4000)
            next(stream)
            daemon.process.kill()
            with pytest.raises(DaemonUnreachable):
                list(stream)
        daemon.wait_end()
        until(lambda: not is_running(engine), "the engine to exit by itself")
        with daemon.restart().client() as client:
            assert client.chat("hello", max_tokens=3)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_vanishes_frees_its_blocks(slow: Daemon, streams: bool) -> None:
    body = {**CHAT, "max_tokens": 4000, "stream": streams}
    with slow.http() as http:
        if streams:
            with http.stream("POST", "/v1/chat/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/chat/completions", json=body, timeout=0.5)
    until(lambda: free_blocks(slow)[0] == free_blocks(slow)[1] > 0, "all blocks to be free")


def test_ten_megabytes_of_json_are_refused_by_size(slow: Daemon) -> None:
    body = json.dumps({**CHAT, "messages": [{"role": "user", "content": "x" * 10_000_000}]})
    with slow.http() as http:
        response = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert response.status_code == 413
        assert "8,388,608" in response.json()["error"]["message"]
        assert http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 3}).status_code == 200


def test_invalid_utf8_is_refused_by_position(slow: Daemon) -> None:
    body = json.dumps(CHAT).encode().replace(b"hello", b"hel\xfflo")
    with slow.http() as http:
        response = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_request_in_flight_may_finish_while_the_daemon_stops() -> None:
    with running(model="fake:10") as daemon, daemon.client() as client:
        stream = client.chat("hello", stream=True, max_tokens=100)
        next(stream)
        daemon.process.send_signal(signal.SIGTERM)
        chunks = list(stream)
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert daemon.wait_end() == 0, daemon.log


def test_a_request_that_takes_too_long_is_cut_off_when_the_daemon_stops() -> None:
    with running(model="fake:10") as daemon, daemon.client() as client:
        stream = client.chat("hello", stream=True, max_tokens=7000)
        next(stream)
        daemon.process.send_signal(signal.SIGTERM)
        with pytest.raises(EngineUnavailable, match="the daemon is stopping"):
            list(stream)
        assert daemon.wait_end() == 0, daemon.log
        assert "Traceback" not in daemon.log
