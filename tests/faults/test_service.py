"""Hob under systemd, without one: passed sockets, readiness, idle exit, restart, units, doctor, completion."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hob import systemd
from hob.client import Client
from hob.config import load_config
from hob.errors import ConfigError
from hob.rundir import RunDir, check_loopback
from hob.units import service_unit, socket_unit
from tests.daemons import Daemon, environment, free_port, hob, running, short_folder, until


class NotifySocket:
    """What systemd would hear."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.settimeout(20)

    def hear(self, wanted: str) -> None:
        """Wait for a line."""
        while wanted not in self._socket.recv(4096).decode().splitlines():
            pass

    def __enter__(self) -> NotifySocket:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


@pytest.fixture
def home() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder


def test_readiness_watchdog_and_end_are_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with NotifySocket(home) as heard:
        monkeypatch.setenv("NOTIFY_SOCKET", str(heard.path))
        monkeypatch.setenv("WATCHDOG_USEC", "2000000")
        with Daemon(home) as daemon:
            heard.hear("READY=1")
            with daemon.client() as client:
                assert client.health()["status"] == "ok"
            heard.hear("WATCHDOG=1")
            heard.hear("WATCHDOG=1")
            daemon.process.send_signal(signal.SIGTERM)
            heard.hear("STOPPING=1")
            assert daemon.wait_end() == 0


def test_the_first_connection_starts_it_and_idle_time_ends_it(home: Path) -> None:
    activate = shutil.which("systemd-socket-activate") or pytest.skip("no systemd-socket-activate here")
    path, port = home / "run" / "hob.sock", free_port()
    path.parent.mkdir(mode=0o700)
    command = [activate, "-l", str(path), "-l", f"127.0.0.1:{port}"]
    settings = environment(home, idle_exit_s=1, socket=path)
    command += [f"--setenv={name}" for name in settings if name.startswith(("HOB_", "XDG_"))]
    with subprocess.Popen([*command, sys.executable, "-m", "hob", "serve"], env=settings) as process:
        try:
            until(path.exists, "the socket")
            with Client(path, timeout_s=30) as client:
                assert client.health()["status"] == "ok"
                state = RunDir(path).read_state()
                assert state is not None
                assert (state.pid, state.port) == (process.pid, port)
            assert process.wait(30) == 0, "it ends by itself"
        finally:
            process.kill()
    assert path.exists(), "the socket is systemd's: it stays"
    assert RunDir(path).holder() is None


def test_a_restart_refuses_no_connection(home: Path) -> None:
    """Clients connect anew for each request all the while, on each kind of socket; the program that answers changes."""
    with Daemon(home).wait_ready() as daemon:
        state, stop, failures, counts = daemon.state, threading.Event(), [], [0, 0, 0]
        with daemon.client() as client:
            own = client.add_app("sandbox", "socket")["path"]
        sockets = [daemon.rundir.socket_path, None, own]
        engine = daemon.engine_pid

        def ask(which: int) -> None:
            base_url = None if sockets[which] else f"http://127.0.0.1:{state.port}"
            while not stop.is_set():
                try:
                    with Client(sockets[which], base_url, timeout_s=60) as client:
                        client.chat("Hello", max_tokens=2)
                    counts[which] += 1
                except Exception as error:
                    failures.append(error)

        threads = [threading.Thread(target=ask, args=(which,)) for which in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: min(counts) > 3, "requests before")
        done = hob(home, "restart")
        assert done.returncode == 0, done.stderr
        seen = list(counts)
        until(lambda: all(now > before + 3 for now, before in zip(counts, seen, strict=True)), "requests after", 30)
        stop.set()
        for thread in threads:
            thread.join(60)
        assert failures == []
        assert (daemon.state.pid, daemon.state.port) == (state.pid, state.port)
        assert daemon.state.started > state.started
        assert daemon.engine_pid != engine
        other = hob(home, "serve")
        assert "already running" in other.stderr, "the lock was kept"
        assert hob(home, "stop").returncode == 0
        assert daemon.wait_end() == 0
        assert not daemon.rundir.socket_path.exists()


def test_sockets_are_taken_from_the_environment_and_from_it_only_once() -> None:
    left, right = socket.socketpair()
    copies = [left.fileno(), right.fileno()]
    environ = {"LISTEN_PID": "7", "LISTEN_FDS": "2"}
    assert systemd.inherit(environ, pid=8).unix is None, "they are for another process"
    assert environ == {}
    environ = {}
    systemd.hand_over(copies[0], [right], True, environ)
    found = systemd.inherit(environ)
    assert (found.lock_fd, found.is_own) == (copies[0], True)
    assert found.unix is not None
    assert found.unix.fileno() == copies[1]
    assert environ == {}
    right.detach()
    found.unix.close()
    left.close()


def test_a_passed_socket_that_others_could_reach_is_refused() -> None:
    with socket.create_server(("0.0.0.0", 0)) as wide, pytest.raises(ConfigError, match=r"0\.0\.0\.0"):
        check_loopback(wide)
    with socket.create_server(("127.0.0.1", 0)) as narrow:
        check_loopback(narrow)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "example.org"])
def test_a_wider_bind_is_refused(host: str, home: Path) -> None:
    done = hob(home, "serve", host=host)
    assert done.returncode == 2
    assert "Expected one of: 127.0.0.1" in done.stderr


def test_units_pass_systemds_own_check(home: Path) -> None:
    analyze = shutil.which("systemd-analyze") or pytest.skip("no systemd-analyze here")
    config, _ = load_config({"home": str(home)}, {})
    service = service_unit(config, [sys.executable, "-m", "hob"], 1 << 30, 60)
    units = {"hob.socket": socket_unit(config), "hob.service": service}
    for name, text in units.items():
        (home / name).write_text(text)

    def verify() -> str:
        command = [analyze, "verify", "--man=no", str(home / "hob.socket"), str(home / "hob.service")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"LC_ALL": "C"})
        return "\n".join(line for line in done.stderr.splitlines() if "hob." in line)

    assert verify() == ""
    (home / "hob.service").write_text(units["hob.service"].replace("Type=notify", "Type=notifyy\nNoSuchSetting=1"))
    assert "NoSuchSetting" in verify(), "the check finds what is wrong"


def test_install_writes_and_uninstall_removes(home: Path, default_gguf: Path) -> None:
    folder = home / "config" / "systemd" / "user"
    shown = hob(home, "install", "--dry-run", model=default_gguf)
    assert "MemoryMax=" in shown.stdout
    assert not folder.exists()
    done = hob(home, "install", "--no-start", model=default_gguf)
    assert done.returncode == 0, done.stderr
    assert "systemctl --user enable --now hob.socket" in done.stdout
    service = (folder / "hob.service").read_text()
    assert f"{sys.executable} -m hob serve" in service
    assert "HOB_IDLE_EXIT_S=900" in service
    assert sorted(path.name for path in folder.iterdir()) == ["hob.service", "hob.socket"]
    assert hob(home, "uninstall").returncode == 0
    assert list(folder.iterdir()) == []


def test_doctor_names_what_is_wrong_and_what_to_do(home: Path) -> None:
    with running() as daemon:
        done = hob(daemon.home, "doctor", "--json")
        assert done.returncode == 0, done.stdout
        findings = {finding["what"]: finding for finding in json.loads(done.stdout)}
        assert findings["daemon"]["state"] == findings["identity"]["state"] == "ok"
    (home / "run").mkdir(mode=0o755)
    (home / "run").chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        port = squatter.getsockname()[1]
        done = hob(home, "doctor", model="no-such-model", port=port)
    assert done.returncode == 1
    for part in ("hob pull no-such-model", f"chmod 700 {home}/run", f"port {port} is in use"):
        assert part in done.stdout
    (home / "config" / "hob").mkdir(parents=True)
    (home / "config" / "hob" / "policy.toml").write_text("[defalt]\n")
    assert "defalt" in hob(home, "doctor").stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, home: Path) -> None:
    script = hob(home, "completion", shell).stdout
    assert f"complete_{shell}" in script
    if shell == "bash":
        env = environment(home) | {"_HOB_COMPLETE": "complete_bash", "COMP_WORDS": "hob cla", "COMP_CWORD": "1"}
        done = subprocess.run([sys.executable, "-m", "hob"], env=env, capture_output=True, text=True, check=False)
        assert done.stdout.split() == ["classify"]
        assert done.stderr == ""


def test_a_daemon_that_nobody_watches_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    systemd.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/notify")
    systemd.notify("READY=1")
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    assert systemd.watchdog_s() == 3.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert systemd.watchdog_s() is None
