"""Fifteen public data sets, one small model: majority, TF-IDF, zero-shot, and heads trained on the device.

    python benchmarks/table2.py --train DIR [--test DIR2] [--cache DIR3] [--json]

DIR holds NAME.jsonl or NAME.csv with columns text and label. Without --test each set is split by a hash of the text
(--test-share); with it, training rows whose text occurs in the test set are dropped: no test row is seen in training.
A daemon is asked for all states and log-probabilities; what it said and finished rows of the table are kept under
--cache, so that a run may be interrupted and gone on with, or be done by pieces (--only). Caps, all stated in the
output: MAX_EXAMPLES training rows of a head, --zero-shot-rows test rows for zero-shot, CHOICE_ROWS training rows to
choose its scoring from.

Columns: macro-F1 on the test rows. Heads: hidden states and words of the text, whichever set of them cross-validation
on the training rows prefers; `head_states` has hidden states alone. head_32 and head_128 are means over five seeds.
Published: the best of 72 models in Lepagnol et al. 2024, arXiv:2404.11122, table 2, with its size.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import hob.heads
import hob.tasks
from hob.client import Client
from hob.heads.head import Features, Head
from hob.heads.parts import is_marked
from hob.tasks import baselines, metrics, train, zero_shot
from hob.tasks.datasets import Example, dataset_files, read_examples, split_by_hash
from hob.tasks.features import States, gather
from hob.tasks.few_shot import few_shot

PUBLISHED: dict[str, tuple[float, str]] = {
    "agnews": (0.734, "163M"),
    "bbcnews": (0.869, "1.2B"),
    "cdr": (0.717, "3.6B"),
    "chemprot": (0.192, "3.6B"),
    "ethos": (0.597, "1.5B"),
    "financial_phrasebank": (0.744, "838M"),
    "imdb": (0.933, "783M"),
    "semeval": (0.270, "12.9B"),
    "sms": (0.699, "6.6B"),
    "spouse": (0.521, "163M"),
    "sst-2": (0.956, "3.6B"),
    "sst-5": (0.485, "41.8B"),
    "trec": (0.324, "6.6B"),
    "yelp": (0.977, "783M"),
    "youtube": (0.716, "41.8B"),
}
KEYS = ("majority", "tfidf", "zero_shot", "head_32", "head_128", "head_all", "published")
"""Of a row in JSON."""
CHOICE_ROWS = 100
FEW = (32, 128)
MAX_CHARS = 2000
"""Zero-shot: longer texts lose their middle. Heads read up to 1,024 tokens."""


@dataclass
class Set:
    """One data set, split."""

    name: str
    train: list[Example]
    test: list[Example]


class _TimeLeft:
    """Guessed from the sets that were done: seconds for each text and each character of it, in equal parts."""

    def __init__(self, sets: list[Set]) -> None:
        texts = {one.name: [e.text for e in one.train + one.test] for one in sets}
        self._parts = {name: (len(some), sum(map(len, some))) for name, some in texts.items()}
        self._total = tuple(sum(column) for column in zip(*self._parts.values(), strict=True))
        self._share, self._seconds = 0.0, 0.0

    def took(self, one: Set, seconds: float) -> None:
        """One more is done."""
        self._share += self._share_of(one)
        self._seconds += seconds

    def of_sets(self, sets: list[Set]) -> str:
        """For those: text for the terminal, empty while nothing is known."""
        if not self._share:
            return ""
        seconds = self._seconds / self._share * sum(self._share_of(one) for one in sets)
        return f", about {seconds:.0f} s left"

    def _share_of(self, one: Set) -> float:
        return sum(part / total for part, total in zip(self._parts[one.name], self._total, strict=True)) / 2


def main() -> None:
    args = _arguments()
    sets = list(_sets(args))
    rows: dict[str, dict[str, Any]] = {}
    if not args.json:
        print(f"{'':21}{'majority':>9}{'tfidf':>7}{'zero':>7}{'h32':>7}{'h128':>7}{'all':>7}{'states':>7}  published")
    with _client(args) as client:
        left = _TimeLeft(sets)
        for i, one in enumerate(sets):
            start = time.perf_counter()
            print(f"{i + 1} of {len(sets)}: {one.name}{left.of_sets(sets[i:])}", file=sys.stderr, flush=True)
            rows[one.name], is_new = _kept_row(one, client, args)
            if is_new:
                left.took(one, time.perf_counter() - start)
            if not args.json:
                print(_line(one, rows[one.name], time.perf_counter() - start), flush=True)
    if args.json:
        print(json.dumps({"rows": {name: {key: row[key] for key in KEYS} for name, row in rows.items()}}, indent=1))
    else:
        _summary(rows, args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--test-share", type=float, default=0.3, help="share of the rows to test on, without --test")
    parser.add_argument("--only", default="", help="names, with commas between them")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "hob-table2")
    parser.add_argument(
        "--zero-shot-rows", type=int, default=200, help="test rows for zero-shot at most; 0: leave it out"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--socket", help="a daemon's socket; unset: one is started if none runs")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


@contextmanager
def _client(args: argparse.Namespace) -> Iterator[Client]:
    if args.socket is None:
        from hob.cli.talk import connected

        with connected() as client:
            yield client
    else:
        with Client(args.socket, app="table2") as client:
            yield client


def _sets(args: argparse.Namespace) -> Iterator[Set]:
    names = [name for name in args.only.split(",") if name] or list(PUBLISHED)
    tests = dataset_files(args.test, names) if args.test else {}
    for name, path in dataset_files(args.train, names).items():
        examples = read_examples(path)
        if not args.test:
            kept, held = split_by_hash(examples, args.test_share, "table2")
        elif name in tests:
            held = read_examples(tests[name])
            seen = {example.text for example in held}
            kept = [example for example in examples if example.text not in seen]
        else:
            print(f"{name}: not in {args.test}, left out", file=sys.stderr)
            continue
        yield Set(name, kept, held)


def _kept_row(one: Set, client: Client, args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """A row, and whether it is new rather than kept from before, of the same data by the same program and model."""
    made_from = (one, args.zero_shot_rows, args.seeds, client.stats()["model"], _program())
    digest = hashlib.sha256(repr(made_from).encode())
    path = args.cache / "rows" / f"{one.name}-{digest.hexdigest()[:16]}.json"
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept, False
    row = _row(one, client, args)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row))
    return row, True


@cache
def _program() -> str:
    """A digest of what makes a row, as it was when the run began."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for module in (hob.tasks, hob.heads):
        folder = Path(module.__file__ or "").parent
        for path in sorted([*folder.glob("**/*.py"), *folder.glob("**/*.toml")]):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _row(one: Set, client: Client, args: argparse.Namespace) -> dict[str, Any]:
    texts, labels = [e.text for e in one.train], [e.label for e in one.train]
    truth = [e.label for e in one.test]
    majority = metrics.majority(labels)
    row: dict[str, Any] = {
        "majority": metrics.macro_f1(truth, [majority] * len(truth)),
        "tfidf": metrics.macro_f1(truth, baselines.tfidf(texts, labels, [e.text for e in one.test])),
        "zero_shot": _zero_shot(one, client, args) if args.zero_shot_rows else None,
    }
    model = client.stats()["model"]
    gathered = train.gathered_features(model["num_layers"], _is_marked(one))
    asked = sorted({e.text for e in one.train + one.test})  # in an order that does not depend on the split
    everything = gather(client, asked, gathered, _progress(one.name), args.cache / "states")
    place = {text: i for i, text in enumerate(asked)}
    states, held = everything[[place[text] for text in texts]], everything[[place[e.text] for e in one.test]]
    for count in FEW:
        scores = few_shot(one.train, one.test, states, held, gathered, count, args.seeds)
        row[f"head_{count}"] = float(np.mean(scores))
    row["head_all"] = _head(one, states, held, gathered, None)
    row["published"] = PUBLISHED[one.name][0]
    row["head_states"] = _head(one, states, held, gathered, False)
    return row


def _is_marked(one: Set) -> bool:
    return sum(is_marked(example.text) for example in one.train) > 0.9 * len(one.train)


def _head(one: Set, states: States, held: States, gathered: Features, words: bool | None) -> float:
    """Macro-F1 of a head trained on all training rows."""
    labels = [e.label for e in one.train]
    chosen = train.sample([e.text for e in one.train], labels)
    head = train.train(
        one.name,
        [one.train[i].text for i in chosen],
        [labels[i] for i in chosen],
        states[chosen],
        gathered,
        ("", ""),
        with_words=words,
    )
    return metrics.macro_f1([e.label for e in one.test], _answers(head, held, gathered, one.test))


def _answers(head: Head, held: States, gathered: Features, test: list[Example]) -> list[str]:
    values = train.blocks_of(held, gathered, head.features)
    return [answer.best for answer in head.answers(values, [e.text for e in test])]


def _zero_shot(one: Set, client: Client, args: argparse.Namespace) -> float:
    """Macro-F1 on test rows by the scoring that is best on training rows."""
    server, cache = zero_shot.HobServer(client), args.cache / "labels"
    choice = zero_shot.sample(one.train, CHOICE_ROWS)
    asked = zero_shot.sample(one.test, args.zero_shot_rows)
    scored = [
        zero_shot.scored(one.name, examples, server, cache, MAX_CHARS, _left(one.name)) for examples in (choice, asked)
    ]
    f1 = {
        scorer: metrics.macro_f1([e.label for e in choice], answers) for scorer, answers in scored[0].answers().items()
    }
    best = max(f1, key=lambda scorer: f1[scorer])
    return metrics.macro_f1([e.label for e in asked], scored[1].answers()[best])


def _progress(name: str) -> Any:
    def show(done: int, of: int) -> None:
        print(f"\r{name}: states of {done} of {of} texts ", end="" if done < of else "\n", file=sys.stderr, flush=True)

    return show


def _left(name: str) -> Any:
    def show(done: int, of: int, left_s: float) -> None:
        print(f"\r{name}: labels of {done} of {of} texts, {left_s:.0f} s left ", end="", file=sys.stderr, flush=True)

    return show


def _line(one: Set, row: dict[str, Any], seconds: float) -> str:
    names = ("majority", "tfidf", "zero_shot", "head_32", "head_128", "head_all", "head_states")
    cells = "".join("      -" if row[name] is None else f"{row[name]:7.3f}" for name in names)
    size = PUBLISHED[one.name][1]
    return (
        f"{one.name:23}{cells}  {row['published']:.3f} ({size})  "
        f"{len(one.train)} + {len(one.test)} rows, {seconds:.0f} s"
    )


def _summary(rows: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    def above(a: str, b: str) -> str:
        known = [row for row in rows.values() if row[a] is not None]
        return f"{a} above {b}: {sum(row[a] > row[b] for row in known)} of {len(known)}"

    pairs = (("head_all", "published"), ("head_all", "tfidf"), ("head_states", "tfidf"), ("zero_shot", "majority"))
    print("\n".join(above(a, b) for a, b in pairs))
    print(
        f"caps: {train.MAX_EXAMPLES} training rows of a head; zero-shot: {args.zero_shot_rows} test rows, "
        f"{MAX_CHARS} characters of a text, {CHOICE_ROWS} training rows to choose from"
    )


if __name__ == "__main__":
    main()
