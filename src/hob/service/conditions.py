"""When background work waits: low battery, heat, a machine that is busy with other things. Delayed, never refused.

    /sys/class/power_supply    batteries and mains      /sys/class/thermal    zones      /proc/stat    processors

What a machine does not have cannot make it wait. `root` is replaced by tests.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from hob.service.policy import BackgroundRules

log = logging.getLogger("hob.policy")

POLL_S = 2.0
FRESH_S = 15.0
"""Two looks at the processors further apart than this say nothing about now."""
LEAST_S = 0.2
POSSIBLE_CELSIUS = (1.0, 150.0)
"""Zones outside of this are broken sensors."""


class Conditions:
    """The state of the machine, looked at when background work wants to begin."""

    def __init__(self, rules_of: Callable[[], BackgroundRules], root: Path = Path("/")) -> None:
        self._rules_of = rules_of
        self._root = root
        self._looked: tuple[float, float, float] | None = None
        self._busy_percent = 0.0
        self.waiting_for = ""
        """Why work waits now; empty if none does."""
        self._num_waiting = 0

    async def clear(self, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """Return when background work may begin."""
        if not (reason := self.reason_to_wait()):
            return
        self._num_waiting += 1
        try:
            while reason:
                if reason != self.waiting_for:
                    log.info("background work waits: %s", reason)
                    self.waiting_for = reason
                await sleep(POLL_S)
                reason = self.reason_to_wait()
        finally:
            self._num_waiting -= 1
            if not self._num_waiting:
                self.waiting_for = ""

    def reason_to_wait(self) -> str:
        """In words, with the figures. Empty: none."""
        rules = self._rules_of()
        if rules.battery_percent:
            charge = self._charge_on_battery()
            if charge is not None and charge <= rules.battery_percent:
                return f"on battery at {charge:.0f} % (rule battery_percent {rules.battery_percent:g})"
        if rules.celsius and (heat := max(self._zones(), default=0.0)) > rules.celsius:
            return f"{heat:.0f} degrees Celsius (rule celsius {rules.celsius:g})"
        if rules.busy_percent and (busy := self._others_percent(time.monotonic())) > rules.busy_percent:
            return f"other programs use {busy:.0f} % of the processors (rule busy_percent {rules.busy_percent:g})"
        return ""

    def _charge_on_battery(self) -> float | None:
        """Percent; None on mains or without a battery."""
        charges = []
        for supply in sorted((self._root / "sys/class/power_supply").glob("*")):
            kind = _read(supply / "type")
            if kind in ("Mains", "USB") and _read(supply / "online") == "1":
                return None
            if kind == "Battery" and _read(supply / "scope") != "Device" and _read(supply / "status") == "Discharging":
                charges.append(_number(supply / "capacity"))
        known = [charge for charge in charges if charge is not None]
        return sum(known) / len(known) if known else None

    def _zones(self) -> Iterator[float]:
        for zone in (self._root / "sys/class/thermal").glob("thermal_zone*"):
            millis = _number(zone / "temp")
            if millis is not None and POSSIBLE_CELSIUS[0] < millis / 1000 < POSSIBLE_CELSIUS[1]:
                yield millis / 1000

    def _others_percent(self, now: float) -> float:
        """Share of the processors that is neither idle nor ours, since the last look. The first look finds 0."""
        total, idle = self._processors()
        ours = self._ours()
        if self._looked is not None and now - self._looked[0] < LEAST_S:
            return self._busy_percent
        before, self._looked = self._looked, (now, total - idle - ours, total)
        if before is None or now - before[0] > FRESH_S or total <= before[2]:
            self._busy_percent = 0.0
        else:
            self._busy_percent = max(0.0, 100 * (self._looked[1] - before[1]) / (total - before[2]))
        return self._busy_percent

    def _processors(self) -> tuple[float, float]:
        """All ticks since boot, and idle ones."""
        first = _read(self._root / "proc/stat").partition("\n")[0].split()
        ticks = [float(word) for word in first[1:9]] or [0.0] * 8
        return sum(ticks), sum(ticks[3:5])

    def _ours(self) -> float:
        """Ticks of this process and of its children."""
        total = 0.0
        own = str(os.getpid())
        children = _read(self._root / f"proc/{own}/task/{own}/children").split()
        for pid in (own, *children):
            words = _read(self._root / f"proc/{pid}/stat").rpartition(")")[2].split()
            total += sum(map(float, words[11:13]))
        return total


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(path: Path) -> float | None:
    try:
        return float(_read(path))
    except ValueError:
        return None
