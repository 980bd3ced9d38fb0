"""The systemd user units of Hob as text, and where they go. Installs nothing itself.

hob.socket     opens the Unix socket and the TCP port; the first connection starts hob.service
hob.service    the daemon: says when it is ready, is watched, is held to its memory, ends when it is idle
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from hob.config import Config

MIB = 1 << 20
SPARE_BYTES = 320 * MIB
"""Both processes beside weights and KV, packing a model, and room to breathe."""
WATCHDOG_S = 60

SOCKET = """\
[Unit]
Description=Hob: sockets of the small-language-model service

[Socket]
ListenStream={socket}
SocketMode=0600
DirectoryMode=0700
ListenStream={address}
FileDescriptorName=hob

[Install]
WantedBy=sockets.target
"""

SERVICE = """\
[Unit]
Description=Hob: one small language model for all programs
Requires=hob.socket
After=hob.socket

[Service]
Type=notify
NotifyAccess=main
ExecStart={command} serve
ExecReload=/bin/kill -USR2 $MAINPID
Environment=HOB_IDLE_EXIT_S={idle_exit_s:.0f}
TimeoutStartSec=300
TimeoutStopSec=20
WatchdogSec={watchdog_s}
Restart=on-failure
RestartSec=2
Slice=background.slice
MemoryMax={memory_max}
UMask=0077
NoNewPrivileges=yes
LockPersonality=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM

[Install]
WantedBy=default.target
"""


def units_folder() -> Path:
    """Where a user's own units lie."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"


def socket_unit(config: Config) -> str:
    """hob.socket."""
    host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
    host = "127.0.0.1" if host == "localhost" else host
    return SOCKET.format(socket=_escaped(str(config.socket_path)), address=f"{host}:{config.server.port}")


def service_unit(config: Config, command: list[str], memory_bytes: int, idle_exit_s: float) -> str:
    """hob.service. command: how this installation's `hob` is run. memory_bytes: see `memory_max`."""
    return SERVICE.format(
        command=_escaped(shlex.join(command)),
        idle_exit_s=idle_exit_s,
        watchdog_s=WATCHDOG_S,
        memory_max=f"{-(-memory_bytes // MIB)}M",
    )


def memory_max(config: Config) -> int:
    """Bytes the service may take: the model twice (packing needs both forms for a moment), KV, and the rest.

    Beyond it the kernel ends the service rather than something of the user's.
    """
    from hob.models.architectures import read_network
    from hob.models.catalog import Catalog
    from hob.models.gguf import open_gguf

    path = Catalog(config.models_dir).resolve(config.engine.model)
    with open_gguf(path) as gguf:
        kv_type = "q8" if config.engine.kv_type == "q8" else "f16"  # what 'auto' becomes is up to the CPU: the larger
        kv_bytes = config.memory.kv_tokens * read_network(gguf).kv_bytes_per_token(kv_type)
    return 2 * path.stat().st_size + kv_bytes + SPARE_BYTES


def _escaped(text: str) -> str:
    """'%' begins a specifier in a unit file."""
    return text.replace("%", "%%")
