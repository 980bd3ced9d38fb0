"""`hob demo`."""

from __future__ import annotations

from typing import Annotated

import typer


def demo(
    json: Annotated[
        bool, typer.Option("--json", help="Print the figures as one JSON object, and nothing else.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Catalogue name or path of a GGUF file.")] = None,
) -> None:
    """Three programs share one model; then three private copies do the same work. All of it really runs.

    Uses a daemon of its own in a temporary folder; yours, if one runs, is left alone. Takes about two minutes.

    \b
    hob demo
    hob demo --json > figures.json
    """
    from rich.console import Console

    from hob.cli.background import fetch_if_missing
    from hob.cli.output import print_json
    from hob.config import load_config
    from hob.demo.story import run_demo

    config, _ = load_config({"model": model})
    fetch_if_missing(config)
    figures = run_demo(config, Console(quiet=json, highlight=False))
    if json:
        print_json(figures)
