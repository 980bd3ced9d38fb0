"""Memory pressure: what is read from a fake system, and what is given back, stage by stage."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.models_world import MB, House, solo

from hob.engine.fake import FakeEngine
from hob.service.pressure import PressureMonitor, memory_bytes
from hob.service.relief import QUIET_S, Relief

GB = 1 << 30


class FakeSystem:
    """A root folder with procfs and the control groups of one kind."""

    def __init__(self, root: Path, kind: str) -> None:
        self.root, self.kind = root, kind
        self.write("proc/meminfo", "MemTotal:       16777216 kB\nMemFree: 1 kB\n")
        self.stall(0.0)
        line, top = {
            "v2": ("0::/app/hob\n", "sys/fs/cgroup"),
            "v1": ("4:memory:/app/hob\n0::/\n", "sys/fs/cgroup/memory"),
        }[kind]
        self.write("proc/self/cgroup", line)
        self.top = f"{top}/app/hob"
        self.use(GB // 10, 0)
        self.limit(None)

    def write(self, path: str, text: str) -> None:
        """A file under the root."""
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def stall(self, avg10: float) -> None:
        """Pressure stall information."""
        self.write(
            "proc/pressure/memory",
            f"some avg10={avg10:.2f} avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
        )

    def use(self, num_bytes: int, num_cache: int) -> None:
        """What the group uses, page cache that can go included."""
        usage = {"v2": "memory.current", "v1": "memory.usage_in_bytes"}[self.kind]
        inactive = {"v2": "inactive_file", "v1": "total_inactive_file"}[self.kind]
        self.write(f"{self.top}/{usage}", f"{num_bytes + num_cache}\n")
        self.write(f"{self.top}/memory.stat", f"anon 1\n{inactive} {num_cache}\n")

    def limit(self, num_bytes: int | None) -> None:
        """The group's limit."""
        if self.kind == "v2":
            self.write(f"{self.top}/memory.max", "max\n" if num_bytes is None else f"{num_bytes}\n")
            self.write(f"{self.top}/memory.high", "max\n")
        else:
            self.write(f"{self.top}/memory.limit_in_bytes", f"{num_bytes or 9223372036854771712}\n")


@pytest.fixture(params=["v1", "v2"])
def system(request: pytest.FixtureRequest, tmp_path: Path) -> FakeSystem:
    return FakeSystem(tmp_path, request.param)


def test_a_quiet_system_has_no_pressure(system: FakeSystem) -> None:
    assert PressureMonitor(system.root).read().level == "none"
    assert memory_bytes(system.root) == 16 * GB


def test_stalls_and_limits_are_pressure(system: FakeSystem) -> None:
    monitor = PressureMonitor(system.root)
    system.stall(7.5)
    assert monitor.read().level == "some"
    system.stall(33.0)
    reading = monitor.read()
    assert (reading.level, reading.why) == ("high", "tasks waited for memory 33 % of the last 10 s")
    system.stall(0.0)
    system.limit(GB)
    assert memory_bytes(system.root) == GB
    system.use(int(0.8 * GB), GB // 10)
    assert monitor.read().level == "none"
    system.use(int(0.92 * GB), GB // 10)
    assert monitor.read().level == "some"
    system.use(int(0.98 * GB), 0)
    reading = monitor.read()
    assert reading.level == "high"
    assert "bytes of" in reading.why
    assert monitor.has_limit


def test_a_system_without_these_files_has_no_pressure(tmp_path: Path) -> None:
    assert PressureMonitor(tmp_path).read().level == "none"


def test_relief_goes_stage_by_stage_and_no_request_is_ended(system: FakeSystem) -> None:
    house = House(dict.fromkeys("ab", MB))
    for name in "ab":
        house.ask(name, name, num_prompt=2000)
    house.run()
    house.ask("running", "a", num_prompt=500, max_tokens=300)
    while not house.tokens("running"):
        house.step()
    relief = Relief(house.residents.room, PressureMonitor(system.root))
    now = house.clock.now
    relief.tick(now)
    before = house.ledger.reserved_bytes
    assert relief.stage == 0
    system.stall(10.0)
    relief.tick(now + 0.5)
    assert relief.stage == 0  # looks are a second apart
    relief.tick(now + 1)
    assert (relief.stage, house.residents.room.pressure) == (1, "some")
    assert house.ledger.reserved_bytes < before
    assert house.loaded == {"a", "b"}
    relief.tick(now + 2)
    assert relief.stage == 2
    relief.tick(now + 3)
    assert relief.stage == 3
    house.step()
    assert house.loaded == {"a"}  # busy: it stays
    system.stall(0.0)
    relief.tick(now + 4)
    assert house.residents.room.pressure == "some"
    relief.tick(now + 4 + QUIET_S)
    assert (relief.stage, house.residents.room.pressure) == (0, "none")
    house.run()
    assert house.tokens("running") == solo(500, 300)


def test_an_alarm_is_acted_upon_at_once_though_averages_do_not_show_it_yet(system: FakeSystem) -> None:
    house = House({"a": MB})
    relief = Relief(house.residents.room, PressureMonitor(system.root))
    now = house.clock.now
    relief.tick(now)
    relief.tick(now + 0.5)
    assert relief.stage == 0, "the control"
    relief.tick(now + 0.6, is_alarmed=True)
    assert (relief.stage, house.residents.room.pressure) == (1, "some")


def test_high_pressure_skips_the_first_stage(system: FakeSystem) -> None:
    house = House({"a": MB})
    house.ask("a", "a")
    house.run()
    relief = Relief(house.residents.room, PressureMonitor(system.root))
    system.stall(50.0)
    relief.tick(house.clock.now + 5)
    assert relief.stage == 2


def test_caches_go_before_contexts() -> None:
    house = House({"a": MB})
    house.ask("cache", "a", num_prompt=1000)
    house.run()
    a = house.residents.get("a")
    assert a is not None
    prefixes = a.scheduler.placement.prefixes
    kept = list(prefixes._labels)[:20]
    prefixes.mark_context(kept)
    house.residents.room.relieve(1)
    assert sorted(prefixes._labels) == sorted(kept)
    house.residents.room.relieve(2)
    assert not prefixes._labels
    assert isinstance(a.engine, FakeEngine)
