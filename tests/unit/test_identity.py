"""Identity on real sockets, and on a made-up /proc where the kernel would not show the case here."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from hob.errors import InvalidRequest, PermissionDenied
from hob.service.identity import Caller, _sandbox_or_unit, identify_tcp, identify_unix, peer_uid
from hob.service.tcp_owner import uid_by_diag, uid_by_proc


class FakePeer:
    """A socket whose peer has these credentials."""

    family = socket.AF_UNIX

    def __init__(self, pid: int, uid: int) -> None:
        self._raw = struct.pack("iII", pid, uid, uid)

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
        if optname != socket.SO_PEERCRED:
            raise OSError("a kernel that knows nothing else")
        assert (level, buflen) == (socket.SOL_SOCKET, 12)
        return self._raw


def test_unix_peer_of_this_process(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen()
        client.connect(path)
        accepted, _ = listener.accept()
        with accepted:
            caller = identify_unix(accepted)
            assert peer_uid(client) == os.getuid()
    executable = _sandbox_or_unit(Path("/proc/self/cgroup")) or os.path.basename(os.readlink("/proc/self/exe"))
    assert caller == Caller(os.getuid(), os.getpid(), executable)
    assert caller.app() == f"{os.getuid()}/{executable}"


def test_unix_peer_is_who_connected_not_who_holds_the_socket(tmp_path: Path) -> None:
    """A child that inherits the connection and executes something else does not change the peer's pid."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen()
        client.connect(path)
        with subprocess.Popen(["sleep", "5"], pass_fds=[client.fileno()]) as child:
            accepted, _ = listener.accept()
            with accepted:
                assert identify_unix(accepted).pid == os.getpid()
            child.kill()


@pytest.mark.parametrize(("pid", "uid"), [(0, 1000), (77, 65534)])
def test_peer_of_another_namespace_is_unknown(pid: int, uid: int) -> None:
    caller = identify_unix(FakePeer(pid, uid))
    assert caller == Caller(None, None, "unknown")
    assert caller.app() == "unknown/unknown"


def test_executable_becomes_a_label(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    link = tmp_path / "7" / "exe"
    link.symlink_to("/opt/My App/täg (v2) (deleted)")
    assert identify_unix(FakePeer(7, 5), tmp_path) == Caller(5, 7, "t_g_v2_")
    link.unlink()
    assert identify_unix(FakePeer(7, 5), tmp_path).label == "unknown"


def test_declared_name_replaces_the_label() -> None:
    caller = Caller(5, 7, "python3")
    assert caller.app("my.app-1_x") == "5/my.app-1_x"
    for wrong in ("", "a b", "a/b", "é", "x" * 65, "a\n"):
        with pytest.raises(InvalidRequest, match="X-Hob-App"):
            caller.app(wrong)


@pytest.mark.parametrize(
    ("family", "listen", "connect"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET6, "::1", "::1"),
        (socket.AF_INET6, "::", "127.0.0.1"),
    ],
)
def test_tcp_peer_of_this_process(family: int, listen: str, connect: str) -> None:
    with socket.create_server((listen, 0), family=family, dualstack_ipv6=listen == "::") as listener:
        port = listener.getsockname()[1]
        client = socket.create_connection((connect, port))
        accepted, _ = listener.accept()
        with accepted:
            peer, local = accepted.getpeername()[:2], accepted.getsockname()[:2]
            assert identify_tcp(peer, local) == Caller(os.getuid(), None, "tcp")
            assert uid_by_diag(peer, local) == uid_by_proc(peer, local) == os.getuid()
            client.close()  # its row stays for a while, but no process stands behind it
            assert uid_by_diag(peer, local) is None
            assert uid_by_proc(peer, local) is None
            with pytest.raises(PermissionDenied, match="no socket"):
                identify_tcp(peer, local)


def test_listener_is_not_taken_for_a_peer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        assert uid_by_diag(address, ("127.0.0.1", 1)) is None
        assert uid_by_proc(address, ("127.0.0.1", 1)) is None


def test_foreign_uid_is_refused() -> None:
    with pytest.raises(PermissionDenied, match=f"to uid {os.getuid() + 1}"):
        identify_tcp(("127.0.0.1", 1), ("127.0.0.1", 2), lambda peer, local: os.getuid() + 1)


def table(tmp_path: Path, uid: int, state: str = "01", inode: int = 1055) -> Path:
    """/proc with one connection from 127.0.0.1:4660 to 127.0.0.1:11435."""
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "tcp").write_text(
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
        f"   0: 0100007F:1234 0100007F:2CAB {state} 00000000:00000000 00:00000000 00000000 {uid:5} 0 {inode} 1 0 20 4\n"
    )
    return tmp_path


PEER, LOCAL = ("127.0.0.1", 0x1234), ("127.0.0.1", 11435)


@pytest.mark.skipif(sys.byteorder != "little", reason="the made-up table is a little-endian machine's")
class TestSocketTable:
    """Rows as the kernel writes them."""

    def test_uid(self, tmp_path: Path) -> None:
        assert uid_by_proc(PEER, LOCAL, table(tmp_path, 1234)) == 1234

    def test_row_without_process(self, tmp_path: Path) -> None:
        assert uid_by_proc(PEER, LOCAL, table(tmp_path, 0, inode=0)) is None

    def test_peer_that_has_sent_all_it_will(self, tmp_path: Path) -> None:
        assert uid_by_proc(PEER, LOCAL, table(tmp_path, 1234, state="05")) == 1234

    def test_other_end_is_not_taken_for_the_peer(self, tmp_path: Path) -> None:
        assert uid_by_proc(LOCAL, PEER, table(tmp_path, 1234)) is None

    def test_no_table(self, tmp_path: Path) -> None:
        assert uid_by_proc(PEER, LOCAL, tmp_path) is None


class LabelledPeer(FakePeer):
    """A peer with a security label."""

    def __init__(self, label: bytes) -> None:
        super().__init__(7, 5)
        self.label = label

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
        return self.label if optname == socket.SO_PEERSEC else super().getsockopt(level, optname, buflen)


def test_behind_a_boundary_a_declared_name_counts_for_nothing() -> None:
    one = Caller(1000, 1, "python3")
    assert one.app("mail") == "1000/mail"
    for caller in (one.with_key("guest"), one.through_socket("guest"), Caller(None, None, "unknown")):
        assert caller.app("mail") == caller.app("notes") == caller.app()
        with pytest.raises(InvalidRequest, match="X-Hob-App"):
            caller.app("no name")


@pytest.mark.parametrize(
    ("theirs", "ours", "boundary"),
    [
        (b"unconfined\0", b"unconfined\n", ""),
        (b"snap.firefox.firefox (enforce)\0", b"unconfined\n", "5+snap.firefox.firefox"),
        (b"snap.firefox.firefox (enforce)", b"snap.firefox.firefox (enforce)\n", ""),
        (b"hob (complain)", b"unconfined\n", ""),
        (b"unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023\0", b"", ""),
        (b"system_u:system_r:container_t:s0:c1,c2\0", b"unconfined_u:unconfined_r:unconfined_t:s0", "5+container_t"),
        (b"\0", b"", ""),
    ],
)
def test_a_security_label_that_confines_is_a_boundary(
    theirs: bytes, ours: bytes, boundary: str, tmp_path: Path
) -> None:
    (tmp_path / "self" / "attr").mkdir(parents=True)
    (tmp_path / "self" / "attr" / "current").write_bytes(ours)
    caller = identify_unix(LabelledPeer(theirs), tmp_path)
    assert caller.boundary == boundary
    assert caller.app("x") == (f"{boundary}/unknown" if boundary else "5/x")


@pytest.mark.parametrize(
    ("group", "label"),
    [
        (
            "/user.slice/user-5.slice/user@5.service/app.slice/app-flatpak-org.gnome.Maps-812.scope",
            "flatpak.org.gnome.Maps",
        ),
        ("/user.slice/user-5.slice/user@5.service/app.slice/snap.firefox.firefox-6f1a.scope", "snap.firefox"),
        ("/user.slice/user-5.slice/user@5.service/app.slice/backup.service", "backup.service"),
        ("/user.slice/user-5.slice/user@5.service", "python3"),
        ("/user.slice/user-5.slice/session-2.scope", "python3"),
        ("/", "python3"),
    ],
)
def test_sandboxes_and_units_name_a_process(group: str, label: str, tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "exe").symlink_to("/usr/bin/python3")
    (tmp_path / "7" / "cgroup").write_text(f"0::{group}\n")
    assert identify_unix(FakePeer(7, 5), tmp_path).label == label
