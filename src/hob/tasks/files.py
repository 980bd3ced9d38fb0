"""Rows of a file in, the same rows with answers out; and how far a head can be trusted, in words."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from hob.errors import UserError
from hob.tasks.datasets import read_rows

CALL_TEXTS = 256
ADDED = ("label", "probability", "out_of_domain")

Classify = Callable[[list[str]], list[dict[str, Any]]]


def classify_file(data: Path | None, output: Path | None, text_column: str, classify: Classify) -> int:
    """Write the rows of `data` with answers as CSV. Returns how many. Raises UserError."""
    if data is None:
        raise UserError("nothing to classify: give a text, or a file by --data")
    rows = read_rows(data)
    for i, row in enumerate(rows, 1):
        if not isinstance(row.get(text_column), str) or not row[text_column].strip():
            raise UserError(f"{data}, row {i}: no text in column '{text_column}'. Columns: {', '.join(map(str, row))}.")
    answers = in_calls([row[text_column] for row in rows], classify)
    begun = list(islice(answers, 1))  # before the file is made: a task that is not there shall leave none
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in ADDED))
    file = sys.stdout if output is None else output.open("w", encoding="utf-8", newline="")
    try:
        writer = csv.DictWriter(file, [*columns, *ADDED], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row, answer in zip(rows, chain(begun, answers), strict=True):
            writer.writerow({**row, **_added(answer)})
    finally:
        if output is not None:
            file.close()
    return len(rows)


def in_calls(texts: list[str], classify: Classify) -> Iterator[dict[str, Any]]:
    """Answers for any number of texts: a call takes a few thousand at most, and an interruption should lose little."""
    for start in range(0, len(texts), CALL_TEXTS):
        yield from classify(texts[start : start + CALL_TEXTS])


def _added(answer: dict[str, Any]) -> dict[str, str]:
    far = answer.get("out_of_domain")
    return {
        "label": answer["label"] or "",
        "probability": f"{answer['probability']:.4f}",
        "out_of_domain": "" if far is None else str(far).lower(),
    }


def trust_lines(task: dict[str, Any]) -> list[str]:
    """What one may expect of a head, from what it did on texts it had not seen."""
    trust = task["trust"]
    kept = [row for row in trust["coverage"] if row[0] >= task["min_confidence"]]
    share, right = (kept[-1][1], kept[-1][2]) if kept else (0.0, 0.0)
    return [
        f"trained on {trust['num_train']} examples, tried on {trust['num_held_out']} it had not seen:",
        f"macro-F1 {trust['macro_f1']:.3f} (always the most frequent label: {trust['majority_f1']:.3f}), "
        f"right in {trust['accuracy']:.1%}",
        f"stated probabilities are off by {trust['calibration_error']:.3f} on average",
        f"it answers where it is at least {task['min_confidence']:.2f} sure: {share:.0%} of the texts, "
        f"{right:.1%} of them right",
    ]
