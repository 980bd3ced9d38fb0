"""The engine process: read what has come, schedule, step, report; one message per step each way.

    python -m hob.service.loop FD SPEC      FD: its end of a Unix socket pair; SPEC: an EngineSpec as JSON

It knows no text and no HTTP, imports neither, and exits when the other end closes. A step that raises ends the
sequences in it, not the process; a process that dies is replaced by `handle.py` while the API's sockets stay open.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable

import msgspec

from hob import logs
from hob.engine.base import BLOCK_SIZE
from hob.engine.grammar import Masks
from hob.errors import HobError, InternalError
from hob.kvcache.swap import Swap
from hob.messages import (
    Answer,
    AskContexts,
    Cancel,
    ContextKv,
    DropContext,
    Failed,
    ForkContext,
    LoadModel,
    Publish,
    Ready,
    Report,
    SetBudget,
    SetLease,
    Shutdown,
    Stats,
    Submit,
    ToEngine,
    UnloadModel,
    Vocabulary,
)
from hob.request import OutputError, SequenceOutput
from hob.service.compiling import Compiled, Compiling
from hob.service.inbox import Inbox
from hob.service.ledger import Ledger
from hob.service.opening import EngineSpec as EngineSpec
from hob.service.opening import ModelOpener
from hob.service.pressure import PressureMonitor
from hob.service.relief import Relief
from hob.service.residents import ResidencyConfig, Residents
from hob.service.stepping import Stepper
from hob.service.totals import merged, stats_of
from hob.service.watchdog import Watchdog
from hob.service.workers import Workers

log = logging.getLogger("hob.engine")

STATS_INTERVAL_S = 0.1
PATIENCE_S = 0.002
"""Waited for a grammar while there is nothing else to do: most are compiled by then."""
STALLED_S = 0.005
"""Longest sleep while there is work that cannot go on yet, such as a sequence whose blocks are being read."""


class Loop:
    """schedule -> step -> postprocess, until told to stop."""

    def __init__(
        self,
        inbox: Inbox,
        residents: Residents,
        stepper: Stepper,
        workers: Workers,
        relief: Relief,
        clock: Callable[[], float],
    ) -> None:
        self._inbox = inbox
        self._residents = residents
        self._stepper = stepper
        self._workers = workers
        self._relief = relief
        self._clock = clock
        self._compilings: dict[str, Compiling] = {}
        self._stats_due = 0.0

    def run(self) -> None:
        """Serve until Shutdown or until the other end closes."""
        is_stalled = False
        while True:
            outputs: list[SequenceOutput] = []
            for message in self._inbox.receive(self._patience(is_stalled), self._others(), self._relief.triggers):
                if isinstance(message, Shutdown):
                    return
                outputs += self._handle(message)
            patience_s = 0.0 if self._residents.has_work else PATIENCE_S
            for compiling in self._compilings.values():
                for compiled in compiling.ready(patience_s):
                    outputs += self._admit(compiled)
            self._relief.tick(self._clock(), self._inbox.is_alarmed)
            self._residents.tick(self._clock())
            computed = self._stepper.step(self._inbox.watch, self._masks_of)
            is_stalled = computed is None
            self._report(outputs + (computed or []))

    def _others(self) -> list[int]:
        """What else may have something to do."""
        swaps = [resident.swap.fileno() for resident in self._residents if resident.swap is not None]
        return [*swaps, self._workers.fileno()]

    def _patience(self, is_stalled: bool) -> float | None:
        """How long to wait for a message. None: until one comes."""
        residents = self._residents
        if any(resident.swap is not None and resident.swap.has_copies for resident in residents):
            return 0
        if residents.has_work:
            return STALLED_S if is_stalled else 0
        is_compiling = any(compiling.is_busy for compiling in self._compilings.values())
        if is_compiling or residents.is_changing or residents.room.messages or residents.room.outputs:
            return STALLED_S
        now = self._clock()
        due = [s for s in (residents.next_due_s(now), self._relief.next_due_s(now)) if s is not None]
        return min(due, default=None)

    def _handle(self, message: ToEngine) -> list[SequenceOutput]:
        now, residents = self._clock(), self._residents
        if isinstance(message, Submit):
            if message.request.grammar is None:
                return self._admit(Compiled(message.request, []))
            try:
                self._compiling_of(message.request.model).begin(message.request)
            except HobError as error:
                return [SequenceOutput.failed(message.request.request_id, error)]
        elif isinstance(message, Vocabulary):
            self._compiling_of(message.model).learn(message)
        elif isinstance(message, Cancel):
            for compiling in self._compilings.values():
                compiling.cancel(message.request_id)
            residents.cancel(message.request_id, now, message.num_kept)
        elif isinstance(message, Publish):
            residents.publish(message.model, message.prompts)
        elif isinstance(message, ForkContext | DropContext):
            residents.change_disk(lambda swap: change_disk(swap, message))
        elif isinstance(message, LoadModel):
            residents.load(message.call_id, message.spec, now, message.need)
        elif isinstance(message, AskContexts):
            residents.room.messages.append(Answer(message.call_id, contexts=self._context_kv(message)))
        elif isinstance(message, UnloadModel | SetLease | SetBudget):
            residents.room.messages.append(self._answer(message, now))
        return []

    def _compiling_of(self, model: str) -> Compiling:
        return self._compilings.setdefault(model or self._residents.room.default, Compiling())

    def _masks_of(self, model: str) -> Masks | None:
        compiling = self._compilings.get(model)
        return None if compiling is None else compiling.masks

    def _admit(self, compiled: Compiled) -> list[SequenceOutput]:
        try:
            if compiled.error is not None:
                raise compiled.error
            place = self._residents.submit(compiled.request, self._clock(), compiled.matchers)
        except HobError as error:
            return [SequenceOutput.failed(compiled.request.request_id, error)]
        return [] if place is None else [SequenceOutput(compiled.request.request_id, place=place)]

    def _answer(self, message: UnloadModel | SetLease | SetBudget, now: float) -> Answer:
        """Do what is asked for; what it raises is the answer."""
        try:
            if isinstance(message, UnloadModel):
                self._residents.unload(message.name, now)
            elif isinstance(message, SetLease):
                self._residents.set_lease(message.app, message.name, message.lease, now)
            else:
                self._residents.set_budget(message.budget_bytes)
        except HobError as error:
            return Answer(message.call_id, OutputError.of(error))
        return Answer(message.call_id)

    def _context_kv(self, message: AskContexts) -> dict[str, ContextKv]:
        stores = [resident.swap.store for resident in self._residents if resident.swap is not None]
        return {
            context_id: ContextKv(kept.num_bytes, kept.num_blocks)
            for context_id in message.context_ids
            for store in stores
            if (kept := store.kept(message.app, context_id)) is not None
        }

    def _stats(self) -> Stats:
        stats = merged([*self._residents.room.retired, *map(stats_of, self._residents)])
        stats.memory = self._residents.stats(self._clock())
        return stats

    def _report(self, outputs: list[SequenceOutput]) -> None:
        now, room = self._clock(), self._residents.room
        for message in room.messages:
            self._inbox.send(message)
        outputs = outputs + room.outputs
        is_due = now >= self._stats_due or not self._residents.has_work or bool(room.messages)
        room.messages, room.outputs = [], []
        if is_due:
            self._stats_due = now + STATS_INTERVAL_S
        if outputs or is_due:
            self._inbox.send(Report(outputs, self._stats() if is_due else None))


def change_disk(swap: Swap, message: ForkContext | DropContext) -> None:
    """Copy or drop a context's references, in the disk tier's own thread, after the turns that ended before."""
    app = message.app
    if isinstance(message, ForkContext):
        parent_id, child_id = message.parent_id, message.child_id
        swap.run(lambda: swap.store.fork(app, parent_id, child_id))
    else:
        swap.drop(app, message.context_id)


def main(fd: int, spec: EngineSpec) -> None:
    """Body of the process."""
    connection, start = socket.socket(fileno=fd), time.monotonic()
    workers = Workers()
    limits = ResidencyConfig(
        spec.keep_alive_s,
        spec.max_keep_alive_s,
        spec.max_pinned_share,
        kv_tokens=spec.kv_tokens,
        max_waiting=spec.scheduler.max_waiting,
    )
    residents = Residents(
        Ledger(spec.budget_bytes), ModelOpener(spec), workers, spec.model_name, limits, spec.scheduler
    )
    stepper = Stepper(residents, time.monotonic)
    inbox = Inbox(connection, stepper.stop, time.monotonic, Watchdog(spec.engine.watchdog_s))
    for other in spec.others:
        residents.know(other)
    try:
        resident = residents.load_now(spec.default, start)
    except (HobError, ValueError, OSError, MemoryError) as error:
        name = type(error).__name__ if isinstance(error, HobError) else InternalError.__name__
        inbox.send(Failed(name, str(error)))
        sys.exit(1)
    residents.restore(spec.leases, time.monotonic())
    try:
        info = residents.room.info_of(resident)
        inbox.send(Ready(info, resident.pool.max_blocks, BLOCK_SIZE, time.monotonic() - start))
        relief = Relief(residents.room, PressureMonitor())
        Loop(inbox, residents, stepper, workers, relief, time.monotonic).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        log.info("the API process is gone; exiting")
    residents.close()


if __name__ == "__main__":
    logs.set_up(os.environ.get(logs.ENVIRONMENT) == "true", "%(levelname)s %(name)s: %(message)s")
    main(int(sys.argv[1]), msgspec.json.decode(sys.argv[2].encode(), type=EngineSpec))
