"""The demo from beginning to end: start, share, compare, kill, join. Prints as it goes and returns every figure.

    1 start      a daemon of its own, in a temporary folder, with the models of the user
    2 share      chat, labels and summaries at once on the one model
    3 compare    the same work by three private copies: one model file for all, then a file each
    4 kill       kill -9 in the middle of an answer, restart, the chat goes on
    5 join       three lines for one's own client

When it ends, nothing of the demo runs any more.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from hob.assembly import Chosen, choose_model
from hob.config import Config
from hob.demo import report
from hob.demo.house import House
from hob.demo.measure import PROGRAMS, Run, run_programs
from hob.demo.programs import load
from hob.demo.view import View
from hob.demo.worker import Event, Worker
from hob.errors import ServiceError, UserError
from hob.memory import is_running

KILL_AFTER_TOKENS = 8
CHAT_TIMEOUT_S = 120.0
ORPHAN_TIMEOUT_S = 10.0


def run_demo(config: Config, console: Console) -> dict[str, Any]:
    """All five parts; returns the figures. Raises UserError without `openai`, ServiceError if a part fails."""
    _check_openai()
    for number in (signal.SIGTERM, signal.SIGHUP):  # a closed terminal too must leave no daemon behind
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    start = time.monotonic()
    console.print(f"[bold]hob demo[/]: one small model, many programs, {len(os.sched_getaffinity(0))} cores")
    with TemporaryDirectory(prefix="hob-demo-") as folder, ExitStack() as stack:
        story = Story(choose_model(config), config, Path(folder), console, stack)
        house = story.start()
        shared = story.share(house)
        mapped = story.copies("3 copies, one file", own_files=False)
        owned = story.copies("3 copies, a file each", own_files=True)
        recovery = story.kill(house, shared)
    runs = [shared, mapped, owned]
    report.print_summary(console, runs, recovery)
    report.print_join(console, config)
    return {
        "model": config.engine.model,
        "cores": len(os.sched_getaffinity(0)),
        "runs": [run.as_json() for run in runs],
        "recovery": recovery,
        "seconds": time.monotonic() - start,
    }


class Story:
    """The parts, in a folder that goes away afterwards. `stack` stops what they leave running."""

    def __init__(self, chosen: Chosen, config: Config, folder: Path, console: Console, stack: ExitStack) -> None:
        self._chosen = chosen
        self._model = str(chosen.gguf or config.engine.model)
        self._folder = folder
        self._console = console
        self._stack = stack

    def start(self) -> House:
        """1. A daemon."""
        report.print_title(self._console, 1, f"A daemon starts and loads {self._chosen.name}, once")
        house = self._house("shared", self._model)
        seconds = house.start().wait()
        state = house.state
        self._console.print(f"  ready after {seconds:.2f} s, pid {state.pid}\n  {state.base_url}\n  {state.socket}")
        return house

    def share(self, house: House) -> Run:
        """2. Three programs on one model."""
        report.print_title(self._console, 2, "Three programs use it at once")
        run = self._run("one daemon, shared", [house])
        report.print_answers(self._console, run)
        return run

    def copies(self, name: str, own_files: bool) -> Run:
        """3. The same work by private copies. The shared daemon rests meanwhile and is not counted."""
        if own_files:
            report.print_round(self._console, "and with a model file each")
        else:
            report.print_title(self._console, 3, "The same work by three private copies, which map one model file")
        houses = []
        for program in PROGRAMS:
            home = f"{'own' if own_files else 'map'}-{program}"
            model = self._copy_model(self._folder / home) if own_files else self._model
            houses.append(self._house(home, model, weights="copy" if own_files else "map").start())
        self._console.print("  three daemons start")
        for house in houses:
            house.wait()
        run = self._run(name, houses)
        for house in houses:
            house.stop()
        return run

    def kill(self, house: House, shared: Run) -> dict[str, float]:
        """4. kill -9 in the middle of an answer; the program notices, waits, asks again."""
        report.print_title(self._console, 4, "kill -9 in the middle of an answer")
        printer = report.ChatPrinter(self._console)
        num_tokens, killed_at, back_at = 0, 0.0, 0.0
        is_time, is_back = threading.Event(), threading.Event()

        def on_event(event: Event) -> None:
            nonlocal num_tokens, back_at
            printer.show(event)
            num_tokens += event["event"] == "token"
            if num_tokens >= KILL_AFTER_TOKENS:
                is_time.set()
            if worker.figures.num_lost and event["event"] == "token" and not is_back.is_set():
                back_at = time.monotonic()
                is_back.set()

        worker = Worker("chat", house.state, turns="after", on_event=on_event)
        try:
            worker.wait_ready()
            worker.go(json.dumps(_conversation(shared)))
            if not is_time.wait(CHAT_TIMEOUT_S):
                raise ServiceError(f"the chat got {num_tokens} tokens in {CHAT_TIMEOUT_S:.0f} s")
            engines = [process.pid for process in house.memory() if process.role == "engine"]
            printer.note(f"[red]kill -9 {house.state.pid}[/], and a new daemon is started")
            killed_at = time.monotonic()
            house.kill()
            house.start().wait()
            printer.note(f"[green]pid {house.state.pid} answers after {time.monotonic() - killed_at:.2f} s[/]")
            worker.join(CHAT_TIMEOUT_S)
        finally:
            worker.close()
        for pid in engines:
            _wait_gone(pid)
        return {"first_token_s": back_at - killed_at, "num_lost": worker.figures.num_lost}

    def _run(self, name: str, houses: list[House]) -> Run:
        with ExitStack() as stack:

            def watch(workers: list[Worker]) -> View:
                return stack.enter_context(View(self._console, houses, workers))

            return run_programs(name, houses, watch)

    def _house(self, name: str, model: str, **settings: str) -> House:
        house = House(self._folder / name, model, **settings)
        self._stack.callback(house.stop)
        return house

    def _copy_model(self, folder: Path) -> str:
        """A private copy of the model's files. The fake engine has none."""
        if self._chosen.gguf is None or self._chosen.packed is None:
            return self._model
        folder.mkdir()
        for path in (self._chosen.gguf, self._chosen.packed):
            shutil.copy2(path, folder / path.name)
        return str(folder / self._chosen.gguf.name)


def _wait_gone(pid: int) -> None:
    """Wait for the engine process of a daemon that was killed: it sees its socket close and ends after its step."""
    deadline = time.monotonic() + ORPHAN_TIMEOUT_S
    while is_running(pid):
        if time.monotonic() > deadline:
            raise ServiceError(f"engine process {pid} outlived its daemon by {ORPHAN_TIMEOUT_S:.0f} s")
        time.sleep(0.05)


def _conversation(run: Run) -> list[dict[str, str]]:
    """What the chat said in part 2."""
    turns = []
    for question, answer in zip(load("chat")["turns"], run.figures["chat"].finished, strict=True):
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer["text"]})
    return turns


def _check_openai() -> None:
    try:
        import openai  # noqa: F401
    except ImportError:
        raise UserError(
            f"`hob demo` uses the openai client, which is not installed: {sys.executable} -m pip install openai"
        ) from None
