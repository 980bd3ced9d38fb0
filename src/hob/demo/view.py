"""What the demo shows while it runs: a live table at a terminal, a plain line now and then otherwise."""

from __future__ import annotations

import contextlib
import time

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from hob.client import Client
from hob.demo.house import House
from hob.demo.worker import Worker
from hob.errors import HobError
from hob.memory import ProcessMemory

ABOUT = {
    "chat": ("openai, TCP", "interactive"),
    "labels": ("hob, Unix", "standard"),
    "summaries": ("openai, TCP", "background"),
}
PLAIN_INTERVAL_S = 2.0


class View:
    """Draws the workers of one or more daemons. Use as a context manager; call it with the memory at hand.

    Fits 80 columns. run, wait: requests the daemon computes and those in its queue.
    """

    def __init__(self, console: Console, houses: list[House], workers: list[Worker]) -> None:
        self._console = console
        self._clients = [Client(house.rundir.socket_path, app="demo", timeout_s=2.0) for house in houses]
        self._workers = workers
        self._plain_due = 0.0
        self._live = Live(console=console, refresh_per_second=8) if console.is_terminal else None
        self._memory: list[ProcessMemory] = []

    def __enter__(self) -> View:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(self._table())
            self._live.stop()
        else:
            self._console.print(self._line(), soft_wrap=True)
        for client in self._clients:
            client.close()

    def __call__(self, memory: list[ProcessMemory]) -> None:
        """Draw the present state."""
        self._memory = memory
        if self._live is not None:
            self._live.update(self._table())
        elif time.monotonic() >= self._plain_due:
            self._plain_due = time.monotonic() + PLAIN_INTERVAL_S
            self._console.print(self._line(), soft_wrap=True)

    def _table(self) -> Table:
        queues = self._queues()
        table = Table(
            caption=f" {_memory_text(self._memory)}", caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for name in ("program", "through", "class"):
            table.add_column(name, no_wrap=True)
        for name in ("done", "run", "wait", "TTFT", "tok/s", "s"):
            table.add_column(name, justify="right", no_wrap=True, min_width=4)
        for worker in self._workers:
            figures = worker.figures
            running, waiting = queues.get(worker.name, (0, 0))
            table.add_row(
                worker.name,
                *ABOUT[worker.name],
                f"{figures.num_done}/{figures.num_total}",
                str(running),
                str(waiting),
                _ms(figures.ttft_s),
                f"{figures.tokens_per_s:.0f}" if figures.num_tokens else "",
                f"{figures.elapsed_s:.1f}",
                style="green" if figures.ended_at else None,
            )
        return table

    def _line(self) -> str:
        parts = []
        for worker in self._workers:
            figures = worker.figures
            speed = f", {figures.tokens_per_s:.0f} tok/s" if figures.num_tokens else ""
            ttft = f" (TTFT {_ms(figures.ttft_s)}{speed})" if figures.ttfts_s else ""
            parts.append(f"{worker.name} {figures.num_done}/{figures.num_total}{ttft}")
        seconds = max(worker.figures.elapsed_s for worker in self._workers)
        return f"  {seconds:4.1f} s  {'  '.join(parts)}  {_memory_text(self._memory)}"

    def _queues(self) -> dict[str, tuple[int, int]]:
        """Program -> requests running and waiting, as the daemons count them."""
        found = {}
        for client in self._clients:
            with contextlib.suppress(HobError):
                for app in client.stats()["stats"]["apps"]:
                    name = app["app"].rpartition("/")[2]
                    found[name] = (app["num_running"], app["num_waiting"])
        return found


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.0f} ms"


def _memory_text(memory: list[ProcessMemory]) -> str:
    """'memory 80 MB PSS = api 50 + engine 30', summed over daemons."""
    total = sum(process.pss_bytes for process in memory)
    roles = sorted({process.role for process in memory})
    parts = []
    for role in roles:
        each = [process.pss_bytes for process in memory if process.role == role]
        parts.append(f"{len(each)} x {role} " * (len(each) > 1) or f"{role} ")
        parts[-1] += f"{sum(each) / 1e6:.0f}"
    return f"memory {total / 1e6:.0f} MB PSS = {' + '.join(parts)}"
