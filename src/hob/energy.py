"""What the processor has used, as its own counters say (RAPL through Linux's powercap), where they may be read.

Most systems let only root read them, virtual machines have none: then there is no meter, and no figure is made up.
"""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class Meter:
    """Joules of all processor packages since it was opened. The counters run over every few hours at most loads."""

    def __init__(self, zones: list[Path]) -> None:
        self._zones = {zone: _read(zone, "energy_uj") for zone in zones}
        self._ranges = {zone: _read(zone, "max_energy_range_uj") for zone in zones}
        self._total_uj = 0

    def joules(self) -> float:
        """Read now. Must be called more often than a counter runs over."""
        for zone, before in self._zones.items():
            now = _read(zone, "energy_uj")
            self._total_uj += now - before if now >= before else now + self._ranges[zone] - before
            self._zones[zone] = now
        return self._total_uj / 1e6


def open_meter(root: Path = POWERCAP) -> Meter | None:
    """A meter over the packages, None where there are none or they may not be read."""
    zones = sorted(zone for zone in root.glob("intel-rapl:*") if zone.name.count(":") == 1)
    try:
        return Meter(zones) if zones else None
    except (OSError, ValueError):
        return None


def _read(zone: Path, name: str) -> int:
    return int((zone / name).read_text())
