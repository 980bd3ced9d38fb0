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
from hob.api.features import FeaturesRequest
from hob.api.memory import BudgetRequest, LeaseRequest, UnloadRequest
from hob.api.ollama_schema import ChatBody, EmbedBody, GenerateBody, NameBody, OldEmbedBody
from hob.api.params import MAX_LIMIT_MS, MAX_SAMPLES, MAX_STOP_CHARS, MAX_STOPS, MAX_TOPS, RANGES
from hob.api.public_prompts import PublishRequest
from hob.api.replies import json_reply
from hob.api.schema import (
    NEUTRAL,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    ScoreRequest,
    TokenizeRequest,
)
from hob.api.tasks import RunRequest, TrainRequest
from hob.request import ServiceClass

MAX_INT = (1 << 63) - 1
BODIES: dict[tuple[str, str], type[msgspec.Struct]] = {
    ("post", "/v1/chat/completions"): ChatRequest,
    ("post", "/v1/completions"): CompletionRequest,
    ("post", "/v1/embeddings"): EmbeddingRequest,
    ("post", "/hob/v1/classify"): ClassifyRequest,
    ("post", "/hob/v1/score"): ScoreRequest,
    ("post", "/hob/v1/tokenize"): TokenizeRequest,
    ("post", "/hob/v1/features"): FeaturesRequest,
    ("post", "/hob/v1/tasks/{task}/train"): TrainRequest,
    ("post", "/hob/v1/tasks/{task}/run"): RunRequest,
    ("post", "/hob/v1/contexts"): CreateRequest,
    ("post", "/hob/v1/contexts/{context_id}/generate"): TurnRequest,
    ("post", "/hob/v1/contexts/{context_id}/fork"): ForkRequest,
    ("put", "/hob/v1/public-prompts/{name}"): PublishRequest,
    ("post", "/hob/v1/apps"): NewApp,
    ("put", "/hob/v1/memory"): BudgetRequest,
    ("put", "/hob/v1/leases/{name}"): LeaseRequest,
    ("post", "/hob/v1/unload"): UnloadRequest,
    ("post", "/api/chat"): ChatBody,
    ("post", "/api/generate"): GenerateBody,
    ("post", "/api/embed"): EmbedBody,
    ("post", "/api/embeddings"): OldEmbedBody,
    ("post", "/api/show"): NameBody,
    ("post", "/api/pull"): NameBody,
}
OTHERS = (
    ("get", "/v1/models"),
    ("get", "/v1/models/{name}"),
    ("get", "/hob/v1/stats"),
    ("get", "/hob/v1/overview"),
    ("get", "/hob/v1/events"),
    ("get", "/hob/v1/memory"),
    ("delete", "/hob/v1/leases/{name}"),
    ("get", "/hob/v1/contexts"),
    ("get", "/hob/v1/contexts/{context_id}"),
    ("delete", "/hob/v1/contexts/{context_id}"),
    ("get", "/hob/v1/tasks"),
    ("get", "/hob/v1/tasks/{task}"),
    ("delete", "/hob/v1/tasks/{task}"),
    ("get", "/hob/v1/apps"),
    ("delete", "/hob/v1/apps/{kind}/{name}"),
    ("get", "/hob/v1/public-prompts"),
    ("delete", "/hob/v1/public-prompts/{name}"),
    ("post", "/hob/v1/dashboard"),
    ("get", "/health"),
    ("get", "/metrics"),
    ("get", "/openapi.json"),
    ("get", "/api/tags"),
    ("get", "/api/ps"),
    ("get", "/api/version"),
)
"""Calls without a body; pages for browsers are not among them."""
_COUNTS = {
    "max_tokens": (1, MAX_INT),
    "max_completion_tokens": (1, MAX_INT),
    "n": (1, MAX_SAMPLES),
    "top_k": (0, MAX_INT),
    "logprobs": (0, MAX_TOPS),
    "top_logprobs": (0, MAX_TOPS),
    "seed": (-MAX_INT - 1, MAX_INT),
    "ttft_deadline_ms": (1, MAX_LIMIT_MS),
    "tpot_limit_ms": (1, MAX_LIMIT_MS),
}
_TEXT = {"minLength": 1, "maxLength": MAX_STOP_CHARS}
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_TEXTS = {"items": {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 0}, _TOKENS]}}
_SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "stop": {"string": _TEXT, "array": {"maxItems": MAX_STOPS, "items": {"type": "string", **_TEXT}}},
    "service_class": {"string": {"enum": [kind.name.lower() for kind in ServiceClass]}},
    "prompt": {"array": {"minItems": 1, **_TEXTS}},
    "input": {"array": {"minItems": 1, **_TEXTS}},
    "messages": {"array": {"minItems": 1}},
}
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
    for ((method, path), schema), ref in zip(BODIES.items(), refs, strict=True):
        paths.setdefault(path, {})[method] = {
            **_parameters(path),
            "summary": (schema.__doc__ or "").split("\n")[0],
            "requestBody": {"required": True, "content": {"application/json": {"schema": ref}}},
            "responses": _responses(),
        }
    for method, path in OTHERS:
        paths.setdefault(path, {})[method] = {**_parameters(path), "responses": _responses()}
    for component in components.values():
        for name, field in component.get("properties", {}).items():
            _narrow(name, field)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Hob", "version": __version__},
        "paths": paths,
        "components": {"schemas": {**components, "Error": _ERROR_SCHEMA}},
    }


def _narrow(name: str, field: dict[str, Any]) -> None:
    """Say of a field what its type does not: the range, or the few values that a field has that Hob does not do."""
    if name in NEUTRAL and not field.keys() & {"type", "anyOf", "$ref"}:
        field["enum"] = [None, *NEUTRAL[name]]
    for kind in field.get("anyOf", [field]):
        number = kind.get("type") in ("number", "integer")
        if number and name in RANGES:
            kind["minimum"], kind["maximum"] = RANGES[name]
        elif number and name in _COUNTS:
            kind["minimum"], kind["maximum"] = _COUNTS[name]
        elif name in _SHAPES and kind.get("type") in _SHAPES[name]:
            kind |= _SHAPES[name][kind["type"]]


def _parameters(path: str) -> dict[str, Any]:
    names = _PARAMETER.findall(path)
    text = {"type": "string", "minLength": 1}
    parameters = [{"name": name, "in": "path", "required": True, "schema": text} for name in names]
    return {"parameters": parameters} if parameters else {}


def _responses() -> dict[str, Any]:
    reply = {"description": "The reply.", "content": {"application/json": {"schema": {"type": "object"}}}}
    return {"200": reply, "4XX": _ERROR, "5XX": _ERROR}
