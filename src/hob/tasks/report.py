"""Results of zero-shot runs as Markdown and as one HTML page with plots. Results of several models in one folder meet.

FOLDER/results-MODEL.json  --all of them-->  report.md, report.html
"""

from __future__ import annotations

import html
import io
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hob.tasks.scorers import SCORERS
from hob.tasks.zero_shot import Result

HEADER = ("data set", "texts", "majority", "TF-IDF", *SCORERS)


def row_object(result: Result) -> dict[str, Any]:
    """For --json."""
    found: dict[str, Any] = msgspec.to_builtins(result)
    return found


def table_row(result: Result) -> tuple[Any, ...]:
    """In the order of HEADER."""
    scores = [f"{result.f1[name].value:.3f}" for name in SCORERS]
    return (result.dataset, result.num_rows, f"{result.majority:.3f}", f"{result.tfidf:.3f}", *scores)


def write(folder: Path, results: list[Result]) -> None:
    """Keep these results, then report on all that are kept there."""
    folder.mkdir(parents=True, exist_ok=True)
    for model in {result.model for result in results}:
        mine = [result for result in results if result.model == model]
        path = folder / f"results-{re.sub('[^A-Za-z0-9._-]+', '-', model)}.json"
        path.write_bytes(msgspec.json.format(msgspec.json.encode(mine), indent=1))
    everything = [
        result
        for path in sorted(folder.glob("results-*.json"))
        for result in msgspec.json.decode(path.read_bytes(), type=list[Result])
    ]
    (folder / "report.md").write_text(markdown(everything), encoding="utf-8")
    (folder / "report.html").write_text(page(everything), encoding="utf-8")


def markdown(results: list[Result]) -> str:
    """Tables, and what they say."""
    lines = ["# Zero-shot classification", "", "Macro-F1; intervals are the 2.5 and 97.5 % points of 1,000 bootstraps."]
    for model in dict.fromkeys(result.model for result in results):
        mine = [result for result in results if result.model == model]
        lines += ["", f"## {model}", "", _markdown_row(HEADER), _markdown_row(["---"] * len(HEADER))]
        for result in mine:
            cells = [_interval(result, name) for name in SCORERS]
            lines.append(_markdown_row([*table_row(result)[:4], *cells]))
        lines += ["", *findings(mine)]
    lines += ["", *_sizes(results)]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _interval(result: Result, scorer: str) -> str:
    measured = result.f1[scorer]
    return f"{measured.value:.3f} ({measured.low:.2f} to {measured.high:.2f})"


def findings(results: list[Result]) -> list[str]:
    """Whether the scoring function matters, on these results of one model: its means, and its share of the variance."""
    table = np.array([[result.f1[name].value for name in SCORERS] for result in results])
    means = {name: float(column.mean()) for name, column in zip(SCORERS, table.T, strict=True)}
    best = max(means, key=lambda name: means[name])
    total = float(((table - table.mean()) ** 2).sum()) or 1.0
    by_scorer = len(table) * float(((table.mean(axis=0) - table.mean()) ** 2).sum()) / total
    by_set = table.shape[1] * float(((table.mean(axis=1) - table.mean()) ** 2).sum()) / total
    top = table.max(axis=1)
    above = sum(float(t) > result.majority for t, result in zip(top, results, strict=True))
    return [
        "Means over data sets: " + ", ".join(f"{name} {mean:.3f}" for name, mean in means.items()) + ".",
        f"Of the variance, the data set explains {by_set:.0%}, the scoring {by_scorer:.0%}; on average the best is "
        f"{best}. The best scoring of each set is above the majority label on {above} of {len(results)}.",
    ]


def _sizes(results: list[Result]) -> list[str]:
    """Where several models are there: on how many data sets each is the best."""
    models = list(dict.fromkeys(result.model for result in results))
    shared = set.intersection(*({r.dataset for r in results if r.model == model} for model in models))
    if len(models) < 2 or not shared:
        return []
    wins = dict.fromkeys(models, 0)
    for dataset in shared:
        best = {r.model: max(m.value for m in r.f1.values()) for r in results if r.dataset == dataset}
        wins[max(best, key=lambda model: best[model])] += 1
    return ["Best on: " + ", ".join(f"{model} {count} of {len(shared)}" for model, count in wins.items()) + "."]


def page(results: list[Result]) -> str:
    """One page that needs nothing beside it."""
    parts = ["<!doctype html><meta charset='utf-8'><title>Zero-shot classification</title>"]
    parts.append("<style>body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}")
    parts.append("table{border-collapse:collapse}td,th{padding:.2em .6em;border-bottom:1px solid #ccc}</style>")
    parts.append("<h1>Zero-shot classification</h1><p>Macro-F1 with 95 % intervals; the bar is the majority label.</p>")
    for model in dict.fromkeys(result.model for result in results):
        mine = [result for result in results if result.model == model]
        parts.append(f"<h2>{html.escape(model)}</h2>{_plot(mine)}")
        rows = [HEADER, *(table_row(result) for result in mine)]
        cells = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
        parts.append("<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>")
        parts += [f"<p>{html.escape(line)}</p>" for line in findings(mine)]
    return "\n".join(parts) + "\n"


def _plot(results: list[Result]) -> str:
    """A figure as SVG: per data set the majority, TF-IDF and each scoring with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.6 * len(results) + 1.6), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(results))
    axes.barh(rows, [r.majority for r in results], 0.8, color="#dddddd", label="majority")
    axes.plot([r.tfidf for r in results], rows, "kx", label="TF-IDF")
    for i, name in enumerate(SCORERS):
        measured = [r.f1[name] for r in results]
        values = np.array([m.value for m in measured])
        errors = np.array([[m.value - m.low for m in measured], [m.high - m.value for m in measured]])
        at = rows - 0.3 + 0.12 * i
        axes.errorbar(values, at, xerr=errors.clip(0), fmt="o", markersize=4, linewidth=1, label=name)
    axes.set_yticks(rows, [r.dataset for r in results])
    axes.set_xlim(0, 1)
    axes.set_xlabel("macro-F1")
    axes.invert_yaxis()
    axes.legend(loc="lower right", fontsize="small")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
