"""Ollama's calls about models: which there are, what is in memory, what one is, fetching one."""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response

from hob import __version__
from hob.api.adapters import split_name
from hob.api.body import parse_body
from hob.api.call import Call
from hob.api.info import memory_seen_by, served_models
from hob.api.ollama_schema import NameBody
from hob.api.overview import check_owner
from hob.api.replies import json_reply
from hob.api.services import ServedModel
from hob.api.stream import NDJSON, EventStream
from hob.api.wire import to_json
from hob.errors import InvalidRequest, ModelNotFound
from hob.messages import ModelStats
from hob.models.catalog import Catalog
from hob.models.sources import looks_like_source

FAR = "9999-12-31T23:59:59Z"
"""When a model leaves memory that does not leave by itself."""


async def version(call: Call) -> Response:
    """/api/version."""
    return json_reply({"version": __version__})


async def tags(call: Call) -> Response:
    """/api/tags: the models that can be asked for."""
    return json_reply({"models": [_entry(call, model) for model in served_models(call.services)]})


async def ps(call: Call) -> Response:
    """/api/ps: the models in memory, and when each would leave it if nobody asks for it."""
    memory = {model.name: model for model in memory_seen_by(call).models}
    default = call.services.backend.model.name
    found = []
    for model in served_models(call.services):
        info, resident = call.services.info_of(model.name), memory.get(model.name)
        if info is None or (resident is None and model.name != default):
            continue
        entry = {**_entry(call, model), "size_vram": 0, "context_length": info.context_length}
        if resident is not None and resident.num_bytes:
            entry["size"] = resident.num_bytes
        found.append({**entry, "expires_at": _leaves_at(resident)})
    return json_reply({"models": found})


def _leaves_at(resident: ModelStats | None) -> str:
    if resident is None or resident.keep_alive_s is None:
        return FAR
    return _iso(time.time() + max(resident.keep_alive_s - resident.idle_s, 0.0))


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
    """What is not known before a model is loaded is left empty."""
    info = call.services.info_of(split_name(model.name)[0])
    family = "" if info is None else info.architecture
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": _iso(model.created),
        "size": model.num_bytes or (0 if info is None else info.weight_bytes),
        "digest": call.services.sha256_of(model.name) or "",
        "details": {
            "parent_model": "",
            "format": "gguf",
            "family": family,
            "families": [family] if family else [],
            "parameter_size": "" if info is None else _short(info.num_parameters),
            "quantization_level": "" if info is None else info.quantisation,
        },
    }


def _iso(unix_time: float) -> str:
    return datetime.datetime.fromtimestamp(unix_time, datetime.UTC).isoformat().replace("+00:00", "Z")


def _short(count: int) -> str:
    """'135M'."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)
