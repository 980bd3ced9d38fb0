"""One step of whichever resident model's turn it is. The loop calls `step` again and again; so do tests, without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hob.config import SchedulerConfig
from hob.engine.base import Engine
from hob.engine.grammar import Masks
from hob.request import SequenceOutput, ServiceClass
from hob.scheduler.abandon import StepUnderWay
from hob.service.resident import Resident
from hob.service.residents import Residents
from hob.service.step import pump, run_step
from hob.service.turns import Turn

Watch = Callable[["StepUnderWay | None"], None]


class Stepper:
    """Steps models in turn. `stop` may be called from another thread."""

    def __init__(self, residents: Residents, clock: Callable[[], float]) -> None:
        self._residents = residents
        self._clock = clock
        self._engine: Engine | None = None

    def stop(self) -> None:
        """Abandon the running step, if one runs."""
        if (engine := self._engine) is not None:
            engine.stop()

    def step(
        self, watch: Watch = lambda step: None, masks_of: Callable[[str], Masks | None] = lambda model: None
    ) -> list[SequenceOutput] | None:
        """One step of the first model in turn that has something to compute. None: there is none."""
        residents = self._residents
        for resident in residents:
            if resident.swap is not None and not resident.scheduler.has_work:
                pump(resident.engine, resident.scheduler, resident.swap)
        busy = {resident.name: resident for resident in residents if resident.scheduler.has_work}
        if not busy:
            return None
        if len(busy) == 1:  # the usual case
            (resident,) = busy.values()
            return self._step_of(resident, watch, masks_of(resident.name))
        claims = {name: resident.claim() for name, resident in busy.items()}
        is_contended = len({c.service_class is ServiceClass.INTERACTIVE for c in claims.values()}) > 1
        for turn in residents.turns.order(self._clock(), list(claims.values())):
            start = self._clock()
            computed = self._step_of(busy[turn.name], watch, masks_of(turn.name), turn)
            if computed is not None:
                now = self._clock()
                residents.turns.took(claims[turn.name], now - start, now, is_contended=is_contended)
                return computed
        return None

    def _step_of(
        self, resident: Resident, watch: Watch, masks: Masks | None, turn: Turn | None = None
    ) -> list[SequenceOutput] | None:
        scheduler = resident.scheduler
        self._residents.room.provide(resident)
        config = scheduler.config
        if turn is not None:
            scheduler.config = limited(config, turn)
        try:
            self._engine = resident.engine
            return run_step(resident.engine, scheduler, self._clock, resident.swap, watch, masks)
        finally:
            self._engine = None
            scheduler.config = config


def limited(config: SchedulerConfig, turn: Turn) -> SchedulerConfig:
    """The limits of a step where several models take turns. None lends: long gaps would earn others long turns.

    What a less urgent model is owed bounds its step, however long its streams take: it is not stretched beyond.
    """
    if turn.max_step_s is not None:
        max_step_s = min(config.max_step_s, turn.max_step_s)
        return replace(config, max_step_s=max_step_s, urgent_stretch=1.0, lend_every=0)
    return replace(config, urgent_stretch=turn.urgent_stretch or config.urgent_stretch, lend_every=0)
