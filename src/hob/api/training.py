"""Trainings of heads: child processes of the daemon, and how far each is.

A child (`python -m hob.tasks.worker`) trains one head and talks to the daemon's socket like any program, as background
work. One training per task at a time; the end of the last one is remembered until the daemon ends. A child whose daemon
has gone finds its socket closed and ends.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, field
from typing import Any

import msgspec

from hob.errors import Conflict, InvalidRequest

MAX_RUNNING = 2
"""Trainings at a time, over all apps: each takes a core for seconds, 110 MB, and what its examples' states take."""
MAX_STATE_BYTES = 1 << 30
"""What these may take in one training. They are in no ledger, so they are bounded."""
VECTORS_PER_EXAMPLE = 50
"""Of the model's width, copies included. Measured: 46."""
_WORKER = "hob.tasks.worker"


def check_size(num_examples: int, hidden_size: int) -> None:
    """Raise InvalidRequest if the states of so many examples are too much."""
    limit = MAX_STATE_BYTES // (4 * VECTORS_PER_EXAMPLE * hidden_size)
    if num_examples > limit:
        raise InvalidRequest(
            f"field 'examples' has {num_examples:,} examples. Expected at most {limit:,} with this model: their states "
            f"take {MAX_STATE_BYTES >> 20:,} MiB then.",
            param="examples",
        )


@dataclass
class Training:
    """One training, running or ended."""

    step: str = "starting"
    done: int = 0
    of: int = 0
    result: dict[str, Any] | None = None
    error: dict[str, str] | None = None

    @property
    def is_running(self) -> bool:
        """Whether its end is still to come."""
        return self.result is None and self.error is None

    def take(self, line: bytes) -> None:
        """One line of the child's."""
        said = msgspec.json.decode(line)
        self.result, self.error = said.get("result"), said.get("error")
        self.step = said.get("step", self.step)
        self.done, self.of = said.get("done", 0), said.get("of", 0)

    def as_object(self) -> dict[str, Any]:
        """As the API shows it."""
        status = "running" if self.is_running else ("failed" if self.error else "done")
        shown = {"status": status, "step": self.step, "done": self.done, "of": self.of}
        return {**shown, "result": self.result, "error": self.error}


@dataclass
class Trainings:
    """Of one daemon, by app and task."""

    _of: dict[tuple[str, str], Training] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def find(self, app: str, task: str) -> Training | None:
        """The last training of a task."""
        return self._of.get((app, task))

    def names(self, app: str) -> set[str]:
        """Tasks of an app that are being trained."""
        return {task for (owner, task), training in self._of.items() if owner == app and training.is_running}

    def forget(self, app: str, task: str) -> None:
        """Drop what is remembered. Raises Conflict while it runs."""
        if task in self.names(app):
            raise Conflict(f"task '{task}' is being trained. Wait for its end: hob task show {task}")
        self._of.pop((app, task), None)

    def start(self, app: str, task: str, job: bytes) -> Training:
        """Begin. job: what the worker reads. Raises Conflict while the task, or too many others, are being trained."""
        self.forget(app, task)
        running = sum(training.is_running for training in self._of.values())
        if running >= MAX_RUNNING:
            raise Conflict(f"{running} trainings run already. Expected fewer than {MAX_RUNNING}: try again soon.")
        training = self._of[app, task] = Training()
        work = asyncio.create_task(_follow(training, job))
        self._tasks.add(work)  # else nobody holds it and it may be collected
        work.add_done_callback(self._tasks.discard)
        return training


async def _follow(training: Training, job: bytes) -> None:
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(sys.executable, "-m", _WORKER, stdin=pipe, stdout=pipe)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(job)
        child.stdin.close()
        async for line in child.stdout:
            training.take(line)
        status = await child.wait()
        if training.is_running:
            training.error = {"name": "InternalError", "message": f"the training process ended with status {status}"}
    except asyncio.CancelledError:
        child.kill()
        raise
