"""Who is who, on a real daemon: foreign users, squatters, processes that change, claimed names, keys, sockets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from hob.client import Client
from hob.errors import PermissionDenied
from hob.service.identity import Caller, identify_unix
from tests.daemons import Daemon, hob, running, short_folder, until

FOREIGN_UID = 54321
CHAT = {"model": "default", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
BECOME = f"import os, socket, sys, time\nos.setgroups([]); os.setgid({FOREIGN_UID}); os.setuid({FOREIGN_UID})\n"


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running() as daemon:
        yield daemon


def as_foreign_user(code: str, *words: object, **files: int) -> str:
    """Run Python as another user; what it prints."""
    command = [sys.executable, "-c", BECOME + code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, pass_fds=files.values())
    return done.stdout


ASK = """
request = b"GET /hob/v1/stats HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n"
def ask(where, family):
    with socket.socket(family) as s:
        s.connect(where); s.sendall(request)
        reply = b""
        while part := s.recv(65536): reply += part
    print(reply.decode())
"""


@needs_root
def test_a_foreign_user_is_refused_over_tcp(daemon: Daemon) -> None:
    reply = as_foreign_user(ASK + "ask(('127.0.0.1', int(sys.argv[1])), socket.AF_INET)", daemon.state.port)
    assert reply.startswith("HTTP/1.1 403 ")
    assert f"the connection to uid {FOREIGN_UID}" in reply


@needs_root
def test_a_foreign_user_cannot_reach_the_sockets(daemon: Daemon) -> None:
    with daemon.client() as client:
        own = client.add_app("walled", "socket")["path"]
    code = "try: ask(sys.argv[1], socket.AF_UNIX)\nexcept PermissionError: print('no way in')"
    for path in (daemon.rundir.socket_path, own):
        assert as_foreign_user(ASK + code, path).strip() == "no way in"


@needs_root
def test_inside_a_sandbox_any_user_is_that_app(daemon: Daemon) -> None:
    """As when its folder is mounted: here a descriptor of the folder leads past the closed one above it."""
    with daemon.client() as client:
        folder = Path(client.add_app("sandbox", "socket")["path"]).parent
    descriptor = os.open(folder, os.O_PATH)
    try:
        code = "ask(f'/proc/self/fd/{sys.argv[1]}/hob.sock', socket.AF_UNIX)"
        assert as_foreign_user(ASK + code, descriptor, folder=descriptor).startswith("HTTP/1.1 200 ")
    finally:
        os.close(descriptor)


@needs_root
def test_a_squatter_on_the_port_learns_nothing() -> None:
    code = """
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
accepted, _ = listener.accept()
accepted.settimeout(5)
print(len(accepted.recv(65536)), flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", BECOME + code], stdout=subprocess.PIPE, text=True) as squatter:
        assert squatter.stdout is not None
        port = int(squatter.stdout.readline())
        with Client(base_url=f"http://127.0.0.1:{port}") as client, pytest.raises(PermissionDenied) as caught:
            client.chat("my secret")
        assert f"uid {FOREIGN_UID}" in str(caught.value)
        assert "Nothing was sent" in str(caught.value)
        assert squatter.stdout.readline().strip() == "0"


def test_a_server_that_has_not_accepted_yet_is_known_by_its_listener(daemon: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answered = threading.Thread(target=lambda: _answer(listener))
        with Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
            timer = threading.Timer(0.3, answered.start)  # connected and checked long before
            timer.start()
            assert client.health() == {"status": "ok"}
        timer.join()
        answered.join(5)


def _answer(listener: socket.socket) -> None:
    accepted, _ = listener.accept()
    with accepted:
        accepted.recv(65536)
        accepted.sendall(b'HTTP/1.1 200 OK\r\ncontent-length: 15\r\nconnection: close\r\n\r\n{"status":"ok"}')


class Connected:
    """A child process with a Unix connection to us, which runs `code` afterwards."""

    def __init__(self, folder: Path, code: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "s"))
        self.listener.listen()
        start = "import os, socket, sys, time\ns = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        self.process = subprocess.Popen([sys.executable, "-c", start + code, str(folder / "s")], stdin=subprocess.PIPE)
        self.accepted, _ = self.listener.accept()

    def __enter__(self) -> Connected:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.accepted.close()
        self.listener.close()


def test_a_process_that_has_ended_lends_its_name_to_nobody(tmp_path: Path) -> None:
    """Its number may be another process's by now: /proc is not believed once the kernel's handle says it ended."""
    with Connected(tmp_path, "sys.exit()") as child:
        child.process.wait()
        proc = tmp_path / "proc"
        (proc / str(child.process.pid)).mkdir(parents=True)
        (proc / str(child.process.pid) / "exe").symlink_to("/usr/bin/trusted")  # as if the number were taken again
        caller = identify_unix(child.accepted, proc)
        assert (caller.uid, caller.pid) == (os.getuid(), child.process.pid)
        assert caller.label in ("unknown", "trusted")
        if hasattr(os, "pidfd_open") and _has_peer_handle(child.accepted):
            assert caller.label == "unknown"


def _has_peer_handle(sock: socket.socket) -> bool:
    try:
        os.close(sock.getsockopt(socket.SOL_SOCKET, 77))
    except OSError:
        return False
    return True


def test_executing_another_program_changes_the_label_and_nothing_else(tmp_path: Path) -> None:
    """What docs/security.md says of labels: a process of our uid can take any. Its boundary stays what it was."""
    code = "os.set_inheritable(s.fileno(), True); sys.stdin.read(1); os.execvp('sleep', ['sleep', '30'])"
    with Connected(tmp_path, code) as child:
        before = identify_unix(child.accepted)
        assert child.process.stdin is not None
        child.process.stdin.write(b"x")
        child.process.stdin.flush()
        until(lambda: identify_unix(child.accepted).label != before.label, "the other program")
        after = identify_unix(child.accepted)
        assert (after.uid, after.pid, after.boundary) == (before.uid, before.pid, before.boundary)


def test_a_key_is_an_app_until_it_is_taken_back(daemon: Daemon) -> None:
    key = hob(daemon.home, "app", "add", "notes").stdout.strip()
    assert key.startswith("hob_")
    kept = (daemon.home / "apps.json").read_text()
    assert key not in kept
    assert (daemon.home / "apps.json").stat().st_mode & 0o077 == 0
    with daemon.http() as http:
        http.headers["authorization"] = f"Bearer {key}"
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 200
        with daemon.client() as client:
            until(lambda: "key:notes/app" in {app["app"] for app in client.stats()["stats"]["apps"]}, "the app")
        refused = http.get("/hob/v1/overview")
        assert (refused.status_code, "key:notes/app" in refused.text) == (403, True)
        assert "notes" in hob(daemon.home, "app", "list").stdout
        assert hob(daemon.home, "app", "rm", "notes").returncode == 0
        gone = http.get("/v1/models")
        assert (gone.status_code, gone.json()["error"]["code"]) == (401, "invalid_api_key")
        http.headers["authorization"] = "Bearer any-other-word"
        assert http.get("/v1/models").status_code == 200


def test_a_socket_is_an_app_whatever_it_says_of_itself(daemon: Daemon) -> None:
    path = hob(daemon.home, "app", "socket", "browser").stdout.strip()
    with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://x", timeout=10) as inside:
        inside.headers["x-hob-app"] = "0/root"
        assert inside.get("/health").status_code == 400, "a label with a slash would reach over the boundary"
        inside.headers["x-hob-app"] = "cli"
        assert inside.post("/v1/chat/completions", json=CHAT).status_code == 200
        for path_of_owner in ("/hob/v1/overview", "/hob/v1/apps", "/metrics"):
            assert inside.get(path_of_owner).status_code == 403
        until(lambda: inside.get("/hob/v1/stats").json()["stats"]["apps"], "its own figures")
        assert {app["app"] for app in inside.get("/hob/v1/stats").json()["stats"]["apps"]} == {"socket:browser/app"}
        with daemon.client() as client:
            until(lambda: "socket:browser/app" in {app["app"] for app in client.stats()["stats"]["apps"]}, "the app")
            client.remove_app("socket", "browser")
        assert "took it back" in inside.get("/health").text
    assert not Path(path).exists()


def test_sockets_of_apps_are_there_again_after_a_restart() -> None:
    with running() as daemon:
        with daemon.client() as client:
            path = client.add_app("stays", "socket")["path"]
        assert hob(daemon.home, "stop").returncode == 0
        daemon.wait_end()
        daemon.restart()
        with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://x", timeout=10) as inside:
            assert inside.get("/health").status_code == 200


@pytest.mark.parametrize("name", ["", "A", "a/b", "..", "-x", "a" * 33, "ä"])
def test_names_of_apps_are_plain(daemon: Daemon, name: str) -> None:
    with daemon.http() as http:
        reply = http.post("/hob/v1/apps", json={"name": name, "kind": "socket"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "name")


def test_policy_holds_on_a_running_daemon(daemon: Daemon) -> None:
    """A change counts for the next request; a refusal says what it is about; the log has both."""
    policy = daemon.home / "config" / "hob" / "policy.toml"
    policy.parent.mkdir(parents=True, exist_ok=True)
    policy.write_text('[app."*/loud"]\ntokens_per_minute = 1\nmodels = ["fake"]\n[app."*/quiet"]\nmodels = ["other"]\n')
    with daemon.http() as http:
        http.headers["x-hob-app"] = "loud"
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 200
        refused = http.post("/v1/chat/completions", json=CHAT)
        error = refused.json()["error"]
        assert (refused.status_code, error["policy"]["rule"], error["policy"]["limit"]) == (429, "tokens_per_minute", 1)
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        http.headers["x-hob-app"] = "quiet"
        denied = http.post("/v1/chat/completions", json=CHAT)
        assert (denied.status_code, denied.json()["error"]["policy"]["rule"]) == (403, "models")
        shown = hob(daemon.home, "policy", "show", f"{os.getuid()}/loud").stdout
        assert "tokens_per_minute" in shown
        assert '[app."*/loud"]' in shown
    assert "right" in hob(daemon.home, "policy", "check").stdout
    until(lambda: "rate_limit_exceeded" in hob(daemon.home, "policy", "log").stdout, "the log")
    assert b"Hi" not in (daemon.home / "audit" / "audit.db").read_bytes()
    policy.write_text("[audit]\nprompts = true\n")
    with daemon.client() as client:
        client.chat("a sentence to keep", max_tokens=2)
    until(lambda: "a sentence to keep" in hob(daemon.home, "policy", "log", "--json").stdout, "the kept text")
    policy.unlink()


def test_labels_are_the_only_thing_a_name_changes() -> None:
    owner = Caller(os.getuid(), 1, "python3")
    assert owner.is_owner
    assert not owner.with_key("a").is_owner
    assert not owner.through_socket("a").is_owner
    assert not Caller(os.getuid() + 1, 1, "hob").is_owner
    assert not Caller(None, None, "unknown").is_owner
    assert owner.through_socket("a").app("python3") == "socket:a/app"


LISTEN = """
import socket, sys
from hob.service.identity import identify_unix
with socket.socket(socket.AF_UNIX) as s:
    s.bind(sys.argv[1]); s.listen(); print("listening", flush=True)
    peer, _ = s.accept()
    peer.recv(1)
    print(identify_unix(peer))
"""


def seen_from(path: Path, *namespace: str, foreign: bool = False) -> str:
    """How a listener that runs in other namespaces sees a peer that does not."""
    listener = subprocess.Popen(
        [*namespace, sys.executable, "-c", LISTEN, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with listener:
        assert listener.stdout is not None
        assert listener.stderr is not None
        if listener.stdout.readline() != "listening\n":
            listener.wait(10)
            pytest.skip(f"no user namespace can be made here: {listener.stderr.read().strip()[-200:]}")
        path.chmod(0o777)
        if foreign:
            connect = "with socket.socket(socket.AF_UNIX) as s: s.connect(sys.argv[1]); s.sendall(b'x'); time.sleep(1)"
            as_foreign_user(connect, path)
        else:
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(str(path))
                peer.sendall(b"x")
                return listener.stdout.readline().strip()
        return listener.stdout.readline().strip()


def test_a_peer_of_another_pid_namespace_is_unknown() -> None:
    with short_folder() as folder:
        control = seen_from(folder / "same")
        other = seen_from(folder / "other", "unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")
    assert f"uid={os.getuid()}, pid={os.getpid()}" in control
    assert other == str(Caller(None, None, "unknown"))


@needs_root
def test_a_peer_without_a_name_in_our_user_namespace_is_unknown() -> None:
    with short_folder() as folder:
        folder.chmod(0o755)
        control = seen_from(folder / "same", foreign=True)
        other = seen_from(folder / "other", "unshare", "--user", "--map-root-user", foreign=True)
    assert f"uid={FOREIGN_UID}" in control
    assert other == str(Caller(None, None, "unknown"))
