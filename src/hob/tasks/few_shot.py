"""Few-shot curves: heads from 8, 32, 128, 512 examples, several draws each.

NAME.csv --split by a hash--> training, test --states of both, once--> heads of each draw --> a Curve
all curves --> few-shot.json, few-shot.md, few-shot.svg
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np

from hob.client import Client
from hob.errors import UserError
from hob.heads.head import Features
from hob.heads.parts import is_marked
from hob.tasks import baselines, metrics, train
from hob.tasks.datasets import Example, read_examples, split_by_hash
from hob.tasks.features import States, gather

COUNTS = (8, 32, 128, 512)
TEST_SHARE = 0.3
"""Of a file's rows, those that no head is trained on."""
SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv")
Bar = Callable[[str, int, int], None]
"""What is being done, how much of it, of how much."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    data: Path
    """A file of examples, or a folder of such."""
    only: list[str] = field(default_factory=list)
    """Names of files without their suffix; empty: all."""
    counts: tuple[int, ...] = COUNTS
    num_seeds: int = 5
    cache: Path | None = None
    """Where the model's states are kept, so that an interrupted run goes on."""


@dataclass(frozen=True)
class Curve:
    """What heads reach by their number of examples: macro-F1 on the test rows."""

    dataset: str
    num_train: int
    num_test: int
    majority: float
    tfidf: float
    """TF-IDF and logistic regression, trained on all training rows."""
    scores: dict[int, list[float]]
    """Number of examples -> a score for each draw. All training rows come last, with one."""


def draw(examples: list[Example], count: int, seed: int) -> list[int]:
    """Indices of `count` examples at random, but two of each label first: nobody learns a label from nothing.

    Where two of each are more than `count`, all of those.
    """
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    by_label: dict[str, list[int]] = {}
    for i in order:
        by_label.setdefault(examples[i].label, []).append(i)
    first = [i for label in sorted(by_label) for i in by_label[label][:2]]
    rest = [i for i in order if i not in set(first)]
    return sorted((first + rest)[: max(count, len(first))])


def few_shot(
    examples: list[Example],
    test: list[Example],
    states: States,
    test_states: States,
    gathered: Features,
    count: int,
    num_seeds: int = 5,
) -> list[float]:
    """Macro-F1 on `test` of a head for each draw. A data set with fewer examples gives one head from all of them."""
    scores = []
    for seed in range(num_seeds if count < len(examples) else 1):
        chosen = draw(examples, count, seed)
        head = train.train(
            "few",
            [examples[i].text for i in chosen],
            [examples[i].label for i in chosen],
            states[chosen],
            gathered,
            ("", ""),
        )
        values = train.blocks_of(test_states, gathered, head.features)
        answers = [answer.best for answer in head.answers(values, [e.text for e in test])]
        scores.append(metrics.macro_f1([e.label for e in test], answers))
    return scores


def run(plan: Plan, client: Client, bar: Bar) -> list[Curve]:
    """A curve for each file. Raises UserError."""
    return [_curve(path.stem, read_examples(path), plan, client, bar) for path in _files(plan)]


def _files(plan: Plan) -> list[Path]:
    if plan.data.is_file():
        return [plan.data]
    known = sorted(p for p in plan.data.glob("*") if p.suffix in SUFFIXES) if plan.data.is_dir() else []
    found = [path for path in known if not plan.only or path.stem in plan.only]
    if not found:
        names = ", ".join(path.stem for path in known) or "none"
        raise UserError(
            f"{plan.data}: nothing to measure. Expected a file or folder of {', '.join(SUFFIXES)}: {names}."
        )
    return found


def _curve(name: str, examples: list[Example], plan: Plan, client: Client, bar: Bar) -> Curve:
    inside, test = split_by_hash(examples, TEST_SHARE, "few-shot")
    texts, truth = [e.text for e in inside], [e.label for e in test]
    marked = all(is_marked(e.text) for e in examples)
    gathered = train.gathered_features(client.stats()["model"]["num_layers"], marked)
    everything = gather(
        client, texts + [e.text for e in test], gathered, lambda done, of: bar(f"{name}: states", done, of), plan.cache
    )
    states, held = everything[: len(inside)], everything[len(inside) :]
    counts = [*(count for count in sorted(plan.counts) if count < len(inside)), len(inside)]
    scores = {}
    for i, count in enumerate(counts):
        bar(f"{name}: heads", i, len(counts))
        scores[count] = few_shot(inside, test, states, held, gathered, count, plan.num_seeds)
    bar(f"{name}: heads", len(counts), len(counts))
    most = metrics.majority([e.label for e in inside])
    learnt = baselines.tfidf(texts, [e.label for e in inside], [e.text for e in test])
    return Curve(
        dataset=name,
        num_train=len(inside),
        num_test=len(test),
        majority=metrics.macro_f1(truth, [most] * len(truth)),
        tfidf=metrics.macro_f1(truth, learnt),
        scores=scores,
    )


# ---- the report ----


def table(curves: list[Curve], counts: Iterable[int]) -> list[tuple[str, ...]]:
    """A header and a row for each curve: mean and spread of the draws."""
    columns = sorted(counts)
    rows = [("data set", *(f"{count}" for count in columns), "all", "TF-IDF, all", "majority")]
    for curve in curves:
        cells = [_cell(curve.scores[count]) if count in curve.scores else "-" for count in columns]
        most = f"{curve.scores[curve.num_train][0]:.3f} ({curve.num_train})"
        rows.append((curve.dataset, *cells, most, f"{curve.tfidf:.3f}", f"{curve.majority:.3f}"))
    return rows


def _cell(scores: list[float]) -> str:
    return f"{np.mean(scores):.3f} ± {np.std(scores):.3f}"


def write(folder: Path, curves: list[Curve], counts: Iterable[int]) -> None:
    """few-shot.json, few-shot.md and few-shot.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "few-shot.json").write_bytes(msgspec.json.format(msgspec.json.encode(curves), indent=1))
    header, *rows = table(curves, counts)
    lines = [header, ("---",) * len(header), *rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    (folder / "few-shot.md").write_text(f"Macro-F1 of heads by number of examples.\n\n{text}", encoding="utf-8")
    _plot(curves, folder / "few-shot.svg")


def _labels(counts: list[int]) -> list[str]:
    """Of the ticks; none where the next is so near that the two would overlap."""
    return [str(a) if b / a > 1.7 else "" for a, b in pairwise([*counts, counts[-1] * 2])]


def _plot(curves: list[Curve], path: Path) -> None:
    """One small chart for each data set: the curve with its spread, TF-IDF and majority as lines."""
    from matplotlib.figure import Figure

    columns = min(len(curves), 4)
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    charts = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for chart, curve in zip(charts, curves, strict=False):
        counts = sorted(curve.scores)
        spread = [np.std(curve.scores[count]) for count in counts]
        chart.errorbar(
            counts, [np.mean(curve.scores[count]) for count in counts], yerr=spread, marker="o", label="head"
        )
        chart.axhline(curve.tfidf, color="black", linestyle="--", linewidth=1, label="TF-IDF, all rows")
        chart.axhline(curve.majority, color="gray", linestyle=":", linewidth=1, label="majority")
        chart.set(title=curve.dataset, xscale="log", ylim=(0, 1), xticks=counts, xticklabels=_labels(counts))
        chart.minorticks_off()
    for chart in charts[len(curves) :]:
        chart.set_axis_off()
    charts[0].set_ylabel("macro-F1")
    charts[0].legend(loc="lower right", fontsize="small")
    figure.savefig(path)
