"""Embeddings, classification, tokens, statistics, health: the endpoints that generate nothing."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

import httpx
import openai
import pytest

from hob.errors import EngineUnavailable
from hob.request import Kind
from tests.api.scripted import ScriptedBackend, score_of


def test_embeddings_have_length_1(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    reply = client.embeddings.create(model="scripted", input=["ab", "c"])
    assert [entry.index for entry in reply.data] == [0, 1]
    assert reply.data[0].embedding == pytest.approx([0.6, 0.8, 0.0])
    assert reply.usage.prompt_tokens == 3
    assert [request.kind for request in backend.requests] == [Kind.EMBED, Kind.EMBED]


def test_embedding_formats_agree(http: httpx.Client) -> None:
    def embed(encoding: str) -> Any:
        body = {"model": "scripted", "input": [97, 98], "encoding_format": encoding, "dimensions": 3}
        return http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]

    assert struct.unpack("<3f", base64.b64decode(embed("base64"))) == pytest.approx(embed("float"))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": "a", "dimensions": 2}, "dimensions"),
        ({"input": []}, "input"),
        ({"input": [""]}, "input[0]"),
        ({"input": "a" * 513}, "input"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": ["a"] * 2049}, "input"),
    ],
)
def test_embeddings_refused(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    reply = http.post("/v1/embeddings", json={"model": "scripted", **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_classify_is_the_softmax_of_exact_scores(http: httpx.Client, backend: ScriptedBackend) -> None:
    reply = http.post("/hob/v1/classify", json={"text": "I love it", "labels": ["good", "bad"]}).json()
    sums = [sum(map(score_of, label.encode())) for label in ("good", "bad")]
    total = sum(map(math.exp, sums))
    assert [entry["label"] for entry in reply["labels"]] == ["good", "bad"]
    assert [entry["logprob"] for entry in reply["labels"]] == pytest.approx(sums)
    assert [entry["num_tokens"] for entry in reply["labels"]] == [4, 3]
    probabilities = [entry["probability"] for entry in reply["labels"]]
    assert probabilities == pytest.approx([math.exp(s) / total for s in sums])
    assert reply["label"] == "bad"
    request = backend.requests[0]
    assert request.kind is Kind.SCORE
    prompt = bytes(request.token_ids).decode()
    instruction = "Classify the text. Answer with one of these labels only: good, bad."
    assert prompt == f"user: {instruction}\n\nText: I love it\nLabel:\nassistant:"


def test_classify_by_mean(http: httpx.Client) -> None:
    body = {"text": "x", "labels": ["a", "aaaa"], "normalise": "mean"}
    reply = http.post("/hob/v1/classify", json=body).json()
    assert [entry["probability"] for entry in reply["labels"]] == pytest.approx([0.5, 0.5])


def test_classify_a_raw_prompt(http: httpx.Client, backend: ScriptedBackend) -> None:
    body = {"prompt": "2 + 2 =", "labels": ["four", "five"], "continuations": [" 4", " 5"]}
    reply = http.post("/hob/v1/classify", json=body).json()
    assert [entry["label"] for entry in reply["labels"]] == ["four", "five"]
    assert bytes(backend.requests[0].token_ids) == b"2 + 2 ="
    assert backend.requests[0].continuations == [[32, 52], [32, 53]]
    http.post("/hob/v1/classify", json={"prompt": "Is it?", "labels": ["yes", "no"]})
    assert backend.requests[1].continuations == [list(b" yes"), list(b" no")]


@pytest.mark.parametrize("source", ["text", "prompt"])
def test_classify_a_list_is_classify_each(http: httpx.Client, backend: ScriptedBackend, source: str) -> None:
    texts, fields = ["ab", "c", "ab"], {"labels": ["a", "bb"], "calibrate": True, "content_free": ["?"]}
    reply = http.post("/hob/v1/classify", json={source: texts, **fields}).json()
    assert len(backend.requests) == 4, "what the labels are worth without a text is asked once"
    assert "label" not in reply
    for text, answer in zip(texts, reply["data"], strict=True):
        alone = http.post("/hob/v1/classify", json={source: text, **fields}).json()
        assert answer == {"label": alone["label"], "labels": alone["labels"]}


def test_classify_messages(http: httpx.Client, backend: ScriptedBackend) -> None:
    body = {"messages": [{"role": "user", "content": "Is it?"}], "labels": ["yes", "no"]}
    http.post("/hob/v1/classify", json=body)
    assert bytes(backend.requests[0].token_ids) == b"user: Is it?\nassistant:"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"labels": ["a", "b"]}, "text"),
        ({"text": "x", "prompt": "y", "labels": ["a", "b"]}, "text"),
        ({"text": "x"}, "labels"),
        ({"text": "x", "labels": ["a"]}, "labels"),
        ({"text": "x", "labels": ["a", "a"]}, "labels"),
        ({"text": "x", "labels": ["a", ""]}, "labels"),
        ({"text": "x", "labels": ["a", "b"], "continuations": ["c", "d"]}, "continuations"),
        ({"prompt": "x", "labels": ["a", "b"], "continuations": ["c"]}, "continuations"),
        ({"prompt": "x", "labels": ["a", "b"], "instruction": "c"}, "instruction"),
        ({"text": "x" * 600, "labels": ["a", "b"]}, "text"),
        ({"text": ["x", "x" * 600], "labels": ["a", "b"]}, "text"),
        ({"text": [], "labels": ["a", "b"]}, "text"),
        ({"text": ["x"] * 2049, "labels": ["a", "b"]}, "text"),
        ({"text": [1], "labels": ["a", "b"]}, "text[0]"),
        ({"text": "x", "labels": ["a", "b"], "normalise": "max"}, "normalise"),
    ],
)
def test_classify_refused(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    reply = http.post("/hob/v1/classify", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_tokenize_and_back(http: httpx.Client) -> None:
    reply = http.post("/hob/v1/tokenize", json={"text": "a€"}).json()
    assert reply["tokens"] == [97, 0xE2, 0x82, 0xAC]
    assert reply["pieces"] == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    back = http.post("/hob/v1/tokenize", json={"tokens": reply["tokens"]}).json()
    assert (back["text"], back["num_tokens"]) == ("a€", 4)
    chat = http.post("/hob/v1/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()
    assert chat["text"] == "user: x\nassistant:"
    assert http.post("/hob/v1/tokenize", json={"tokens": [9999]}).json()["error"]["param"] == "tokens[0]"
    assert http.post("/hob/v1/tokenize", json={}).json()["error"]["param"] == "text"


def test_stats_and_health(http: httpx.Client, backend: ScriptedBackend) -> None:
    stats = http.get("/hob/v1/stats").json()
    assert stats["model"]["context_length"] == 512
    assert stats["stats"]["num_blocks"] == 64
    assert http.get("/health").json()["status"] == "ok"
    backend.model_error = EngineUnavailable("the engine is starting", retry_after_s=1.0)
    reply = http.get("/health")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert reply.json()["error"]["code"] == "engine_unavailable"


def test_the_document_is_served(http: httpx.Client) -> None:
    """That it names every route is tests/unit/test_openapi.py's."""
    document = http.get("/openapi.json").json()
    assert "/v1/chat/completions" in document["paths"]
    assert document["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False


def test_calibrated_probabilities_are_over_those_of_texts_that_say_nothing(
    http: httpx.Client, backend: ScriptedBackend
) -> None:
    body = {"model": "scripted", "text": "t", "labels": ["a", "b", "cc"]}
    plain = http.post("/hob/v1/classify", json=body).json()
    reply = http.post("/hob/v1/classify", json={**body, "calibrate": True}).json()
    # the scripted model gives a label the same score whatever the text: nothing is left of its preference
    assert [entry["probability"] for entry in reply["labels"]] == pytest.approx([1 / 3] * 3)
    assert [entry["logprob"] for entry in reply["labels"]] == [entry["logprob"] for entry in plain["labels"]]
    assert len(backend.requests) == 5
    assert b"Text: N/A\n" in bytes(backend.requests[2].token_ids)
    prompt = {"model": "scripted", "prompt": "x", "labels": ["a", "b"], "calibrate": True, "content_free": ["", "-"]}
    assert http.post("/hob/v1/classify", json=prompt).status_code == 400  # an empty prompt has no token
    prompt["content_free"] = ["?", "-"]
    assert http.post("/hob/v1/classify", json=prompt).status_code == 200


def test_it_may_abstain(http: httpx.Client) -> None:
    body = {"model": "scripted", "text": "t", "labels": ["a", "b"]}
    sure = http.post("/hob/v1/classify", json=body).json()
    best = max(entry["probability"] for entry in sure["labels"])
    assert http.post("/hob/v1/classify", json={**body, "abstain_below": best - 0.01}).json()["label"] == sure["label"]
    unsure = http.post("/hob/v1/classify", json={**body, "abstain_below": best + 0.01}).json()
    assert unsure["label"] is None
    assert unsure["labels"] == sure["labels"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text": "t", "content_free": ["x"]}, "content_free"),
        ({"prompt": "t", "calibrate": True}, "content_free"),
        ({"messages": [{"role": "user", "content": "t"}], "calibrate": True}, "content_free"),
        ({"text": "t", "abstain_below": 2}, "abstain_below"),
    ],
)
def test_calibration_refused(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    reply = http.post("/hob/v1/classify", json={"model": "scripted", "labels": ["a", "b"], **body})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_score_continuations_and_prompts(http: httpx.Client, backend: ScriptedBackend) -> None:
    reply = http.post("/hob/v1/score", json={"prompt": "ab", "continuations": ["c", [100, 101]]}).json()
    assert [entry["token_logprobs"] for entry in reply["scores"]] == [
        [score_of(ord("c"))],
        [score_of(100), score_of(101)],
    ]
    assert reply["scores"][1]["logprob"] == score_of(100) + score_of(101)
    assert reply["scores"][1]["tokens"] == ["d", "e"]
    reply = http.post("/hob/v1/score", json={"prompt": "abc", "top_logprobs": 2}).json()
    (entry,) = reply["scores"]
    assert entry["token_logprobs"] == [score_of(ord("b")), score_of(ord("c"))]
    assert len(entry["top_logprobs"][0]) == 2
    assert reply["hob"]["tokens"]["seen"] == 3


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt"),
        ({"prompt": "a"}, None),
        ({"prompt": ["ab", "cd"]}, "prompt"),
        ({"prompt": "ab", "continuations": []}, "continuations"),
        ({"prompt": "ab", "continuations": [""]}, "continuations"),
        ({"prompt": "ab", "top_logprobs": 99}, "top_logprobs"),
        ({"prompt": "ab", "continuations": ["c"], "top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_score_refused(http: httpx.Client, body: dict[str, Any], param: str | None) -> None:
    reply = http.post("/hob/v1/score", json=body)
    assert reply.status_code == 400
    assert param is None or param in reply.json()["error"]["param"]
