"""/hob/v1/overview and /hob/v1/events: the whole state of the service as one object, once or every second.

The page and `hob top` draw this object and know nothing else. It is for the owner: it names every app.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.responses import Response

from hob import __version__
from hob.api.call import Call, Record
from hob.api.info import served_models
from hob.api.observe import SAMPLE_S, WINDOW_S, Observer
from hob.api.replies import json_reply
from hob.api.services import Services
from hob.api.stream import EventStream
from hob.api.wire import to_json
from hob.errors import HobError, PermissionDenied
from hob.memory import ProcessMemory, processes_below
from hob.messages import AppStats, Stats

SHARE_WINDOW_S = 60.0
MEMORY_EVERY_S = 4.0
"""Reading PSS makes the kernel walk the page tables of both processes."""


def check_owner(call: Call) -> None:
    """Raises PermissionDenied unless the caller is the service's owner."""
    caller = call.record.caller
    if caller is None or not caller.is_owner:
        raise PermissionDenied(
            f"{call.record.endpoint} is for the owner of the service (uid {os.getuid()}, outside of any sandbox). "
            f"You are '{call.app}'."
        )


async def overview(call: Call) -> Response:
    """Once."""
    check_owner(call)
    return json_reply(await make_overview(call.services))


async def events(call: Call) -> Response:
    """Every second, for as long as the client listens and the service runs."""
    check_owner(call)
    return EventStream(_events(call.services))


async def _events(services: Services) -> AsyncGenerator[bytes, None]:
    observer = services.observer
    with observer.watching():
        while not observer.is_stopping:
            yield b"data: " + to_json(await make_overview(services)) + b"\n\n"
            await asyncio.sleep(SAMPLE_S)


async def make_overview(services: Services) -> dict[str, Any]:
    """The object. Without an engine it says why, and the rest of it still stands."""
    stats, observer = services.backend.stats, services.observer
    processes = await _Memory.of(services)
    return {
        "version": __version__,
        "pid": os.getpid(),
        "time": time.time(),
        "uptime_s": round(time.time() - services.started_at, 1),
        "models": _models(services),
        "engine": {
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
            "num_steps": stats.num_steps,
            "num_preemptions": stats.num_preemptions,
            "num_alarms": stats.num_alarms,
        },
        "apps": _apps(stats, observer),
        "requests": [_request(record) for record in observer.in_flight.values() if record.endpoint.startswith("POST")],
        "series": _series(observer),
        "memory": _memory(services, processes),
        "contexts": await _contexts(services),
        "background_waits_for": services.conditions.waiting_for if services.conditions else "",
        "num_refusals": observer.num_refusals,
        "refusals": [msgspec.to_builtins(refusal) for refusal in reversed(observer.refusals)],
    }


def _models(services: Services) -> list[dict[str, Any]]:
    """Every model that can be asked for; of those in memory, what the ledger says, and of the default one its facts."""
    try:
        loaded, error = services.backend.model, None
    except HobError as caught:
        loaded, error = None, caught.message
    resident = {model.name: model for model in services.backend.stats.memory.models}
    found = []
    for model in served_models(services) if loaded or services.models else []:
        is_default = loaded is not None and model.name == loaded.name
        entry: dict[str, Any] = {"name": model.name, "is_loaded": is_default or model.name in resident}
        if loaded is not None and is_default:
            entry |= msgspec.to_builtins(loaded)
        if model.name in resident:
            entry["resident"] = msgspec.to_builtins(resident[model.name])
        found.append(entry | ({"error": error} if error else {}))
    return found


def _apps(stats: Stats, observer: Observer) -> list[dict[str, Any]]:
    """Each app, with its share of the engine's time over the last minute; None where nobody used any."""
    used = _recent_compute(stats, observer)
    total = sum(used.values())
    apps = [
        msgspec.to_builtins(app) | {"share": used.get(app.app, 0.0) / total if total > 0 else None}
        for app in stats.apps
    ]
    return sorted(apps, key=lambda app: (-(app["share"] or 0.0), -app["num_running"], app["app"]))


def _recent_compute(stats: Stats, observer: Observer) -> dict[str, float]:
    since = time.time() - SHARE_WINDOW_S
    base = next((sample for sample in observer.samples if sample.time >= since), None)
    if base is None:
        return {}

    def used(app: AppStats) -> float:
        return max(0.0, app.compute_s - base.compute_s.get(app.app, 0.0))

    return {app.app: used(app) for app in stats.apps}


def _request(record: Record) -> dict[str, Any]:
    totals = record.totals
    waits = "waiting" if record.first_output_s is None else "answering"
    return {
        "app": record.app,
        "endpoint": record.endpoint.partition(" ")[2],
        "class": record.service_class,
        "state": waits,
        "age_s": round(time.perf_counter() - record.started_s, 2),
        "num_prompt_tokens": totals.num_prompt_tokens,
        "num_cached_tokens": totals.num_cached_tokens,
        "num_output_tokens": totals.num_output_tokens,
    }


def _series(observer: Observer) -> dict[str, list[Any]]:
    """Second by second: rates between neighbouring samples, and the median of first-token times."""
    series: dict[str, list[Any]] = {
        name: [] for name in ("time", "output_tok_s", "prompt_tok_s", "ttft_ms", "num_running", "num_waiting")
    }
    since, samples = time.time() - WINDOW_S, list(observer.samples)
    for before, sample in itertools.pairwise(samples):
        elapsed_s = sample.time - before.time
        if sample.time < since or elapsed_s <= 0:
            continue
        ttfts = sorted(sample.ttfts_s)
        series["time"].append(round(sample.time, 2))
        series["output_tok_s"].append(round((sample.num_output_tokens - before.num_output_tokens) / elapsed_s, 1))
        series["prompt_tok_s"].append(round((sample.num_prompt_tokens - before.num_prompt_tokens) / elapsed_s, 1))
        series["ttft_ms"].append(round(1e3 * ttfts[len(ttfts) // 2], 1) if ttfts else None)
        series["num_running"].append(sample.num_running)
        series["num_waiting"].append(sample.num_waiting)
    return series


class _Memory:
    """PSS of the processes, read at most every MEMORY_EVERY_S, whoever asks."""

    _read_at = -MEMORY_EVERY_S
    _found: list[ProcessMemory] = []  # noqa: RUF012  of the process, not of an instance: there is one daemon in it

    @classmethod
    async def of(cls, services: Services) -> list[ProcessMemory]:
        """Both processes."""
        if time.monotonic() - cls._read_at >= MEMORY_EVERY_S:
            cls._read_at = time.monotonic()
            cls._found = await asyncio.to_thread(processes_below, os.getpid())
        return cls._found


def _memory(services: Services, processes: list[ProcessMemory]) -> dict[str, Any]:
    """The ledger: what is reserved, for what, of how much; beside it what the processes really take."""
    stats = services.backend.stats
    ledger = stats.memory
    parts = [
        {"name": account if len(ledger.models) == 1 else f"{model.name}: {account}", "bytes": size}
        for model in ledger.models
        for account, size in model.accounts.items()
    ]
    return {
        "pss_bytes": sum(process.pss_bytes for process in processes),
        "budget_bytes": ledger.budget_bytes,
        "reserved_bytes": ledger.reserved_bytes + ledger.overhead_bytes,
        "pressure": ledger.pressure,
        "parts": [*parts, {"name": "processes", "bytes": ledger.overhead_bytes}],
        "kv_blocks": {"total": stats.num_blocks, "free": stats.num_free_blocks, "cached": stats.num_cached_blocks},
        "disk_bytes": stats.disk_bytes,
    }


async def _contexts(services: Services) -> list[dict[str, Any]]:
    if services.contexts is None:
        return []
    rows = await asyncio.to_thread(services.contexts.by_app)
    return [{"app": app, "num_contexts": count, "num_tokens": tokens} for app, count, tokens in rows]
