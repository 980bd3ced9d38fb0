"""`hob pull`, `hob list`, `hob rm`: models on this machine."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hob.config import Config

PLAIN_INTERVAL_S = 2.0
"""Without a terminal, progress is a line this often."""


def pull(
    name: Annotated[
        str, typer.Argument(help="Catalogue name (`hob list`), hf:OWNER/REPO/FILE.gguf, https address or path.")
    ],
    save_as: Annotated[str | None, typer.Option("--as", help="Name for a model from elsewhere.")] = None,
    sha256: Annotated[str | None, typer.Option(help="What the file of a model from elsewhere must have.")] = None,
) -> None:
    """Fetch a model and pack it. An interrupted download goes on where it stopped.

    \b
    hob pull smollm2-135m
    hob pull hf:OWNER/REPO/FILE.gguf --as mine
    """
    from hob.config import load_config

    config, _ = load_config()
    print(_pull(config, name, save_as, sha256))


def list_models(json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """List models: those on this machine, and those that can be pulled.

    \b
    hob list
    """
    from hob.cli.output import human_bytes, print_json, print_table
    from hob.config import load_config
    from hob.models.catalog import Catalog

    config, _ = load_config()
    entries = Catalog(config.models_dir).list()
    if json:
        print_json(entries)
        return
    rows: list[list[Any]] = [
        [
            entry.name,
            human_bytes(entry.size_bytes) if entry.size_bytes else "?",
            entry.path or f"not here: hob pull {entry.name}",
            ", ".join(entry.aliases),
        ]
        for entry in entries
    ]
    print_table(["name", "size", "where", "also called"], rows)


def rm(name: Annotated[str, typer.Argument(help="Name of a model on this machine.")]) -> None:
    """Remove a model and what was packed from it.

    \b
    hob rm gemma3-270m
    """
    from hob.config import load_config
    from hob.models.catalog import Catalog

    config, _ = load_config()
    print(f"removed {Catalog(config.models_dir).remove(name)}")


def pull_missing(config: Config) -> None:
    """Pull the configured model, saying so on stderr, unless it is here."""
    from hob.errors import ModelNotFound
    from hob.models.catalog import Catalog

    try:
        Catalog(config.models_dir).resolve(config.engine.model)
    except ModelNotFound:
        print(f"hob: model '{config.engine.model}' is not here yet, fetching it", file=sys.stderr)
        print(f"hob: {_pull(config, config.engine.model)}", file=sys.stderr)


def _pull(config: Config, name: str, save_as: str | None = None, sha256: str | None = None) -> str:
    """Fetch with progress on stderr, pack, and say where it is now."""
    from hob.models.catalog import Catalog
    from hob.models.pack import ensure_packed

    with progress_shown() as report:
        path = Catalog(config.models_dir).pull(name, report, save_as=save_as, sha256=sha256)
        ensure_packed(path, lambda done, total: report(done, total, "pack"))
    return f"{name} is at {path}"


@contextlib.contextmanager
def progress_shown() -> Iterator[Callable[[int, int, str], None]]:
    """A callback (done, total, stage): a bar on stderr at a terminal, else a line every few seconds."""
    if not sys.stderr.isatty():
        yield _plain_progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description:9}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def report(done: int, total: int, stage: str) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage)
            bar.update(tasks[stage], completed=done, total=total or None)

        yield report


def _plain_progress() -> Callable[[int, int, str], None]:
    from hob.cli.output import human_bytes

    due, shown = 0.0, ""

    def report(done: int, total: int, stage: str) -> None:
        nonlocal due, shown
        if stage == shown and time.monotonic() < due and done != total:
            return
        due, shown = time.monotonic() + PLAIN_INTERVAL_S, stage
        print(f"hob: {stage} {human_bytes(done)} of {human_bytes(total) if total else '?'}", file=sys.stderr)

    return report
