"""What keeps a daemon from starting: one line that names it, status 2, nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from hob.errors import ConfigError
from hob.rundir import AlreadyRunning, RunDir
from tests.daemons import Daemon, hob, running, short_folder, until


def refused(home: Path, *expected: str, **settings: object) -> None:
    """`hob serve` ends with status 2, one line that holds all of `expected`, and no socket or state left."""
    done = hob(home, "serve", **settings)
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("hob: ")
    assert "Traceback" not in done.stderr
    for text in expected:
        assert text in line


def test_a_missing_model_names_the_command_that_fetches_it() -> None:
    with short_folder() as home:
        refused(home, "smollm2-135m", "`hob pull smollm2-135m`", model="smollm2-135m")
        assert not (home / "run" / "hob.sock").exists()
        assert not (home / "run" / "hob.json").exists()


def test_a_model_file_that_is_none_is_refused() -> None:
    with short_folder() as home:
        (home / "model.gguf").write_bytes(b"GGUF" + b"\xff" * 60)
        refused(home, "model.gguf", model=home / "model.gguf")


def test_a_port_that_is_taken_names_port_and_owner() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, short_folder() as home:
        port = other.getsockname()[1]
        refused(home, f"127.0.0.1:{port}", f"pid {os.getpid()}", "HOB_PORT=0", port=port)
        assert not (home / "run" / "hob.sock").exists()


def test_a_port_that_another_daemon_has_names_its_socket_and_the_next_command() -> None:
    with running() as daemon, short_folder() as home:
        port, path = daemon.state.port, daemon.rundir.socket_path
        refused(home, f"pid {daemon.process.pid}", f"`HOB_SOCKET={path} hob stop`", "HOB_PORT=0", port=port)
        found = hob(home, "doctor", port=port)
        assert found.returncode == 1
        assert f"HOB_SOCKET={path} hob stop" in found.stdout
        assert hob(home, "stop", socket=path).stdout == f"stopped (pid {daemon.process.pid})\n"


def test_a_second_daemon_names_the_first_and_leaves_it_alone() -> None:
    with running() as daemon:
        refused(daemon.home, str(daemon.rundir.socket_path), f"pid {daemon.process.pid}", "`hob stop`")
        with daemon.client() as client:
            assert client.health()["status"] == "ok"
        assert daemon.state.pid == daemon.process.pid


def test_of_two_daemons_that_start_at_once_one_wins() -> None:
    with short_folder() as home, Daemon(home) as one, Daemon(home) as two:
        until(lambda: (one.process.poll() is None) != (two.process.poll() is None), "one of them to give up")
        winner, loser = (one, two) if one.process.poll() is None else (two, one)
        assert loser.wait_end() == 2
        assert winner.wait_ready().state.pid == winner.process.pid


def test_leftovers_of_a_killed_daemon_are_taken_over() -> None:
    with running() as daemon:
        daemon.process.kill()
        daemon.wait_end()
        assert daemon.rundir.socket_path.exists()
        assert daemon.rundir.read_state() is None, "a dead daemon's state file must not count"
        with daemon.restart().client() as client:
            assert client.health()["status"] == "ok"


def test_a_folder_that_others_can_enter_is_refused() -> None:
    with short_folder() as home:
        (home / "open").mkdir()
        (home / "open").chmod(0o755)
        refused(home, "0755", "chmod 700", socket=home / "open" / "hob.sock")


def test_a_socket_path_that_is_too_long_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linux allows 107"):
        RunDir(Path("/tmp") / ("x" * 120) / "hob.sock").prepare()


def test_the_lock_survives_a_look_at_it() -> None:
    with short_folder() as home:
        rundir = RunDir(home / "run" / "hob.sock")
        rundir.prepare()
        rundir.lock()
        assert RunDir(rundir.socket_path).holder() == os.getpid()
        with pytest.raises(AlreadyRunning, match=f"pid {os.getpid()}"):
            RunDir(rundir.socket_path).lock()
        rundir.release()
        assert rundir.holder() is None
        rundir.lock()
        rundir.release()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_daemon_in_order(number: int) -> None:
    with running() as daemon:
        engine = daemon.engine_pid
        daemon.process.send_signal(number)
        assert daemon.wait_end() == 0, daemon.log
        assert "Traceback" not in daemon.log
        assert sorted(path.name for path in daemon.rundir.socket_path.parent.iterdir()) == ["hob.lock"]
        assert not Path(f"/proc/{engine}").exists()


def test_a_signal_while_starting_ends_it_too() -> None:
    with short_folder() as home, Daemon(home) as daemon:
        until(lambda: daemon.rundir.holder(), "the lock")
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.wait_end() == 0, daemon.log
        assert "Traceback" not in daemon.log
        assert not daemon.rundir.socket_path.exists()


def test_a_background_start_reports_the_daemons_own_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, short_folder() as home:
        port = other.getsockname()[1]
        done = hob(home, "run", "hello", port=port)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(f"hob: cannot start on 127.0.0.1:{port}")
