"""Receipts: one shape in every API, at the end of every reply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from hob.energy import open_meter
from tests.api.scripted import ScriptedBackend

ASK = [{"role": "user", "content": "Hi"}]
SHAPE = {"tokens", "seconds", "model", "grammar", "class"}
CALLS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": ASK},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/embeddings": {"input": "Hi"},
    "/hob/v1/classify": {"text": "Hi", "labels": ["a", "b"]},
    "/api/chat": {"messages": ASK, "stream": False},
    "/api/generate": {"prompt": "Hi", "stream": False},
    "/api/embed": {"input": "Hi"},
    "/api/embeddings": {"prompt": "Hi"},
}


@pytest.mark.parametrize("path", CALLS)
def test_one_shape(http: httpx.Client, backend: ScriptedBackend, path: str) -> None:
    backend.num_cached = 1
    receipt = http.post(path, json={"model": "scripted", **CALLS[path]}).json()["hob"]
    assert set(receipt) == SHAPE  # no joules: they are not measured here
    assert receipt["tokens"].keys() == {"seen", "cached", "generated", "cut"}
    assert receipt["tokens"]["seen"] > 0
    assert receipt["tokens"]["cached"] == 1
    assert receipt["seconds"].keys() == {"queued", "prefill", "decode"}
    assert receipt["model"] == {
        "name": "scripted",
        "quantisation": "Q4_1",
        "sha256": None,
        "adapter": None,
        "adapter_sha256": None,
    }
    assert (receipt["grammar"], receipt["class"]) == (False, "standard")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("with_usage", [False, True])
def test_the_last_chunk_has_it(http: httpx.Client, backend: ScriptedBackend, path: str, with_usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if with_usage else {}
    body = {"model": "scripted", "stream": True, "n": 2, "regex": "H.*", **options, **CALLS[path]}
    text = http.post(path, json=body, headers={"x-hob-class": "background"}).text
    chunks = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
    assert [i for i, chunk in enumerate(chunks) if "hob" in chunk] == [len(chunks) - 1]
    receipt = chunks[-1]["hob"]
    assert receipt["tokens"]["generated"] == 4
    assert (receipt["grammar"], receipt["class"]) == (True, "background")


def test_a_reply_that_a_stop_string_ends_has_one_too(http: httpx.Client, backend: ScriptedBackend) -> None:
    body = {"model": "scripted", "prompt": "Hi", "stop": " wor"}
    receipt = http.post("/v1/completions", json=body).json()["hob"]
    assert receipt["tokens"]["generated"] == 2
    assert receipt["seconds"]["decode"] >= 0


def test_clients_keep_it(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="scripted", messages=ASK)
    assert reply.model_extra["hob"]["tokens"]["generated"] == 2


def test_what_was_cut_is_told_and_cutting_is_an_error_unless_allowed(
    http: httpx.Client, backend: ScriptedBackend
) -> None:
    body: dict[str, Any] = {"model": "scripted", "prompt": "ab" * 300, "max_tokens": 12}
    assert http.post("/v1/completions", json=body).json()["error"]["code"] == "context_length_exceeded"
    reply = http.post("/v1/completions", json={**body, "allow_cut": True}).json()
    assert reply["hob"]["tokens"] == {"seen": 500, "cached": 0, "generated": 2, "cut": 100}
    assert backend.requests[-1].token_ids == list(b"ab" * 250)


def test_the_oldest_turns_of_a_chat_are_cut_but_not_its_system_prompt(
    http: httpx.Client, backend: ScriptedBackend
) -> None:
    messages = [{"role": "system", "content": "S"}]
    messages += [{"role": "user", "content": f"{i}" + "x" * 150} for i in range(5)]
    body: dict[str, Any] = {"model": "scripted", "messages": messages, "max_tokens": 100}
    assert http.post("/v1/chat/completions", json=body).status_code == 400
    reply = http.post("/v1/chat/completions", json={**body, "allow_cut": True}).json()
    text = bytes(backend.requests[-1].token_ids).decode()
    assert text.startswith("system: S\nuser: 3x")
    assert reply["hob"]["tokens"]["cut"] == 3 * len("user: 0\n" + "x" * 150)


def test_joules_come_from_the_packages_that_may_be_read(tmp_path: Path) -> None:
    assert open_meter(tmp_path) is None
    for name, value in (("intel-rapl:0", 900), ("intel-rapl:0:0", 5), ("intel-rapl:1", 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000\n")
    meter = open_meter(tmp_path)
    assert meter is not None
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("50\n")  # it ran over
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("300\n")
    assert meter.joules() == pytest.approx(350e-6)
    assert meter.joules() == pytest.approx(350e-6)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert open_meter(tmp_path) is None
