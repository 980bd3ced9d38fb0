"""How fast a head is trained and how fast texts are classified: 1,000 messages of 40 tokens, by a head and zero-shot.

    python benchmarks/tasks.py [--rows 1000]

Asks the daemon, starting one if none runs (HOB_HOME, HOB_MODEL, HOB_SOCKET say which). Messages are random common
words, cut to 40 tokens by the model's own tokenizer; labels depend on a word, so that there is something to learn.
Prints seconds, the goal beside each.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import machine
from hob.cli.talk import connected
from hob.client import Client

WORDS = [
    *("time", "people", "way", "day", "man", "thing", "life", "child", "world", "school", "state", "family", "group"),
    *("country", "problem", "hand", "part", "place", "case", "week", "company", "system", "question", "work", "night"),
    *(
        "point",
        "home",
        "water",
        "room",
        "mother",
        "area",
        "story",
        "fact",
        "month",
        "lot",
        "book",
        "eye",
        "job",
        "word",
    ),
]
LABELS = {"food": "soup", "travel": "train", "money": "invoice", "weather": "storm"}
NUM_TOKENS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1000)
    args = parser.parse_args()
    print(machine.describe())
    with connected() as client:
        rows = messages(client, args.rows)
        say("a head trained, states included", 60, args.rows, lambda: train(client, rows))
        texts = [row["text"] for row in rows]
        say("classified by the head", 15, args.rows, lambda: client.run_task("speed", texts))
        say("classified zero-shot, 4 labels", 30, args.rows, lambda: zero_shot(client, texts))


def messages(client: Client, count: int) -> list[dict[str, str]]:
    """Texts of NUM_TOKENS tokens each."""
    rng = random.Random(0)
    rows = []
    for i in range(count):
        label = list(LABELS)[i % len(LABELS)]
        words = [LABELS[label], *rng.choices(WORDS, k=NUM_TOKENS)]
        ids = client.tokenize(" ".join(words))["tokens"][:NUM_TOKENS]
        rows.append({"text": client.tokenize(tokens=ids)["text"], "label": label})
    return rows


def train(client: Client, rows: list[dict[str, str]]) -> Any:
    client.train_task("speed", rows)
    return client.trained_task("speed")


def zero_shot(client: Client, texts: list[str]) -> None:
    client.classify(texts, list(LABELS))


def say(what: str, goal_s: float, rows: int, work: Any) -> None:
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    print(f"{rows} messages of {NUM_TOKENS} tokens, {what}: {seconds:.1f} s (goal for 1,000: {goal_s} s)", flush=True)


if __name__ == "__main__":
    main()
