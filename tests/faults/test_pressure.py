"""A real control group: a daemon near its limit gives memory back, ends no request and is not killed.

Needs a group of our own, which root may make where the memory controller is mounted (v1) or delegated (v2).
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hob.client import Client
from hob.models.pack import ensure_packed
from hob.service.pressure import Group
from tests.daemons import Daemon, environment, short_folder, until
from tests.tiny import TinyShape, write_tiny_gguf

pytestmark = pytest.mark.slow

SHAPE = TinyShape(
    num_layers=12, hidden_size=256, num_heads=8, num_kv_heads=4, ffn_size=1024, context_length=4096, can_serve=True
)
"""6 kB of KV a token."""
PROMPT = 1000
ROOM_BYTES = 5 * PROMPT * 6144
"""What the group may take beyond what the daemon takes at its start."""
V2, V1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")


@dataclass
class Cage:
    """A control group of our own."""

    group: Group
    limit_name: str

    def limit(self, num_bytes: int) -> None:
        (self.group.path / self.limit_name).write_text(str(num_bytes))

    @property
    def used(self) -> int:
        used = self.group.used()
        assert used is not None
        return used


@pytest.fixture
def cage() -> Iterator[Cage]:
    """An empty group, removed at the end; skips where none can be made."""
    name = f"hob-test-{os.getpid()}"
    has_v2 = (V2 / "cgroup.subtree_control").exists() and "memory" in (V2 / "cgroup.subtree_control").read_text()
    if has_v2:
        made = Cage(Group(V2 / name, ("memory.max",), "memory.current"), "memory.max")
    else:
        made = Cage(Group(V1 / name, ("memory.limit_in_bytes",), "memory.usage_in_bytes"), "memory.limit_in_bytes")
    try:
        made.group.path.mkdir()
    except OSError as error:
        pytest.skip(f"no control group of memory can be made here: {error}")
    try:
        yield made
    finally:
        until(lambda: removed(made.group.path), "the group's processes to end")


def removed(path: Path) -> bool:
    with contextlib.suppress(OSError):
        path.rmdir()
    return not path.exists()


class CagedDaemon(Daemon):
    """Starts inside a group."""

    def __init__(self, home: Path, cage: Cage, **settings: object) -> None:
        self._cage = cage
        super().__init__(home, **settings)

    def _spawn(self) -> None:
        enter = f'echo $$ > {self._cage.group.path}/cgroup.procs && exec "$@"'
        with (self.home / "stderr").open("ab") as log:
            self.process = subprocess.Popen(
                ["sh", "-c", enter, "sh", sys.executable, "-m", "hob", "serve"],
                env=environment(self.home, **self._settings),
                stdin=subprocess.DEVNULL,
                stderr=log,
            )


def fill(client: Client, rng: random.Random) -> None:
    """A prompt that nobody sent before: its KV stays in the prefix cache."""
    client.complete([rng.randrange(3, 250) for _ in range(PROMPT)], max_tokens=1)


def is_told(daemon: Daemon) -> bool:
    """Whether the daemon said that it gives memory back."""
    return "memory pressure, stage" in daemon.log


def test_near_the_limit_of_its_group_it_gives_memory_back_and_goes_on(cage: Cage) -> None:
    rng = random.Random(0)
    with short_folder() as home:
        (home / "models").mkdir()
        ensure_packed(write_tiny_gguf(home / "models" / "tiny.gguf", 0, "F32", SHAPE))
        settings = {"model": "tiny", "budget": "2GB", "kv_tokens": 32768}
        with CagedDaemon(home, cage, **settings).wait_ready() as daemon, daemon.client() as client:
            engine = daemon.engine_pid
            for _ in range(6):
                fill(client, rng)
            before = cage.used
            assert client.memory()["pressure"] == "none", "the control: without a limit nothing is given back"
            cage.limit(int((before + ROOM_BYTES) / 0.9))
            most = 0
            for _ in range(16):
                fill(client, rng)
                most = max(most, cage.used)
                # Use goes up and down by some MB by itself: above the line for a moment is not near the limit yet, and
                # the daemon may have looked within the fill and given back by now.
                until(lambda: is_told(daemon) or cage.used < before + ROOM_BYTES, "memory to be given back", 20)
                if is_told(daemon):
                    until(lambda: cage.used < before + ROOM_BYTES, "memory to be given back", 20)
                    break
            else:
                raise AssertionError(f"never near the limit: {before:,} bytes at first, {most:,} at most")
            for _ in range(3):
                fill(client, rng)
            assert daemon.engine_pid == engine, "nothing was killed"
