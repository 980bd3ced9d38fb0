"""The demo's side of a program: starts the process, reads its JSON lines, keeps the figures."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hob.demo.programs import num_requests
from hob.errors import ServiceError
from hob.rundir import DaemonState

READY_TIMEOUT_S = 60.0
Event = dict[str, Any]


@dataclass
class Figures:
    """What one program saw, from its own clock."""

    num_done: int = 0
    num_total: int = 0
    num_tokens: int = 0
    num_lost: int = 0
    ttfts_s: list[float] = field(default_factory=list)
    finished: list[Event] = field(default_factory=list)
    started_at: float = 0.0
    ended_at: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Since it was told to go, until it was done."""
        return (self.ended_at or time.monotonic()) - self.started_at if self.started_at else 0.0

    @property
    def ttft_s(self) -> float | None:
        """Median time to the first token; for programs that do not stream, to the answer."""
        return statistics.median(self.ttfts_s) if self.ttfts_s else None

    @property
    def tokens_per_s(self) -> float:
        """Generated, over its whole running time."""
        return self.num_tokens / self.elapsed_s if self.elapsed_s else 0.0


class Worker:
    """One of the three programs, running against one daemon."""

    def __init__(
        self, name: str, state: DaemonState, turns: str = "turns", on_event: Callable[[Event], None] | None = None
    ) -> None:
        self.name = name
        self.figures = Figures(num_total=num_requests(name))
        self._on_event = on_event
        self._ready = threading.Event()
        self._done = threading.Event()
        self._errors: list[str] = []
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "hob.demo.programs", name),
                *("--base-url", state.base_url, "--socket", state.socket, "--turns", turns),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._read, self._read_errors)]
        for thread in self._threads:
            thread.start()

    def wait_ready(self) -> None:
        """Until its imports are done. Raises ServiceError if it ends before."""
        if not self._ready.wait(READY_TIMEOUT_S) or (self._done.is_set() and not self.figures.num_done):
            raise self._failure()

    def go(self, line: str = "go") -> None:
        """Start the work."""
        self.figures.started_at = time.monotonic()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""
        return self._done.is_set()

    def join(self, timeout_s: float) -> None:
        """Wait for its end. Raises ServiceError if it failed or takes longer."""
        if not self._done.wait(timeout_s) or self._process.wait() != 0:
            raise self._failure()

    def close(self) -> None:
        """End it if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for thread in self._threads:
            thread.join(5)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event: Event = json.loads(line)
            self._note(event)
            if self._on_event is not None:
                self._on_event(event)
        self.figures.ended_at = self.figures.ended_at or time.monotonic()
        self._ready.set()
        self._done.set()

    def _note(self, event: Event) -> None:
        figures = self.figures
        if event["event"] == "ready":
            self._ready.set()
        elif event["event"] == "request":
            figures.num_done += 1
            figures.num_tokens += event["tokens"]
            figures.ttfts_s.append(event["ttft_s"])
            figures.finished.append(event)
        elif event["event"] == "lost":
            figures.num_lost += 1
        elif event["event"] == "done":
            figures.ended_at = time.monotonic()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._errors += self._process.stderr

    def _failure(self) -> ServiceError:
        self._process.kill()
        status = self._process.wait()
        for thread in self._threads:
            thread.join(2)
        last = self._errors[-1].strip() if self._errors else "it said nothing"
        return ServiceError(f"the demo's program '{self.name}' ended with status {status}: {last}")
