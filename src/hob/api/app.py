"""The application: which path is answered by what. Routes only.

FastAPI routes and answers; bodies are msgspec structs (schema.py), so its document is made from them in openapi.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from hob import __version__
from hob.api import apps, contexts, info, memory, ollama, ollama_models, page, public_prompts, tasks
from hob.api.call import Call
from hob.api.chat import chat_completions
from hob.api.classify import classify
from hob.api.completions import completions
from hob.api.edge import Edge
from hob.api.embeddings import embeddings
from hob.api.metrics import metrics
from hob.api.openapi import document
from hob.api.overview import events, overview
from hob.api.replies import error_reply
from hob.api.scores import score_texts
from hob.api.services import Services
from hob.api.tokenize import tokenize
from hob.errors import NotFound

Route = Callable[[Call, bytes], Awaitable[Response]]

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
    "/api/tags": ollama_models.tags,
    "/api/ps": ollama_models.ps,
    "/api/version": ollama_models.version,
}


def create_app(services: Services) -> FastAPI:
    """The ASGI application. Serve it with uvicorn and `http=protocol.HobProtocol`."""
    app = FastAPI(title="Hob", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.services = services
    for path, post in POSTS.items():
        app.router.add_route(path, _post(post), methods=["POST"])
    for path, get in GETS.items():
        app.router.add_route(path, _get(get), methods=["GET"])
    app.router.add_route("/v1/models/{name:path}", _model, methods=["GET"])
    for path in page.FILES:
        app.router.add_route(path, page.page, methods=["GET"])
    app.router.add_route(page.ENTER + "{secret}", page.enter, methods=["GET"])
    contexts.register(app, _call)
    apps.register(app, _call)
    public_prompts.register(app, _call)
    tasks.register(app, _call)
    memory.register(app, _call)
    app.openapi = document  # type: ignore[method-assign]
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(Edge, services=services)
    return app


def _call(request: Request) -> Call:
    record, services = request.state.record, request.app.state.services
    if services.meter is not None:
        record.joules_before = services.meter.joules()
    return Call(services, record.app, request.headers.get("x-hob-class"), record, request.receive)


def _post(route: Route) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        call, raw = _call(request), await request.body()
        if call.services.policy.file.audit.prompts:
            call.record.body = raw.decode("utf-8", "replace")
        return await route(call, raw)

    return endpoint


def _get(route: Callable[[Call], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await route(_call(request))

    return endpoint


async def _model(request: Request) -> Response:
    return await info.get_model(_call(request), request.path_params["name"])


async def _http_error(request: Request, error: Exception) -> Response:
    """The router's own errors, 404 and 405, in our shape."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        reply = NotFound(f"{request.method} is not possible at '{path}'. Expected {allowed}.")
        reply.code = "method_not_allowed"
    else:
        reply = NotFound(f"there is nothing at '{path}'. Known: {', '.join(sorted([*GETS, *POSTS]))}.")
    reply.status = error.status_code
    return error_reply(reply, path)
