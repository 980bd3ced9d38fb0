"""Prompts that the owner makes public, through a real daemon: shared by all apps, kept, and taken back."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hob.client import Client
from hob.errors import InvalidRequest, NotFound, PermissionDenied, StorageError
from hob.service.public_prompts import PublicPrompt, PublicPrompts
from tests.daemons import Daemon, hob, running, until

OPENING = len("system: \nuser: ") + 320
"""Tokens of the fake model that a conversation with `system` begins with."""
SHARED = OPENING // 16 * 16
TOOLS = [{"type": "function", "function": {"name": "light", "description": "Switch a light.", "parameters": {}}}]


def system(number: int) -> dict[str, str]:
    """A system prompt of 320 tokens that differs from others from its first block on."""
    return {"role": "system", "content": f"{number:5} briefly. " * 20 + " " * 20}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running() as started:
        yield started


@pytest.fixture
def owner(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as client:
        yield client
        for prompt in client.public_prompts():
            client.unpublish(prompt["name"])


def cached(daemon: Daemon, app: str, number: int, text: str, **options: Any) -> int:
    """Tokens of a conversation with that system prompt that an app did not have to wait for."""
    with Client(daemon.rundir.socket_path, app=app) as client:
        reply = client.chat([system(number), {"role": "user", "content": text}], max_tokens=1, **options)
    return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_public_prefix_hits_from_every_app_and_what_follows_does_not(daemon: Daemon, owner: Client) -> None:
    secret = "a secret of the first " * 10
    assert [cached(daemon, app, 1, secret) for app in ("a", "b")] == [0, 0], "before it is public"
    made = owner.publish("brief", messages=[system(1)])
    assert (made["num_tokens"], made["num_shared_tokens"]) == (OPENING, SHARED)
    assert cached(daemon, "a", 1, secret) == 0, "the first computes it"
    assert [cached(daemon, app, 1, text) for app, text in (("b", "hi"), ("c", secret))] == [SHARED, SHARED]
    assert cached(daemon, "a", 1, secret) > SHARED + 150, "its own suffix it does find"
    assert owner.stats()["stats"]["num_alarms"] == 0


def test_tools_are_part_of_the_prompt(daemon: Daemon, owner: Client) -> None:
    made = owner.publish("house", messages=[system(2)], tools=TOOLS)
    assert made["num_tokens"] > OPENING
    assert cached(daemon, "a", 2, "lights on", tools=TOOLS) == 0
    assert cached(daemon, "b", 2, "lights off", tools=TOOLS) == made["num_shared_tokens"]
    assert cached(daemon, "c", 2, "no tools") == SHARED < made["num_shared_tokens"], "what comes before them"


def test_a_text_for_completions(daemon: Daemon, owner: Client) -> None:
    text = "Once upon a time " * 4
    assert owner.publish("tale", prompt=text)["num_tokens"] == len(text)
    for app, expected in (("a", 0), ("b", 64)):
        with Client(daemon.rundir.socket_path, app=app) as client:
            usage = client.complete(text + "there was", max_tokens=1)["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == expected


def test_what_is_taken_back_is_private_again(daemon: Daemon, owner: Client) -> None:
    owner.publish("brief", messages=[system(4)])
    assert [cached(daemon, app, 4, "hi") for app in ("a", "b")][1] == SHARED
    owner.unpublish("brief")
    assert owner.public_prompts() == []
    assert cached(daemon, "c", 4, "hi") == 0
    with pytest.raises(NotFound, match="no public prompt 'brief'. Known: none"):
        owner.unpublish("brief")


def test_a_name_means_one_prompt(owner: Client) -> None:
    owner.publish("one", prompt="x" * 40)
    owner.publish("one", prompt="y" * 50)
    assert [(p["name"], p["num_tokens"], p["prompt"]) for p in owner.public_prompts()] == [("one", 50, "y" * 50)]


def test_contexts_begin_with_it_too(daemon: Daemon, owner: Client) -> None:
    owner.publish("brief", messages=[system(6)])
    assert cached(daemon, "a", 6, "hi") == 0
    with Client(daemon.rundir.socket_path, app="b") as client:
        context = client.create_context("c", [system(6)])
        usage = client.turn(context["id"], "hello", max_tokens=1)["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == SHARED
        assert client.turn(context["id"], "again", max_tokens=1)["hob"]["tokens"]["cached"] > SHARED


def test_errors_name_the_field(daemon: Daemon, owner: Client) -> None:
    for body, match in (
        ({}, "expected either the field 'prompt'"),
        ({"prompt": "x", "messages": [system(7)]}, "expected either the field 'prompt'"),
        ({"prompt": "short"}, "has 5 tokens. Expected at least 16"),
        ({"prompt": "x" * 100_000}, "the prompt has 100,000 tokens"),
        ({"messages": []}, "has 6 tokens. Expected at least 16"),
        ({"tools": TOOLS * 2}, "each name once"),
        ({"prompts": "x"}, "unknown field 'prompts'"),
    ):
        with pytest.raises(InvalidRequest, match=match):
            owner.publish("one", **body)
    with pytest.raises(InvalidRequest, match="name 'Big'"):
        owner.publish("Big", prompt="x" * 40)
    assert owner.public_prompts() == []


def test_only_the_owner_may(daemon: Daemon, owner: Client) -> None:
    key = owner.add_app("guest", "key")["key"]
    with daemon.http() as http:
        http.headers["authorization"] = f"Bearer {key}"
        for method, path in (("GET", ""), ("PUT", "/x"), ("DELETE", "/x")):
            reply = http.request(method, f"/hob/v1/public-prompts{path}", json={"prompt": "x" * 40})
            assert (reply.status_code, reply.json()["error"]["code"]) == (403, PermissionDenied.code)
    owner.remove_app("key", "guest")


@pytest.mark.slow
def test_they_outlive_the_daemon_and_the_engine() -> None:
    with running() as daemon:
        with daemon.client() as client:
            client.publish("brief", messages=[system(9)])
        daemon.process.send_signal(signal.SIGTERM)
        daemon.wait_end()
        daemon.restart()
        assert [cached(daemon, app, 9, "hi") for app in ("a", "b")] == [0, SHARED]
        pid = daemon.engine_pid
        os.kill(pid, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{pid}").exists(), "the end of the engine process")
        assert [cached(daemon, app, 9, "hi") for app in ("a", "b")] == [0, SHARED]


@pytest.mark.slow
def test_the_command_line(daemon: Daemon, owner: Client, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    (tmp_path / "system.txt").write_text(system(10)["content"])
    done = hob(
        daemon.home, "public", "add", "house", "--system", f"@{tmp_path / 'system.txt'}",
        "--tools", str(tmp_path / "tools.json"),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    [made] = owner.public_prompts()
    assert done.stdout == (
        f"house: the first {made['num_shared_tokens']} of {made['num_tokens']} tokens are shared by all apps\n"
    )
    assert made["messages"] == [system(10)]
    listed = hob(daemon.home, "public", "list")
    assert "house  fake" in listed.stdout
    assert json.loads(hob(daemon.home, "public", "list", "--json").stdout) == [made]
    assert hob(daemon.home, "public", "rm", "house").stdout == "removed house\n"
    gone = hob(daemon.home, "public", "rm", "house")
    assert (gone.returncode, gone.stderr) == (2, "hob: there is no public prompt 'house'. Known: none.\n")
    wrong = hob(daemon.home, "public", "add", "x", "--tools", str(tmp_path / "system.txt"))
    assert wrong.returncode == 2
    assert "is not JSON" in wrong.stderr


def test_the_file_is_whole_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "home" / "public.json"
    prompts = PublicPrompts(path)
    prompts.put("a", PublicPrompt("m", [1, 2], 0.0, prompt="x"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert PublicPrompts(path).by_name == prompts.by_name
    assert PublicPrompts(path).by_model() == {"m": [[1, 2]]}
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StorageError, match="Mend or remove it"):
        PublicPrompts(path)
