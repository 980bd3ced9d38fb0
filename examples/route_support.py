"""Route support messages to teams: learn from those that were answered, send the doubtful ones to a person.

    python examples/route_support.py answered.csv new.csv routed.csv

answered.csv has columns message and team; new.csv has message and whatever else, and comes out with the team, how sure
that is, and why a person should look where one should.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from pathlib import Path

import hob
from hob.tasks.datasets import read_examples, read_rows
from hob.tasks.files import in_calls, trust_lines

TASK = "support"
PERSON = "a person"


def main(answered: Path, new: Path, routed: Path) -> None:
    """Learn, route, count."""
    examples = [{"text": e.text, "label": e.label} for e in read_examples(answered, "message", "team")]
    rows = read_rows(new)
    with hob.Client(app="support", service_class="background") as client:
        client.train_task(TASK, examples)
        print(client.trained_task(TASK)["reason"])
        print("\n".join(trust_lines(client.task(TASK))))
        answers = list(in_calls([row["message"] for row in rows], lambda some: client.run_task(TASK, some)))
    with routed.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "team", "probability", "why"])
        writer.writeheader()
        teams: Counter[str] = Counter()
        for row, answer in zip(rows, answers, strict=True):
            why = "unlike earlier messages" if answer["out_of_domain"] else "" if answer["label"] else "not sure"
            team = PERSON if why else answer["label"]
            teams[team] += 1
            writer.writerow({**row, "team": team, "probability": f"{answer['probability']:.3f}", "why": why})
    print(", ".join(f"{team}: {count}" for team, count in teams.most_common()))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*map(Path, sys.argv[1:]))
