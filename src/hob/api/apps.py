"""/hob/v1/apps: the apps that the owner named. Keys and sockets come and go while the service runs.

GET /hob/v1/apps       POST /hob/v1/apps {name, kind: "key" | "socket"}       DELETE /hob/v1/apps/{kind}/{name}
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Router

from hob.api.app_sockets import AppSockets
from hob.api.body import parse_body
from hob.api.call import Call
from hob.api.overview import check_owner
from hob.api.replies import json_reply
from hob.api.schema import Body
from hob.errors import NotFound, ServiceError
from hob.service.apps import Apps

PATH = "/hob/v1/apps"


class NewApp(Body, kw_only=True):
    """Body of POST /hob/v1/apps."""

    model: str = ""
    name: str
    kind: Literal["key", "socket"] = "key"


def register(router: Router, call_of: Callable[[HttpRequest], Call]) -> None:
    """Add the routes."""

    async def at_all(request: HttpRequest) -> Response:
        call = call_of(request)
        return await (list_apps(call) if request.method == "GET" else add(call, await request.body()))

    async def at_one(request: HttpRequest) -> Response:
        return await remove(call_of(request), **request.path_params)

    router.add_route(PATH, at_all, methods=["GET", "POST"])
    router.add_route(PATH + "/{kind}/{name}", at_one, methods=["DELETE"])


async def list_apps(call: Call) -> Response:
    """Names and when they were made; no key."""
    apps, sockets = _parts(call)
    keys = [{"kind": "key", "name": name, "created": int(f.created)} for name, f in apps.file.keys.items()]
    made = [
        {"kind": "socket", "name": name, "created": int(f.created), "path": str(sockets.path_of(name))}
        for name, f in apps.file.sockets.items()
    ]
    return json_reply({"object": "list", "data": keys + made})


async def add(call: Call, raw: bytes) -> Response:
    """A key, shown in this reply only; or a socket, listening when the reply comes."""
    apps, sockets = _parts(call)
    body = parse_body(raw, NewApp)
    made: dict[str, Any] = {"kind": body.kind, "name": body.name, "app": f"{body.kind}:{body.name}/app"}
    if body.kind == "key":
        made["key"] = apps.add_key(body.name)
    else:
        apps.add_socket(body.name)
        made["path"] = str(await sockets.open(body.name))
    return json_reply(made, 201)


async def remove(call: Call, kind: str, name: str) -> Response:
    """From now on the key is wrong, or the socket is gone and its connections are answered with a refusal."""
    apps, sockets = _parts(call)
    if kind == "key":
        apps.remove_key(name)
    elif kind == "socket":
        apps.remove_socket(name)
        sockets.close(name)
    else:
        raise NotFound(f"there is no kind of app '{kind}'. Expected key or socket.", param="kind")
    return json_reply({"kind": kind, "name": name, "deleted": True})


def _parts(call: Call) -> tuple[Apps, AppSockets]:
    check_owner(call)
    if call.services.apps is None or call.services.app_sockets is None:
        raise ServiceError("this service keeps no apps")
    return call.services.apps, call.services.app_sockets
