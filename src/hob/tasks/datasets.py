"""Examples from files: CSV with a header, JSON Lines, or Hugging Face `datasets`. And how they are split.

A row has a text and a label; their columns are `text` and `label` unless told otherwise. A text's part (training, held
out) depends on a hash of the text alone, so a copy of it never lands in both, and adding rows moves none.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hob.errors import UserError


@dataclass(frozen=True, slots=True)
class Example:
    """A text and its label."""

    text: str
    label: str


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .csv, .tsv or .jsonl file. Raises UserError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix in (".csv", ".tsv"):
                return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
            if path.suffix in (".jsonl", ".ndjson"):
                return [json.loads(line) for line in file if line.strip()]
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    raise UserError(f"{path} is of an unknown kind. Expected .csv, .tsv or .jsonl.")


def read_examples(path: Path, text_column: str = "text", label_column: str = "label") -> list[Example]:
    """Labelled rows of a file. Raises UserError naming the row and the columns there are."""
    return examples_of(read_rows(path), str(path), text_column, label_column)


def examples_of(rows: Iterable[dict[str, Any]], source: str, text_column: str, label_column: str) -> list[Example]:
    """Rows to examples."""
    examples = []
    for i, row in enumerate(rows, 1):
        text, label = row.get(text_column), row.get(label_column)
        if not isinstance(text, str) or not text.strip() or label is None or not str(label).strip():
            known = ", ".join(str(name) for name in row)
            raise UserError(
                f"{source}, row {i}: expected a text in column '{text_column}' and a label in '{label_column}'. "
                f"Columns: {known}. Others: --text-column, --label-column."
            )
        examples.append(Example(text, str(label).strip()))
    if not examples:
        raise UserError(f"{source} has no rows")
    return examples


def from_hub(name: str, split: str, text_column: str = "text", label_column: str = "label") -> list[Example]:
    """A data set of the Hugging Face hub through `datasets`; numbered labels get their names."""
    try:
        import datasets
    except ImportError:
        raise UserError("data sets of the hub need `pip install datasets`") from None
    loaded = datasets.load_dataset(name, split=split)
    names = getattr(loaded.features[label_column], "names", None)
    rows = [
        {text_column: row[text_column], label_column: names[row[label_column]] if names else row[label_column]}
        for row in loaded
    ]
    return examples_of(rows, name, text_column, label_column)


def check_labels(labels: list[str]) -> None:
    """Raise UserError where nothing can be learnt: fewer than two labels, or one of them with a single example."""
    counts = Counter(labels)
    if len(counts) < 2:
        raise UserError(f"all {len(labels)} examples have the label '{next(iter(counts), '')}'. Expected two or more.")
    if min(counts.values()) < 2:
        rare = min(counts, key=lambda label: counts[label])
        raise UserError(f"label '{rare}' has 1 example for training. Expected at least 2 for each label.")


def share_of(text: str, salt: str = "") -> float:
    """A number in [0, 1) that the text alone decides."""
    digest = hashlib.sha256(f"{salt}\0{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_by_hash(examples: list[Example], share: float, salt: str = "") -> tuple[list[Example], list[Example]]:
    """(those for training, about `share` of them held out)."""
    kept = [e for e in examples if share_of(e.text, salt) >= share]
    return kept, [e for e in examples if share_of(e.text, salt) < share]


def dataset_files(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Name -> its file in a folder, of those that are there. Raises UserError if none is."""
    found = {}
    for name in names:
        for suffix in (".jsonl", ".csv", ".tsv"):
            if (path := folder / f"{name}{suffix}").is_file():
                found[name] = path
                break
    if not found:
        raise UserError(f"{folder} has none of the data sets: {', '.join(names)} as .jsonl, .csv or .tsv")
    return found
