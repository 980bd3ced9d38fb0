"""`hob memory`: what the service takes, and what it may."""

from __future__ import annotations

from typing import Annotated

import typer


def memory(
    budget: Annotated[
        str | None, typer.Option(help="Change the running service's budget: bytes, or e.g. 4GiB.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the memory ledger and the resident models, or change the budget.

    \b
    hob memory
    hob memory --budget 2GiB           until the daemon ends; `budget` in hob.toml is what it starts with
    """
    from hob.cli.output import print_json, print_memory
    from hob.client import Client

    with Client() as client:
        if budget is not None:
            client.set_budget(budget)
        report = client.memory()
    if json:
        print_json(report)
    else:
        print_memory(report)
