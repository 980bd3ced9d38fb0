"""Ollama's calls about models: which there are, what is in memory, what one is, fetching one."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response

from hob import __version__
from hob.api.body import parse_body
from hob.api.call import Call
from hob.api.info import served_models
from hob.api.ollama_schema import NameBody
from hob.api.overview import check_owner
from hob.api.replies import json_reply
from hob.api.services import ServedModel
from hob.api.stream import NDJSON, EventStream
from hob.api.wire import to_json
from hob.errors import InvalidRequest, ModelNotFound
from hob.messages import ModelInfo
from hob.models.catalog import Catalog
from hob.models.sources import looks_like_source

FAR = "9999-12-31T23:59:59Z"
"""When a model leaves memory: not by itself."""


async def version(call: Call) -> Response:
    """/api/version."""
    return json_reply({"version": __version__})


async def tags(call: Call) -> Response:
    """/api/tags: the models that can be asked for."""
    return json_reply({"models": [_entry(call, model) for model in served_models(call.services)]})


async def ps(call: Call) -> Response:
    """/api/ps: the models in memory."""
    info = call.services.backend.model
    found = [_entry(call, model) for model in served_models(call.services) if model.name == info.name]
    more = {"expires_at": FAR, "size_vram": 0, "context_length": info.context_length}
    return json_reply({"models": [{**entry, **more} for entry in found]})


async def show_model(call: Call, raw: bytes) -> Response:
    """/api/show."""
    name = _name(parse_body(raw, NameBody))
    info = await call.use_model(name)
    model = next(model for model in served_models(call.services) if model.name == info.name)
    entry = _entry(call, model)
    arch = info.architecture
    return json_reply(
        {
            "details": entry["details"],
            "modified_at": entry["modified_at"],
            "model_info": {
                "general.architecture": arch,
                "general.parameter_count": info.num_parameters,
                f"{arch}.context_length": info.context_length,
                f"{arch}.embedding_length": info.hidden_size,
                f"{arch}.block_count": info.num_layers,
                f"{arch}.vocab_size": info.vocab_size,
            },
            "capabilities": ["completion", "tools", "embedding"],
        }
    )


async def pull(call: Call, raw: bytes) -> Response:
    """/api/pull: fetch a model that the catalogue names. The owner's only, and no address of a caller's is fetched."""
    body = parse_body(raw, NameBody)
    name = _name(body)
    check_owner(call)
    if looks_like_source(name):
        raise InvalidRequest(
            f"model '{name}' is an address. Expected a name of the catalogue; for others: `hob pull`.", param="model"
        )
    lines = _pulled(Catalog(call.services.config.models_dir), name)
    if body.stream is not False:
        return EventStream(lines, framing=NDJSON)
    last = b""
    async for line in lines:
        last = line
    return Response(last, media_type="application/json")


async def _pulled(catalog: Catalog, name: str) -> AsyncGenerator[bytes, None]:
    """Ollama's lines of progress. A client that leaves does not end the fetch of bytes under way; the next goes on."""
    loop = asyncio.get_running_loop()
    steps: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def report(done: int, total: int, stage: str) -> None:
        step = {"status": f"{stage} {name}", "digest": name, "total": total, "completed": done}
        loop.call_soon_threadsafe(steps.put_nowait, step)

    if all(name not in (record.name, *record.aliases) for record in await asyncio.to_thread(catalog.list)):
        raise ModelNotFound(f"the catalogue has no model '{name}'. See `hob list`.", param="model")
    yield to_json({"status": "pulling manifest"}) + b"\n"
    work = asyncio.ensure_future(asyncio.to_thread(catalog.pull, name, report))
    while not work.done() or not steps.empty():
        step = asyncio.ensure_future(steps.get())
        await asyncio.wait((work, step), return_when=asyncio.FIRST_COMPLETED)
        if step.done():
            yield to_json(step.result()) + b"\n"
        else:
            step.cancel()
    work.result()
    yield to_json({"status": "success"}) + b"\n"


def _name(body: NameBody) -> str:
    name = (body.model or body.name).removesuffix(":latest")
    if not name:
        raise InvalidRequest("field 'model' is missing", param="model")
    return name


def _entry(call: Call, model: ServedModel) -> dict[str, Any]:
    info: ModelInfo = call.services.backend.model
    created = datetime.datetime.fromtimestamp(model.created, datetime.UTC).isoformat().replace("+00:00", "Z")
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": created,
        "size": info.weight_bytes,
        "digest": call.services.sha256_of(model.name) or "",
        "details": {
            "parent_model": "",
            "format": "gguf",
            "family": info.architecture,
            "families": [info.architecture],
            "parameter_size": _short(info.num_parameters),
            "quantization_level": info.quantisation,
        },
    }


def _short(count: int) -> str:
    """'135M'."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)
