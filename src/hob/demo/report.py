"""What the demo prints: titles, a little of each program's answers, the summary table, the lines to join with."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hob.config import Config
from hob.demo.measure import Run
from hob.demo.worker import Event

NUM_SHOWN_LABELS = 4
NUM_SHOWN_TURNS = 2


def print_title(console: Console, number: int, text: str) -> None:
    """A part begins."""
    console.print(f"\n[bold cyan]{number}[/]  [bold]{text}[/]")


def print_round(console: Console, text: str) -> None:
    """A part goes on with another round."""
    console.print(f"\n   [bold]{text}[/]")


def print_answers(console: Console, run: Run) -> None:
    """A little of what each program got."""
    labels = run.figures["labels"].finished
    right = sum(event["label"] == event["truth"] for event in labels)
    console.print(f"  [bold]labels[/]: {right} of {len(labels)} as a person labelled them, for example")
    for event in labels[:: max(len(labels) // NUM_SHOWN_LABELS, 1)][:NUM_SHOWN_LABELS]:
        console.print(f"    {event['label']:8} {event['probability']:.2f}  {_short(event['text'], console.width - 20)}")
    console.print("  [bold]chat[/]")
    for event in run.figures["chat"].finished[:NUM_SHOWN_TURNS]:
        console.print(f"    {_short(event['text'], console.width - 6)}")
    console.print("  [bold]summaries[/]")
    console.print(f"    {_short(run.figures['summaries'].finished[0]['text'], console.width - 6)}")


class ChatPrinter:
    """The chat of part 4 as it goes, wrapped at the console's width."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._column = 0

    def show(self, event: Event) -> None:
        """One event of the chat program."""
        if event["event"] == "question":
            self._line(f"[bold]> {escape(event['text'])}[/]")
        elif event["event"] == "token":
            self._text(event["text"].replace("\n", " "))
        elif event["event"] == "lost":
            self._line(f"[dim]the chat program: {escape(_short(event['error'], 60))} It asks again.[/]")
        elif event["event"] == "request":
            self._console.print()
            self._column = 0

    def note(self, text: str) -> None:
        """A line of ours between."""
        self._line(text)

    def _line(self, text: str) -> None:
        if self._column:
            self._console.print()
        self._console.print(f"  {text}")
        self._column = 0

    def _text(self, text: str) -> None:
        if self._column == 0 or self._column + len(text) > self._console.width - 2:
            self._console.print("\n  " if self._column else "  ", end="")
            self._column, text = 2, text.lstrip()
        self._console.print(text, end="", markup=False, soft_wrap=True)
        self._column += len(text)


def print_summary(console: Console, runs: list[Run], recovery: dict[str, float]) -> None:
    """The table worth a screenshot."""
    table = Table(title="\nThe same engine, the same work, really run", title_justify="left")
    table.add_column("")
    for run in runs:
        table.add_column(run.name.replace(", ", ",\n"), justify="right")
    base = runs[0]
    rows: list[tuple[str, list[float], str]] = [
        ("memory, all, MB PSS", [run.total_bytes / 1e6 for run in runs], ".0f"),
        ("memory, engines, MB PSS", [run.engine_bytes / 1e6 for run in runs], ".0f"),
        ("all done after, s", [run.seconds for run in runs], ".1f"),
        ("chat: TTFT, ms", [1000 * (run.figures["chat"].ttft_s or 0) for run in runs], ".0f"),
        ("chat done after, s", [run.figures["chat"].elapsed_s for run in runs], ".1f"),
        ("labels done after, s", [run.figures["labels"].elapsed_s for run in runs], ".1f"),
        ("summaries done after, s", [run.figures["summaries"].elapsed_s for run in runs], ".1f"),
    ]
    for name, values, form in rows:
        cells = [f"[bold]{values[0]:{form}}[/]"]
        cells += [f"{value:{form}}  {_times(value, values[0]):>6}" for value in values[1:]]
        table.add_row(name, *cells)
    console.print(table)
    is_same = all(_answers(run) == _answers(base) for run in runs)
    num_answers = sum(len(figures.finished) for figures in base.figures.values())
    console.print(
        f"  memory is the peak of PSS: a page shared by n processes counts 1/n in each\n"
        f"  the {num_answers} answers {'are the same in all three runs, bit for bit' if is_same else 'differ: a bug'}\n"
        f"  after kill -9: the chat had its next token {recovery['first_token_s']:.2f} s later"
    )


def _answers(run: Run) -> list[Any]:
    """All that the programs were told, without the times."""
    events = [(name, event) for name, figures in run.figures.items() for event in figures.finished]
    return sorted([name, str(e["text"]), str(e.get("label")), repr(e.get("probability"))] for name, e in events)


def print_join(console: Console, config: Config) -> None:
    """Part 5."""
    print_title(console, 5, "Your turn: three lines for your own OpenAI client")
    url = f"http://{config.server.host}:{config.server.port}/v1"
    console.print(
        f"  {command('hob')} serve --background\n"
        f"  export OPENAI_BASE_URL={url} OPENAI_API_KEY=any\n"
        f"  {command('python3')} -c 'from openai import OpenAI; print(OpenAI().chat.completions.create("
        """model="default", messages=[{"role": "user", "content": "Hi!"}]).choices[0].message.content)'""",
        markup=False,
        soft_wrap=True,
    )
    console.print("\n  Nothing of the demo is running any more; its daemons and files are gone.")


def command(name: str) -> str:
    """How a command that lies beside this Python is called from here."""
    beside = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    return name if found and Path(found) == beside else _relative(beside)


def _relative(path: Path) -> str:
    here = os.path.relpath(path)
    return here if len(here) < len(str(path)) and not here.startswith("..") else str(path)


def _times(value: float, base: float) -> str:
    return f"× {value / base:.1f}" if base else "-"


def _short(text: Any, width: int) -> str:
    line = " ".join(str(text).split())
    return escape(line if len(line) <= width else line[: width - 1] + "…")
