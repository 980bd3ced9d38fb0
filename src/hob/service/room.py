"""The models that are there and the memory they share: room is made, given to their KV, and taken back.

Bytes are in `ledger.py`, who holds which model for how long in `leases.py`. Room is made in this order: caches of the
least recently used models, their contexts (which go to disk first), idle models by rank. What is computed for a request
is never taken; a model that goes finishes what it has. Owned by the loop; time is passed in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import msgspec

from hob.errors import NotFound, Overloaded
from hob.kvcache.pool import BLOCK_SIZE
from hob.messages import MAX_APPS, FromEngine, LeasesEnded, ModelInfo, ModelStats, Stats, Unloaded
from hob.request import SequenceOutput
from hob.service.leases import Leases
from hob.service.ledger import Ledger
from hob.service.resident import Resident
from hob.service.totals import merged, retired, stats_of
from hob.service.workers import Workers

log = logging.getLogger("hob.engine")

GRACE_S = 1.0
"""A model is not unloaded for another one sooner, though idle: who asked for it is about to send the request."""


class Room:
    """See the module."""

    def __init__(self, ledger: Ledger, workers: Workers, default: str, leases: Leases) -> None:
        """`default`: the model that requests without a name mean; idle time alone never unloads it."""
        self.ledger = ledger
        self.leases = leases
        self.default = default
        self.residents: dict[str, Resident] = {}
        self.closing: dict[str, Resident] = {}
        self.pressure = "none"
        self.now = 0.0
        self.messages: list[FromEngine] = []
        """For the API process, to be sent with the next report."""
        self.outputs: list[SequenceOutput] = []
        """Ends of requests that are in no scheduler."""
        self.retired: list[Stats] = []
        """What models that are gone did, in one sum."""
        self.num_unloads = 0
        self._workers = workers

    def __iter__(self) -> Iterator[Resident]:
        """All that are ready or draining."""
        return iter(list(self.residents.values()))

    def get(self, name: str) -> Resident | None:
        """A resident model; empty: the default."""
        return self.residents.get(name or self.default)

    # ---- memory ----

    def provide(self, resident: Resident) -> None:
        """Before a model's step: memory for the blocks its sequences lack, from what is free, else from others."""
        if not resident.scheduler.running:
            self._end_hopeless(resident)  # else one that never starts would hold up all behind it
        is_short = resident.pool.num_bare > 0 and not self._grow(resident)
        resident.short_since = (resident.short_since or self.now) if is_short else None

    def _grow(self, resident: Resident) -> bool:
        """As far ahead of need as is free; or what is needed next. False: there is no memory even for that."""
        total, least = resident.wanted_blocks()
        unused = resident.pool.num_unused
        if total > unused and self.pressure == "none":
            chunk = -(-(total - unused) // resident.footprint.blocks_per_page) * resident.footprint.blocks_per_page
            if resident.grow(chunk) or resident.grow(total - unused):
                return True
        lack = min(least, resident.pool.max_blocks) - resident.pool.num_free
        if lack <= 0 or resident.grow(lack):
            return True
        self.make_room(resident.missing_bytes(lack), resident.urgency(self.now), keep=resident.name)
        return resident.grow(lack)

    def make_room(self, num_bytes: int, urgency: int, keep: str = "") -> bool:
        """Have `num_bytes` free: caches first, then contexts, then idle models. `keep` loses nothing.

        urgency: of what wants it; a model that more urgent work comes back to stays. Models that begin to close give
        their memory back in the next ticks; False until then.
        """
        others = sorted((r for r in self if r.name != keep), key=lambda r: (r.scheduler.has_work, r.last_used))
        for contexts_too in (False, True):
            for resident in others:
                if (lack := num_bytes - self.ledger.free_bytes) <= 0:
                    return True
                resident.shrink(lack, contexts_too=contexts_too)
        for resident in self._victims(keep):
            if keep and (self.now - resident.since < GRACE_S or resident.urgency(self.now) < urgency):
                continue
            if num_bytes - self.ledger.free_bytes <= sum(r.num_bytes for r in self.closing.values()):
                break
            self.close(resident)
        return self.ledger.free_bytes >= num_bytes

    def relieve(self, stage: int) -> int:
        """The system is short of memory: 1 caches, 2 contexts too, 3 idle models too. Returns the bytes given back."""
        before = self.ledger.reserved_bytes
        for resident in self:
            resident.shrink(1 << 62, contexts_too=stage > 1)
        if stage > 2:
            for resident in self._victims(""):
                self.close(resident)
                self._go_on_closing(resident)
        return before - self.ledger.reserved_bytes

    # ---- what there is ----

    def is_pinned(self, name: str) -> bool:
        """Whether an app's lease holds it."""
        return self.leases.is_pinned(name)

    def info_of(self, resident: Resident) -> ModelInfo:
        """What clients are told; a context is no longer than there can be memory for."""
        info, max_tokens = resident.engine.info, resident.pool.max_blocks * BLOCK_SIZE
        return msgspec.structs.replace(info, context_length=min(info.context_length, max_tokens))

    def known(self, name: str) -> Resident:
        """A resident model by its name. Raises NotFound."""
        if (resident := self.residents.get(name)) is None:
            loaded = ", ".join(self.residents) or "none"
            raise NotFound(f"model '{name}' is not loaded. Loaded: {loaded}.", param="model")
        return resident

    def model_stats(self, resident: Resident, now: float) -> ModelStats:
        """What the owner is shown of it."""
        name, scheduler = resident.name, resident.scheduler
        is_leaving = resident.is_draining or name in self.closing
        return ModelStats(
            name,
            "draining" if is_leaving else "ready",
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            idle_s=0.0 if scheduler.has_work else max(now - resident.last_used, 0.0),
            keep_alive_s=None if name == self.default else self.keep_alive_s(name),
            rank=self.leases.rank(name),
            is_pinned=self.is_pinned(name),
            leases=self.leases.apps(name),
        )

    # ---- unloading ----

    def _victims(self, keep: str) -> list[Resident]:
        """Idle models that may go, the first to go first."""
        idle = [r for r in self if r.name != keep and not r.scheduler.has_work and not self.is_pinned(r.name)]
        return sorted(idle, key=self.worth)

    def worth(self, resident: Resident) -> tuple[int, bool, int, float]:
        """Orders models: the lowest goes first."""
        name, urgency = resident.name, resident.urgency(self.now)
        return -urgency, name == self.default, self.leases.rank(name), resident.last_used

    def keep_alive_s(self, name: str) -> float:
        """Seconds without a request after which it goes."""
        return float("inf") if name == self.default else self.leases.keep_alive_s(name)

    def close(self, resident: Resident, *, comes_back: bool = False) -> None:
        """Begin to unload an idle model: no new requests; what is not on disk of its contexts is copied out first.

        Its leases end, unless it comes back.
        """
        log.info("unloading model '%s'", resident.name)
        del self.residents[resident.name]
        self.closing[resident.name] = resident
        if not comes_back and (apps := self.leases.forget(resident.name)):
            self.messages.append(LeasesEnded(resident.name, apps))

    def end_lease(self, app: str, name: str, why: str) -> None:
        """Take a lease away from an app."""
        log.warning("the lease of app '%s' on model '%s' ends: %s", app, name, why)
        self.leases.end(app, name)
        self.messages.append(LeasesEnded(name, [app]))

    def go_on_closing(self) -> None:
        """With all that are on their way out."""
        for resident in list(self.closing.values()):
            self._go_on_closing(resident)

    def _go_on_closing(self, resident: Resident) -> None:
        """Free engine and KV once all is copied; the writer ends in its own time."""
        swap, name = resident.swap, resident.name
        if swap is not None and swap.has_turns:
            swap.pump(resident.engine, resident.scheduler.placement.prefixes.find, is_idle=True)
            if swap.has_turns:
                return
        if resident.is_freed:
            return
        resident.is_freed = True
        self.retired = [merged([*self.retired, retired(stats_of(resident))])]
        del self.retired[0].apps[:-MAX_APPS]
        resident.engine.close()
        for part in ("kv", "scratch", "weights"):
            self.ledger.release(f"{name}/{part}")

        def gone(error: Exception | None) -> None:
            if error is not None:
                log.error("closing the disk tier of '%s': %s", name, error)
            self.release(name)
            del self.closing[name]
            self.num_unloads += 1
            self.messages.append(Unloaded(name))
            self.set_limits()

        self._workers.submit(swap.close if swap is not None else lambda: None, gone)

    def release(self, name: str) -> None:
        """All that is reserved for a model; but the API process keeps the default one's tokenizer to its end."""
        for part in self.ledger.held_by(name):
            if part != "text" or name != self.default:
                self.ledger.release(f"{name}/{part}")

    def _end_hopeless(self, resident: Resident) -> None:
        """Sequences that the budget, as it is now, has no room for: ended with the numbers."""
        for request_id in {s.request.request_id: None for s in resident.hopeless()}:
            limit = resident.pool.max_blocks * BLOCK_SIZE
            resident.scheduler.cancel(request_id, resident.last_used)
            error = Overloaded(
                f"the memory budget, {self.ledger.budget_bytes:,} bytes now, and what is pinned leave {limit:,} tokens "
                f"of KV to model '{resident.name}': the request no longer fits"
            )
            self.outputs.append(SequenceOutput.failed(request_id, error))

    # ---- limits ----

    def set_limits(self) -> None:
        """How long a sequence may be, by model: all of the budget that nobody else has for good."""
        for resident in self:
            others = sum(r.fixed_bytes for r in self if r is not resident and self.is_pinned(r.name))
            resident.limit(self.ledger.budget_bytes - others - resident.bytes_beside_kv)
