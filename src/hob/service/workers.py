"""Slow jobs beside the loop: loading a model, closing a disk tier. Results come back to the loop's thread.

`is_threaded` off: a job runs when it is submitted, and its result waits for the next `take` (tests under a virtual
clock).
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable

Then = Callable[["Exception | None"], None]
"""Called by `take`, in the loop's thread: None, or what the job raised."""


class Workers:
    """One thread per job; few at a time."""

    def __init__(self, *, is_threaded: bool = True) -> None:
        self._is_threaded = is_threaded
        self._done: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._threads: set[threading.Thread] = set()

    def fileno(self) -> int:
        """Readable when `take` has something to do."""
        return self._wake

    def submit(self, job: Callable[[], None], then: Then) -> None:
        """Run `job` beside the loop and `then` in it."""

        def run() -> None:
            failure: Exception | None = None
            try:
                job()
            except Exception as error:
                failure = error
            self._done.put(lambda: then(failure))
            os.eventfd_write(self._wake, 1)

        if not self._is_threaded:
            run()
            return
        thread = threading.Thread(target=run, name="hob-work", daemon=True)
        self._threads = {t for t in self._threads if t.is_alive()} | {thread}
        thread.start()

    def take(self) -> None:
        """Hand over the results that are there."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while not self._done.empty():
            self._done.get()()

    def close(self) -> None:
        """Wait for the jobs that run."""
        for thread in self._threads:
            thread.join()
        self.take()
        os.close(self._wake)
