"""The application: which path is answered by what. Routes only.

    Edge -> Application (its errors in our shape) -> Starlette's Router -> a handler -> its Response

Bodies are msgspec structs (schema.py), and the document is made from them in openapi.py: of a framework only the router
is left to be used, and each layer around it would cost every message of every reply.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as HttpRoute
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from hob.api import apps, contexts, info, memory, ollama, ollama_models, page, public_prompts, tasks
from hob.api.call import Call
from hob.api.chat import chat_completions
from hob.api.classify import classify
from hob.api.completions import completions
from hob.api.edge import Edge
from hob.api.embeddings import embeddings
from hob.api.metrics import metrics
from hob.api.openapi import api_document
from hob.api.overview import events, overview
from hob.api.replies import error_reply
from hob.api.scores import score_texts
from hob.api.services import Services
from hob.api.tokenize import tokenize
from hob.errors import NotFound

Route = Callable[[Call, bytes], Awaitable[Response]]
Handler = Callable[[Request], Awaitable[Response]]

POSTS: dict[str, Route] = {
    "/v1/chat/completions": chat_completions,
    "/v1/completions": completions,
    "/v1/embeddings": embeddings,
    "/hob/v1/classify": classify,
    "/hob/v1/score": score_texts,
    "/hob/v1/tokenize": tokenize,
    page.LINK: page.make_link,
    "/api/chat": ollama.chat,
    "/api/generate": ollama.generate,
    "/api/embed": ollama.embed,
    "/api/embeddings": ollama.embeddings,
    "/api/show": ollama_models.show_model,
    "/api/pull": ollama_models.pull,
}
GETS: dict[str, Callable[[Call], Awaitable[Response]]] = {
    "/v1/models": info.list_models,
    "/hob/v1/stats": info.stats,
    "/hob/v1/overview": overview,
    "/hob/v1/events": events,
    "/metrics": metrics,
    "/health": info.health,
    "/openapi.json": api_document,
    "/api/tags": ollama_models.tags,
    "/api/ps": ollama_models.ps,
    "/api/version": ollama_models.version,
}


def create_app(services: Services) -> ASGIApp:
    """The ASGI application. Serve it with uvicorn and `http=protocol.HobProtocol`."""
    return Edge(Application(create_router(services), services), services)


def create_router(services: Services) -> Router:
    """All routes."""
    router = Router(redirect_slashes=False)

    def call_of(request: Request) -> Call:
        record = request.state.record
        if services.meter is not None:
            record.joules_before = services.meter.joules()
        return Call(services, record.app, request.headers.get("x-hob-class"), record, request.state.gone)

    for path, post in POSTS.items():
        router.routes.append(HttpRoute(path, _Endpoint(_post(post, call_of)), methods=["POST"]))
    for path, get in GETS.items():
        router.add_route(path, _get(get, call_of), methods=["GET"])
    router.add_route("/v1/models/{name:path}", _model(call_of), methods=["GET"])
    for path in page.FILES:
        router.add_route(path, page.page, methods=["GET"])
    router.add_route(page.ENTER + "{secret}", page.enter, methods=["GET"])
    for part in (contexts, apps, public_prompts, tasks, memory):
        part.register(router, call_of)
    return router


class Application:
    """The router; what it finds no route for is an error as all others are."""

    def __init__(self, router: Router, services: Services) -> None:
        self.services = services
        self._router = router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request. Errors of handlers are the caller's to answer."""
        scope["app"] = self
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            await _http_error(scope["method"], scope["path"], error)(scope, receive, send)


class _Endpoint:
    """A handler as an ASGI application of its own: Starlette would wrap a function twice, and each message it sends."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = await self._handler(Request(scope, receive, send))
        await reply(scope, receive, send)


def _post(route: Route, call_of: Callable[[Request], Call]) -> Handler:
    async def endpoint(request: Request) -> Response:
        call, raw = call_of(request), await request.body()
        if call.services.policy.file.audit.prompts:
            call.record.body = raw.decode("utf-8", "replace")
        return await route(call, raw)

    return endpoint


def _get(route: Callable[[Call], Awaitable[Response]], call_of: Callable[[Request], Call]) -> Handler:
    async def endpoint(request: Request) -> Response:
        return await route(call_of(request))

    return endpoint


def _model(call_of: Callable[[Request], Call]) -> Handler:
    async def endpoint(request: Request) -> Response:
        return await info.get_model(call_of(request), request.path_params["name"])

    return endpoint


def _http_error(method: str, path: str, error: HTTPException) -> Response:
    """The router's own errors, 404 and 405, in our shape."""
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        reply = NotFound(f"{method} is not possible at '{path}'. Expected {allowed}.")
        reply.code = "method_not_allowed"
    else:
        reply = NotFound(f"there is nothing at '{path}'. Known: {', '.join(sorted([*GETS, *POSTS]))}.")
    reply.status = error.status_code
    return error_reply(reply, path)
