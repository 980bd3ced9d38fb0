"""`hob app`: apps with a name that nobody else can take, by a key or by a socket of their own."""

from __future__ import annotations

from typing import Annotated

import typer

Name = Annotated[str, typer.Argument(help="Lower-case letters, digits, '.', '_', '-'.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

group = typer.Typer(
    name="app",
    help="""Apps that the service tells apart: each has an API key, or a socket to be mounted into its sandbox.

    \b
    hob app add notes                a key, shown once: for OPENAI_API_KEY
    hob app socket browser           a folder with a socket: podman run -v FOLDER:/run/hob ...
    hob app list
    hob app rm notes
    """,
    no_args_is_help=True,
    rich_markup_mode=None,
)


@group.command()
def add(name: Name, json: Json = False) -> None:
    """Name an app and print its API key, this once.

    \b
    export OPENAI_API_KEY=$(hob app add notes)
    """
    from hob.cli.output import print_json
    from hob.client import Client

    with Client() as client:
        made = client.add_app(name, "key")
    if json:
        print_json(made)
    else:
        print(made["key"])


@group.command()
def socket(name: Name, json: Json = False) -> None:
    """Make a socket for an app and print its path. Mount its folder into the app's sandbox.

    \b
    hob app socket browser
    """
    from hob.cli.output import print_json
    from hob.client import Client

    with Client() as client:
        made = client.add_app(name, "socket")
    if json:
        print_json(made)
    else:
        print(made["path"])


@group.command(name="list")
def list_apps(json: Json = False) -> None:
    """List the apps that have a key or a socket.

    \b
    hob app list
    """
    import time

    from hob.cli.output import print_json, print_table
    from hob.client import Client

    with Client() as client:
        apps = client.apps()
    if json:
        print_json(apps)
        return
    rows = [
        [app["name"], app["kind"], time.strftime("%Y-%m-%d", time.localtime(app["created"])), app.get("path", "")]
        for app in apps
    ]
    print_table(["name", "by", "since", "path"], rows, "no app has a key or a socket. Make one: hob app add NAME")


@group.command()
def rm(name: Name) -> None:
    """Take back an app's key and socket.

    \b
    hob app rm notes
    """
    from hob.client import Client
    from hob.errors import NotFound

    with Client() as client:
        kinds = [app["kind"] for app in client.apps() if app["name"] == name]
        if not kinds:
            raise NotFound(f"no app '{name}'. See `hob app list`.")
        for kind in kinds:
            client.remove_app(kind, name)
            print(f"removed {kind} of {name}")
