"""What the service costs on top of its engine: start, memory, speed through the socket.

python benchmarks/service.py --model smollm2-135m [--json]

startup_s            from `hob serve` (packed file there) to the first token of a first request
pss_mb               both processes, model resident, after 4 requests of 1,024 tokens of KV each
decode_N             tokens per second over N sequences: in process, and streamed over the Unix socket
socket_share_N       the second over the first, in turn in one run, median of rounds
api_cpu_us_per_token CPU time of the API process per streamed token at 16 streams
one_process_N        the same as decode_socket_N with the engine's loop in a thread of the daemon (--one-process)
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import command
import machine
from engine import Figure, Worker
from lean_client import stream_completion
from workers.protocol import prompt

WORKERS = Path(__file__).parent / "workers"
NO_STOP = {"0": -100, "1": -100, "2": -100}
NUM_IN, NUM_OUT = 64, 96


async def complete(socket_path: str, token_ids: list[int], max_tokens: int) -> list[float]:
    """Stream one greedy completion over the Unix socket; the time of each token."""
    body = {"model": "", "prompt": token_ids, "max_tokens": max_tokens, "stream": True, "temperature": 0}
    times: list[float] = []

    def note(count: int, now: float) -> None:
        times.extend([now] * count)

    await stream_completion(socket_path, body | {"logit_bias": NO_STOP}, {"X-Hob-App": "bench"}, note)
    return times


def cpu_s(pid: int) -> float:
    """User and system seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pss_mb(pid: int) -> float:
    """Proportional set size in MB (10^6 bytes)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit(f"no Pss in /proc/{pid}/smaps_rollup")


class Daemon:
    """`hob serve` with a socket of its own. Speculation puts several tokens into one event: off where those count."""

    def __init__(
        self, model: str, program: tuple[str, ...] = ("-m", "hob.cli.main", "serve"), speculation: str = "off"
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.socket = f"{self._folder.name}/hob.sock"
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, *program, "--model", model, "--port", "0", "--socket", self.socket],
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HOB_SPECULATION": speculation},
        )
        atexit.register(self._process.kill)  # whatever happens, it does not outlive us

    async def first_token_s(self) -> float:
        """Seconds from start to the first token."""
        while not Path(self.socket).exists():
            if self._process.poll() is not None:
                raise SystemExit(f"hob serve ended with status {self._process.returncode}")
            await asyncio.sleep(0.005)
        while True:
            try:
                times = await complete(self.socket, prompt(8, 49152), 1)
                return times[0] - self.started
            except ConnectionRefusedError:
                await asyncio.sleep(0.005)

    @property
    def pids(self) -> list[int]:
        """The API process and its children."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return [self._process.pid, *map(int, children)]

    def close(self) -> None:
        """Stop it."""
        self._process.terminate()
        self._process.wait(20)
        self._folder.cleanup()


async def decode_speed(socket: str, num_sequences: int, seed: int) -> float:
    """Tokens per second over all streams, from when the last one has its first token to when the first one ends."""
    prompts = [prompt(NUM_IN, 49152, seed * 100 + i) for i in range(num_sequences)]
    streams = await asyncio.gather(*(complete(socket, p, NUM_OUT) for p in prompts))
    begin, end = max(s[0] for s in streams), min(s[-1] for s in streams)
    return sum(sum(begin < t <= end for t in s) for s in streams) / (end - begin)


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    before = machine.CpuTimes.now()
    starts = []
    for _ in range(args.rounds):
        daemon = Daemon(args.model)
        starts.append(await daemon.first_token_s())
        daemon.close()
    daemon = Daemon(args.model)
    await daemon.first_token_s()
    await asyncio.gather(*(complete(daemon.socket, prompt(960, 49152, i), 64) for i in range(4)))
    pss = [pss_mb(pid) for pid in daemon.pids]
    one = Daemon(args.model, (str(Path(__file__).parent / "one_process.py"),)) if args.one_process else None
    if one is not None:
        await one.first_token_s()
    worker = Worker("in process", [sys.executable, str(WORKERS / "run_ours.py"), args.gguf])
    places = ("process", "socket", *(["one_process"] if one else []))
    speeds: dict[str, list[float]] = {f"{where}_{n}": [] for n in (1, 16) for where in places}
    cpu_us = []
    for round_index in range(args.rounds):
        for n in (1, 16):
            figure = Figure("", "decode", n, NUM_IN + NUM_OUT // 2)
            speeds[f"process_{n}"].append(worker.measure(figure))
            cpu_before = cpu_s(daemon.pids[0])
            speeds[f"socket_{n}"].append(await decode_speed(daemon.socket, n, round_index))
            if one is not None:
                speeds[f"one_process_{n}"].append(await decode_speed(one.socket, n, round_index))
            if n == 16:
                cpu_us.append((cpu_s(daemon.pids[0]) - cpu_before) / (n * NUM_OUT) * 1e6)
    worker.close()
    daemon.close()
    if one is not None:
        one.close()
    medians = {key: statistics.median(values) for key, values in speeds.items()}
    return {
        "startup_s": round(statistics.median(starts), 2),
        "pss_mb": round(sum(pss), 1),
        "pss_mb_each": [round(value, 1) for value in pss],
        **{f"decode_{key}": round(value, 1) for key, value in medians.items()},
        **{f"socket_share_{n}": round(medians[f"socket_{n}"] / medians[f"process_{n}"], 3) for n in (1, 16)},
        "api_cpu_us_per_token": round(statistics.median(cpu_us), 1),
        "steal": round(before.steal_share_since(), 4),
        "machine": machine.describe(),
    }


def show(result: dict[str, Any]) -> None:
    """For people."""
    table = Table(title=f"{result['machine']['cpu']}, {result['machine']['cores']} cores")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for key, value in result.items():
        if key != "machine":
            table.add_row(key, str(value))
    Console().print(table)


def main() -> None:
    """Parse, run, print."""
    parser = command.parser_of(__doc__)
    parser.add_argument("--gguf", required=True, help="the same model's GGUF file, for the engine in process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one-process", action="store_true", help="also with engine and API in one process")
    command.execute(parser, run, show)


if __name__ == "__main__":
    main()
