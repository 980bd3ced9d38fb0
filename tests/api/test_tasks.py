"""Heads over a real daemon on the fake engine: states, training in the background, serving, versions. The fake's states
are noise, so what these heads learn they learn from words."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hob.api.training import check_size
from hob.client import Client
from hob.errors import Conflict, InvalidRequest, NotFound
from tests.daemons import Daemon, running, until

WORDS = {"food": ["bread", "soup", "apple", "cheese"], "travel": ["train", "ship", "ticket", "airport"]}


def messages(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Sentences of made-up words and one that tells what they are about."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        label = ("food", "travel")[i % 2]
        filler = " ".join("".join(rng.choices("aeioulmnrst", k=5)) for _ in range(4))
        rows.append({"text": f"{filler} {rng.choice(WORDS[label])} {rng.choice(WORDS[label])}", "label": label})
    return rows


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running(model="fake") as started:
        yield started


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as made:
        yield made


def trained(client: Client, name: str, examples: list[dict[str, str]], **options: Any) -> dict[str, Any]:
    """Train to the end. Returns the training."""
    client.train_task(name, examples, **options)
    until(lambda: client.task(name)["training"]["status"] != "running", "the training", 240.0)
    training: dict[str, Any] = client.task(name)["training"]
    return training


def states(client: Client, **body: Any) -> np.ndarray:
    reply = client.features(**body)
    return np.stack(
        [np.frombuffer(base64.b64decode(data), np.float32).reshape(reply["shape"]) for data in reply["data"]]
    )


def test_features_pool_spans_of_parts(client: Client) -> None:
    parts = [{"text": "ab"}, {"text": " cd", "spans": ["e1"]}, {"text": " e"}, {"text": " f", "spans": ["e2"]}]
    pools = [{"how": "mean", "span": "e1"}, {"how": "last", "span": "e2"}, {"how": "last"}]
    found = states(client, input=[parts], pools=pools, layers=[0, 1])
    assert found.shape == (1, 3, 2, 8)
    assert np.array_equal(found[0, 1], found[0, 2]), "the text ends with e2"
    whole = states(client, input=["ab cd e f"], pools=[{"how": "last"}], layers=[0, 1])
    assert np.array_equal(found[0, 2], whole[0, 0]), "parts of bytes are the whole in bytes"


def test_features_do_not_depend_on_company(client: Client) -> None:
    texts = [f"text number {i} " * (i % 5 + 1) for i in range(40)]
    together = states(client, input=texts, layers=[0, 1])
    for i in (0, 7, 39):
        assert np.array_equal(together[i], states(client, input=[texts[i]], layers=[0, 1])[0])


def test_a_long_text_loses_its_middle(client: Client) -> None:
    text = "a" * 30 + "b" * 300 + "c" * 10
    cut = states(client, input=[text], max_tokens=40)
    assert np.array_equal(cut, states(client, input=["a" * 30 + "c" * 10]))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [""]}, "input"),
        ({"input": ["a"], "layers": [2]}, "layers"),
        ({"input": ["a"], "layers": [1, 0]}, "layers"),
        ({"input": ["a"], "pools": []}, "pools"),
        ({"input": ["a"], "pools": [{"span": "e1"}]}, "input[0]"),
        ({"input": ["a"], "pools": [{"how": "sum"}]}, "pools[0].how"),
        ({"input": ["a"], "max_tokens": 1}, "max_tokens"),
    ],
)
def test_features_refused(daemon: Daemon, fields: dict[str, Any], param: str) -> None:
    with daemon.http() as http:
        reply = http.post("/hob/v1/features", json=fields)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


@pytest.fixture(scope="module")
def topic(daemon: Daemon) -> str:
    """A trained task."""
    with daemon.client() as client:
        training = trained(client, "shared", messages(60, 1))
    assert training["result"]["is_kept"], training
    return "shared"


def test_train_run_replace_and_forget(client: Client) -> None:
    first = trained(client, "topic", messages(60))
    assert first["result"]["is_kept"], first
    assert first["result"]["version"] == 1
    task = client.task("topic")
    assert task["labels"] == ["food", "travel"]
    assert task["trust"]["macro_f1"] > 0.9
    assert task["features"]["has_words"]
    answers = client.run_task("topic", ["soup cheese bread", "airport ticket train"], min_confidence=0)
    assert [a["label"] for a in answers] == ["food", "travel"]
    assert all(sum(a["probabilities"]) == pytest.approx(1) for a in answers)
    assert "topic" in [t["id"] for t in client.tasks()]

    second = trained(client, "topic", messages(60))  # as good as the first is not better
    assert not second["result"]["is_kept"]
    assert "not better" in second["result"]["reason"]
    assert client.task("topic")["versions"] == [1]

    assert client.delete_task("topic")["deleted"]
    with pytest.raises(NotFound, match="topic"):
        client.task("topic")


def test_an_unsure_head_abstains_and_says_what_it_would_have_said(client: Client, topic: str) -> None:
    (answer,) = client.run_task(topic, ["nothing known here"], min_confidence=0.999)
    assert answer["label"] is None
    assert answer["best"] in ("food", "travel")
    (again,) = client.run_task(topic, ["nothing known here"], min_confidence=0)
    assert again["label"] == answer["best"]


def test_answers_do_not_depend_on_company(client: Client, topic: str) -> None:
    texts = [row["text"] for row in messages(20, 3)]
    together = client.run_task(topic, texts)
    assert together[5] == client.run_task(topic, [texts[5]])[0]
    assert together[::-1] == client.run_task(topic, texts[::-1])


def test_an_app_sees_its_own_tasks_only(daemon: Daemon, client: Client, topic: str) -> None:
    assert topic in [task["id"] for task in client.tasks()]
    with Client(daemon.rundir.socket_path, app="other", timeout_s=30) as other:
        assert topic not in [task["id"] for task in other.tasks()]
        with pytest.raises(NotFound):
            other.run_task(topic, ["soup"])


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([{"text": f"soup {i}", "label": "food"} for i in range(30)], "the label 'food'"),
        ([{"text": "soup", "label": "food"}, {"text": "train", "label": "travel"}], "has 1 example"),
    ],
)
def test_what_cannot_be_learnt_is_said(client: Client, examples: list[dict[str, str]], message: str) -> None:
    training = trained(client, "hopeless", examples)
    assert training["status"] == "failed"
    assert message in training["error"]["message"]


def test_requests_that_are_refused(daemon: Daemon, client: Client) -> None:
    with pytest.raises(InvalidRequest, match="name"):
        client.train_task("Not A Name", messages(4))
    with pytest.raises(InvalidRequest, match="examples"):
        client.train_task("none", [])
    with pytest.raises(NotFound, match="hob task train"):
        client.run_task("unknown", ["a"])
    client.train_task("busy", messages(40, 5))
    with pytest.raises(Conflict, match="being trained"):
        client.train_task("busy", messages(10))
    until(lambda: client.task("busy")["training"]["status"] == "done", "the training", 240.0)
    with pytest.raises(NotFound, match="version 9"):
        client.run_task("busy", ["a"], version=9)
    with pytest.raises(InvalidRequest, match="texts"):
        client.run_task("busy", [])


def test_a_training_takes_no_more_memory_than_is_said() -> None:
    check_size(9320, 576)
    with pytest.raises(InvalidRequest, match="has 9,321 examples. Expected at most 9,320 with this model: .* MiB"):
        check_size(9321, 576)
