"""`hob config`: every setting, its value, and where that came from."""

from __future__ import annotations

from typing import Annotated

import typer


def config(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/settings.md.")] = False,
) -> None:
    """Show every setting with its value and origin.

    A flag beats HOB_NAME in the environment, which beats hob.toml, which beats the default.

    \b
    hob config
    HOB_THREADS=1 hob config | grep threads
    """
    from dataclasses import fields

    from hob.cli.output import print_json, print_table
    from hob.config import load_config

    if markdown:
        from hob.cli.settings_page import settings_page

        print(settings_page(), end="")
        return
    loaded, origins = load_config()
    rows = []
    for section in fields(loaded):
        component = getattr(loaded, section.name)
        for setting in fields(component):
            value = getattr(component, setting.name)
            rows.append((section.name, setting.name, value, origins[setting.name]))
    if json:
        names = {name: {"section": s, "value": _plain(value), "origin": o} for s, name, value, o in rows}
        print_json(names)
        return
    shown = [[s, n, "(unset)" if v is None else _plain(v), o] for s, n, v, o in rows]
    print_table(["section", "setting", "value", "origin"], shown)


def _plain(value: object) -> str | int | float | bool | None:
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)
