"""The models that requests ask for: which come, in what order, and who gives way to whom.

    wanted --room made, reserved--> loading --> ready --idle, rank, pressure, room for another--> draining --> gone

One process holds them all, so that one step at a time has all cores: two processes on the same cores would take turns
by the kernel's clock, and neither cost model, nor class, nor fairness would mean anything. Turns are shared out in
`turns.py`; those that are there, and the memory they share, are in `room.py`.

A request for a model that is not there waits for it; none in flight is ended by an unload. A model that is wanted for
DRAIN_AFTER_S while all others are busy has the lowest of them drained: it takes no new requests, which wait in their
turn. Models whose sequences fit only one at a time take turns: what the one that gives way had begun goes on when it is
back. All is synchronous and owned by the loop; loading itself runs in `workers.py`. Time is passed in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Protocol

from hob.config import SchedulerConfig
from hob.errors import (
    Conflict,
    HobError,
    InternalError,
    ModelNotFound,
    ModelTooLarge,
    Overloaded,
    PermissionDenied,
)
from hob.kvcache.pool import BLOCK_SIZE
from hob.kvcache.swap import Swap
from hob.messages import Answer, Lease, MemoryStats, ModelSpec, ModelStats
from hob.request import FinishReason, OutputError, Place, Request, Sequence, SequenceOutput
from hob.scheduler.fairness import VirtualTime
from hob.service.leases import Leases
from hob.service.ledger import OVERHEAD_BYTES, Ledger
from hob.service.resident import MIN_KV_TOKENS, Footprint, Opened, Resident
from hob.service.room import Room
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
class Waiting:
    """A request whose model is not there."""

    request: Request
    matchers: Many[object]
    """Where its samples stand in their grammar, if it has one."""
    since: float


@dataclass(slots=True)
class _Wanted:
    """A model that is asked for and not there."""

    spec: ModelSpec
    since: float
    call_ids: list[int] = field(default_factory=list)
    requests: list[Waiting] = field(default_factory=list)
    parked: list[list[Sequence]] = field(default_factory=list)
    """Sequences of requests that had begun when it gave way: they go on when it is back."""
    footprint: Footprint | None = None
    is_loading: bool = False
    opened: Opened | None = None
    behind: set[str] = field(default_factory=set)
    """Models that it gave way to: it stands back while they have work, up to `behind_until`."""
    behind_until: float = 0.0
    disk_changes: list[Callable[[Swap], None]] = field(default_factory=list)
    """What happened to contexts while it was loaded, perhaps after it had read the histories."""

    @property
    def num_waiting(self) -> int:
        """Requests."""
        return len(self.requests) + len(self.parked)


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
        leases = Leases(config.keep_alive_s, config.max_keep_alive_s, config.max_rank)
        self.room = Room(ledger, workers, default, leases)
        self.turns = Turns(scheduler.urgent_stretch, scheduler.max_step_s)
        self.fairness = VirtualTime()
        self.num_loads = 0
        self._opener = opener
        self._workers = workers
        self._config = config
        self._num_blocks = -(-config.kv_tokens // BLOCK_SIZE)
        self._specs: dict[str, ModelSpec] = {}
        self._wanted: dict[str, _Wanted] = {}
        self._published: dict[str, list[list[int]]] = {}
        self._tied_since: float | None = None

    def __iter__(self) -> Iterator[Resident]:
        """All that are ready or draining."""
        return iter(self.room)

    def get(self, name: str) -> Resident | None:
        """A resident model; empty: the default."""
        return self.room.get(name)

    @property
    def has_work(self) -> bool:
        """Whether a sequence wants to run on any model."""
        return any(resident.scheduler.has_work for resident in self)

    @property
    def is_changing(self) -> bool:
        """Whether models wait for room or are on their way out: `tick` is to be called often."""
        return bool(self.room.closing) or any(not wanted.is_loading for wanted in self._wanted.values())

    # ---- requests and calls ----

    def know(self, spec: ModelSpec) -> None:
        """A model that requests may name: it is loaded when one does."""
        self._specs[spec.name] = spec

    def publish(self, name: str, prompts: list[list[int]]) -> None:
        """The prompts of a model that all apps share, now or when it is loaded."""
        self._published[name] = prompts
        if (resident := self.room.residents.get(name)) is not None:
            resident.scheduler.placement.prefixes.publish(prompts)

    def change_disk(self, change: Callable[[Swap], None]) -> None:
        """A context was copied or deleted. A model that is not here learns it from the histories when it is loaded."""
        for resident in self:
            if resident.swap is not None:
                change(resident.swap)
        for wanted in self._wanted.values():
            if wanted.is_loading:
                wanted.disk_changes.append(change)

    def submit(self, request: Request, now: float, matchers: Many[object] = ()) -> Place | None:
        """Give a request to its model's scheduler, or have it wait for its model. Raises what admission raises."""
        name = request.model or self.room.default
        resident = self.room.residents.get(name)
        if resident is not None and not resident.is_draining:
            resident.last_used = now
            return resident.scheduler.add(request, now, matchers)
        if name not in self._specs:
            raise ModelNotFound(f"model '{name}' is not known here. Known: {', '.join(self._specs)}.", param="model")
        if sum(wanted.num_waiting for wanted in self._wanted.values()) >= self._config.max_waiting:
            raise Overloaded(
                f"{self._config.max_waiting} requests wait for models to be loaded, which is the limit",
                retry_after_s=2.0,
            )
        self._want(self._specs[name], now).requests.append(Waiting(request, matchers, now))
        return None

    def cancel(self, request_id: str, now: float, num_kept: int | None = None) -> None:
        """The client left. A model that nobody else waits for is not loaded for it any more. See Scheduler.cancel."""
        for resident in self:
            resident.scheduler.cancel(request_id, now, num_kept)
        for name, wanted in list(self._wanted.items()):
            num_waiting = wanted.num_waiting
            wanted.requests = [waiting for waiting in wanted.requests if waiting.request.request_id != request_id]
            wanted.parked = [sequences for sequences in wanted.parked if id_of(sequences) != request_id]
            is_last = num_waiting > 0 and not wanted.num_waiting
            if is_last and not wanted.is_loading and not wanted.call_ids and not self.room.leases.apps(name):
                del self._wanted[name]

    def load(self, call_id: int, spec: ModelSpec, now: float) -> None:
        """A client wants a model loaded; it is answered when that is so or cannot be."""
        self.know(spec)
        resident = self.room.residents.get(spec.name)
        if resident is not None and not resident.is_draining:
            resident.last_used = now
            self.room.messages.append(Answer(call_id, model=self.room.info_of(resident)))
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
            self.room.release(spec.name)
            raise
        self.room.now = now
        self._loaded(wanted, None)
        if (resident := self.get(spec.name)) is None:
            raise Overloaded(f"the memory for the KV of model '{spec.name}' is gone", retry_after_s=2.0)
        return resident

    def unload(self, name: str, now: float) -> None:
        """Drain a model. Raises NotFound if it is not loaded, Conflict if it is pinned."""
        resident = self.room.known(name)
        if self.room.is_pinned(name):
            raise Conflict(
                f"model '{name}' is pinned by {', '.join(self.room.leases.apps(name))}. End the lease first."
            )
        resident.is_draining = True

    def set_lease(self, app: str, name: str, lease: Lease | None, now: float) -> None:
        """Make, change or end an app's lease; a model that is not there is loaded for it.

        Raises NotFound, PermissionDenied above the owner's cap.
        """
        if lease is None:
            self.room.leases.end(app, name)
            self.room.set_limits()
            return
        if name not in self.room.residents and name not in self._specs:
            self.room.known(name)  # raises
        self.room.leases.check(lease)
        if lease.is_pinned:
            self._check_pinned(app, name)
        self.room.leases.put(app, name, lease)
        if name not in self.room.residents:
            self._want(self._specs[name], now)
        self.room.set_limits()

    def _check_pinned(self, app: str, name: str) -> None:
        num_bytes = self._size_of(self.room.leases.pinned_by(app) | {name})
        cap = int(self._config.max_pinned_share * self.room.ledger.budget_bytes)
        if num_bytes > cap:
            raise PermissionDenied(
                f"app '{app}' would pin {num_bytes:,} bytes with '{name}'. The owner allows {cap:,} "
                f"({self._config.max_pinned_share:.0%} of the memory budget, setting 'max_pinned_share')."
            )

    def _size_of(self, names: set[str]) -> int:
        """What models take, or would, for as long as they are there."""
        return sum(self._size_of_one(name) for name in names)

    def _size_of_one(self, name: str) -> int:
        if (resident := self.room.residents.get(name)) is not None:
            return resident.fixed_bytes
        return self._opener.footprint(self._specs[name]).num_bytes + self._specs[name].text_bytes

    def set_budget(self, budget_bytes: int) -> None:
        """Change the budget; what is too much is given back at once as far as nobody needs it, the rest as they end."""
        self.room.ledger.set_budget(budget_bytes)
        self._end_pins()
        self.room.set_limits()
        if self.room.ledger.free_bytes < 0:
            self.room.make_room(0)
        log.info("memory budget: %d bytes, %d reserved", budget_bytes, self.room.ledger.reserved_bytes)

    def restore(self, leases: dict[str, dict[str, Lease]], now: float) -> None:
        """Leases, by model and app, that another process had granted. What cannot be any more is said to be over."""
        for name, by_app in leases.items():
            for app, lease in by_app.items():
                try:
                    self.set_lease(app, name, lease, now)
                except HobError as error:
                    self.room.end_lease(app, name, error.message)

    def _end_pins(self) -> None:
        """The owner's budget goes before an app's pin: those that are too much now end, the lowest rank first."""
        budget = self.room.ledger.budget_bytes
        for _, name, app in self.room.leases.pins():
            pinned = {name for _, name, _ in self.room.leases.pins()}
            is_over_cap = self._size_of(self.room.leases.pinned_by(app)) > self._config.max_pinned_share * budget
            if is_over_cap or self._size_of(pinned) > budget:
                self.room.end_lease(app, name, f"the memory budget is {budget:,} bytes now")

    # ---- between steps ----

    def tick(self, now: float) -> None:
        """Take in what was loaded, begin what can be, let go of what is idle or over the budget."""
        self.room.now = now
        self._workers.take()
        for resident in self:
            if resident.scheduler.has_work:
                resident.last_used = now
            elif resident.is_draining or now - resident.last_used > self.room.keep_alive_s(resident.name):
                self.room.close(resident)
        self.room.go_on_closing()
        if self.room.ledger.free_bytes < 0:
            self.room.make_room(0)
        self._break_tie(now)
        if self._wanted and not any(wanted.is_loading for wanted in self._wanted.values()):
            self._begin_one(now)

    def _break_tie(self, now: float) -> None:
        """Models whose waiting sequences fit only without each other's weights: the lowest that is not pinned gives
        way. Of pinned ones there is no tie: what fits only without another pinned one is refused, or ended."""
        busy = [resident for resident in self if resident.scheduler.has_work]
        if len(busy) < 2 or self.room.closing or any(resident.scheduler.running for resident in busy):
            self._tied_since = None
        elif self._tied_since is None:
            self._tied_since = now
        elif now - self._tied_since > TIE_S and (free := [r for r in busy if not self.room.is_pinned(r.name)]):
            self._tied_since = None
            self._give_way(min(free, key=self.room.worth), now)

    def _give_way(self, resident: Resident, now: float) -> None:
        log.warning("model '%s' gives way: its requests and another model's do not fit together", resident.name)
        wanted = self._want(resident.spec, now)
        wanted.parked += resident.scheduler.park()
        wanted.behind = {other.name for other in self if other is not resident and other.scheduler.has_work}
        wanted.behind_until = now + MAX_BEHIND_S
        self.room.close(resident, comes_back=True)

    def next_due_s(self, now: float) -> float | None:
        """Seconds until an idle model's time is over. None: no such time."""
        times = [
            resident.last_used + self.room.keep_alive_s(resident.name) - now
            for resident in self
            if not resident.scheduler.has_work
        ]
        finite = [max(seconds, 0.0) for seconds in times if seconds != float("inf")]
        return min(finite, default=None)

    def stats(self, now: float) -> MemoryStats:
        """The ledger and the models."""
        models = [self.room.model_stats(resident, now) for resident in [*self, *self.room.closing.values()]]
        models += [
            ModelStats(name, "loading" if w.is_loading else "waiting", num_waiting=w.num_waiting)
            for name, w in self._wanted.items()
            if name not in self.room.residents and name not in self.room.closing
        ]
        default = self.room.default
        if not any(model.name == default for model in models) and self.room.ledger.held_by(default):
            models.append(ModelStats(default, "unloaded"))
        for model in models:
            model.accounts = self.room.ledger.held_by(model.name)
            model.num_bytes = sum(model.accounts.values())
        return MemoryStats(
            budget_bytes=self.room.ledger.budget_bytes,
            reserved_bytes=self.room.ledger.reserved_bytes,
            overhead_bytes=OVERHEAD_BYTES,
            models=models,
            pressure=self.room.pressure,
            num_loads=self.num_loads,
            num_unloads=self.room.num_unloads,
            num_refused=self.room.ledger.num_refused,
        )

    def check(self) -> None:
        """Raise unless pools, block tables and the ledger agree."""
        for resident in self:
            resident.scheduler.check()
        names = {*self.room.residents, *self.room.closing, *(n for n, w in self._wanted.items() if w.is_loading)}
        names.add(self.room.default)  # its text
        if strangers := self.room.ledger.owners() - names:
            raise InternalError(f"ledger: accounts of models that are not there: {', '.join(sorted(strangers))}")

    def close(self) -> None:
        """Shutdown: end the disk tiers in order, give all memory back."""
        self._workers.close()  # first: what is being loaded must be closed too, what is being closed must not
        for resident in [*self, *self.room.closing.values()]:
            if resident.swap is not None:
                resident.swap.drain(resident.engine, resident.scheduler.placement.prefixes.find)
                resident.swap.close()
            resident.engine.close()
        self.room.residents.clear()
        self.room.closing.clear()

    # ---- loading ----

    def _want(self, spec: ModelSpec, now: float) -> _Wanted:
        if spec.name not in self._wanted:
            self._wanted[spec.name] = _Wanted(spec, now)
        return self._wanted[spec.name]

    def _begin_one(self, now: float) -> None:
        """Begin to load the first wanted model for which there is room; make room for the first otherwise."""
        for wanted in sorted(self._wanted.values(), key=lambda w: w.since):
            if wanted.spec.name in self.room.residents or wanted.spec.name in self.room.closing:
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
        name, ledger = wanted.spec.name, self.room.ledger
        footprint = wanted.footprint = wanted.footprint or self._opener.footprint(wanted.spec)
        parts = {
            "weights": footprint.weight_bytes,
            "scratch": footprint.scratch_bytes,
            "buffers": footprint.buffer_bytes,
            "text": wanted.spec.text_bytes - ledger.held_by(name).get("text", 0),
            "kv": footprint.kv_bytes(MIN_KV_TOKENS),
        }
        needed = sum(parts.values())
        self._check_possible(name, parts, needed)
        if not self.room.make_room(needed, keep=name):
            self._drain_one(wanted, now)
            return False
        for part, num_bytes in parts.items():
            if not ledger.reserve(f"{name}/{part}", num_bytes):
                self.room.release(name)
                raise Overloaded(
                    f"no memory for the {part} of model '{name}': {num_bytes:,} bytes, {ledger.free_bytes:,} free",
                    retry_after_s=2.0,
                )
        return True

    def _check_possible(self, name: str, parts: dict[str, int], needed: int) -> None:
        pinned = [n for n in self.room.residents if n != name and self.room.is_pinned(n)]
        pinned_bytes = sum(self.room.residents[n].fixed_bytes for n in pinned)
        what = ", ".join(f"{part} {count:,}" for part, count in parts.items() if count)
        message = (
            f"model '{name}' needs {needed:,} bytes ({what}, that is {MIN_KV_TOKENS} tokens), "
            f"but the memory budget is {self.room.ledger.budget_bytes:,}"
        )
        if needed > self.room.ledger.budget_bytes:
            error = ModelTooLarge(f"{message} (setting 'budget').", param="model")
            error.room_bytes = max(self.room.ledger.budget_bytes - (needed - parts["weights"]), 0)
            raise error
        if needed > self.room.ledger.budget_bytes - pinned_bytes:
            raise Overloaded(
                f"{message}, of which {pinned_bytes:,} are pinned for {', '.join(pinned)}. End a lease, or wait.",
                retry_after_s=30.0,
            )

    def _drain_one(self, wanted: _Wanted, now: float) -> None:
        """All others are busy: after a while the lowest of them takes no new requests."""
        if now - wanted.since < DRAIN_AFTER_S or self.room.closing or any(resident.is_draining for resident in self):
            return
        busy = [r for r in self if not self.room.is_pinned(r.name) and now - r.since > MIN_STAY_S]
        if busy:
            victim = min(busy, key=self.room.worth)
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
            self.room.release(name)
            known = error if isinstance(error, HobError) else InternalError(f"model '{name}' did not load: {error}")
            self._refuse(wanted, known)
            return
        opened.scheduler.order.fairness = self.fairness
        opened.scheduler.placement.prefixes.publish(self._published.get(name, ()))
        if opened.swap is not None:
            for change in wanted.disk_changes:
                change(opened.swap)
        resident = Resident(wanted.spec, opened, footprint, self.room.ledger, self.room.now)
        surplus = opened.engine.scratch_bytes - footprint.scratch_bytes
        self.room.ledger.release(f"{name}/kv")  # what was reserved for it is what it takes now
        is_short = surplus > 0 and not self.room.ledger.reserve(f"{name}/scratch", surplus)
        if is_short or not resident.grow(resident.min_kv_blocks()):
            self.room.residents[name] = resident
            self.room.close(resident)
            self._refuse(wanted, Overloaded(f"the memory for the KV of model '{name}' is gone", retry_after_s=2.0))
            return
        self.room.residents[name] = resident
        del self._wanted[name]
        self.num_loads += 1
        self.room.set_limits()
        for call_id in wanted.call_ids:
            self.room.messages.append(Answer(call_id, model=self.room.info_of(resident)))
        resident.scheduler.resume(wanted.parked)
        for waiting in wanted.requests:
            try:
                resident.scheduler.add(waiting.request, waiting.since, waiting.matchers)
            except HobError as refusal:
                self._end(waiting.request.request_id, refusal)

    def _refuse(self, wanted: _Wanted, error: HobError) -> None:
        """A model cannot be had: all who wait for it are told."""
        log.error("model '%s': %s", wanted.spec.name, error)
        self._wanted.pop(wanted.spec.name, None)
        for call_id in wanted.call_ids:
            self.room.messages.append(Answer(call_id, OutputError.of(error), room_bytes=error.room_bytes))
        for waiting in wanted.requests:
            self._end(waiting.request.request_id, error)
        for sequences in wanted.parked:
            for sequence in sequences:
                if not sequence.is_finished:
                    self._end(id_of(sequences), error, sequence.index)

    def _end(self, request_id: str, error: HobError, index: int = 0) -> None:
        self.room.outputs.append(
            SequenceOutput(request_id, index, finish_reason=FinishReason.ERROR, error=OutputError.of(error))
        )


def id_of(sequences: list[Sequence]) -> str:
    """Of the request whose sequences these are."""
    return sequences[0].request.request_id
