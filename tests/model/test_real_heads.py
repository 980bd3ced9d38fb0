"""Heads over the default model: what its hidden states hold that words do not. Sentences are made here; topics of the
training and of the test share no noun, so counting words cannot help."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from hob.client import Client
from tests.daemons import running

pytestmark = pytest.mark.weights

FRAMES = (
    "Yesterday we spoke about the {} for an hour.",
    "She wrote a short note on the {}.",
    "I think the {} is better than the last one.",
    "They are still waiting for the {}.",
)
SEEN = {
    "food": ("bread", "cheese", "apple", "soup", "butter", "salad", "chicken", "cake", "rice", "sausage"),
    "travel": ("train", "airport", "hotel", "ticket", "passport", "ferry", "suitcase", "flight", "station", "bus"),
}
UNSEEN = {
    "food": ("pasta", "potato", "sandwich", "tomato", "honey", "pizza"),
    "travel": ("airplane", "luggage", "railway", "tourist", "taxi", "cruise"),
}


def sentences(nouns: dict[str, tuple[str, ...]]) -> list[dict[str, str]]:
    return [
        {"text": frame.format(noun), "label": label}
        for label, some in nouns.items()
        for frame, noun in itertools.product(FRAMES, some)
    ]


@pytest.fixture(scope="module")
def client(default_gguf: Path) -> Iterator[Client]:
    with running(model=default_gguf) as daemon, daemon.client() as made:
        yield made


def test_a_head_knows_words_it_has_not_seen(client: Client) -> None:
    client.train_task("topic", sentences(SEEN), words=False)
    assert client.trained_task("topic")["is_kept"]
    rows = sentences(UNSEEN)
    answers = client.run_task("topic", [row["text"] for row in rows], min_confidence=0)
    right = sum(a["label"] == row["label"] for a, row in zip(answers, rows, strict=True))
    assert right >= 0.85 * len(rows), f"{right} of {len(rows)}"
    (far,) = client.run_task("topic", ["0x7f 0x45 0x4c 0x46 }}{{ ;; \n\t\t#!"])
    assert far["out_of_domain"]


def test_calibrated_zero_shot_is_better_than_chance_and_no_other_in_a_batch(client: Client) -> None:
    rows = sentences(UNSEEN)[::2]
    texts = [row["text"] for row in rows]
    together = client.classify(texts, list(UNSEEN), calibrate=True)["data"]
    right = sum(answer["label"] == row["label"] for answer, row in zip(together, rows, strict=True))
    assert right >= 0.6 * len(rows), f"{right} of {len(rows)}"
    for i in (0, len(texts) - 1):
        alone = client.classify(texts[i], list(UNSEEN), calibrate=True)
        assert alone["labels"] == together[i]["labels"], "the same bits, alone or among others"
