"""Structured output over a real daemon with its engine process (the fake engine, whose tokens are bytes)."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator
from os import kill

import openai
import pytest

from tests.daemons import Daemon, running, until
from tests.needs import needs

needs("llguidance")

PROMPT = "A hob"
SCHEMA = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "level": {"enum": [1, 2, 3]}},
    "required": ["on", "level"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "lamp", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running(model="fake:2") as started:
        yield started


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[openai.OpenAI]:
    url = f"http://127.0.0.1:{daemon.state.port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


def complete(client: openai.OpenAI, max_tokens: int = 200, n: int = 1, **fields: object) -> list[tuple[str, str]]:
    """Text and finish reason of each choice."""
    reply = client.completions.create(model="fake", prompt=PROMPT, max_tokens=max_tokens, n=n, extra_body=fields)
    return [(choice.text, choice.finish_reason) for choice in reply.choices]


def test_a_schema_is_kept_to(client: openai.OpenAI) -> None:
    made = complete(client, n=4, response_format=FORMAT)
    assert all(finish == "stop" for _, finish in made)
    lamps = [json.loads(text) for text, _ in made]
    assert all(set(lamp) == {"on", "level"} and lamp["level"] in (1, 2, 3) for lamp in lamps)


def test_the_client_parses_it(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "?"}], response_format=FORMAT, max_tokens=200
    )
    assert set(json.loads(reply.choices[0].message.content)) == {"on", "level"}


def test_a_stream_is_kept_to_it_too(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="fake", prompt=PROMPT, max_tokens=50, stream=True, extra_body={"choice": ["red", "green"]}
    )
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) in ("red", "green")
    assert chunks[-1].finish_reason == "stop"


def test_regex_and_grammar(client: openai.OpenAI) -> None:
    ((text, finish),) = complete(client, regex=r"[a-f]{4}-\d{4}")
    assert finish == "stop"
    assert re.fullmatch(r"[a-f]{4}-[0-9]{4}", text)
    ((text, finish),) = complete(client, grammar='start: "a" "b"~3')
    assert (text, finish) == ("abbb", "stop")


def test_what_is_cut_says_so(client: openai.OpenAI) -> None:
    ((text, finish),) = complete(client, max_tokens=3, regex="[0-9]{8}")
    assert finish == "length"
    assert re.fullmatch("[0-9]{3}", text)


@pytest.mark.parametrize(
    ("fields", "param", "match"),
    [
        ({"regex": "(?=a)"}, "regex", "look-around"),
        ({"grammar": "start: ("}, "grammar", "cannot be enforced"),
        ({"grammar": "(" * 60_000 + ")" * 60_000}, "grammar", "bytes"),
        ({"choice": []}, "choice", "0 texts"),
        ({"choice": ["a", ""]}, "choice", "none empty"),
        ({"regex": "a", "choice": ["a"]}, "choice", "Expected one"),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex", "Expected one"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"shema": {}}}}, None, "shema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format.json_schema.schema",
            "not",
        ),
    ],
)
def test_what_cannot_be_enforced_is_a_400(
    client: openai.OpenAI, fields: dict[str, object], param: str | None, match: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=match) as caught:
        complete(client, **fields)
    assert param is None or caught.value.param == param


def test_text_is_no_grammar(client: openai.OpenAI) -> None:
    ((_, finish),) = complete(client, max_tokens=5, response_format={"type": "text"})
    assert finish == "length"


def test_a_hostile_grammar_ends_its_own_request_only(daemon: Daemon, client: openai.OpenAI) -> None:
    """A stream runs beside a grammar that costs more with each token until it is stopped."""
    pid = daemon.engine_pid
    stream = client.completions.create(model="fake", prompt=PROMPT, max_tokens=4000, stream=True)
    next(iter(stream))
    with pytest.raises(openai.BadRequestError, match="cannot be enforced"):
        complete(client, max_tokens=4000, grammar='start: s\ns: s s s | s s | "a"')
    chain = "start:a0\n" + "".join(f"a{i:x}:a{i + 1:x}\n" for i in range(5_500)) + f'a{5_500:x}:"a"'
    assert complete(client, grammar=chain) == [("a", "stop")]
    assert next(iter(stream)).choices[0].finish_reason is None
    stream.close()
    assert daemon.engine_pid == pid


def test_a_new_engine_process_learns_the_vocabulary_again(daemon: Daemon, client: openai.OpenAI) -> None:
    assert complete(client, choice=["yes"]) == [("yes", "stop")]
    old = daemon.engine_pid
    kill(old, signal.SIGKILL)
    until(lambda: daemon.process.poll() is None and _is_new(daemon, old), "a new engine")
    assert complete(client, choice=["yes"]) == [("yes", "stop")]


def _is_new(daemon: Daemon, old: int) -> bool:
    try:
        return daemon.engine_pid != old
    except AssertionError:
        return False


def test_leaving_while_a_grammar_is_compiled_leaves_nothing(daemon: Daemon, client: openai.OpenAI) -> None:
    large = "|".join(f"{i:x}" * 7 for i in range(8_000))[:60_000]
    threads = [threading.Thread(target=_leave_early, args=(client, large)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with daemon.client() as hob:
        until(lambda: hob.stats()["stats"]["num_running"] == 0, "none running")
    assert complete(client, choice=["still here"]) == [("still here", "stop")]


def _leave_early(client: openai.OpenAI, pattern: str) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.005).completions.create(
            model="fake", prompt=PROMPT, max_tokens=4000, extra_body={"regex": f"(({pattern}) )*"}
        )
