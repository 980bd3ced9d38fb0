"""`hob policy`: look at the rules without a daemon, and at what was done under them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

group = typer.Typer(
    name="policy",
    help="""What each app may do: policy.toml beside hob.toml. A running daemon reads it again when it changes.

    \b
    hob policy check                 is the file right?
    hob policy show 1000/python3     what applies to an app, and which table says so
    hob policy log                   the last requests
    """,
    no_args_is_help=True,
    rich_markup_mode=None,
)


@group.command()
def check(file: Annotated[Path | None, typer.Argument(help="Unset: the one in force.")] = None) -> None:
    """Say whether the file is right, or what is wrong with it.

    \b
    hob policy check ./policy.toml
    """
    from hob.config import load_config
    from hob.errors import ConfigError
    from hob.service.policy import read_policy

    path = file or load_config()[0].policy_path
    if file is not None and not file.is_file():
        raise ConfigError(f"there is no file '{file}'")
    found = read_policy(path)
    there = f"{path}: right" if path.is_file() else f"{path} is not there: the built-in policy applies"
    print(f"{there}; apps with rules of their own: {', '.join(sorted(found.app)) or 'none'}")


@group.command()
def show(
    app: Annotated[str, typer.Argument(help="An app as `hob ps` names it.")] = "*",
    json: Json = False,
) -> None:
    """Show the rules that apply to an app, and where each comes from.

    \b
    hob policy show 1000/notes
    hob policy show unknown/unknown
    """
    import msgspec

    from hob.cli.output import print_json, print_table
    from hob.config import load_config
    from hob.service.policy import Rules, grant_of, read_policy

    grant = grant_of(read_policy(load_config()[0].policy_path), app)
    if json:
        print_json({"app": app, "rules": msgspec.to_builtins(grant.rules), "origins": grant.origins})
        return
    rows = [[name, _words(getattr(grant.rules, name)), grant.origins.get(name, "")] for name in Rules.__struct_fields__]
    print_table(["rule", "value", "says"], rows)


@group.command()
def log(
    last: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    json: Json = False,
) -> None:
    """Show the last requests of the audit log.

    \b
    hob policy log --last 50
    """
    import time

    import msgspec

    from hob.cli.output import print_json, print_table
    from hob.config import load_config
    from hob.service.audit import Entry, read_last

    entries = read_last(load_config()[0].audit_dir, last)
    if json:
        print_json([dict(zip(Entry.__struct_fields__, msgspec.to_builtins(entry), strict=True)) for entry in entries])
        return
    rows = [
        [
            time.strftime("%m-%d %H:%M:%S", time.localtime(entry.time)),
            entry.app,
            entry.endpoint,
            entry.status,
            entry.prompt_tokens,
            entry.output_tokens,
            f"{entry.ms:.0f}",
            entry.code or "",
        ]
        for entry in entries
    ]
    header = ["time", "app", "endpoint", "status", "prompt", "output", "ms", "refusal"]
    print_table(header, rows, "no requests in the audit log yet")


def _words(value: object) -> str:
    if value is None:
        return "no limit"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
