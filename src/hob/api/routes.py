"""Routes whose calls take a Call, the parts of the path and, of POST and PUT, the body."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Router

from hob.api.call import Call

CallOf = Callable[[HttpRequest], Call]


def add_routes(router: Router, call_of: CallOf, *routes: tuple[str, str, Callable[..., Awaitable[Response]]]) -> None:
    """Each is method, path and what answers."""
    for method, path, act in routes:
        router.add_route(path, _endpoint(act, call_of, has_body=method in ("POST", "PUT")), methods=[method])


def _endpoint(
    act: Callable[..., Awaitable[Response]], call_of: CallOf, *, has_body: bool
) -> Callable[[HttpRequest], Awaitable[Response]]:
    async def answer(request: HttpRequest) -> Response:
        bodies = [await request.body()] if has_body else []
        return await act(call_of(request), *request.path_params.values(), *bodies)

    return answer
