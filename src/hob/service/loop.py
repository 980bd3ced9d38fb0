"""The engine process: read what has come, schedule, step, report; one message per step each way.

    python -m hob.service.loop FD SPEC      FD: its end of a Unix socket pair; SPEC: an EngineSpec as JSON

It knows no text and no HTTP, imports neither, and exits when the other end closes. A step that raises ends the
sequences in it, not the process; a process that dies is replaced by `handle.py` while the API's sockets stay open.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Callable

import msgspec

from hob import logs
from hob.config import EngineConfig, SchedulerConfig
from hob.engine.base import BLOCK_SIZE, Engine
from hob.errors import HobError, InternalError
from hob.kvcache.swap import Swap
from hob.messages import (
    Cancel,
    DropContext,
    Failed,
    ForkContext,
    Ready,
    Report,
    Shutdown,
    Stats,
    Submit,
    Vocabulary,
    encode_frame,
)
from hob.request import FinishReason, OutputError, SequenceOutput
from hob.scheduler.scheduler import Scheduler
from hob.service.compiling import Compiled, Compiling
from hob.service.disk import DiskSpec, open_disk
from hob.service.inbox import Inbox
from hob.service.step import run_step
from hob.service.watchdog import Watchdog

log = logging.getLogger("hob.engine")

STATS_INTERVAL_S = 0.1
STALLED_S = 0.005
"""Longest sleep while there is work that cannot go on yet, such as a sequence whose blocks are being read."""


class EngineSpec(msgspec.Struct):
    """What an engine process is to run."""

    model_name: str
    packed_path: str
    """Packed model file; empty for the fake engine."""
    engine: EngineConfig
    scheduler: SchedulerConfig
    kv_tokens: int
    fake_step_s: float = 0.0
    """Fake engine: seconds of a step beside its rows."""
    fake_vocab_size: int = 1000
    disk: DiskSpec | None = None
    """Where KV of persistent contexts is kept. None: nowhere."""


class Loop:
    """schedule -> step -> postprocess, until told to stop."""

    def __init__(
        self,
        inbox: Inbox,
        engine: Engine,
        scheduler: Scheduler,
        clock: Callable[[], float],
        swap: Swap | None = None,
    ) -> None:
        self._inbox = inbox
        self._engine = engine
        self._scheduler = scheduler
        self._clock = clock
        self._swap = swap
        self._compiling = Compiling()
        self._stats_due = 0.0

    def run(self) -> None:
        """Serve until Shutdown or until the other end closes."""
        is_stalled = False
        while True:
            outputs: list[SequenceOutput] = []
            for message in self._inbox.receive(self._patience(is_stalled), self._swap):
                if isinstance(message, Shutdown):
                    return
                outputs += self._handle(message)
            for compiled in self._compiling.ready():
                outputs += self._admit(compiled)
            masks, watch = self._compiling.masks, self._inbox.watch
            computed = run_step(self._engine, self._scheduler, self._clock, self._swap, watch, masks)
            is_stalled = computed is None
            self._report(outputs + (computed or []))

    def _patience(self, is_stalled: bool) -> float | None:
        """How long to wait for a message. None: until one comes."""
        if self._swap is not None and self._swap.has_copies:
            return 0
        if not self._scheduler.has_work:
            return STALLED_S if self._compiling.is_busy else None
        return STALLED_S if is_stalled else 0

    def _handle(self, message: Submit | Cancel | Vocabulary | ForkContext | DropContext) -> list[SequenceOutput]:
        if isinstance(message, Cancel):
            self._compiling.cancel(message.request_id)
            self._scheduler.cancel(message.request_id, self._clock())
            return []
        if isinstance(message, ForkContext | DropContext):
            self._change_disk(message)
            return []
        if isinstance(message, Vocabulary):
            self._compiling.learn(message)
            return []
        if message.request.grammar is not None:
            self._compiling.begin(message.request)
            return []
        return self._admit(Compiled(message.request, []))

    def _admit(self, compiled: Compiled) -> list[SequenceOutput]:
        try:
            if compiled.error is not None:
                raise compiled.error
            place = self._scheduler.add(compiled.request, self._clock(), compiled.matchers)
        except HobError as error:
            refusal = OutputError(type(error).__name__, error.message, error.retry_after_s, error.param)
            return [SequenceOutput(compiled.request.request_id, finish_reason=FinishReason.ERROR, error=refusal)]
        return [] if place is None else [SequenceOutput(compiled.request.request_id, place=place)]

    def _change_disk(self, message: ForkContext | DropContext) -> None:
        """In the disk tier's own thread, after the turns that ended before."""
        if (swap := self._swap) is None:
            return
        app = message.app
        if isinstance(message, ForkContext):
            parent_id, child_id = message.parent_id, message.child_id
            swap.run(lambda: swap.store.fork(app, parent_id, child_id))
        else:
            context_id = message.context_id
            swap.drop(app, context_id)

    def _stats(self) -> Stats:
        stats = self._scheduler.stats()
        stats.num_alarms = self._scheduler.placement.prefixes.num_alarms
        if (swap := self._swap) is not None:
            stats.num_alarms += swap.store.num_alarms
            stats.num_blocks_written, stats.num_blocks_read = swap.num_written, swap.num_read
            stats.num_write_errors, stats.disk_bytes = swap.num_write_errors, swap.store.num_bytes
        return stats

    def _report(self, outputs: list[SequenceOutput]) -> None:
        now = self._clock()
        is_due = now >= self._stats_due or not self._scheduler.has_work
        if is_due:
            self._stats_due = now + STATS_INTERVAL_S
        if outputs or is_due:
            self._inbox.send(Report(outputs, self._stats() if is_due else None))


def open_engine(spec: EngineSpec) -> Engine:
    """The engine a spec asks for, its pool open."""
    if spec.packed_path:
        from hob.engine.local import LocalEngine

        engine: Engine = LocalEngine(spec.model_name, spec.packed_path, spec.engine, spec.scheduler.max_step_tokens)
    else:
        from hob.engine.fake import CostModel, FakeEngine

        cost = CostModel(step=spec.fake_step_s) if spec.fake_step_s else None
        engine = FakeEngine(vocab_size=spec.fake_vocab_size, cost=cost)
    engine.open_pool(-(-spec.kv_tokens // BLOCK_SIZE))
    return engine


def main(fd: int, spec: EngineSpec) -> None:
    """Body of the process."""
    connection = socket.socket(fileno=fd)
    start = time.monotonic()
    try:
        engine = open_engine(spec)
    except (HobError, ValueError, OSError, MemoryError) as error:
        name = type(error).__name__ if isinstance(error, HobError) else InternalError.__name__
        connection.sendall(encode_frame(Failed(name, str(error))))
        sys.exit(1)
    num_blocks = -(-spec.kv_tokens // BLOCK_SIZE)
    info = engine.info
    disk = open_disk(spec.disk, engine, spec.packed_path) if spec.disk is not None else None
    swap, salt_of = (disk.swap, disk.salt_of) if disk is not None else (None, None)
    scheduler = Scheduler(spec.scheduler, num_blocks, info.context_length, info.vocab_size, swap, salt_of)
    if swap is not None:
        swap.recompute_s = scheduler.cost.prompt_s
    log.info("isa: %s (%s), %d threads", info.isa, info.isa_reason, info.num_threads)
    try:
        gc.freeze()  # what startup made stays: no pass over all of it between two steps
        inbox = Inbox(connection, engine.stop, time.monotonic, Watchdog(spec.engine.watchdog_s))
        inbox.send(Ready(info, num_blocks, BLOCK_SIZE, time.monotonic() - start))
        Loop(inbox, engine, scheduler, time.monotonic, swap).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        log.info("the API process is gone; exiting")
    if swap is not None:
        swap.drain(engine, scheduler.placement.prefixes.find)
        swap.close()
    engine.close()


if __name__ == "__main__":
    logs.set_up(os.environ.get(logs.ENVIRONMENT) == "true", "%(levelname)s %(name)s: %(message)s")
    main(int(sys.argv[1]), msgspec.json.decode(sys.argv[2].encode(), type=EngineSpec))
