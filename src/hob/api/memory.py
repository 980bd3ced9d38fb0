"""/hob/v1/memory and /hob/v1/leases: what the service takes, what it may, and which models stay for whom.

GET    /hob/v1/memory               the ledger and the resident models
PUT    /hob/v1/memory               {budget}                        owner only: bytes, or e.g. "4GiB"
PUT    /hob/v1/leases/{model}       {rank?, pin?, keep_alive_s?}    loads the model and holds it for the app
DELETE /hob/v1/leases/{model}
POST   /hob/v1/unload               {model}                         owner only
"""

from __future__ import annotations

import msgspec
from starlette.responses import Response
from starlette.routing import Router

from hob.api.body import parse_body, show
from hob.api.call import Call
from hob.api.info import memory_seen_by
from hob.api.overview import check_owner
from hob.api.replies import json_reply
from hob.api.routes import CallOf, add_routes
from hob.api.schema import Body
from hob.config import parse_bytes
from hob.errors import ConfigError, InvalidRequest
from hob.messages import Lease

MAX_BUDGET = 1 << 62
"""What a message to the engine process can hold, and more than any machine has."""


class BudgetRequest(Body, kw_only=True):
    """Body of PUT /hob/v1/memory."""

    model: str = ""
    budget: int | str


class LeaseRequest(Body, kw_only=True):
    """Body of PUT /hob/v1/leases/{model}."""

    model: str = ""
    rank: int = 0
    pin: bool = False
    keep_alive_s: float | None = None


class UnloadRequest(Body, kw_only=True):
    """Body of POST /hob/v1/unload."""

    model: str


def register(router: Router, call_of: CallOf) -> None:
    """Add the routes."""
    add_routes(
        router,
        call_of,
        ("GET", "/hob/v1/memory", memory),
        ("PUT", "/hob/v1/memory", set_budget),
        ("POST", "/hob/v1/unload", unload_model),
        ("PUT", "/hob/v1/leases/{name:path}", hold_model),
        ("DELETE", "/hob/v1/leases/{name:path}", end_lease),
    )


async def memory(call: Call) -> Response:
    """The ledger. Of other apps only the owner learns."""
    return json_reply(msgspec.to_builtins(memory_seen_by(call)))


async def set_budget(call: Call, raw: bytes) -> Response:
    """Change the budget of the running service; the setting `budget` is what it starts with."""
    check_owner(call)
    body = parse_body(raw, BudgetRequest)
    try:
        budget = body.budget if isinstance(body.budget, int) else parse_bytes("budget", body.budget)
    except ConfigError as error:
        raise InvalidRequest(error.message, param="budget") from None
    except OverflowError:
        budget = MAX_BUDGET + 1
    if not 0 <= budget <= MAX_BUDGET:
        raise InvalidRequest(f"field 'budget' is {show(body.budget)}. Expected at most 2^62 bytes.", param="budget")
    await call.services.backend.set_budget(budget)
    return json_reply({"budget_bytes": budget})


async def hold_model(call: Call, name: str, raw: bytes) -> Response:
    """A lease of the calling app."""
    body = parse_body(raw, LeaseRequest)
    if (grant := call.record.grant) is not None:
        grant.check_lease()
    model = await call.use_model(name)
    lease = Lease(body.rank, body.pin, body.keep_alive_s)
    await call.services.backend.set_lease(call.app, model.name, lease)
    return json_reply({"model": model.name, "app": call.app, **msgspec.to_builtins(lease)})


async def end_lease(call: Call, name: str) -> Response:
    """End it; the model stays until it is idle for its time or its memory is wanted."""
    model = call.services.loaded_name(name)
    await call.services.backend.set_lease(call.app, model, None)
    return json_reply({"model": model, "app": call.app, "deleted": True})


async def unload_model(call: Call, raw: bytes) -> Response:
    """Unload a model once its requests have ended."""
    check_owner(call)
    name = call.services.loaded_name(parse_body(raw, UnloadRequest).model)
    await call.services.backend.unload(name)
    return json_reply({"model": name, "unloading": True})
