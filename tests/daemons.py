"""Real `hob` processes for tests: a daemon in a folder of its own, and single commands."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from hob.client import Client
from hob.rundir import DaemonState, RunDir

TIMEOUT_S = 30.0


def environment(home: Path, **settings: object) -> dict[str, str]:
    """No setting of the developer's gets in: HOB_HOME and what is given, nothing else."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HOB_", "XDG_"))}
    given = {f"HOB_{name.upper()}": str(value) for name, value in settings.items()}
    defaults = {"HOB_MODEL": "fake", "HOB_PORT": "0", "XDG_CONFIG_HOME": str(home / "config"), "HOB_HOME": str(home)}
    return {**kept, **defaults, **given}


def hob(
    home: Path, *words: str, stdin: str = "", timeout_s: float = TIMEOUT_S, **settings: object
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "hob", *words],
        env=environment(home, **settings),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def until(condition: Callable[[], object], what: str, timeout_s: float = 10.0) -> None:
    """Wait for a condition; fail naming it."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.01)


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A temporary folder whose path leaves room for a socket's name (pytest's are long)."""
    with tempfile.TemporaryDirectory(prefix="hob-") as folder:
        yield Path(folder)


class Daemon:
    """`hob serve` as a child process. Context manager: kills what is left of it."""

    def __init__(self, home: Path, **settings: object) -> None:
        self.home = home
        self.rundir = RunDir(home / "run" / "hob.sock")
        self._settings = settings
        self._spawn()

    def _spawn(self) -> None:
        with (self.home / "stderr").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hob", "serve"],
                env=environment(self.home, **self._settings),
                stdin=subprocess.DEVNULL,
                stderr=log,
            )

    def wait_ready(self) -> Daemon:
        """Until /health answers."""

        def is_ready() -> bool:
            assert self.process.poll() is None, self.log
            with contextlib.suppress(Exception), Client(self.rundir.socket_path, timeout_s=TIMEOUT_S) as client:
                return client.health()["status"] == "ok"
            return False

        until(is_ready, "the daemon", TIMEOUT_S)
        return self

    def restart(self) -> Daemon:
        """Start again in the same folder, after it ended."""
        self._spawn()
        return self.wait_ready()

    def wait_end(self) -> int:
        """Exit status."""
        return self.process.wait(TIMEOUT_S)

    @property
    def log(self) -> str:
        """What it wrote to stderr."""
        return (self.home / "stderr").read_text()

    @property
    def state(self) -> DaemonState:
        """Its state file."""
        state = self.rundir.read_state()
        assert state is not None
        return state

    @property
    def engine_pid(self) -> int:
        """Its engine process."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and b"hob.service.loop" in (folder / "cmdline").read_bytes():
                    return int(folder.name)
        raise AssertionError("no engine process")

    def client(self, timeout_s: float = TIMEOUT_S) -> Client:
        """Over its Unix socket."""
        return Client(self.rundir.socket_path, app="test", timeout_s=timeout_s)

    def http(self) -> httpx.Client:
        """Raw HTTP over TCP."""
        return httpx.Client(base_url=f"http://127.0.0.1:{self.state.port}", timeout=TIMEOUT_S, trust_env=False)

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def running(**settings: object) -> Iterator[Daemon]:
    """A daemon that answers."""
    with short_folder() as home, Daemon(home, **settings) as daemon:
        yield daemon.wait_ready()


def durable(context: dict[str, Any]) -> dict[str, Any]:
    """What is promised of a context: all but what is on disk of its KV, which comes and goes."""
    return {name: value for name, value in context.items() if name != "kv"}


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
