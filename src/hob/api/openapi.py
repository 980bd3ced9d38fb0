"""The OpenAPI document, made from the request structs; served at /openapi.json."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import msgspec
from starlette.responses import Response

from hob import __version__
from hob.api.apps import NewApp
from hob.api.call import Call
from hob.api.context_turns import TurnRequest
from hob.api.contexts import CreateRequest, ForkRequest
from hob.api.ollama_schema import ChatBody, EmbedBody, GenerateBody, NameBody, OldEmbedBody
from hob.api.replies import json_reply
from hob.api.schema import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    ScoreRequest,
    TokenizeRequest,
)

BODIES: dict[str, type[msgspec.Struct]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/hob/v1/classify": ClassifyRequest,
    "/hob/v1/score": ScoreRequest,
    "/hob/v1/tokenize": TokenizeRequest,
    "/api/chat": ChatBody,
    "/api/generate": GenerateBody,
    "/api/embed": EmbedBody,
    "/api/embeddings": OldEmbedBody,
    "/api/show": NameBody,
    "/api/pull": NameBody,
    "/hob/v1/contexts": CreateRequest,
    "/hob/v1/contexts/{context_id}/generate": TurnRequest,
    "/hob/v1/contexts/{context_id}/fork": ForkRequest,
    "/hob/v1/apps": NewApp,
}
GETS = (
    "/v1/models",
    "/v1/models/{name}",
    "/hob/v1/stats",
    "/hob/v1/overview",
    "/hob/v1/contexts",
    "/hob/v1/contexts/{context_id}",
    "/hob/v1/apps",
    "/hob/v1/public-prompts",
    "/health",
    "/api/tags",
    "/api/ps",
    "/api/version",
)
DELETES = ("/hob/v1/contexts/{context_id}", "/hob/v1/apps/{kind}/{name}", "/hob/v1/public-prompts/{name}")
_PARAMETER = re.compile(r"{(\w+)}")
_ERROR = {
    "description": "What happened, the value, what was expected.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


async def api_document(call: Call) -> Response:
    """/openapi.json."""
    return json_reply(document())


@cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    template = "#/components/schemas/{name}"
    refs, components = msgspec.json.schema_components(BODIES.values(), ref_template=template)
    paths: dict[str, Any] = {}
    for (path, schema), ref in zip(BODIES.items(), refs, strict=True):
        paths.setdefault(path, {})["post"] = {
            **_parameters(path),
            "summary": (schema.__doc__ or "").split("\n")[0],
            "requestBody": {"required": True, "content": {"application/json": {"schema": ref}}},
            "responses": _responses(),
        }
    for method, some in (("get", GETS), ("delete", DELETES)):
        for path in some:
            paths.setdefault(path, {})[method] = {**_parameters(path), "responses": _responses()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Hob", "version": __version__},
        "paths": paths,
        "components": {"schemas": {**components, "Error": _ERROR_SCHEMA}},
    }


def _parameters(path: str) -> dict[str, Any]:
    names = _PARAMETER.findall(path)
    text = {"type": "string", "minLength": 1}
    parameters = [{"name": name, "in": "path", "required": True, "schema": text} for name in names]
    return {"parameters": parameters} if parameters else {}


def _responses() -> dict[str, Any]:
    reply = {"description": "The reply.", "content": {"application/json": {"schema": {"type": "object"}}}}
    return {"200": reply, "4XX": _ERROR, "5XX": _ERROR}
