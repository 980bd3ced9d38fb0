"""What may be wrong with a machine or an installation, looked at one by one. Each finding says what to do.

Changes nothing and starts nothing.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hob.config import Config, load_config
from hob.errors import HobError
from hob.rundir import RunDir

SPARE_BYTES = 256 << 20


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: Literal["ok", "note", "bad"]
    """note: it works, but not as well as it could."""
    says: str
    then: str = ""
    """What to do. Empty: nothing."""


def examine() -> list[Finding]:
    """All findings, in the order of what depends on what."""
    try:
        config, _ = load_config()
    except HobError as error:
        return [Finding("settings", "bad", error.message, "Mend hob.toml or the environment variable.")]
    findings = [Finding("settings", "ok", "hob.toml, environment and defaults agree")]
    for check in CHECKS:
        try:
            findings.append(check(config))
        except HobError as error:
            findings.append(Finding(check.__name__.strip("_"), "bad", error.message))
    return findings


def _processor(config: Config) -> Finding:
    from hob import native

    found = native.available_isas()
    threads = config.engine.threads or len(os.sched_getaffinity(0))
    says = f"best instruction set {found[-1]}, {threads} threads"
    if found[-1] == "portable":
        return Finding("processor", "note", says, "It works, slowly: no AVX2 was found, nor the kernels for it.")
    return Finding("processor", "ok", says)


def _model(config: Config) -> Finding:
    from hob.assembly import is_fake
    from hob.models.catalog import Catalog

    if is_fake(config.engine.model):
        return Finding("model", "note", f"'{config.engine.model}' answers nonsense: it is for tests")
    try:
        path = Catalog(config.models_dir).resolve(config.engine.model)
    except HobError as error:
        return Finding("model", "bad", error.message, f"hob pull {config.engine.model}")
    return Finding("model", "ok", f"{config.engine.model} at {path}, {path.stat().st_size / 1e6:.0f} MB")


def _memory(config: Config) -> Finding:
    from hob.units import memory_max

    try:
        most = memory_max(config)
    except HobError:
        most = SPARE_BYTES
    free = _available_bytes()
    says = f"{free / 1e6:,.0f} MB available, at most {most / 1e6:,.0f} MB wanted"
    if free < most:
        return Finding("memory", "bad", says, "Choose a smaller model, or fewer `kv_tokens`.")
    return Finding("memory", "ok", says)


def _disk(config: Config) -> Finding:
    folder = next(path for path in (config.paths.home, *config.paths.home.parents) if path.exists())
    if not os.access(folder, os.W_OK):
        return Finding("disk", "bad", f"'{folder}' cannot be written", "Set HOB_HOME to a folder of yours.")
    free = shutil.disk_usage(folder).free
    says = f"{free / 1e9:.1f} GB free for {config.paths.home}"
    wanted = config.contexts.context_disk_bytes
    if free < wanted:
        return Finding("disk", "note", says, f"Contexts may take {wanted / 1e9:.1f} GB: lower `context_disk_bytes`.")
    return Finding("disk", "ok", says)


def _socket(config: Config) -> Finding:
    folder = config.socket_path.parent
    if not folder.exists():
        return Finding("socket", "ok", f"{config.socket_path}, its folder will be made")
    info = folder.stat()
    if info.st_uid != os.geteuid() or info.st_mode & 0o077:
        mode = f"mode {info.st_mode & 0o7777:04o}, uid {info.st_uid}"
        return Finding("socket", "bad", f"others can enter '{folder}' ({mode})", f"chmod 700 {folder}")
    return Finding("socket", "ok", str(config.socket_path))


def _daemon(config: Config) -> Finding:
    from hob.rundir import owner_of_port

    state = RunDir(config.socket_path).read_state()
    if state is None:
        owner = owner_of_port(config.server.port) if config.server.port else None
        if owner is not None:
            says = f"none runs on {config.socket_path}, and port {config.server.port} is in use by {owner}"
            end = f"HOB_SOCKET={owner.socket_path} hob stop" if owner.socket_path else "End that program"
            return Finding("daemon", "bad", says, f"{end}, or set HOB_PORT=0 for a free port.")
        return Finding("daemon", "ok", "none runs; the first command that needs one starts it")
    from hob.client import Client

    try:
        with Client(config.socket_path, timeout_s=10.0) as client:
            client.health()
    except HobError as error:
        return Finding("daemon", "bad", f"pid {state.pid}: {error.message}", "hob restart")
    from hob import __version__

    if state.version != __version__:
        says = f"pid {state.pid} is version {state.version}, installed is {__version__}"
        return Finding("daemon", "note", says, "hob restart")
    return Finding("daemon", "ok", f"pid {state.pid} answers on {state.base_url}")


def _identity(config: Config) -> Finding:
    """Loopback TCP needs the kernel's table of sockets."""
    import socket

    from hob.service.tcp_owner import uid_by_diag, uid_by_proc

    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        with client, accepted:
            ends = client.getsockname()[:2], client.getpeername()[:2]
            try:
                found = uid_by_diag(*ends)
            except OSError:
                found = uid_by_proc(*ends)
                if found == os.getuid():
                    return Finding("identity", "note", "no sock_diag: each TCP connection costs some milliseconds")
    if found != os.getuid():
        return Finding("identity", "bad", "the owner of a TCP connection cannot be found", "Use the Unix socket.")
    return Finding("identity", "ok", "the kernel says whose each connection is")


def _policy(config: Config) -> Finding:
    from hob.service.policy import read_policy

    read_policy(config.policy_path)
    there = config.policy_path.is_file()
    return Finding("policy", "ok", str(config.policy_path) if there else "no policy.toml: the built-in one applies")


def _systemd(config: Config) -> Finding:
    from hob.units import units_folder

    unit = units_folder() / "hob.service"
    if not Path("/run/systemd/system").is_dir():
        return Finding("systemd", "ok", "not running here: the first command that needs Hob starts it")
    if not unit.is_file():
        return Finding("systemd", "note", "no units: Hob runs when a command starts it", "hob install")
    if sys.executable not in unit.read_text(encoding="utf-8", errors="replace"):
        return Finding("systemd", "note", f"{unit} starts another installation than this one", "hob install")
    return Finding("systemd", "ok", str(unit))


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


CHECKS: tuple[Callable[[Config], Finding], ...] = (
    _processor,
    _model,
    _memory,
    _disk,
    _socket,
    _daemon,
    _identity,
    _policy,
    _systemd,
)
