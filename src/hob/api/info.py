"""What the service says about itself: models, health, statistics."""

from __future__ import annotations

import os
import time
from typing import Any

import msgspec
from starlette.responses import Response

from hob import __version__
from hob.api.adapters import served_adapters
from hob.api.call import Call
from hob.api.replies import json_reply
from hob.api.services import ServedModel, Services
from hob.errors import ModelNotFound
from hob.messages import MemoryStats, ModelStats


def served_models(services: Services) -> list[ServedModel]:
    """The models that can be asked for: those the daemon listed, else the loaded one."""
    served = services.served or [ServedModel(services.backend.model.name, int(services.started_at))]
    return [*served[:1], *served_adapters(services), *served[1:]]


def _model_object(model: ServedModel) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": model.owned_by}


async def list_models(call: Call) -> Response:
    """/v1/models."""
    return json_reply({"object": "list", "data": [_model_object(model) for model in served_models(call.services)]})


async def get_model(call: Call, name: str) -> Response:
    """/v1/models/{name}."""
    models = served_models(call.services)
    for model in models:
        if model.name == name:
            return json_reply(_model_object(model))
    known = ", ".join(model.name for model in models)
    raise ModelNotFound(f"model '{name}' is not served. Expected one of: {known}.", param="model")


async def health(call: Call) -> Response:
    """/health: 200 while an engine runs, else the error that says why not."""
    return json_reply({"status": "ok", "model": call.services.backend.model.name})


def memory_seen_by(call: Call) -> MemoryStats:
    """The ledger as the caller may see it: the owner all, others the sums, and of models what they hold themselves."""
    memory, caller = call.services.backend.stats.memory, call.record.caller
    if caller is not None and caller.is_owner:
        return memory
    models = [
        ModelStats(
            model.name,
            model.state,
            rank=model.rank if call.app in model.leases else 0,
            is_pinned=model.is_pinned and call.app in model.leases,
            leases=[app for app in model.leases if app == call.app],
        )
        for model in memory.models
    ]
    return msgspec.structs.replace(memory, models=models)


async def stats(call: Call) -> Response:
    """/hob/v1/stats: the engine's numbers, the model, the daemon's age. Of other apps only the owner learns."""
    backend, caller = call.services.backend, call.record.caller
    stats = backend.stats
    if caller is None or not caller.is_owner:
        apps = [app for app in stats.apps if app.app == call.app]
        stats = msgspec.structs.replace(stats, apps=apps, memory=memory_seen_by(call))
    return json_reply(
        {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(time.time() - call.services.started_at, 3),
            "model": msgspec.to_builtins(backend.model),
            "stats": msgspec.to_builtins(stats),
        }
    )
