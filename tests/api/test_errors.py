"""What is refused and how: one shape, the field named, the value, what was expected. Also over raw sockets."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from hob.service.identity import _sandbox_or_unit
from tests.api.conftest import Server, wait_for
from tests.api.scripted import ScriptedBackend

CHAT = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "f"}}
GOOD: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]}
JSON = {"content-type": "application/json"}


def error_of(reply: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temprature": 1}, "temprature", "Did you mean 'temperature'?"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "boss", "content": ""}]}, "messages[0].role", "boss"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "null"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "5"),
        ({"messages": [{"role": "user", "content": "", "x": 1}]}, "messages[0].x", "unknown"),
        ({"messages": [{"role": "user", "content": "", "tool_call_id": "x"}]}, "messages[0].tool_call_id", "tool"),
        ({"messages": [{"role": "function", "content": ""}]}, "messages[0].role", "tool"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "image_url",
        ),
        ({"temperature": 2.5}, "temperature", "0 to 2"),
        ({"temperature": "hot"}, "temperature", '"hot"'),
        ({"top_p": -0.1}, "top_p", "0 to 1"),
        ({"n": 0}, "n", "1 to 128"),
        ({"n": 10**30}, "n", "1 to 128"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 10**30}, "max_tokens", "512"),
        ({"max_tokens": True}, "max_tokens", "bool"),
        ({"max_completion_tokens": 500}, "max_completion_tokens", "at most 493"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "both the same"),
        ({"seed": 2**63}, "seed", "64-bit"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": ""}, "stop", "1 to 256"),
        ({"stop": [1]}, "stop[0]", "str"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token id"),
        ({"logit_bias": {"5000": 1}}, "logit_bias", "token id"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "-100 to 100"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"logprobs": False, "top_logprobs": 0}, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, "tools[0].function.name", "letters"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name", "once"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "f"),
        ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice", "required"),
        ({"tools": [TOOL], "regex": "a"}, "regex", "tools"),
        ({"tool_choice": "required"}, "tool_choice", "no 'tools'"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls", "no 'tools'"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"modalities": ["text", "audio"]}, "modalities", "audio"),
        ({"store": True}, "store", "false"),
        ({"store": 0}, "store", "false"),
        ({"service_tier": "flex"}, "service_tier", "default"),
        ({"service_class": "urgent"}, "service_class", "interactive"),
        ({"metadata": {"a": 1}}, "metadata[...]", "str"),
    ],
)
def test_wrong_fields_are_named(
    http: httpx.Client, backend: ScriptedBackend, fields: dict[str, Any], param: str, words: str
) -> None:
    reply = http.post(CHAT, json={**GOOD, **fields})
    error = error_of(reply)
    assert (reply.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert words in error["message"]
    assert backend.requests == []


def test_neutral_values_are_accepted(http: httpx.Client) -> None:
    neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]}
    neutral |= {"store": False, "service_tier": "auto", "audio": None, "stream": False, "logprobs": False}
    message = {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None, "annotations": []}
    assert http.post(CHAT, json={**GOOD, **neutral, "messages": [message]}).status_code == 200


def test_prompt_longer_than_the_context(http: httpx.Client) -> None:
    reply = http.post(CHAT, json={**GOOD, "messages": [{"role": "user", "content": "x" * 1000}]})
    error = error_of(reply)
    assert (reply.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert "1,017 tokens" in error["message"]
    assert "512" in error["message"]


def test_unknown_model(http: httpx.Client) -> None:
    reply = http.post(CHAT, json={**GOOD, "model": "gpt-4"})
    assert (reply.status_code, error_of(reply)["code"]) == (404, "model_not_found")
    assert "scripted" in error_of(reply)["message"]
    assert http.post(CHAT, json={**GOOD, "model": "default"}).status_code == 200


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "object"),
        (b'{"model": "a", "messages": [], }', "byte 31"),
        (b'{"model": "scripted", "temperature": NaN}', "byte 37"),
        (b'{"model": "\xff"}', "0xff at position 11"),
        (b'{"model": "\\ud800"}', "not valid JSON"),
        (b'{"model": "m", "response_format": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b"[" * 100_000, "object"),
        (b'{"model": "m", "messages": [], "temperature": 1e999}', "out of range"),
    ],
)
def test_bodies_that_are_no_json(http: httpx.Client, raw: bytes, words: str) -> None:
    reply = http.post(CHAT, content=raw, headers=JSON)
    assert reply.status_code == 400
    assert words in error_of(reply)["message"]


def test_content_type_must_be_json(http: httpx.Client) -> None:
    for headers in ({"content-type": "text/plain"}, {}):
        reply = http.post(CHAT, content=b"{}", headers=headers)
        assert (reply.status_code, error_of(reply)["param"]) == (400, "Content-Type")
    assert http.post(CHAT, content=json.dumps(GOOD), headers={"content-type": "application/json; charset=utf-8"})


def test_10_mb_of_json(http: httpx.Client) -> None:
    reply = http.post(CHAT, content=b'{"model": "' + b"x" * (10 << 20) + b'"}', headers=JSON)
    assert reply.status_code == 413
    assert error_of(reply)["code"] == "request_too_large"
    assert "1,048,576" in error_of(reply)["message"]
    assert http.get("/health").status_code == 200


def test_announced_body_is_refused_before_it_comes(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
        raw.sendall(head(content_length=10 << 30))
        assert b" 413 " in raw.recv(65536)


def test_chunked_body_is_refused_before_it_ends(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
        raw.sendall(head(chunked=True))
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        for _ in range(17):
            raw.sendall(chunk)
        assert b" 413 " in raw.recv(65536)


def head(host: str = "localhost", *, content_length: int = 0, chunked: bool = False, extra: str = "") -> bytes:
    length = "transfer-encoding: chunked" if chunked else f"content-length: {content_length}"
    return (
        f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n{length}\r\n{extra}\r\n"
    ).encode()


def test_client_that_leaves_within_its_body(server: Server, backend: ScriptedBackend) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
        raw.sendall(head(content_length=100) + b'{"model"')
    assert httpx.get(server.url + "/health").status_code == 200
    assert backend.requests == []


@pytest.mark.parametrize("junk", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"\0" * 100, b"POST / HTTP/9.9\r\n\r\n"])
def test_what_is_no_http(server: Server, junk: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
        raw.sendall(junk)
        assert raw.recv(65536).startswith(b"HTTP/1.1 400 ")
    assert httpx.get(server.url + "/health").status_code == 200


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:80", "[::1]:5", "LOCALHOST:11435"])
def test_hosts_of_this_machine(http: httpx.Client, host: str) -> None:
    assert http.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "localhost:80@evil", "", "[::2]", "::1"])
def test_foreign_hosts_are_refused(http: httpx.Client, host: str) -> None:
    reply = http.get("/health", headers={"host": host})
    assert (reply.status_code, error_of(reply)["param"]) == (403, "Host")


def test_two_hosts_are_refused(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
        raw.sendall(head(extra="host: evil.example\r\n"))
        assert b" 400 " in raw.recv(65536)


def test_any_host_on_the_unix_socket(server: Server) -> None:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(server.socket_path))) as http:
        assert http.get("http://anything.example/health").status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost.evil.example", "http://127.0.0.1:1"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_foreign_origins_are_refused(http: httpx.Client, origin: str, method: str) -> None:
    reply = http.request(method, "/v1/models", headers={"origin": origin, **JSON})
    assert (reply.status_code, error_of(reply)["param"]) == (403, "Origin")
    assert not [name for name in reply.headers if name.startswith("access-control")]


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_foreign_page_is_refused_where_it_sends_no_origin(http: httpx.Client, site: str) -> None:
    reply = http.get("/health", headers={"sec-fetch-site": site})
    assert (reply.status_code, error_of(reply)["param"]) == (403, "Sec-Fetch-Site")


def test_404_and_405_have_the_same_shape(http: httpx.Client) -> None:
    reply = http.get("/v1/nothing")
    assert (reply.status_code, error_of(reply)["code"]) == (404, "not_found")
    assert CHAT in error_of(reply)["message"]
    reply = http.get(CHAT)
    assert (reply.status_code, error_of(reply)["code"]) == (405, "method_not_allowed")
    assert "POST" in error_of(reply)["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_shows_an_id_and_no_stack(
    http: httpx.Client, backend: ScriptedBackend, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    def broken(request: object, index: int) -> list[int]:
        raise ZeroDivisionError("secret detail")

    backend.script = broken
    reply = http.post(CHAT, json={**GOOD, "stream": stream})
    error = error_of(reply)
    assert (reply.status_code, error["code"]) == (500, "internal_error")
    assert "secret" not in reply.text
    bug_id = error["message"].split("bug ")[1][:8]
    assert any(f"bug {bug_id}" in record.getMessage() and record.exc_info for record in caplog.records)


def test_a_bug_within_a_stream_is_its_last_event(http: httpx.Client, backend: ScriptedBackend) -> None:
    backend.script = lambda request, index: [257, 9999]
    reply = http.post(CHAT, json={**GOOD, "stream": True})
    events = [line for line in reply.text.split("\n") if line]
    assert reply.status_code == 200
    assert json.loads(events[-1][6:])["error"]["code"] == "internal_error"
    assert "[DONE]" not in reply.text


def test_apps_and_classes(http: httpx.Client, server: Server, backend: ScriptedBackend) -> None:
    http.post(CHAT, json=GOOD)
    http.post(CHAT, json=GOOD, headers={"x-hob-app": "notes", "x-hob-class": "background"})
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(server.socket_path)), base_url="http://x") as unix:
        unix.post(CHAT, json=GOOD)
    executable = _sandbox_or_unit(Path("/proc/self/cgroup")) or os.path.basename(os.readlink("/proc/self/exe"))
    apps = [request.app for request in backend.requests]
    assert apps == [f"{os.getuid()}/{label}" for label in ("tcp", "notes", executable)]
    assert [request.service_class.name for request in backend.requests] == ["STANDARD", "BACKGROUND", "STANDARD"]
    reply = http.post(CHAT, json=GOOD, headers={"x-hob-app": "a b"})
    assert (reply.status_code, error_of(reply)["param"]) == (400, "X-Hob-App")
    reply = http.post(CHAT, json={**GOOD, "service_class": "standard"}, headers={"x-hob-class": "background"})
    assert (reply.status_code, error_of(reply)["param"]) == (400, "service_class")


def test_one_log_line_per_request(
    http: httpx.Client, backend: ScriptedBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hob.api")
    backend.num_cached = 5
    http.post(CHAT, json=GOOD, headers={"x-hob-app": "notes"})
    http.get("/v1/nothing")
    wait_for(lambda: len(caplog.records) == 2)
    first, second = (record.getMessage() for record in caplog.records)
    assert f"/notes POST {CHAT} 200 prompt 5+14 output 2 ttft " in first
    assert "tok/s" in first
    assert "GET /v1/nothing 404" in second


def test_requests_on_one_connection_at_once(server: Server) -> None:
    """Pipelining: two requests sent together get two replies in order."""
    body = json.dumps(GOOD).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
        raw.sendall((head(content_length=len(body)) + body) * 2)
        received = b""
        while received.count(b"Hello world") < 2:
            received += raw.recv(65536)
    assert received.count(b"HTTP/1.1 200 ") == 2


def test_many_at_once(server: Server, backend: ScriptedBackend) -> None:
    backend.delay_s = 0.01
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(httpx.post(server.url + CHAT, json={**GOOD, "stream": True}, timeout=20).status_code)

    threads = [threading.Thread(target=ask) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 32


def test_replies_do_not_wait_for_acknowledgements(server: Server, backend: ScriptedBackend) -> None:
    """Nagle's algorithm and a delayed acknowledgement would add 40 ms to each request on a kept connection."""
    body = json.dumps(GOOD).encode()
    times = []
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
        for _ in range(9):
            start = time.perf_counter()
            raw.sendall(head(content_length=len(body)) + body)
            received = b""
            while b"system_fingerprint" not in received or not received.endswith(b"}"):
                received += raw.recv(65536)
            times.append(time.perf_counter() - start)
    assert sorted(times)[4] < 0.03
