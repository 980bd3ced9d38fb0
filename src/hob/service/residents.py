"""The models that requests ask for: which come, in what order, and who gives way to whom.

    wanted --room made, reserved--> loading --> ready --idle, rank, pressure, room for another--> draining --> gone

One process holds them all, so that one step at a time has all cores: two processes on the same cores would take turns
by the kernel's clock, and neither cost model, nor class, nor fairness would mean anything. Turns are shared out in
`turns.py`; those that are there, and the memory they share, are in `room.py`.

A request for a model that is not there waits for it; none in flight is ended by an unload. Who comes and who goes is by
the most urgent class of what waits for a model or runs on it, then by age or by worth:

    a model whose work is less urgent     gives way at once: what it had begun goes on when it is back
    one whose work is as urgent           is drained after DRAIN_AFTER_S: it takes no new requests, which wait
    one whose work is more urgent         stays, until who waits has done so for PATIENCE_S: then all are equal

A chat pauses between its turns: its model counts as standard meanwhile (`Resident.urgency`). Models whose sequences fit
only one at a time take turns. All is synchronous and owned by the loop; loading itself runs in `workers.py`. Time is
passed in.
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
)
from hob.kvcache.pool import BLOCK_SIZE
from hob.kvcache.swap import Swap
from hob.messages import Answer, Lease, MemoryStats, ModelSpec, ModelStats, Need
from hob.request import OutputError, Place, Request, Sequence, SequenceOutput, ServiceClass
from hob.scheduler.fairness import VirtualTime
from hob.service.leases import Leases
from hob.service.ledger import OVERHEAD_BYTES, Ledger
from hob.service.pins import Pins
from hob.service.resident import IDLE, MIN_KV_TOKENS, MIN_STAY_S, Footprint, Opened, Resident
from hob.service.room import Room
from hob.service.turns import Turns
from hob.service.workers import Workers

log = logging.getLogger("hob.engine")

DRAIN_AFTER_S = 1.0
"""How long a wanted model waits for busy ones before one of them is drained."""
PATIENCE_S = 60.0
"""How long a model waits behind more urgent work of others: then it has its turn, so that nobody starves."""
MAX_STAY_S = 20.0
"""A model that gave way to more urgent work stays twice as long the next time, up to this: what is computed again each
time would never end else."""
LOOK_S = 0.25
"""How often models are asked whether they have interactive work."""
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


@dataclass(slots=True)
class _Wanted:
    """A model that is asked for and not there."""

    spec: ModelSpec
    since: float
    calls: dict[int, ServiceClass] = field(default_factory=dict)
    """Clients that wait for the model itself, and the class of what they will ask."""
    requests: list[Waiting] = field(default_factory=list)
    parked: list[list[Sequence]] = field(default_factory=list)
    """Sequences of requests that had begun when it gave way: they go on when it is back."""
    footprint: Footprint | None = None
    loading_since: float | None = None
    """None: it is not being loaded yet."""
    stay_s: float = MIN_STAY_S
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

    @property
    def is_loading(self) -> bool:
        """Whether it is on its way."""
        return self.loading_since is not None

    @property
    def service_class(self) -> ServiceClass:
        """The most urgent that waits for it. A lease alone is not urgent."""
        requests = [w.request for w in self.requests] + [sequences[0].request for sequences in self.parked]
        classes = [*self.calls.values(), *(request.service_class for request in requests)]
        return min(classes, default=ServiceClass.BACKGROUND)

    def urgency(self, now: float) -> ServiceClass:
        """Its class, or the most urgent once its patience is at an end."""
        return ServiceClass.INTERACTIVE if now - self.since > PATIENCE_S else self.service_class


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
        self._pins = Pins(self.room, self._size_of, config.max_pinned_share)
        self._opener = opener
        self._workers = workers
        self._config = config
        self._num_blocks = -(-config.kv_tokens // BLOCK_SIZE)
        self._specs: dict[str, ModelSpec] = {}
        self._wanted: dict[str, _Wanted] = {}
        self._published: dict[str, list[list[int]]] = {}
        self._looked_at = 0.0
        self._least_load_s: dict[str, float] = {}
        """By model: the least that loading it has taken."""

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
        if (resident := self._ready(name, request.service_class)) is not None:
            place = resident.scheduler.add(request, now, matchers)
            self._use(resident, request.service_class, now)
            return place
        if name not in self._specs:
            raise ModelNotFound(f"model '{name}' is not known here. Known: {', '.join(self._specs)}.", param="model")
        if sum(wanted.num_waiting for wanted in self._wanted.values()) >= self._config.max_waiting:
            raise Overloaded(
                f"{self._config.max_waiting} requests wait for models to be loaded, which is the limit",
                retry_after_s=2.0,
            )
        request.arrived_s = now if request.arrived_s is None else request.arrived_s
        if request.ttft_deadline_s is not None:
            self._check_due(name, request.arrived_s + request.ttft_deadline_s, now)
        self._want(self._specs[name], now).requests.append(Waiting(request, matchers))
        return None

    def _ready(self, name: str, service_class: ServiceClass) -> Resident | None:
        """A model that takes a request of this class. One that is drained for less urgent work goes on instead."""
        resident = self.room.residents.get(name)
        if resident is None or not resident.is_draining:
            return resident
        rival = self._wanted.get(resident.drained_for)
        if not resident.drained_for or (rival is not None and service_class >= rival.urgency(self.room.now)):
            return None
        resident.is_draining, resident.drained_for = False, ""
        if (wanted := self._wanted.pop(name, None)) is not None:
            self._take_in(wanted, resident)
        return resident

    def _use(self, resident: Resident, service_class: ServiceClass, now: float) -> None:
        resident.last_used = now
        if service_class is ServiceClass.INTERACTIVE:
            resident.last_urgent = now

    def _check_due(self, name: str, due_s: float, now: float) -> None:
        """Raise Overloaded if a first token is due before a model that is not there can be."""
        load_s, wanted = self._least_load_s.get(name, 0.0), self._wanted.get(name)
        if wanted is not None and wanted.loading_since is not None:
            load_s -= now - wanted.loading_since
        if load_s > due_s - now:
            raise Overloaded(
                f"the first token is due in {due_s - now:.3f} s, but model '{name}' is not in memory, and to load it "
                f"takes {load_s:.3f} s or more. Ask for a later deadline, or none.",
                param="ttft_deadline_s",
                retry_after_s=1.0,
            )

    def cancel(self, request_id: str, now: float, num_kept: int | None = None) -> None:
        """The client left. A model that nobody else waits for is not loaded for it any more. See Scheduler.cancel."""
        for resident in self:
            resident.scheduler.cancel(request_id, now, num_kept)
        for name, wanted in list(self._wanted.items()):
            num_waiting = wanted.num_waiting
            wanted.requests = [waiting for waiting in wanted.requests if waiting.request.request_id != request_id]
            wanted.parked = [sequences for sequences in wanted.parked if id_of(sequences) != request_id]
            is_last = num_waiting > 0 and not wanted.num_waiting
            if is_last and not wanted.is_loading and not wanted.calls and not self.room.leases.apps(name):
                del self._wanted[name]

    def load(self, call_id: int, spec: ModelSpec, now: float, need: Need) -> None:
        """A client wants a model loaded; it is answered when that is so or cannot be, or not in time."""
        self.know(spec)
        if (resident := self._ready(spec.name, need.service_class)) is not None:
            self._use(resident, need.service_class, now)
            self.room.messages.append(Answer(call_id, model=self.room.info_of(resident)))
            return
        try:
            if need.due_s is not None:
                self._check_due(spec.name, need.due_s, now)
        except Overloaded as refusal:
            self.room.messages.append(Answer(call_id, OutputError.of(refusal)))
        else:
            self._want(spec, now).calls[call_id] = need.service_class

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
        resident.is_draining, resident.drained_for = True, ""

    def set_lease(self, app: str, name: str, lease: Lease | None, now: float) -> None:
        """Make, change or end an app's lease; a model that is not there is loaded for it.

        Raises NotFound, PermissionDenied above the owner's cap, Overloaded where a pin finds no room now.
        """
        if lease is None:
            self.room.leases.end(app, name)
            self.room.set_limits()
            return
        if name not in self.room.residents and name not in self._specs:
            self.room.known(name)  # raises
        self.room.leases.check(lease)
        if lease.is_pinned:
            self._pins.check(app, name)
        self.room.leases.put(app, name, lease)
        if name not in self.room.residents:
            self._want(self._specs[name], now)
        self.room.set_limits()

    def _size_of(self, name: str) -> int:
        """What a model takes, or would, for as long as it is there."""
        if (resident := self.room.residents.get(name)) is not None:
            return resident.fixed_bytes
        return self._opener.footprint(self._specs[name]).num_bytes + self._specs[name].text_bytes

    def set_budget(self, budget_bytes: int) -> None:
        """Change the budget; what is too much is given back at once as far as nobody needs it, the rest as they end."""
        self.room.ledger.set_budget(budget_bytes)
        self._pins.end_excess()
        self.room.set_limits()
        if self.room.ledger.free_bytes < 0:
            self.room.make_room(0, ServiceClass.INTERACTIVE)
        log.info("memory budget: %d bytes, %d reserved", budget_bytes, self.room.ledger.reserved_bytes)

    def restore(self, leases: dict[str, dict[str, Lease]], now: float) -> None:
        """Leases, by model and app, that another process had granted. What cannot be any more is said to be over."""
        for name, by_app in leases.items():
            for app, lease in by_app.items():
                try:
                    self.set_lease(app, name, lease, now)
                except HobError as error:
                    self.room.end_lease(app, name, error.message)

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
        if now - self._looked_at > LOOK_S:
            self._looked_at = now
            for resident in self:
                resident.urgency(now)
        self.room.go_on_closing()
        if self.room.ledger.free_bytes < 0:
            self.room.make_room(0, ServiceClass.INTERACTIVE)
        self._break_tie(now)
        if self._wanted and not any(wanted.is_loading for wanted in self._wanted.values()):
            self._begin_one(now)

    def _break_tie(self, now: float) -> None:
        """Models that lack memory for their sequences: the most urgent has it from one that is less so.

        If no model can go on without another's weights, the lowest that is not pinned gives way. Of pinned ones there
        is no tie: what fits only without another pinned one is refused, or ended.
        """
        busy = [resident for resident in self if resident.scheduler.has_work]
        short = [(r.urgency(now), r.short_since, r) for r in busy if r.short_since is not None]
        if len(busy) < 2 or not short or self.room.closing:
            return
        urgency, since, first = min(short, key=lambda entry: entry[:2])
        if now - since < TIE_S:
            return
        free = [resident for resident in busy if not self.room.is_pinned(resident.name)]
        if any(resident.scheduler.running for resident in busy):
            least = urgency + 1 if now - since < PATIENCE_S else ServiceClass.INTERACTIVE
            free = [r for r in free if r is not first and r.urgency(now) >= least and now - r.since > r.stay_s]
        if not free:
            return
        first.short_since, first.since = None, now  # its stay begins
        victim = min(free, key=self.room.worth)
        if victim.scheduler.running and victim.urgency(now) > urgency:
            victim.push_out()
            self.room.provide(first)  # before the other starts again
        else:
            self._give_way(victim, {other.name for other in busy if other is not victim}, now)

    def _give_way(self, resident: Resident, to: set[str], now: float) -> None:
        """A model goes; what it has begun is parked until it is back."""
        log.warning("model '%s' gives way to %s: they do not fit together", resident.name, ", ".join(to))
        wanted = self._want(resident.spec, now)
        wanted.parked += resident.scheduler.park()
        wanted.stay_s = min(2 * resident.stay_s, MAX_STAY_S)
        wanted.behind = to
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
        """Begin to load the most urgent wanted model, or make room for it."""
        for wanted in sorted(self._wanted.values(), key=lambda w: (w.urgency(now), w.since)):
            if wanted.spec.name in self.room.residents or wanted.spec.name in self.room.closing:
                continue  # on its way out: it comes back when it is gone
            if now < wanted.behind_until and self._is_behind(wanted, now):
                continue
            try:
                if self._reserve(wanted, now):
                    self._load(wanted)
                    return
            except HobError as error:
                self._refuse(wanted, error)
            else:
                return

    def _is_behind(self, wanted: _Wanted, now: float) -> bool:
        """Whether a model to which it gave way has work that is not less urgent."""
        return any(
            resident.name in wanted.behind
            and resident.scheduler.has_work
            and resident.urgency(now) <= wanted.service_class
            for resident in self
        )

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
        if not self.room.make_room(needed, wanted.urgency(now), keep=name):
            self._take_from_one(wanted, now)
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

    def _take_from_one(self, wanted: _Wanted, now: float) -> None:
        """All others are busy: the lowest of them goes, unless all have more urgent work. See the module."""
        if self.room.closing:
            return
        free = [r for r in self if not self.room.is_pinned(r.name) and now - r.since > r.stay_s]
        free = [r for r in free if r.urgency(now) >= wanted.urgency(now)]
        if not free:
            return
        victim = min(free, key=self.room.worth)
        if wanted.service_class < victim.urgency(now) < IDLE:
            self._give_way(victim, {wanted.spec.name}, now)
        elif now - wanted.since > DRAIN_AFTER_S and not any(resident.is_draining for resident in self):
            log.info("model '%s' is drained: '%s' waits for its memory", victim.name, wanted.spec.name)
            victim.is_draining, victim.drained_for = True, wanted.spec.name

    def _load(self, wanted: _Wanted) -> None:
        spec, footprint = wanted.spec, wanted.footprint
        assert footprint is not None
        wanted.loading_since = self.room.now

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
        resident.stay_s = wanted.stay_s
        del self._wanted[name]
        self.num_loads += 1
        if wanted.loading_since is not None:
            load_s = self.room.now - wanted.loading_since
            self._least_load_s[name] = min(load_s, self._least_load_s.get(name, load_s))
        self.room.set_limits()
        self._take_in(wanted, resident)

    def _take_in(self, wanted: _Wanted, resident: Resident) -> None:
        """All who waited for a model that is there now."""
        self._use(resident, wanted.service_class, self.room.now)
        for call_id in wanted.calls:
            self.room.messages.append(Answer(call_id, model=self.room.info_of(resident)))
        resident.scheduler.resume(wanted.parked)
        for waiting in wanted.requests:
            request = waiting.request
            try:
                place = resident.scheduler.add(request, self.room.now, waiting.matchers)
            except HobError as refusal:
                self._end(request.request_id, refusal)
            else:
                if place is not None:
                    self.room.outputs.append(SequenceOutput(request.request_id, place=place))

    def _refuse(self, wanted: _Wanted, error: HobError) -> None:
        """A model cannot be had: all who wait for it are told."""
        log.error("model '%s': %s", wanted.spec.name, error)
        self._wanted.pop(wanted.spec.name, None)
        for call_id in wanted.calls:
            self.room.messages.append(Answer(call_id, OutputError.of(error), room_bytes=error.room_bytes))
        for waiting in wanted.requests:
            self._end(waiting.request.request_id, error)
        for sequences in wanted.parked:
            for sequence in sequences:
                if not sequence.is_finished:
                    self._end(id_of(sequences), error, sequence.index)

    def _end(self, request_id: str, error: HobError, index: int = 0) -> None:
        self.room.outputs.append(SequenceOutput.failed(request_id, error, index))


def id_of(sequences: list[Sequence]) -> str:
    """Of the request whose sequences these are."""
    return sequences[0].request.request_id
