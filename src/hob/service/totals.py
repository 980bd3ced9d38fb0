"""Numbers of several resident models as one: what `hob ps` and /hob/v1/stats show of all of them."""

from __future__ import annotations

import msgspec

from hob.messages import AppStats, Stats
from hob.service.resident import Resident

_SUMMED = tuple(f.name for f in msgspec.structs.fields(Stats) if f.type in (int, float))
_SUMMED_BY_APP = tuple(
    f.name for f in msgspec.structs.fields(AppStats) if f.type in (int, float) and f.name != "last_ttft_s"
)


def stats_of(resident: Resident) -> Stats:
    """One model's, its disk tier included. Blocks without memory count as free: they can be had."""
    stats = msgspec.structs.replace(resident.scheduler.stats())
    stats.num_blocks = resident.pool.max_blocks
    stats.num_free_blocks = stats.num_blocks - (
        resident.pool.num_blocks - resident.pool.num_bare - resident.pool.num_free
    )
    stats.num_alarms = resident.scheduler.placement.prefixes.num_alarms
    if (swap := resident.swap) is not None:
        stats.num_alarms += swap.store.num_alarms
        stats.num_blocks_written, stats.num_blocks_read = swap.num_written, swap.num_read
        stats.num_write_errors, stats.disk_bytes = swap.num_write_errors, swap.store.num_bytes
    return stats


def retired(stats: Stats) -> Stats:
    """What stays of a model's numbers when it is unloaded: what it did, not what it held."""
    return msgspec.structs.replace(
        stats, num_running=0, num_waiting=0, num_blocks=0, num_free_blocks=0, num_cached_blocks=0, disk_bytes=0
    )


def merged(parts: list[Stats]) -> Stats:
    """Sums; of an app, the latest first-token time of the model that served it last."""
    if len(parts) == 1:
        return parts[0]
    total = Stats(**{name: sum(getattr(part, name) for part in parts) for name in _SUMMED})
    apps: dict[str, AppStats] = {}
    for app in (app for part in parts for app in part.apps):
        known = apps.setdefault(app.app, AppStats(app.app))
        for name in _SUMMED_BY_APP:
            setattr(known, name, getattr(known, name) + getattr(app, name))
        known.last_ttft_s = max(known.last_ttft_s, app.last_ttft_s)
    total.apps = list(apps.values())
    return total
