"""Random sessions of several apps over one engine: turns, forks, deletions, cancellations, evictions, deaths.

Apps share their prompts on purpose, so that a block given to the wrong app or the wrong place is likely and matters.
Every reply is held against an oracle that knows no blocks. The engine attends to every slot of a sequence, as a real
model does; one wrong block anywhere changes the reply.
"""

from __future__ import annotations

import contextlib
import os
import queue
import random
import select
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hob.config import SchedulerConfig
from hob.engine.base import BLOCK_SIZE, Batch, Out
from hob.engine.fake import CostModel, FakeClock, FakeEngine, _mix
from hob.kvcache.keys import KeyRing
from hob.kvcache.store import BlockStore
from hob.kvcache.swap import Swap
from hob.request import FinishReason, Request, SamplingParams, ServiceClass
from hob.scheduler.scheduler import Scheduler
from hob.service.step import run_step

VOCAB = 1000
APPS = ("a", "b", "c")
NUM_BLOCKS = 48
DISK_SLOTS = 150
MAX_TOKENS = 480
PROMPTS = [random.Random(1000 + i).choices(range(VOCAB), k=96) for i in range(4)]
_WEIGHTS = np.random.default_rng(7).integers(1, 1 << 62, 1 << 13).astype(np.uint64) * np.uint64(2) + np.uint64(1)


def attend(slots: NDArray[np.uint64]) -> int:
    """A digest of all slots of a sequence, (n,), each weighted by its place."""
    return _mix(int((slots * _WEIGHTS[: len(slots)]).sum()), 0)


class AttentiveEngine(FakeEngine):
    """The fake engine, whose outputs depend on every slot rather than the last."""

    def _row(self, table: list[int], batch: Batch, r: int, adapter: int) -> None:
        super()._row(table, batch, r, adapter)
        if batch.out[r] == Out.LOGITS:
            index = np.arange(int(batch.index[r]) + 1)
            places = np.array(table)[index // BLOCK_SIZE] * BLOCK_SIZE + index % BLOCK_SIZE
            self._logits[-1] = attend(self._slots[places])


def oracle(token_ids: list[int], num_tokens: int) -> list[int]:
    """The reply of a solo run."""
    slots, reply = [], list[int]()
    for token in token_ids:
        slots.append(_mix(slots[-1] if slots else 0, token))
    while len(reply) < num_tokens:
        reply.append(attend(np.array(slots, np.uint64)) % VOCAB)
        slots.append(_mix(slots[-1], reply[-1]))
    return reply


@dataclass
class Session:
    """A context as its app knows it."""

    context_id: str
    app: str
    history: list[int]
    num_turns: int = 0


class Killed(BaseException):
    """The process ends here: nothing after this happens, no cleaning up either."""


@dataclass
class Tally:
    """What a run did."""

    num_rounds: int = 0
    num_wrong: int = 0
    num_cancelled: int = 0
    num_stopped: int = 0
    """Turns that ended where a stop string would have."""
    num_forks: int = 0
    num_deleted: int = 0
    num_restarts: int = 0
    num_kills: int = 0
    """Of the restarts, those by kill -9."""
    num_half_written: int = 0
    """Of these, those in the middle of a write."""
    num_blocks_read: int = 0
    num_blocks_written: int = 0
    num_preemptions: int = 0
    num_evictions: int = 0
    """Contexts whose blocks on disk were given up for others'."""
    num_alarms: int = 0
    wrong: list[str] = field(default_factory=list)


class Sessions:
    """Runs rounds. A round is one turn of one context; several are in flight at a time."""

    def __init__(self, folder: Path, seed: int, is_threaded: bool = False, restarts: float = 0.003) -> None:
        """restarts: how likely each act is one."""
        self.rng = random.Random(seed)
        self.tally = Tally()
        self.sessions: dict[str, Session] = {}
        self.in_flight: dict[str, tuple[Session, list[int], int, list[int]]] = {}
        self._folder, self._is_threaded, self._restarts = folder / "kv", is_threaded, restarts
        self._num_ids = 0
        self._is_dying = False
        self._keys = KeyRing(folder / "keys", {})
        self.open()

    def open(self) -> None:
        """Start an engine process, so to speak."""
        self.clock = FakeClock()
        self.engine = AttentiveEngine(cost=CostModel(), sleep=self.clock.sleep, vocab_size=VOCAB)
        self.engine.open_pool(NUM_BLOCKS)
        slot_bytes = 4096
        max_bytes = DISK_SLOTS * slot_bytes
        store = BlockStore(self._folder, "fake", self.engine.block_bytes, self._keys, max_bytes, self._pwritev)
        store.reconcile({s.context_id: (s.app, None) for s in self.sessions.values()})
        self.swap = Swap(store, is_threaded=self._is_threaded)
        config = SchedulerConfig(max_running=8, max_step_tokens=self.rng.choice([32, 128, 512]))
        self.scheduler = Scheduler(config, NUM_BLOCKS, 8192, VOCAB, self.swap, self._keys.salt)
        self.prefixes = self.scheduler.placement.prefixes

    def shut(self, is_polite: bool) -> None:
        """End it, with everything in flight; impolitely as kill -9 does."""
        if is_polite:
            self.in_flight.clear()
            self.swap.drain(self.engine, self.prefixes.find)
        else:
            self._kill()
        self.tally = self.so_far
        self.swap.close()

    @property
    def so_far(self) -> Tally:
        """The tally, with what the present engine process has done."""
        tally, swap, placement = self.tally, self.swap, self.scheduler.placement
        return replace(
            tally,
            num_blocks_read=tally.num_blocks_read + swap.num_read,
            num_blocks_written=tally.num_blocks_written + swap.num_written,
            num_preemptions=tally.num_preemptions + placement.num_preemptions,
            num_evictions=tally.num_evictions + swap.store.num_evicted,
            num_alarms=tally.num_alarms + self.prefixes.num_alarms + swap.store.num_alarms,
        )

    def _kill(self) -> None:
        """Let a turn end, then lose what is queued to be written, and stop in the middle of the next write.

        The folder as it is at that moment is what the next process finds: its log not copied into the index, slots
        that no row names, holes that are not punched.
        """
        while self.in_flight and not self.swap.has_turns:
            self.step()
        self.in_flight.clear()
        self.tally.num_kills += 1
        swap, writer, idle = self.swap, self.swap._writer, threading.Event()
        with contextlib.suppress(queue.Empty):
            while True:
                swap._jobs.get_nowait()
        swap.run(idle.set)
        idle.wait()
        swap._writer, self._is_dying = None, True  # from now on it writes here
        try:
            swap.drain(self.engine, self.prefixes.find)
        except Killed:
            self.tally.num_half_written += 1
        swap._writer, self._is_dying = writer, False
        self._folder = Path(shutil.copytree(self._folder, self._folder.with_name(f"kv{self.tally.num_kills}")))

    def _pwritev(self, fd: int, parts: Sequence[bytes | memoryview], offset: int) -> int:
        """os.pwritev, of which the dying process does a part."""
        if not self._is_dying:
            return os.pwritev(fd, parts, offset)
        data = b"".join(parts)
        os.pwrite(fd, data[: self.rng.randrange(len(data) + 1)], offset)
        raise Killed

    def run(self, num_rounds: int, is_enough: Callable[[Tally], bool] = lambda tally: True) -> Tally:
        """Play, and go on until enough has happened: with threads, what does depends on the machine."""
        while self.tally.num_rounds < num_rounds or not is_enough(self.so_far):
            assert self.tally.num_rounds < 20 * num_rounds, f"not enough has happened: {self.so_far}"
            self._act()
            for _ in range(self.rng.randrange(1, 5)):
                self.step()
        while self.scheduler.has_work:
            self.step()
        self.shut(is_polite=True)
        return self.tally

    def step(self) -> None:
        """One step of the loop."""
        outputs = run_step(self.engine, self.scheduler, self.clock, self.swap)
        if outputs is None and self._is_threaded and self.scheduler.has_work:
            select.select([self.swap], [], [], 1)
        for output in outputs or []:
            if output.request_id not in self.in_flight:
                continue
            session, prompt, num_tokens, got = self.in_flight[output.request_id]
            got += output.token_ids
            if output.finish_reason is FinishReason.LENGTH:
                del self.in_flight[output.request_id]
                self._judge(session, prompt, num_tokens, got)
            elif output.finish_reason is not None:
                raise AssertionError(f"a turn ended with {output.finish_reason}: {output.error}")
        self.scheduler.check()

    def begin(self, session: Session, new: list[int], num_tokens: int) -> None:
        """Start a turn."""
        self._num_ids += 1
        name = f"r{self._num_ids}"
        prompt = session.history + new
        request = Request(
            name,
            session.app,
            prompt,
            sampling=SamplingParams(max_tokens=num_tokens, temperature=0.0),
            service_class=self.rng.choice(list(ServiceClass)),
            context_id=session.context_id,
        )
        self.scheduler.add(request, self.clock())
        self.in_flight[name] = (session, prompt, num_tokens, [])

    def create(self, app: str | None = None) -> Session:
        """A new context; its first tokens are another app's too."""
        self._num_ids += 1
        prompt = self.rng.choice(PROMPTS)[: self.rng.choice([16, 48, 96])]
        session = Session(f"c{self._num_ids}", app or self.rng.choice(APPS), list(prompt))
        self.sessions[session.context_id] = session
        return session

    def _judge(self, session: Session, prompt: list[int], num_tokens: int, got: list[int]) -> None:
        self.tally.num_rounds += 1
        session.num_turns += 1
        if got != oracle(prompt, num_tokens):
            self.tally.num_wrong += 1
            self.tally.wrong.append(f"{session.context_id} of app {session.app}, {len(prompt)} tokens")
        session.history[:] = prompt + got

    def _act(self) -> None:
        busy = {session.context_id for session, *_ in self.in_flight.values()}
        idle = [session for session in self.sessions.values() if session.context_id not in busy]
        dice = self.rng.random()
        if self.rng.random() < self._restarts:
            self.tally.num_restarts += 1
            self.shut(is_polite=self.rng.random() < 0.5)
            self.open()
        elif dice < 0.04 and self.in_flight:
            self._cancel(self.rng.choice(list(self.in_flight)))
        elif idle and (dice < 0.1 or len(self.sessions) > 24):
            self._delete(self.rng.choice(idle))
        elif idle and dice < 0.2:
            self._fork(self.rng.choice(idle))
        elif len(self.in_flight) < 6:
            session = self.rng.choice(idle) if idle and self.rng.random() < 0.8 else self.create()
            new = self.rng.choices(range(VOCAB), k=self.rng.randrange(1, 40))
            self.begin(session, new, self.rng.randrange(1, 24))
            if len(session.history) > MAX_TOKENS:
                self.sessions.pop(session.context_id, None)
                self.swap.drop(session.app, session.context_id)

    def _cancel(self, name: str) -> None:
        """A turn is given up, or ends where a stop string would."""
        session, prompt, _, got = self.in_flight.pop(name)
        if got and self.rng.random() < 0.5:
            self.tally.num_stopped += 1
            self.scheduler.cancel(name, self.clock(), num_kept=len(prompt) + len(got))
            self._judge(session, prompt, len(got), got)
        else:
            self.tally.num_cancelled += 1
            self.scheduler.cancel(name, self.clock())

    def _delete(self, session: Session) -> None:
        self.tally.num_deleted += 1
        del self.sessions[session.context_id]
        self.swap.drop(session.app, session.context_id)

    def _fork(self, parent: Session) -> None:
        self.tally.num_forks += 1
        self._num_ids += 1
        child = Session(f"c{self._num_ids}", parent.app, list(parent.history))
        self.sessions[child.context_id] = child
        self.swap.run(lambda: self.swap.store.fork(parent.app, parent.context_id, child.context_id))
