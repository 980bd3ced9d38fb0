"""A daemon in the background: found, or started and waited for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hob.config import Config
from hob.errors import ServiceError, UserError
from hob.rundir import DaemonState, RunDir, already_running

START_TIMEOUT_S = 180.0
"""Packing a model for the first time takes some seconds; a slow disk more."""


def ensure_daemon(config: Config) -> DaemonState:
    """The daemon on this socket. Starts one and says so on stderr if none runs. Fetches the model if it is missing."""
    state = RunDir(config.socket_path).read_state()
    if state is None:
        fetch_if_missing(config)
        state = start_daemon(config, {})
        print(f"hob: {describe(state)}", file=sys.stderr)
    return state


def start_daemon(config: Config, flags: Mapping[str, Any]) -> DaemonState:
    """Run a detached `hob serve` and wait until it answers. Raises the error it ended with, or AlreadyRunning."""
    if (pid := RunDir(config.socket_path).holder()) is not None:
        raise already_running(config.socket_path, pid)
    log_path = config.paths.home / "logs" / "hob.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    options = [word for name, value in flags.items() for word in _option(name, value)]
    with log_path.open("ab") as log:
        start = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "hob", "serve", *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if is_healthy(config.socket_path):
            state = RunDir(config.socket_path).read_state()
            if state is not None:
                process.returncode = 0  # detached: it outlives us, and Popen need not warn about that
                return state
        if process.poll() is not None:
            raise _death(process.returncode, log_path, start)
        time.sleep(0.02)
    raise ServiceError(f"the daemon (pid {process.pid}) did not answer within {START_TIMEOUT_S:.0f} s. See {log_path}.")


def _option(name: str, value: Any) -> list[str]:
    """A flag as words of a command line."""
    flag = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return []
    return [flag] if value is True else [flag, str(value)]


def is_healthy(socket_path: Path) -> bool:
    """Whether /health answers 200. A daemon that is still loading keeps the caller waiting until it is ready."""
    import http.client
    import socket

    connection = http.client.HTTPConnection("localhost", timeout=START_TIMEOUT_S)
    try:
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(START_TIMEOUT_S)
        connection.sock.connect(os.fspath(socket_path))
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def describe(state: DaemonState) -> str:
    """One line that says what runs and how to end it."""
    return f"daemon started: {state.model} on {state.base_url} (pid {state.pid}; `hob stop` ends it)"


def fetch_if_missing(config: Config) -> None:
    """Pull the configured model if it is known and not here."""
    from hob.assembly import is_fake

    if not is_fake(config.engine.model):
        from hob.cli.models import pull_missing

        pull_missing(config)


def _death(returncode: int, log_path: Path, start: int) -> Exception:
    """The daemon's own last line is the message."""
    with log_path.open("rb") as log:
        log.seek(start)
        lines = log.read().decode("utf-8", "replace").strip().splitlines()
    message = next((line.removeprefix("hob: ") for line in reversed(lines) if line.startswith("hob: ")), "")
    kind = UserError if returncode == 2 else ServiceError
    return kind(message or f"the daemon exited with status {returncode} before it was ready. See {log_path}.")
