"""Run the three programs once and take down time and memory: against one daemon, or against one each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from hob.client import Client
from hob.demo.house import House
from hob.demo.worker import Figures, Worker
from hob.memory import ProcessMemory

PROGRAMS = ("chat", "labels", "summaries")
SAMPLE_INTERVAL_S = 0.25
LIMIT_S = 300.0


@dataclass
class Run:
    """What the three programs took together."""

    name: str
    seconds: float = 0.0
    """From the common start until the last one was done."""
    engine_bytes: int = 0
    """Peak PSS of the engine processes alone: weights, KV, scratch."""
    total_bytes: int = 0
    """Peak PSS of all processes of the daemons."""
    figures: dict[str, Figures] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """Without the texts."""
        kept = ("num_done", "num_tokens", "elapsed_s", "ttft_s", "tokens_per_s")
        programs = {name: {key: getattr(f, key) for key in kept} for name, f in self.figures.items()}
        return {**{key: value for key, value in asdict(self).items() if key != "figures"}, "programs": programs}


def run_programs(
    name: str, houses: list[House], watch: Callable[[list[Worker]], Callable[[list[ProcessMemory]], None]]
) -> Run:
    """Let chat, labels and summaries run at once. houses: one for all, or one for each.

    `watch(workers)` gives a function that is called with the memory of all processes some times a second.
    """
    result = Run(name)
    each = houses * len(PROGRAMS) if len(houses) == 1 else houses
    workers = [Worker(program, house.state) for program, house in zip(PROGRAMS, each, strict=True)]
    try:
        for worker in workers:
            worker.wait_ready()
        for house in houses:
            _warm(house)
        look = watch(workers)
        start = time.monotonic()
        for worker in workers:
            worker.go()
        while not all(worker.is_done for worker in workers) and time.monotonic() - start < LIMIT_S:
            memory = [process for house in houses for process in house.memory()]
            _keep_peak(result, memory)
            look(memory)
            time.sleep(SAMPLE_INTERVAL_S)
        for worker in workers:
            worker.join(1.0)
            result.figures[worker.name] = worker.figures
        result.seconds = max(worker.figures.ended_at or 0.0 for worker in workers) - start
    finally:
        for worker in workers:
            worker.close()
    return result


def _warm(house: House) -> None:
    """One short answer, so that no run pays for first touches: the programs' own work starts cold."""
    with Client(house.rundir.socket_path, app="demo") as client:
        client.chat("Hello", max_tokens=16)


def _keep_peak(result: Run, memory: list[ProcessMemory]) -> None:
    result.total_bytes = max(result.total_bytes, sum(process.pss_bytes for process in memory))
    engines = sum(process.pss_bytes for process in memory if process.role == "engine")
    result.engine_bytes = max(result.engine_bytes, engines)
