"""Results of zero-shot runs as Markdown and as one HTML page with plots. Results of several models in one folder meet.

FOLDER/results-MODEL.json  --all of them-->  report.md, report.html

Beside the tables stands what they say of two findings of Lepagnol et al. 2024 (arXiv:2404.11122): that neither the
scoring function nor the model's size matters much.
"""

from __future__ import annotations

import html
import io
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from hob.tasks.effects import Effect, effect
from hob.tasks.scorers import SCORERS
from hob.tasks.zero_shot import Result

Floats = NDArray[np.float64]
MIN_SETS = 5
"""Data sets below which nothing is said of significance: five that all agree have p = 0.06 for two levels."""
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
    lines += ["", *across(results)]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _interval(result: Result, scorer: str) -> str:
    measured = result.f1[scorer]
    return f"{measured.value:.3f} ({measured.low:.2f} to {measured.high:.2f})"


def findings(results: list[Result]) -> list[str]:
    """Whether the scoring function matters, on these results of one model."""
    table = _table(results)
    total = float(((table - table.mean()) ** 2).sum()) or 1.0
    by_scorer = len(table) * float(((table.mean(axis=0) - table.mean()) ** 2).sum()) / total
    by_set = table.shape[1] * float(((table.mean(axis=1) - table.mean()) ** 2).sum()) / total
    top = table.max(axis=1)
    above = sum(float(t) > result.majority for t, result in zip(top, results, strict=True))
    return [
        f"The best scoring of each set is above the majority label on {above} of {len(results)}. Of the variance, the "
        f"data set explains {by_set:.0%}, the scoring {by_scorer:.0%}.",
        _said("Scoring", effect(list(SCORERS), table)),
    ]


def _table(results: list[Result]) -> Floats:
    """(data sets, scorings)"""
    return np.array([[result.f1[name].value for name in SCORERS] for result in results])


def _said(what: str, found: Effect) -> str:
    """A sentence or two."""
    best, worst = next(iter(found.means)), list(found.means)[-1]
    means = ", ".join(f"{level} {mean:.3f}" for level, mean in found.means.items())
    text = (
        f"{what}, means over {found.num_sets} data sets: {means}. {best} is {found.gap.value:.3f} above {worst} "
        f"(95 % interval over data sets {found.gap.low:.3f} to {found.gap.high:.3f})."
    )
    if found.num_sets < MIN_SETS:
        return f"{text} Too few data sets to tell whether that is chance."
    verdict = "the order is more than chance" if found.p < 0.05 else "an order that chance makes too"
    name = "Wilcoxon" if len(found.means) == 2 else "Friedman"
    return f"{text} {name} p = {found.p:.2g}, agreement of the sets W = {found.agreement:.2f}: {verdict}."


def across(results: list[Result]) -> list[str]:
    """Where several models are there: whether the scoring matters over all of them, and whether the model does."""
    models = list(dict.fromkeys(result.model for result in results))
    shared = sorted(set.intersection(*({r.dataset for r in results if r.model == model} for model in models)))
    if len(models) < 2 or not shared:
        return []
    by_model = [
        _table(sorted((r for r in results if r.model == model and r.dataset in shared), key=lambda r: r.dataset))
        for model in models
    ]  # of each (data sets, scorings)
    cube = np.stack(by_model, axis=2)
    best = next(iter(effect(list(SCORERS), cube.mean(axis=2)).means))
    return [
        _said("Scoring, mean of the models", effect(list(SCORERS), cube.mean(axis=2))),
        _said("Model, mean of the scorings", effect(models, cube.mean(axis=1))),
        _said(f"Model, by {best}", effect(models, cube[:, list(SCORERS).index(best)])),
    ]


def page(results: list[Result]) -> str:
    """One page that needs nothing beside it."""
    parts = ["<!doctype html><meta charset='utf-8'><title>Zero-shot classification</title>"]
    parts.append("<style>body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}")
    parts.append("svg{max-width:100%;height:auto}table{border-collapse:collapse;font-size:.9em}")
    parts.append(
        "td{padding:.2em .6em;border-bottom:1px solid #ccc;text-align:right;font-variant-numeric:tabular-nums}"
    )
    parts.append("td:first-child{text-align:left}tr:first-child td{font-weight:bold;vertical-align:bottom}</style>")
    parts.append(
        "<h1>Zero-shot classification</h1><p>Macro-F1 with 95 % intervals. The grey bar is the most frequent label; "
    )
    parts.append("TF-IDF is a logistic regression trained on the rows that no model was asked for.</p>")
    for model in dict.fromkeys(result.model for result in results):
        mine = [result for result in results if result.model == model]
        parts.append(f"<h2>{html.escape(model)}</h2>{_plot(mine)}")
        rows = [[name.replace("_", " ") for name in HEADER], *(table_row(result) for result in mine)]
        cells = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
        parts.append("<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>")
        parts += [f"<p>{html.escape(line)}</p>" for line in findings(mine)]
    said = across(results)
    parts += ["<h2>All models</h2>"] * bool(said) + [f"<p>{html.escape(line)}</p>" for line in said]
    return "\n".join(parts) + "\n"


def _plot(results: list[Result]) -> str:
    """A figure as SVG: per data set the majority, TF-IDF and each scoring with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.5 * len(results) + 1.8), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(results))
    axes.barh(rows, [r.majority for r in results], 0.8, color="#dddddd", label="majority")
    axes.plot([r.tfidf for r in results], rows, "kx", label="TF-IDF")
    for i, name in enumerate(SCORERS):
        measured = [r.f1[name] for r in results]
        values = np.array([m.value for m in measured])
        errors = np.array([[m.value - m.low for m in measured], [m.high - m.value for m in measured]])
        at = rows - 0.3 + 0.12 * i
        axes.errorbar(values, at, xerr=errors.clip(0), fmt="o", markersize=4, linewidth=1, label=name.replace("_", " "))
    axes.set_yticks(rows, [r.dataset for r in results])
    axes.set_xlim(0, 1)
    axes.set_xlabel("macro-F1")
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=4, fontsize="small", frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
