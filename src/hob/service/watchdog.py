"""Ends the engine process when a step hangs, so that it is replaced: `handle.py` starts another and says why.

A thread of its own looks at the clock; a step runs without the GIL. What Python was doing is written to stderr first.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time

log = logging.getLogger("hob.engine")

HUNG_STATUS = 70
"""Exit status that says so."""
MAX_LOOK_S = 1.0
"""Longest time between two looks."""


class Watchdog:
    """Told when each step begins and ends."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since: float | None = None
        threading.Thread(target=self._look, name="hob-watchdog", daemon=True).start()

    def watch(self, is_running: bool) -> None:
        """A step begins or has ended."""
        self._since = time.monotonic() if is_running else None

    def _look(self) -> None:
        while True:
            time.sleep(min(self._limit_s / 4, MAX_LOOK_S))
            since = self._since
            if since is not None and (elapsed_s := time.monotonic() - since) > self._limit_s:
                log.critical("a step hangs: %.1f s, the limit is %.1f s; the process ends", elapsed_s, self._limit_s)
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                os._exit(HUNG_STATUS)
