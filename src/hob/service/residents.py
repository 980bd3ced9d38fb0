"""The models of an engine process: which are resident, which come, which go, and who has how much memory.

    wanted --room made, reserved--> loading --> ready --idle, rank, pressure, room for another--> draining --> gone

One process holds them all, so that one step at a time has all cores: two processes on the same cores would take turns
by the kernel's clock, and neither cost model, nor class, nor fairness would mean anything. Turns
are shared out in `turns.py`, bytes in `ledger.py`, and who holds which model for how long is in `leases.py`.

A request for a model that is not there waits for it; none in flight is ended by an unload. Room is made in this order:
caches of the least recently used models, their contexts (which go to disk first), idle models by rank. A model that is
wanted for DRAIN_AFTER_S while all others are busy has the lowest of them drained: it takes no new requests, which wait
in their turn. All is synchronous and owned by the loop; loading itself runs in `workers.py`. Time is passed in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from hob.config import SchedulerConfig
from hob.errors import (
    Conflict,
    HobError,
    InternalError,
    ModelNotFound,
    ModelTooLarge,
    NotFound,
    Overloaded,
    PermissionDenied,
)
from hob.kvcache.pool import BLOCK_SIZE
from hob.messages import Answer, FromEngine, Lease, MemoryStats, ModelInfo, ModelSpec, ModelStats, Stats, Unloaded
from hob.request import FinishReason, OutputError, Place, Request, SequenceOutput
from hob.scheduler.fairness import VirtualTime
from hob.service.leases import Leases
from hob.service.ledger import OVERHEAD_BYTES, Ledger
from hob.service.resident import MIN_KV_TOKENS, Footprint, Opened, Resident
from hob.service.totals import merged, retired, stats_of
from hob.service.turns import Turns
from hob.service.workers import Workers

log = logging.getLogger("hob.engine")

DRAIN_AFTER_S = 1.0
"""How long a wanted model waits for busy ones before one of them is drained."""
MIN_STAY_S = 2.0
"""A model is not drained sooner after it was loaded: loading must be worth it."""
TIE_S = 0.5
"""How long two models may both wait for memory that neither can have beside the other."""
MAX_BEHIND_S = 20.0
"""How long a model that gave way stands back at most."""
GRACE_S = 1.0
"""Nor is it unloaded for another one sooner, though idle: who asked for it is about to send the request."""


class Opener(Protocol):
    """How models are measured and opened. `service.opening` is the real one."""

    def footprint(self, spec: ModelSpec) -> Footprint:
        """What a model would take. Raises ModelFileError."""
        ...

    def open(self, spec: ModelSpec, num_blocks: int) -> Opened:
        """Load it, with a pool of so many blocks, none of them touched yet. Slow; in another thread."""
        ...


@dataclass(frozen=True, slots=True)
class ResidencyConfig:
    """Limits of residency."""

    keep_alive_s: float = 300.0
    max_keep_alive_s: float = 3600.0
    max_pinned_share: float = 0.5
    max_rank: int = 10
    kv_tokens: int = 16384
    max_waiting: int = 1024


@dataclass(slots=True)
class _Wanted:
    """A model that is asked for and not there."""

    spec: ModelSpec
    since: float
    call_ids: list[int] = field(default_factory=list)
    requests: list[tuple[Request, Sequence[object]]] = field(default_factory=list)
    """With their matchers, where they have a grammar."""
    footprint: Footprint | None = None
    is_loading: bool = False
    opened: Opened | None = None
    behind: set[str] = field(default_factory=set)
    """Models that it gave way to: it stands back while they have work, up to `behind_until`."""
    behind_until: float = 0.0


class Residents:
    """See the module."""

    def __init__(
        self,
        ledger: Ledger,
        opener: Opener,
        workers: Workers,
        default: str,
        config: ResidencyConfig,
        scheduler: SchedulerConfig,
    ) -> None:
        """`default`: the model that requests without a name mean; idle time alone never unloads it."""
        self.ledger = ledger
        self.default = default
        self.turns = Turns(scheduler.urgent_stretch, scheduler.max_step_s)
        self.fairness = VirtualTime()
        self.messages: list[FromEngine] = []
        """For the API process, to be sent with the next report."""
        self.outputs: list[SequenceOutput] = []
        """Ends of requests that never reached a scheduler."""
        self.retired: list[Stats] = []
        """What models that are gone did, in one sum."""
        self.pressure = "none"
        self.num_loads = self.num_unloads = 0
        self._opener = opener
        self._workers = workers
        self._config = config
        self._num_blocks = -(-config.kv_tokens // BLOCK_SIZE)
        self._specs: dict[str, ModelSpec] = {}
        self._residents: dict[str, Resident] = {}
        self._closing: dict[str, Resident] = {}
        self._wanted: dict[str, _Wanted] = {}
        self._leases = Leases(config.keep_alive_s, config.max_keep_alive_s, config.max_rank)
        self._published: dict[str, list[list[int]]] = {}
        self._now = 0.0
        self._tied_since: float | None = None

    def __iter__(self) -> Iterator[Resident]:
        """All that are ready or draining."""
        return iter(list(self._residents.values()))

    def get(self, name: str) -> Resident | None:
        """A resident model; empty: the default."""
        return self._residents.get(name or self.default)

    @property
    def has_work(self) -> bool:
        """Whether a sequence wants to run on any model."""
        return any(resident.scheduler.has_work for resident in self)

    @property
    def is_changing(self) -> bool:
        """Whether models wait for room or are on their way out: `tick` is to be called often."""
        return bool(self._closing) or any(not wanted.is_loading for wanted in self._wanted.values())

    # ---- requests and calls ----

    def know(self, spec: ModelSpec) -> None:
        """A model that requests may name: it is loaded when one does."""
        self._specs[spec.name] = spec

    def publish(self, name: str, prompts: list[list[int]]) -> None:
        """The prompts of a model that all apps share, now or when it is loaded."""
        self._published[name] = prompts
        if (resident := self._residents.get(name)) is not None:
            resident.scheduler.placement.prefixes.publish(prompts)

    def submit(self, request: Request, now: float, matchers: Sequence[object] = ()) -> Place | None:
        """Give a request to its model's scheduler, or have it wait for its model. Raises what admission raises."""
        name = request.model or self.default
        resident = self._residents.get(name)
        if resident is not None and not resident.is_draining:
            resident.last_used = now
            return resident.scheduler.add(request, now, matchers)
        if name not in self._specs:
            raise ModelNotFound(f"model '{name}' is not known here. Known: {', '.join(self._specs)}.", param="model")
        if sum(len(w.requests) for w in self._wanted.values()) >= self._config.max_waiting:
            raise Overloaded(
                f"{self._config.max_waiting} requests wait for models to be loaded, which is the limit",
                retry_after_s=2.0,
            )
        self._want(self._specs[name], now).requests.append((request, matchers))
        return None

    def cancel(self, request_id: str, now: float) -> None:
        """The client left."""
        for resident in self:
            resident.scheduler.cancel(request_id, now)
        for wanted in self._wanted.values():
            wanted.requests = [r for r in wanted.requests if r[0].request_id != request_id]

    def load(self, call_id: int, spec: ModelSpec, now: float) -> None:
        """A client wants a model loaded; it is answered when that is so or cannot be."""
        self.know(spec)
        resident = self._residents.get(spec.name)
        if resident is not None and not resident.is_draining:
            resident.last_used = now
            self.messages.append(Answer(call_id, model=self.info_of(resident)))
        else:
            self._want(spec, now).call_ids.append(call_id)

    def load_now(self, spec: ModelSpec, now: float) -> Resident:
        """Load a model within this call: the default one, at the start. Raises what keeps it from being loaded."""
        self.know(spec)
        wanted = self._want(spec, now)
        try:
            if not self._reserve(wanted, now):
                raise Overloaded(f"no room for model '{spec.name}'", retry_after_s=2.0)
            wanted.opened = self._opener.open(spec, self._num_blocks)
        except BaseException:
            del self._wanted[spec.name]
            self._release(spec.name)
            raise
        self._now = now
        self._loaded(wanted, None)
        if (resident := self.get(spec.name)) is None:
            raise Overloaded(f"the memory for the KV of model '{spec.name}' is gone", retry_after_s=2.0)
        return resident

    def unload(self, name: str, now: float) -> None:
        """Drain a model. Raises NotFound if it is not loaded, Conflict if it is pinned."""
        resident = self._known(name)
        if self.is_pinned(name):
            raise Conflict(f"model '{name}' is pinned by {', '.join(self._leases.apps(name))}. End the lease first.")
        resident.is_draining = True

    def set_lease(self, app: str, name: str, lease: Lease | None, now: float) -> None:
        """Make, change or end an app's lease; a model that is not there is loaded for it.

        Raises NotFound, PermissionDenied above the owner's cap.
        """
        if lease is None:
            self._leases.end(app, name)
            return
        if name not in self._residents and name not in self._specs:
            self._known(name)  # raises
        self._leases.check(lease)
        if lease.is_pinned:
            self._check_pinned(app, name)
        self._leases.put(app, name, lease)
        if name not in self._residents:
            self._want(self._specs[name], now)
        self._set_limits()

    def _check_pinned(self, app: str, name: str) -> None:
        num_bytes = sum(self._size_of(n) for n in self._leases.pinned_by(app) | {name})
        cap = int(self._config.max_pinned_share * self.ledger.budget_bytes)
        if num_bytes > cap:
            raise PermissionDenied(
                f"app '{app}' would pin {num_bytes:,} bytes with '{name}'. The owner allows {cap:,} "
                f"({self._config.max_pinned_share:.0%} of the memory budget, setting 'max_pinned_share')."
            )

    def _size_of(self, name: str) -> int:
        """What a model takes, or would."""
        if (resident := self._residents.get(name)) is not None:
            return resident.num_bytes
        return self._opener.footprint(self._specs[name]).num_bytes + self._specs[name].text_bytes

    def set_budget(self, budget_bytes: int) -> None:
        """Change the budget; what is too much is given back at once as far as nobody needs it, the rest as they end."""
        self.ledger.set_budget(budget_bytes)
        self._set_limits()
        if self.ledger.free_bytes < 0:
            self.make_room(0)
        log.info("memory budget: %d bytes, %d reserved", budget_bytes, self.ledger.reserved_bytes)

    # ---- between steps ----

    def tick(self, now: float) -> None:
        """Take in what was loaded, begin what can be, let go of what is idle or over the budget."""
        self._now = now
        self._workers.take()
        for resident in self:
            if resident.scheduler.has_work:
                resident.last_used = now
            elif resident.is_draining or now - resident.last_used > self._keep_alive_s(resident.name):
                self._close(resident)
        for resident in list(self._closing.values()):
            self._go_on_closing(resident)
        if self.ledger.free_bytes < 0:
            self.make_room(0)
        self._break_tie(now)
        if self._wanted and not any(wanted.is_loading for wanted in self._wanted.values()):
            self._begin_one(now)

    def _break_tie(self, now: float) -> None:
        """Models whose waiting sequences fit only without each other's weights: the lowest gives way.

        Its requests that have brought nothing yet come again when it is back; the others end with an error.
        """
        busy = [resident for resident in self if resident.scheduler.has_work]
        if len(busy) < 2 or self._closing or any(resident.scheduler.running for resident in busy):
            self._tied_since = None
        elif self._tied_since is None:
            self._tied_since = now
        elif now - self._tied_since > TIE_S:
            self._tied_since = None
            self._give_way(min(busy, key=self._worth), now)

    def _give_way(self, resident: Resident, now: float) -> None:
        log.warning("model '%s' gives way: its requests and another model's do not fit together", resident.name)
        waiting = resident.scheduler.waiting
        touched = {s.request.request_id for s in waiting if s.num_generated or s.matcher is not None}
        for request_id, request in {s.request.request_id: s.request for s in waiting}.items():
            resident.scheduler.cancel(request_id, now)
            if request_id in touched:
                self._end(request, Overloaded("memory ran short while the reply was being made", retry_after_s=5.0))
            else:
                self._want(resident.spec, now).requests.append((request, ()))
        if (wanted := self._wanted.get(resident.name)) is not None:
            wanted.behind = {other.name for other in self if other is not resident and other.scheduler.has_work}
            wanted.behind_until = now + MAX_BEHIND_S
        self._close(resident)

    def next_due_s(self, now: float) -> float | None:
        """Seconds until an idle model's time is over. None: no such time."""
        times = [
            resident.last_used + self._keep_alive_s(resident.name) - now
            for resident in self
            if not resident.scheduler.has_work
        ]
        finite = [max(seconds, 0.0) for seconds in times if seconds != float("inf")]
        return min(finite, default=None)

    def provide(self, resident: Resident) -> None:
        """Before a model's step: memory for the blocks its sequences lack, from what is free, else from others."""
        if not resident.pool.num_bare:
            return
        total, least = resident.wanted_blocks()
        unused = resident.pool.num_unused
        if total > unused and self.pressure == "none":
            chunk = -(-(total - unused) // resident.footprint.blocks_per_page) * resident.footprint.blocks_per_page
            if resident.grow(chunk) or resident.grow(total - unused):
                return
        if (lack := min(least, resident.pool.max_blocks) - resident.pool.num_free) > 0 and not resident.grow(lack):
            self.make_room(resident.missing_bytes(lack), keep=resident.name)
            if not resident.grow(lack):
                self._end_hopeless(resident)

    def make_room(self, num_bytes: int, keep: str = "") -> bool:
        """Have `num_bytes` free: caches first, then contexts, then idle models. `keep` loses nothing.

        Models that begin to close give their memory back in the next ticks; False until then.
        """
        others = sorted((r for r in self if r.name != keep), key=lambda r: (r.scheduler.has_work, r.last_used))
        for contexts_too in (False, True):
            for resident in others:
                if (lack := num_bytes - self.ledger.free_bytes) <= 0:
                    return True
                resident.shrink(lack, contexts_too=contexts_too)
        for resident in self._victims(keep):
            if keep and self._now - resident.since < GRACE_S:
                continue
            if num_bytes - self.ledger.free_bytes <= sum(r.num_bytes for r in self._closing.values()):
                break
            self._close(resident)
        return self.ledger.free_bytes >= num_bytes

    def relieve(self, stage: int) -> int:
        """The system is short of memory: 1 caches, 2 contexts too, 3 idle models too. Returns the bytes given back."""
        before = self.ledger.reserved_bytes
        for resident in self:
            resident.shrink(1 << 62, contexts_too=stage > 1)
        if stage > 2:
            for resident in self._victims(""):
                self._close(resident)
                self._go_on_closing(resident)
        return before - self.ledger.reserved_bytes

    # ---- what there is ----

    def is_pinned(self, name: str) -> bool:
        """Whether an app's lease holds it."""
        return self._leases.is_pinned(name)

    def info_of(self, resident: Resident) -> ModelInfo:
        """What clients are told; a context is no longer than there can be memory for."""
        info, max_tokens = resident.engine.info, resident.pool.max_blocks * BLOCK_SIZE
        return msgspec.structs.replace(info, context_length=min(info.context_length, max_tokens))

    def stats(self, now: float) -> MemoryStats:
        """The ledger and the models."""
        models = [self._stats_of(resident, now) for resident in [*self, *self._closing.values()]]
        models += [
            ModelStats(name, "loading" if w.is_loading else "waiting", num_waiting=len(w.requests))
            for name, w in self._wanted.items()
            if name not in self._residents and name not in self._closing
        ]
        for model in models:
            model.accounts = self.ledger.held_by(model.name)
            model.num_bytes = sum(model.accounts.values())
        return MemoryStats(
            budget_bytes=self.ledger.budget_bytes,
            reserved_bytes=self.ledger.reserved_bytes,
            overhead_bytes=OVERHEAD_BYTES,
            models=models,
            pressure=self.pressure,
            num_loads=self.num_loads,
            num_unloads=self.num_unloads,
            num_refused=self.ledger.num_refused,
        )

    def check(self) -> None:
        """Raise unless pools, block tables and the ledger agree."""
        for resident in self:
            resident.scheduler.check()
        names = {*self._residents, *self._closing, *(n for n, w in self._wanted.items() if w.is_loading)}
        if strangers := self.ledger.owners() - names:
            raise InternalError(f"ledger: accounts of models that are not there: {', '.join(sorted(strangers))}")

    def close(self) -> None:
        """Shutdown: end the disk tiers in order, give all memory back."""
        for resident in [*self, *self._closing.values()]:
            if resident.swap is not None:
                resident.swap.drain(resident.engine, resident.scheduler.placement.prefixes.find)
                resident.swap.close()
            resident.engine.close()
        self._residents.clear()
        self._closing.clear()
        self._workers.close()

    # ---- loading ----

    def _want(self, spec: ModelSpec, now: float) -> _Wanted:
        if spec.name not in self._wanted:
            self._wanted[spec.name] = _Wanted(spec, now)
        return self._wanted[spec.name]

    def _begin_one(self, now: float) -> None:
        """Begin to load the first wanted model for which there is room; make room for the first otherwise."""
        for wanted in sorted(self._wanted.values(), key=lambda w: w.since):
            if wanted.spec.name in self._residents or wanted.spec.name in self._closing:
                continue  # on its way out: it comes back when it is gone
            if now < wanted.behind_until and any(r.name in wanted.behind and r.scheduler.has_work for r in self):
                continue
            try:
                if self._reserve(wanted, now):
                    self._load(wanted)
                    return
            except HobError as error:
                self._refuse(wanted, error)
            else:
                return

    def _reserve(self, wanted: _Wanted, now: float) -> bool:
        """Reserve all a model begins with. Raises ModelTooLarge or Overloaded if that can never be."""
        name = wanted.spec.name
        footprint = wanted.footprint = wanted.footprint or self._opener.footprint(wanted.spec)
        parts = {
            "weights": footprint.weight_bytes,
            "scratch": footprint.scratch_bytes,
            "buffers": footprint.buffer_bytes,
            "text": wanted.spec.text_bytes,
            "kv": footprint.kv_bytes(MIN_KV_TOKENS),
        }
        needed = sum(parts.values())
        self._check_possible(name, parts, needed)
        if not self.make_room(needed, keep=name):
            self._drain_one(wanted, now)
            return False
        for part, num_bytes in parts.items():
            if not self.ledger.reserve(f"{name}/{part}", num_bytes):
                self._release(name)
                raise Overloaded(
                    f"no memory for the {part} of model '{name}': {num_bytes:,} bytes, {self.ledger.free_bytes:,} free",
                    retry_after_s=2.0,
                )
        return True

    def _check_possible(self, name: str, parts: dict[str, int], needed: int) -> None:
        pinned = [n for n in self._residents if n != name and self.is_pinned(n)]
        pinned_bytes = sum(self._residents[n].num_bytes for n in pinned)
        what = ", ".join(f"{part} {count:,}" for part, count in parts.items() if count)
        message = (
            f"model '{name}' needs {needed:,} bytes ({what}, that is {MIN_KV_TOKENS} tokens), "
            f"but the memory budget is {self.ledger.budget_bytes:,}"
        )
        if needed > self.ledger.budget_bytes:
            error = ModelTooLarge(f"{message} (setting 'budget').", param="model")
            error.room_bytes = max(self.ledger.budget_bytes - (needed - parts["weights"]), 0)
            raise error
        if needed > self.ledger.budget_bytes - pinned_bytes:
            raise Overloaded(
                f"{message}, of which {pinned_bytes:,} are pinned for {', '.join(pinned)}. End a lease, or wait.",
                retry_after_s=30.0,
            )

    def _drain_one(self, wanted: _Wanted, now: float) -> None:
        """All others are busy: after a while the lowest of them takes no new requests."""
        if now - wanted.since < DRAIN_AFTER_S or self._closing or any(resident.is_draining for resident in self):
            return
        busy = [r for r in self if not self.is_pinned(r.name) and now - r.since > MIN_STAY_S]
        if busy:
            victim = min(busy, key=self._worth)
            log.info("model '%s' is drained: '%s' waits for its memory", victim.name, wanted.spec.name)
            victim.is_draining = True

    def _load(self, wanted: _Wanted) -> None:
        spec, footprint = wanted.spec, wanted.footprint
        assert footprint is not None
        wanted.is_loading = True

        def job() -> None:
            wanted.opened = self._opener.open(spec, self._num_blocks)

        log.info("loading model '%s'", spec.name)
        self._workers.submit(job, lambda error: self._loaded(wanted, error))

    def _loaded(self, wanted: _Wanted, error: Exception | None) -> None:
        name, opened, footprint = wanted.spec.name, wanted.opened, wanted.footprint
        if opened is None or footprint is None:
            self._release(name)
            known = error if isinstance(error, HobError) else InternalError(f"model '{name}' did not load: {error}")
            self._refuse(wanted, known)
            return
        opened.scheduler.order.fairness = self.fairness
        opened.scheduler.placement.prefixes.publish(self._published.get(name, ()))
        resident = Resident(wanted.spec, opened, footprint, self.ledger, self._now)
        surplus = opened.engine.scratch_bytes - footprint.scratch_bytes
        self.ledger.release(f"{name}/kv")  # what was reserved for it is what it takes now
        is_short = surplus > 0 and not self.ledger.reserve(f"{name}/scratch", surplus)
        if is_short or not resident.grow(resident.min_kv_blocks()):
            self._residents[name] = resident
            self._close(resident)
            self._refuse(wanted, Overloaded(f"the memory for the KV of model '{name}' is gone", retry_after_s=2.0))
            return
        self._residents[name] = resident
        del self._wanted[name]
        self.num_loads += 1
        self._set_limits()
        for call_id in wanted.call_ids:
            self.messages.append(Answer(call_id, model=self.info_of(resident)))
        for request, matchers in wanted.requests:
            try:
                resident.scheduler.add(request, wanted.since, matchers)
            except HobError as refusal:
                self._end(request, refusal)

    def _refuse(self, wanted: _Wanted, error: HobError) -> None:
        """A model cannot be had: all who wait for it are told."""
        log.error("model '%s': %s", wanted.spec.name, error)
        self._wanted.pop(wanted.spec.name, None)
        for call_id in wanted.call_ids:
            self.messages.append(Answer(call_id, OutputError.of(error), room_bytes=error.room_bytes))
        for request, _ in wanted.requests:
            self._end(request, error)

    def _end(self, request: Request, error: HobError) -> None:
        self.outputs.append(
            SequenceOutput(request.request_id, finish_reason=FinishReason.ERROR, error=OutputError.of(error))
        )

    # ---- unloading ----

    def _victims(self, keep: str) -> list[Resident]:
        """Idle models that may go, the first to go first."""
        idle = [r for r in self if r.name != keep and not r.scheduler.has_work and not self.is_pinned(r.name)]
        return sorted(idle, key=self._worth)

    def _worth(self, resident: Resident) -> tuple[bool, int, float]:
        return resident.name == self.default, self._leases.rank(resident.name), resident.last_used

    def _keep_alive_s(self, name: str) -> float:
        return float("inf") if name == self.default else self._leases.keep_alive_s(name)

    def _close(self, resident: Resident) -> None:
        """Begin to unload an idle model: no new requests; what is not on disk of its contexts is copied out first."""
        log.info("unloading model '%s'", resident.name)
        del self._residents[resident.name]
        self._closing[resident.name] = resident
        self._leases.forget(resident.name)

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
        resident.engine.close()
        for part in ("kv", "scratch", "weights"):
            self.ledger.release(f"{name}/{part}")

        def gone(error: Exception | None) -> None:
            if error is not None:
                log.error("closing the disk tier of '%s': %s", name, error)
            self._release(name)
            del self._closing[name]
            self.num_unloads += 1
            self.messages.append(Unloaded(name))
            self._set_limits()

        self._workers.submit(swap.close if swap is not None else lambda: None, gone)

    def _release(self, name: str) -> None:
        for part in self.ledger.held_by(name):
            self.ledger.release(f"{name}/{part}")

    def _end_hopeless(self, resident: Resident) -> None:
        """Sequences that the budget, as it is now, has no room for: ended with the numbers."""
        for request_id in {s.request.request_id: None for s in resident.hopeless()}:
            limit = resident.pool.max_blocks * BLOCK_SIZE
            resident.scheduler.cancel(request_id, resident.last_used)
            error = Overloaded(f"the memory budget shrank: the request no longer fits {limit:,} tokens of KV")
            self.outputs.append(
                SequenceOutput(request_id, finish_reason=FinishReason.ERROR, error=OutputError.of(error))
            )

    # ---- limits ----

    def _known(self, name: str) -> Resident:
        if (resident := self._residents.get(name)) is None:
            loaded = ", ".join(self._residents) or "none"
            raise NotFound(f"model '{name}' is not loaded. Loaded: {loaded}.", param="model")
        return resident

    def _set_limits(self) -> None:
        """How long a sequence may be, by model: all of the budget that nobody else has for good."""
        for resident in self:
            others = sum(r.num_bytes for r in self if r is not resident and self.is_pinned(r.name))
            fixed = sum(n for part, n in self.ledger.held_by(resident.name).items() if part != "kv")
            resident.limit(self.ledger.budget_bytes - others - fixed)

    def _stats_of(self, resident: Resident, now: float) -> ModelStats:
        name, scheduler = resident.name, resident.scheduler
        is_leaving = resident.is_draining or name in self._closing
        return ModelStats(
            name,
            "draining" if is_leaving else "ready",
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            idle_s=0.0 if scheduler.has_work else max(now - resident.last_used, 0.0),
            keep_alive_s=None if name == self.default else self._keep_alive_s(name),
            rank=self._leases.rank(name),
            is_pinned=self.is_pinned(name),
            leases=self._leases.apps(name),
        )
