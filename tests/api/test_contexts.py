"""Persistent contexts through a real daemon with the fake engine: the calls, their errors, what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from hob.api.context_turns import closing_and, kept_reply
from hob.client import Client
from hob.errors import Conflict, ContextLengthExceeded, InvalidRequest, NotFound, RateLimited
from hob.models.byte_text import ByteChat, ByteTokenizer
from tests.daemons import Daemon, durable, running, until

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running(max_contexts=20) as started:
        yield started


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as connected:
        yield connected
        for context in connected.contexts():
            connected.delete_context(context["id"])


def test_a_context_is_the_conversation_it_replaces(client: Client) -> None:
    """What the service keeps gives the same reply as sending everything each time."""
    context = client.create_context("notes", "Be brief.")
    assert (context["num_tokens"], context["num_turns"], context["kind"]) == (0, 0, "chat")
    messages = [{"role": "system", "content": "Be brief."}]
    for text in ("Hello", "And now?", "x" * 200):
        messages.append({"role": "user", "content": text})
        turn = client.turn(context["id"], text, **GREEDY)
        prompt = "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant: "
        assert turn["usage"]["prompt_tokens"] == turn["context"]["num_tokens"] - 12
        messages.append({"role": "assistant", "content": turn["choices"][0]["message"]["content"]})
        if text == "Hello":
            assert turn["usage"]["prompt_tokens"] == len(prompt)
    assert client.context(context["id"])["num_turns"] == 3


def test_later_turns_compute_only_what_is_new(client: Client) -> None:
    context = client.create_context()
    client.turn(context["id"], "x" * 500, **GREEDY)
    turn = client.turn(context["id"], "more", **GREEDY)
    cached = turn["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert turn["usage"]["prompt_tokens"] - cached < 50


def test_text_contexts_continue_their_text(client: Client) -> None:
    context = client.create_context()
    first = client.turn(context["id"], prompt="Once upon", **GREEDY)
    assert first["context"]["num_tokens"] == 9 + 12
    second = client.turn(context["id"], prompt=" a time", **GREEDY)
    assert second["usage"]["prompt_tokens"] == 9 + 12 + 7
    assert second["context"]["kind"] == "text"
    with pytest.raises(InvalidRequest, match="holds a text. Expected 'prompt'"):
        client.turn(context["id"], "a message", **GREEDY)


def test_streams_end_with_the_context_as_it_is_kept(client: Client) -> None:
    one, two = client.create_context(), client.create_context()
    whole = client.turn(one["id"], "Hello", **GREEDY)
    chunks = list(client.turn(two["id"], "Hello", stream=True, stream_options={"include_usage": True}, **GREEDY))
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert chunks[-2]["context"]["num_tokens"] == whole["context"]["num_tokens"]
    assert client.context(two["id"])["num_turns"] == 1


def test_forks_share_the_past_only(client: Client) -> None:
    context = client.create_context("parent")
    client.turn(context["id"], "Hello", **GREEDY)
    fork = client.fork_context(context["id"], "child")
    assert fork["parent"] == context["id"]
    assert fork["num_tokens"] == client.context(context["id"])["num_tokens"]
    same = [client.turn(i, "same", **GREEDY)["choices"][0]["message"]["content"] for i in (context["id"], fork["id"])]
    assert same[0] == same[1]
    client.turn(fork["id"], "only here", **GREEDY)
    assert client.context(context["id"])["num_turns"] == 2
    client.delete_context(context["id"])
    assert client.turn(fork["id"], "on", **GREEDY)["context"]["num_turns"] == 4


def test_a_turn_that_the_client_left_leaves_no_trace(daemon: Daemon, client: Client) -> None:
    context = client.create_context()
    client.turn(context["id"], "Hello", **GREEDY)
    before = client.context(context["id"])
    stream = client.turn(context["id"], "long", stream=True, temperature=0, max_tokens=3000)
    next(stream)
    with pytest.raises(Conflict, match="is busy with a turn"):
        client.turn(context["id"], "meanwhile", **GREEDY)
    with pytest.raises(Conflict):
        client.delete_context(context["id"])
    stream.close()  # type: ignore[attr-defined]
    until(lambda: client.stats()["stats"]["num_running"] == 0, "the turn to be given up")
    assert durable(client.context(context["id"])) == durable(before)
    client.turn(context["id"], "again", **GREEDY)


def test_stop_strings_are_not_part_of_the_history(client: Client) -> None:
    context = client.create_context()
    reply = client.turn(context["id"], prompt="Hello", **GREEDY)["choices"][0]["message"]["content"]
    characters = [c for c in reply if c.isascii()]
    stop = characters[-1] if characters else reply[-1]
    again = client.create_context()
    cut = client.turn(again["id"], prompt="Hello", stop=stop, **GREEDY)
    text = cut["choices"][0]["message"]["content"]
    assert stop not in text
    assert 5 <= cut["context"]["num_tokens"] <= 5 + len(text.encode())


def test_other_apps_see_nothing(daemon: Daemon, client: Client) -> None:
    context = client.create_context()
    with Client(daemon.rundir.socket_path, app="other") as other:
        assert other.contexts() == []
        with pytest.raises(NotFound, match="has no context"):
            other.turn(context["id"], "Hello", **GREEDY)
        with pytest.raises(NotFound):
            other.delete_context(context["id"])
        with pytest.raises(NotFound):
            other.fork_context(context["id"])
        stream = client.turn(context["id"], "long", stream=True, temperature=0, max_tokens=3000)
        next(stream)
        with pytest.raises(Conflict):  # the control: it is busy
            client.delete_context(context["id"])
        with pytest.raises(NotFound):
            other.delete_context(context["id"])
        stream.close()  # type: ignore[attr-defined]
    until(lambda: client.stats()["stats"]["num_running"] == 0, "the turn to be given up")


def test_errors_name_the_field(client: Client) -> None:
    context = client.create_context()
    with pytest.raises(InvalidRequest, match="exactly one of the fields 'messages' and 'prompt'"):
        client.turn(context["id"], "a", prompt="b")
    with pytest.raises(InvalidRequest, match="field 'n' is 2"):
        client.turn(context["id"], "a", n=2)
    with pytest.raises(ContextLengthExceeded):
        client.turn(context["id"], "x" * 100_000, **GREEDY)
    with pytest.raises(InvalidRequest, match="unknown field 'logprobs'"):
        client.turn(context["id"], "a", logprobs=True)
    with pytest.raises(NotFound):
        client.context("ctx-none")
    with pytest.raises(InvalidRequest, match="129 characters"):
        client.create_context("x" * 129)
    assert client.context(context["id"])["num_turns"] == 0


def test_the_limit_is_named(client: Client) -> None:
    for _ in range(20):
        client.create_context()
    with pytest.raises(RateLimited, match="has 20 contexts, the limit is 20"):
        client.create_context()


def test_the_list_has_the_last_used_first(client: Client) -> None:
    names = ["a", "b", "c"]
    ids = [client.create_context(name)["id"] for name in names]
    client.turn(ids[1], "Hello", **GREEDY)
    assert [context["name"] for context in client.contexts()] == ["b", "c", "a"]


def test_a_context_may_have_fewer_bits_on_disk(daemon: Daemon, client: Client) -> None:
    plain, small = client.create_context("plain"), client.create_context("small", kv_bits=3)
    assert small["kv"] == {"bits": 3, "is_exact": False, "num_bytes": None, "num_blocks": None}
    replies = [client.turn(c["id"], "x" * 2000, **GREEDY)["choices"][0]["message"]["content"] for c in (plain, small)]
    assert replies[0] == replies[1], "what is in memory is exact"
    until(lambda: sum((client.context(small["id"])["kv"]["num_blocks"] or {}).values()) >= 125, "its blocks on disk")
    fork = client.fork_context(small["id"])
    kv = {context["id"]: context["kv"] for context in client.contexts()}
    assert kv[small["id"]]["num_blocks"].keys() == {"16", "8", "4", "2"}, "an unfinished block stays as it is"
    assert kv[plain["id"]]["num_blocks"].keys() == {"16"}
    assert kv[plain["id"]] | {"num_bytes": 0, "num_blocks": {}} == {
        "bits": 16,
        "is_exact": True,
        "num_bytes": 0,
        "num_blocks": {},
    }
    assert (kv[fork["id"]]["bits"], client.turn(fork["id"], "on", **GREEDY)["context"]["kv"]["bits"]) == (3, 3)
    with pytest.raises(InvalidRequest, match="kv_bits"):
        client.create_context("five", kv_bits=5)


def test_closing_and_is_what_the_template_puts_behind_a_reply() -> None:
    assert bytes(closing_and(ByteChat(), [{"role": "user", "content": "yes 7"}])) == b"\nuser: yes 7\nassistant: "


@pytest.mark.parametrize(
    ("reply", "shown", "kept"),
    [("héllo", "héllo", "héllo"), ("hello STOP", "hello ", "hello "), ("aSTOP", "", ""), ("hé", "h", "h")],
)
def test_kept_reply(reply: str, shown: str, kept: str) -> None:
    assert bytes(kept_reply(ByteTokenizer(), list(reply.encode()), shown)) == kept.encode()


def test_kept_reply_cuts_within_a_token() -> None:
    class Words(ByteTokenizer):
        def token_bytes(self, token_id: int) -> bytes:
            return b" wordST" if token_id == 300 else super().token_bytes(token_id)

    assert kept_reply(Words(), [ord("a"), 300, ord("O")], "a word") == [ord("a"), *b" word"]
