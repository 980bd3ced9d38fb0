"""What machine a benchmark ran on: name, cores, measured peaks, and how much of the CPU others took meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def describe() -> dict[str, Any]:
    """CPU model, usable cores, memory in GB, kernel."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": names[0].partition(":")[2].strip() if names else os.uname().machine,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "kernel": os.uname().release,
    }


def peak() -> dict[str, float]:
    """Measured: int8 and float32 multiply-adds per second on all cores (10^9), DRAM read (GB/s)."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        command = ["g++", "-O3", "-march=native", "-std=c++20", "-pthread", str(HERE / "peak.cpp"), "-o", str(program)]
        subprocess.run(command, check=True)
        return dict(json.loads(subprocess.run([program], check=True, capture_output=True).stdout))


@dataclass(frozen=True)
class CpuTimes:
    """Totals of /proc/stat in ticks."""

    total: int
    steal: int

    @staticmethod
    def now() -> CpuTimes:
        """Read them."""
        fields = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        return CpuTimes(sum(fields[:8]), fields[7])

    def steal_share_since(self) -> float:
        """Share of CPU time the host gave to others since then, 0 to 1."""
        now = CpuTimes.now()
        return (now.steal - self.steal) / max(now.total - self.total, 1)
