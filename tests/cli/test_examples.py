"""The three programs of examples/ that sort texts, run as a user would on data made here, over a daemon of their own.

The fake engine's states are noise: what these learn they learn from words, and zero-shot answers mean nothing. What is
held is that the programs work from end to end, say how far they can be trusted, and touch only what they may."""

from __future__ import annotations

import csv
import mailbox
import random
import subprocess
import sys
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path

import pytest

from tests.daemons import Daemon, environment, running

EXAMPLES = Path(__file__).parents[2] / "examples"
TOPICS = {"bills": ["invoice", "payment", "refund"], "trips": ["flight", "hotel", "luggage"]}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running(model="fake") as started:
        yield started


def run(daemon: Daemon, program: str, *words: object) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / program), *map(str, words)],
        env=environment(daemon.home),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def sentence(topic: str, rng: random.Random) -> str:
    filler = " ".join("".join(rng.choices("aeioulmnrst", k=5)) for _ in range(4))
    return f"{filler} {' '.join(TOPICS[topic])} {rng.choice(TOPICS[topic])}"


def test_sort_mailbox(daemon: Daemon, tmp_path: Path) -> None:
    rng = random.Random(0)
    inbox = mailbox.Maildir(tmp_path / "mail")

    def letter(topic: str) -> EmailMessage:
        message = EmailMessage()
        message["Subject"], message["From"] = f"About {rng.choice(TOPICS[topic])}", "someone@example.org"
        message.set_content(sentence(topic, rng))
        return message

    for topic in TOPICS:
        folder = inbox.add_folder(topic)
        for _ in range(30):
            folder.add(letter(topic))
        for _ in range(5):
            inbox.add(letter(topic))
    said = run(daemon, "sort_mailbox.py", tmp_path / "mail")
    assert "macro-F1" in said
    assert len(inbox) == 10, "without --move nothing moves"
    run(daemon, "sort_mailbox.py", tmp_path / "mail", "--move")
    left = len(inbox)
    assert left < 10
    assert sum(len(inbox.get_folder(topic)) for topic in TOPICS) == 70 - left
    for topic in TOPICS:
        own = sum(TOPICS[topic][0] in str(m) for m in inbox.get_folder(topic))
        assert own >= len(inbox.get_folder(topic)) - 1, "sorted wrongly"


def test_tag_notes(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("The flight leaves at nine.\n")
    (tmp_path / "b.md").write_text("tag: bills\nPay the invoice.\n")
    said = run(daemon, "tag_notes.py", tmp_path, "--tags", "bills,trips", "--min-confidence", "0", "--write")
    assert "a.md" in said
    assert "of 1 notes that you tagged" in said
    assert (tmp_path / "a.md").read_text().split("\n")[0] in ("tag: bills", "tag: trips")
    assert (tmp_path / "b.md").read_text() == "tag: bills\nPay the invoice.\n"


def test_route_support(daemon: Daemon, tmp_path: Path) -> None:
    rng = random.Random(1)
    answered, new, routed = (tmp_path / name for name in ("answered.csv", "new.csv", "routed.csv"))
    with answered.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("message", "team"))
        writer.writerows((sentence(topic, rng), topic) for _ in range(30) for topic in TOPICS)
    asked = [(str(i), sentence(topic, rng), topic) for i in range(6) for topic in TOPICS]
    with new.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "message", "truth"))
        writer.writerows(asked)
    said = run(daemon, "route_support.py", answered, new, routed)
    assert "it answers where it is at least" in said
    with routed.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["message"], row["truth"]) for row in rows] == asked
    assert sum(row["team"] in (row["truth"], "a person") for row in rows) >= len(rows) - 1
    assert all((row["team"] == "a person") == bool(row["why"]) for row in rows)
