"""Several models in a real daemon: kill -9 while one is loaded; budget, leases, unloading by HTTP and command line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from hob.client import Client
from hob.errors import Conflict, EngineUnavailable, HobError, NotFound, Overloaded, PermissionDenied
from hob.models.pack import ensure_packed
from tests.daemons import Daemon, durable, hob, short_folder, until
from tests.tiny import TinyShape, write_tiny_gguf

pytestmark = pytest.mark.slow

SHAPE = TinyShape(
    num_layers=8, hidden_size=256, num_heads=8, num_kv_heads=4, ffn_size=1024, context_length=1024, can_serve=True
)
NAMES = ("alpha", "beta")


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with short_folder() as home:
        (home / "models").mkdir()
        for seed, name in enumerate(NAMES):
            ensure_packed(write_tiny_gguf(home / "models" / f"{name}.gguf", seed, "F32", SHAPE))
        with Daemon(home, model="alpha", budget="400MB", keep_alive_s=60, kv_tokens=2048).wait_ready() as started:
            yield started


def ask(daemon: Daemon, model: str) -> str:
    with Client(daemon.rundir.socket_path, app="test", model=model, timeout_s=30) as client:
        return str(client.complete("Hello", max_tokens=4, temperature=0)["choices"][0]["text"])


def names(client: Client) -> list[str]:
    return sorted(model["name"] for model in client.memory()["models"])


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.05, 0.2])
def test_an_engine_killed_while_it_loads_a_model_is_replaced(daemon: Daemon, delay_s: float) -> None:
    with daemon.client() as client:
        with contextlib.suppress(NotFound):
            client.unload("beta")
        until(lambda: "beta" not in names(client), "the model to go")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, daemon, "beta")
        time.sleep(delay_s)
        os.kill(daemon.engine_pid, signal.SIGKILL)
        with contextlib.suppress(EngineUnavailable):  # unless it was so quick, or waited for the next process
            asked.result(30)
    replies = {name: ask(daemon, name) for name in NAMES}
    assert replies == {name: ask(daemon, name) for name in NAMES}
    with daemon.client() as client:
        until(lambda: names(client) == ["alpha", "beta"], "both in the ledger")
        memory = client.memory()
        assert memory["reserved_bytes"] == sum(model["num_bytes"] for model in memory["models"])


@pytest.mark.parametrize("delay_s", [0.01, 0.1])
def test_a_daemon_killed_while_it_loads_a_model_can_be_restarted(daemon: Daemon, delay_s: float) -> None:
    with daemon.client() as client:
        with contextlib.suppress(NotFound):
            client.unload("beta")
        until(lambda: "beta" not in names(client), "the model to go")
        context_id = client.create_context()["id"]
        client.turn(context_id, prompt="Hello", max_tokens=4, temperature=0)
        before = durable(client.context(context_id))
    engine = daemon.engine_pid
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, daemon, "beta")
        time.sleep(delay_s)
        daemon.process.kill()
        daemon.wait_end()
        with contextlib.suppress(HobError):  # the connection broke, unless it was so quick
            asked.result(30)
    until(lambda: not Path(f"/proc/{engine}").exists(), "the engine process to follow")
    daemon.restart()
    assert len({ask(daemon, "beta") for _ in range(2)}) == 1
    with daemon.client() as client:
        assert durable(client.context(context_id)) == before
        client.delete_context(context_id)


def test_a_lease_holds_a_model_until_it_ends(daemon: Daemon) -> None:
    with daemon.client() as client:
        assert client.lease("beta", rank=2, pin=True)["is_pinned"] is True
        until(lambda: "beta" in names(client), "the model")
        [beta] = [model for model in client.memory()["models"] if model["name"] == "beta"]
        assert (beta["is_pinned"], beta["rank"], len(beta["leases"])) == (True, 2, 1)
        with pytest.raises(Conflict, match="is pinned by"):
            client.unload("beta")
        with pytest.raises(PermissionDenied, match="The owner allows"):
            client.lease("beta", rank=1000)
        assert client.end_lease("beta")["deleted"] is True
        client.unload("beta")
        until(lambda: "beta" not in names(client), "the model to go")
        with pytest.raises(NotFound, match="is not loaded"):
            client.unload("beta")


def test_a_deadline_counts_the_loading_of_its_model(daemon: Daemon) -> None:
    def first_token(ms: float) -> dict[str, bool]:
        with Client(daemon.rundir.socket_path, app="test", model="beta", timeout_s=30) as client:
            return dict(client.complete("Hello", max_tokens=1, ttft_deadline_ms=ms)["hob"]["met"])

    ask(daemon, "beta")
    for _ in range(2):  # how long it takes is known the second time at the latest
        with daemon.client() as client:
            client.unload("beta")
            until(lambda: "beta" not in names(client), "the model to go")
        with pytest.raises(Overloaded, match="first token is"):
            first_token(1)
        assert first_token(20_000) == {"ttft_deadline": True}


def test_leases_outlive_the_engine_process(daemon: Daemon) -> None:
    def shown() -> list[tuple[str, int, bool, int]]:
        models = client.memory()["models"]
        return [(m["name"], m["rank"], m["is_pinned"], len(m["leases"])) for m in models if m["name"] == "beta"]

    def kill() -> None:
        os.kill(daemon.engine_pid, signal.SIGKILL)
        ask(daemon, "alpha")

    with daemon.client() as client:
        client.lease("beta", rank=2, pin=True)
        kill()
        until(lambda: shown() == [("beta", 2, True, 1)], "the lease in the next process")
        with pytest.raises(Conflict, match="is pinned by"):
            client.unload("beta")
        client.end_lease("beta")
        kill()
        ask(daemon, "beta")
        until(lambda: shown() == [("beta", 0, False, 0)], "no lease that was ended to come back")
        client.lease("beta", rank=2)
        client.unload("beta")  # which ends it
        until(lambda: "beta" not in names(client), "the model to go")
        kill()
        ask(daemon, "beta")
        until(lambda: shown() == [("beta", 0, False, 0)], "no lease of a model that went to come back")


def test_the_command_line_shows_and_changes_the_budget(daemon: Daemon) -> None:
    before = json.loads(hob(daemon.home, "memory", "--json").stdout)
    assert before["budget_bytes"] == 400_000_000
    changed = hob(daemon.home, "memory", "--budget", "300MB")
    assert (changed.returncode, "alpha" in changed.stdout) == (0, True)
    with daemon.client() as client:
        until(lambda: client.memory()["budget_bytes"] == 300_000_000, "the budget")
        client.set_budget(400_000_000)
    wrong = hob(daemon.home, "memory", "--budget", "much")
    assert (wrong.returncode, "budget" in wrong.stderr) == (2, True)


def test_replies_go_on_after_their_model_gave_way_to_another() -> None:
    """Two models whose replies fit only one at a time; one reply is held to a grammar."""
    num_tokens, kv_bytes = 1500, 8192
    shape = replace(SHAPE, num_kv_heads=8, context_length=2048)

    def reply(daemon: Daemon, model: str) -> str:
        with Client(daemon.rundir.socket_path, app="test", model=model, timeout_s=60) as client:
            form = {"regex": "[a-z ]+"} if model == "beta" else {}
            no_end = {"2": -100}
            done = client.complete("Hello", max_tokens=num_tokens, temperature=0, logit_bias=no_end, **form)
        assert done["usage"]["completion_tokens"] == num_tokens
        return str(done["choices"][0]["text"])

    with short_folder() as home:
        (home / "models").mkdir()
        for seed, name in enumerate(NAMES):
            ensure_packed(write_tiny_gguf(home / "models" / f"{name}.gguf", seed, "F32", shape))
        with (
            Daemon(home, model="alpha", budget="400MB", kv_tokens=2048, kv_type="f16").wait_ready() as daemon,
            daemon.client() as owner,
        ):
            alone = [reply(daemon, name) for name in NAMES]
            assert "gives way" not in daemon.log, "the control"
            models = owner.memory()["models"]
            fixed = sum(model["num_bytes"] - model["accounts"]["kv"] for model in models)
            owner.set_budget(fixed + num_tokens * kv_bytes * 3 // 4)
            with ThreadPoolExecutor(2) as pool:
                together = list(pool.map(lambda name: reply(daemon, name), NAMES))
            assert "gives way" in daemon.log
            assert together == alone


def test_only_the_owner_changes_the_budget_and_unloads(daemon: Daemon) -> None:
    with daemon.client() as owner:
        key = owner.add_app("guest", "key")["key"]
    with daemon.http() as http:
        http.headers["authorization"] = f"Bearer {key}"
        assert http.put("/hob/v1/memory", json={"budget": 1}).status_code == 403
        assert http.post("/hob/v1/unload", json={"model": "alpha"}).status_code == 403
        assert http.get("/hob/v1/memory").status_code == 200
    with daemon.client() as owner:
        owner.remove_app("key", "guest")
