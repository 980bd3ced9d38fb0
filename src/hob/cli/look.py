"""`hob top`, `hob dashboard`: what goes on, in the terminal and in a browser."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

BLOCKS = "▁▂▃▄▅▆▇█"
PALETTE = ("dark_orange3", "steel_blue1", "medium_purple", "gold3", "sea_green3", "grey62")
NUM_POINTS = 60
"""Seconds that a curve shows."""
MAX_ROWS = 12


def top(
    once: Annotated[bool, typer.Option("--once", help="Print the state once and end.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the state once as one JSON object.")] = False,
) -> None:
    """Watch the service: apps and their shares, requests, speed, memory. Ctrl-C ends it.

    \b
    hob top
    hob top --json | jq .apps
    """
    from hob.cli.output import print_json
    from hob.client import Client
    from hob.config import load_config

    config, _ = load_config()
    with Client(config.socket_path, app="hob-top") as client:
        if json:
            print_json(client.overview())
            return
        from rich.console import Console

        console = Console()
        if once or not console.is_terminal:
            console.print(view(client.overview()))
            return
        _watch(client, console)


def dashboard(
    no_open: Annotated[bool, typer.Option("--no-open", help="Print the link only.")] = False,
) -> None:
    """Open the page of the service in a browser: a link that works once, within a minute.

    \b
    hob dashboard
    hob dashboard --no-open
    """
    import webbrowser

    from hob.client import Client
    from hob.config import load_config
    from hob.errors import DaemonUnreachable
    from hob.rundir import RunDir

    config, _ = load_config()
    state = RunDir(config.socket_path).read_state()
    if state is None:
        raise DaemonUnreachable(f"no daemon runs on '{config.socket_path}'. Start one with `hob serve`.")
    with Client(config.socket_path) as client:
        link = state.base_url.removesuffix("/v1") + client.dashboard()
    print(link)
    if not no_open:
        webbrowser.open(link)


def _watch(client: Any, console: Any) -> None:
    from rich.live import Live

    with Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            for overview in client.watch():
                live.update(view(overview), refresh=True)
        except KeyboardInterrupt:
            return


# ---- drawing ----


def view(overview: dict[str, Any]) -> RenderableType:
    """The whole screen."""
    from rich.console import Group

    parts: list[RenderableType] = [
        _head(overview),
        "",
        _curves(overview["series"]),
        "",
        _memory(overview["memory"]),
        "",
    ]
    parts += [_apps(overview["apps"]), ""]
    if overview["requests"]:
        parts += [_requests(overview["requests"]), ""]
    if overview["refusals"]:
        parts.append(_refusals(overview["refusals"], overview["num_refusals"]))
    return Group(*parts)


def _head(overview: dict[str, Any]) -> RenderableType:
    from rich.text import Text

    loaded = [model["name"] for model in overview["models"] if model["is_loaded"]]
    contexts = sum(each["num_contexts"] for each in overview["contexts"])
    engine = overview["engine"]
    return Text.assemble(
        ("hob ", "bold dark_orange3"),
        (", ".join(loaded) or "no model is loaded", "bold"),
        f"  up {overview['uptime_s']:.0f} s  running {engine['num_running']}  waiting {engine['num_waiting']}  "
        f"contexts {contexts}",
        (f"\nbackground work waits: {reason}" if (reason := overview["background_waits_for"]) else "", "gold3"),
    )


def curve(values: list[float | None]) -> str:
    """Numbers as a row of blocks, the highest one full; nothing where there is none."""
    shown = values[-NUM_POINTS:]
    highest = max([value for value in shown if value is not None], default=0.0) or 1.0
    last = len(BLOCKS) - 1
    return "".join(" " if value is None else BLOCKS[round(last * max(value, 0.0) / highest)] for value in shown)


def _curves(series: dict[str, list[Any]]) -> RenderableType:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, label, unit, colour in (
        ("output_tok_s", "generated", "tok/s", PALETTE[0]),
        ("prompt_tok_s", "read", "tok/s", PALETTE[1]),
        ("ttft_ms", "first token", "ms", PALETTE[2]),
    ):
        known = [value for value in series[name] if value is not None]
        now = f"{known[-1]:,.0f} {unit}" if known else "-"
        table.add_row(label, f"[bold]{now:>12}[/]", f"[{colour}]{curve(series[name])}[/]")
    return table


def _memory(memory: dict[str, Any]) -> RenderableType:
    from rich.text import Text

    total = memory["reserved_bytes"] or 1
    line = Text(
        f"memory {memory['reserved_bytes'] / 1e6:,.0f} of {memory['budget_bytes'] / 1e6:,.0f} MB reserved, "
        f"{memory['pss_bytes'] / 1e6:,.0f} MB taken\n"
    )
    legend = Text()
    for colour, part in zip(PALETTE, memory["parts"], strict=False):
        line.append("█" * round(40 * part["bytes"] / total), colour)
        legend.append("  ■ ", colour)
        legend.append(f"{part['name']} {part['bytes'] / 1e6:,.0f}")
    return Text("\n").join([line, legend])


def _apps(apps: list[dict[str, Any]]) -> RenderableType:
    from rich.markup import escape

    table = _table("app", "share", "", "run", "wait", "asked", "prompt", "cached", "output", "TTFT")
    for app in apps[:MAX_ROWS]:
        share = app["share"] or 0.0
        table.add_row(
            escape(app["app"]),
            "-" if app["share"] is None else f"{100 * share:.0f} %",
            f"[{PALETTE[0]}]{'█' * round(8 * share)}[/]",
            *(f"{app[name]:,}" for name in ("num_running", "num_waiting", "num_requests")),
            *(f"{app[name]:,}" for name in ("num_prompt_tokens", "num_cached_tokens", "num_output_tokens")),
            f"{1000 * app['last_ttft_s']:.0f}",
        )
    return table


def _requests(requests: list[dict[str, Any]]) -> RenderableType:
    from rich.markup import escape

    table = _table("request of", "what", "class", "state", "prompt", "output", "age s", texts=4)
    for request in requests[:MAX_ROWS]:
        table.add_row(
            escape(request["app"]),
            escape(request["endpoint"]),
            request["class"] or "-",
            request["state"],
            f"{request['num_prompt_tokens']:,}",
            f"{request['num_output_tokens']:,}",
            f"{request['age_s']:.1f}",
        )
    return table


def _refusals(refusals: list[dict[str, Any]], count: int) -> RenderableType:
    from rich.text import Text

    lines = [Text(f"refused {count}", "bold")]
    lines += [Text(f"  {each['status']} {each['app']}: {each['message']}", no_wrap=True) for each in refusals[:3]]
    return Text("\n").join(lines)


def _table(*columns: str, texts: int = 1) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for i, column in enumerate(columns):
        is_text = i < texts or not column
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True, overflow="ellipsis")
    return table
