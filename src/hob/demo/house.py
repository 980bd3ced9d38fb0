"""One daemon of the demo: a folder of its own for socket, state and logs, the models of the user.

The demo never touches the user's own daemon: it has its own HOB_HOME, its own socket and a free port.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from hob.cli.background import is_healthy
from hob.errors import ServiceError
from hob.memory import ProcessMemory, processes_below
from hob.rundir import DaemonState, RunDir

START_TIMEOUT_S = 60.0


class House:
    """Starts, measures, kills and stops one `hob serve`."""

    def __init__(self, home: Path, model: str, **settings: str) -> None:
        """home: made if missing. settings: as HOB_NAME in the daemon's environment, e.g. weights='map'.

        The port is free now and stays the same over restarts, so that a client finds it again.
        """
        self.rundir = RunDir(home / "run" / "hob.sock")
        self.log_path = home / "hob.log"
        home.mkdir(parents=True, exist_ok=True)
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HOB_")},
            "HOB_HOME": str(home),
            "HOB_SOCKET": str(self.rundir.socket_path),
            "HOB_MODEL": model,
            "HOB_PORT": str(_free_port()),
            **{f"HOB_{name.upper()}": value for name, value in settings.items()},
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> House:
        """Start the process; `wait` waits for it."""
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hob", "serve"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        return self

    def wait(self) -> float:
        """Wait until it answers. Returns the seconds waited. Raises ServiceError with the end of its log."""
        start = time.monotonic()
        while not is_healthy(self.rundir.socket_path):
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() - start > START_TIMEOUT_S:
                lines = self.log_path.read_text(errors="replace").strip().splitlines()[-3:]
                raise ServiceError(f"the demo's daemon did not start: {' | '.join(lines)}")
            time.sleep(0.02)
        return time.monotonic() - start

    @property
    def state(self) -> DaemonState:
        """Where it is found."""
        state = self.rundir.read_state()
        if state is None:
            raise ServiceError(f"the demo's daemon is gone. See {self.log_path}.")
        return state

    def memory(self) -> list[ProcessMemory]:
        """Its processes and what they take."""
        return processes_below(self._process.pid) if self._process and self._process.poll() is None else []

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that does not do."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
