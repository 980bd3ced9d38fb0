"""`hob public`: prompts whose computed prefix all apps share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Name = Annotated[str, typer.Argument(help="Lower-case letters, digits, '.', '_', '-'.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

group = typer.Typer(
    name="public",
    help="""Prompts that all apps share: a system prompt or a tool list is computed once, not once for each app.

    \b
    hob public add assistant --system "You are a helpful assistant."
    hob public add house --system @system.txt --tools tools.json
    hob public list
    hob public rm house
    """,
    no_args_is_help=True,
    rich_markup_mode=None,
)


@group.command()
def add(
    name: Name,
    system: Annotated[str | None, typer.Option(help="The system prompt; '@FILE' reads it from a file.")] = None,
    tools: Annotated[Path | None, typer.Option(help="A file with the 'tools' of a request, as JSON.")] = None,
    prompt: Annotated[str | None, typer.Option(help="A plain text, for completions; '@FILE' reads a file.")] = None,
    model: Annotated[str, typer.Option(help="Whose template and tokens.")] = "default",
    json: Json = False,
) -> None:
    """Publish a prompt; one of the same name is replaced.

    \b
    hob public add assistant --system "You are a helpful assistant."
    hob public add house --system @system.txt --tools tools.json
    """
    from hob.cli.output import print_json
    from hob.client import Client

    body: dict[str, Any] = {"model": model}
    if system is not None:
        body["messages"] = [{"role": "system", "content": _text(system)}]
    if tools is not None:
        body["tools"] = _json(tools)
    if prompt is not None:
        body["prompt"] = _text(prompt)
    with Client() as client:
        made = client.publish(name, **body)
    if json:
        print_json(made)
    else:
        print(f"{name}: the first {made['num_shared_tokens']} of {made['num_tokens']} tokens are shared by all apps")


@group.command(name="list")
def list_prompts(json: Json = False) -> None:
    """List the public prompts.

    \b
    hob public list
    """
    import time

    from hob.cli.output import print_json, print_table
    from hob.client import Client

    with Client() as client:
        prompts = client.public_prompts()
    if json:
        print_json(prompts)
        return
    rows = [
        [
            prompt["name"],
            prompt["model"],
            prompt["num_shared_tokens"],
            time.strftime("%Y-%m-%d", time.localtime(prompt["created"])),
            _begin(prompt),
        ]
        for prompt in prompts
    ]
    header = ["name", "model", "shared tokens", "since", "begins"]
    print_table(header, rows, "no public prompts. Make one: hob public add NAME --system TEXT")


@group.command()
def rm(name: Name) -> None:
    """Make a prompt private again.

    \b
    hob public rm house
    """
    from hob.client import Client

    with Client() as client:
        client.unpublish(name)
    print(f"removed {name}")


def _begin(prompt: dict[str, Any]) -> str:
    messages = prompt["messages"]
    text = prompt["prompt"] or (messages[0]["content"] if messages else f"{len(prompt['tools'])} tools")
    return str(text)[:40].replace("\n", " ")


def _text(given: str) -> str:
    return _read(Path(given[1:])) if given.startswith("@") else given


def _json(path: Path) -> Any:
    import msgspec

    from hob.errors import InvalidRequest

    try:
        return msgspec.json.decode(_read(path))
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"'{path}' is not JSON: {error}. Expected a list of tools.") from None


def _read(path: Path) -> str:
    from hob.errors import InvalidRequest

    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read '{path}': {error}") from None
