"""What is done about memory pressure, and when: caches first, then contexts to disk, then idle models.

    none --some--> stage 1 --still--> stage 2 --still--> stage 3        high: a stage deeper at once
      ^-------------- quiet for QUIET_S: KV may grow ahead of need again

One stage per look, a second apart, so that each has time to show. Requests in flight are never ended.
"""

from __future__ import annotations

import logging
import select

from hob.service.pressure import PressureMonitor, Reading
from hob.service.room import Room

log = logging.getLogger("hob.engine")

BUSY_LOOK_S = 1.0
"""Between two looks while there is pressure or work."""
IDLE_LOOK_S = 5.0
"""Between two looks while nothing happens and no trigger would wake us."""
QUIET_S = 10.0
MAX_STAGE = 3


class Relief:
    """Looks at the system now and then. Time is passed in."""

    def __init__(self, room: Room, monitor: PressureMonitor) -> None:
        self._room = room
        self._monitor = monitor
        self._trigger_fd = monitor.arm()
        self._poll = select.poll()
        if self._trigger_fd is not None:
            self._poll.register(self._trigger_fd, select.POLLPRI)
        self._due_s = 0.0
        self._quiet_since = 0.0
        self.stage = 0

    @property
    def triggers(self) -> list[int]:
        """What wakes us when tasks begin to wait for memory: exceptional conditions of these files."""
        return [] if self._trigger_fd is None else [self._trigger_fd]

    def tick(self, now: float, is_alarmed: bool = False) -> None:
        """Look, if it is time or the trigger fires, and act. is_alarmed: it fired while the loop slept."""
        is_triggered = is_alarmed or bool(self._poll.poll(0))
        if now < self._due_s and not is_triggered:
            return
        self._due_s = now + BUSY_LOOK_S
        reading = self._monitor.read()
        if is_triggered and reading.level == "none":
            reading = Reading("some", "the pressure trigger fired")
        if reading.level == "none":
            if self.stage and now - self._quiet_since >= QUIET_S:
                log.info("memory pressure is over")
                self.stage, self._room.pressure = 0, "none"
            return
        self._quiet_since = now
        self._room.pressure = reading.level
        self.stage = min(max(self.stage + 1, 2 if reading.level == "high" else 1), MAX_STAGE)
        freed = self._room.relieve(self.stage)
        log.warning("memory pressure, stage %d: %s; %d bytes given back", self.stage, reading.why, freed)

    def next_due_s(self, now: float) -> float | None:
        """Seconds until the next look while nothing else happens. None: the trigger will wake us."""
        if self.stage:
            return max(self._due_s - now, 0.0)
        if self._trigger_fd is None or self._monitor.has_limit:
            return max(self._due_s - now, 0.0) + IDLE_LOOK_S - BUSY_LOOK_S
        return None
