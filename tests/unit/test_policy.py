"""policy.toml: what applies to whom, what is counted, what a refusal says. Time is passed in."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import pytest

from hob.errors import ConfigError, PermissionDenied, RateLimited
from hob.request import ServiceClass
from hob.service.audit import AuditLog, Entry, read_last
from hob.service.conditions import Conditions
from hob.service.policy import AuditRules, BackgroundRules, Policy, grant_of, read_policy

PATH = "/v1/chat/completions"
FILE = """
[default]
tokens_per_minute = 1000
weight = 2.0

[app."1000/mail"]
max_concurrent = 1
models = ["small-*"]
most_urgent = "standard"

[app."1000/*"]
tokens_per_minute = 50
endpoints = ["/v1/*"]
"""


@dataclass
class Spent:
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(FILE)
    return path


def test_the_first_match_decides_over_default_over_what_is_built_in(path: Path) -> None:
    mail, other = (grant_of(read_policy(path), app) for app in ("1000/mail", "1000/x"))
    assert (mail.rules.tokens_per_minute, mail.rules.max_concurrent, mail.weight) == (1000, 1, 2.0)
    assert (other.rules.tokens_per_minute, other.rules.max_concurrent) == (50, None)
    assert mail.origins["tokens_per_minute"] == "[default]"
    assert other.origins["endpoints"] == '[app."1000/*"]'
    assert mail.origins["leases"] == "the built-in policy"


def test_without_a_file_apps_are_free_and_unknown_peers_get_the_least(tmp_path: Path) -> None:
    policy = Policy(tmp_path / "none.toml")
    assert policy.grant("1000/x").rules.tokens_per_minute is None
    assert policy.grant("1000/x").service_class(None) is ServiceClass.STANDARD
    unknown = policy.grant("unknown/anything")
    assert unknown.service_class(None) is ServiceClass.BACKGROUND
    assert not unknown.may_lease
    with pytest.raises(PermissionDenied, match="most_urgent"):
        unknown.service_class(ServiceClass.INTERACTIVE)
    with pytest.raises(PermissionDenied, match="endpoint '/hob/v1/contexts'"):
        policy.enter("unknown/x", "/hob/v1/contexts", Spent(), 0.0)


def test_a_refusal_says_rule_limit_and_use(path: Path) -> None:
    policy = Policy(path)
    grant = policy.enter("1000/mail", PATH, first := Spent(), 0.0)
    with pytest.raises(RateLimited) as caught:
        policy.enter("1000/mail", PATH, Spent(), 0.0)
    assert caught.value.policy == {
        "rule": "max_concurrent", "table": '[app."1000/mail"]', "limit": 1, "used": 1, "retry_after_s": 1.0,
    }  # fmt: skip
    for part in ("1000/mail", "1 of 1", "max_concurrent", '[app."1000/mail"]'):
        assert part in str(caught.value)
    policy.enter("1000/mail", PATH, Spent(), 0.0, is_counted=False)
    policy.leave("1000/mail", first, 1.0)
    policy.enter("1000/mail", PATH, Spent(), 1.0)
    grant.check_model("small-1")
    with pytest.raises(PermissionDenied, match=r"model 'big'.*small-\*"):
        grant.check_model("big")
    with pytest.raises(PermissionDenied, match="endpoint '/hob/v1/stats'"):
        policy.enter("1000/x", "/hob/v1/stats", Spent(), 0.0)


def test_tokens_of_a_minute_are_counted_while_they_are_made(path: Path) -> None:
    policy = Policy(path)
    for ended in (10.0, 20.0):
        use = Spent(20, 0)
        policy.enter("1000/x", PATH, use, 0.0)
        policy.leave("1000/x", use, ended)
    policy.enter("1000/x", PATH, running := Spent(5, 0), 25.0)
    policy.enter("1000/x", PATH, Spent(), 25.0)
    running.num_output_tokens = 5
    with pytest.raises(RateLimited) as caught:
        policy.enter("1000/x", PATH, Spent(), 30.0)
    assert caught.value.policy is not None
    assert caught.value.policy["used"] == 50
    assert caught.value.retry_after_s == pytest.approx(40.0)  # the first 20 fall out 60 s after they were spent
    policy.enter("1000/y", PATH, Spent(), 30.0)
    policy.enter("1000/x", PATH, Spent(), 70.0)


def test_a_changed_file_counts_at_once_and_a_wrong_one_changes_nothing(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Policy(path)
    with pytest.raises(PermissionDenied):
        policy.enter("1000/x", "/hob/v1/stats", Spent(), 0.0)
    _replace(path, "[default]\nmax_concurrent = 7\n")
    assert policy.enter("1000/x", "/hob/v1/stats", Spent(), 0.0).rules.max_concurrent == 7
    _replace(path, "[default]\nmax_concurent = 8\n")
    with caplog.at_level(logging.ERROR):
        assert policy.enter("1000/x", PATH, Spent(), 0.0).rules.max_concurrent == 7
    assert "max_concurent" in caplog.text


def _replace(path: Path, text: str) -> None:
    (path.parent / "new").write_text(text)
    (path.parent / "new").rename(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[default", "not valid TOML"),
        ("[defaults]\n", "defaults"),
        ("[default]\nweight = 0\n", "0.01 to 100"),
        ("[default]\ntokens_per_minute = 0\n", "at least 1"),
        ("[default]\nservice_class = 'urgent'\n", "urgent"),
        ("[app.x]\nmax_concurrent = '3'\n", "int"),
        ("[audit]\nmax_bytes = 1\n", "65536"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(ConfigError, match=expected) as caught:
        read_policy(tmp_path / "policy.toml")
    assert str(tmp_path) in str(caught.value)


# ---- when background work waits ----


def machine(root: Path, **files: str) -> Path:
    """A root with these files; '__' in a name is a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


BATTERY = {
    "sys__class__power_supply__BAT0__type": "Battery",
    "sys__class__power_supply__BAT0__status": "Discharging",
    "sys__class__power_supply__BAT0__capacity": "20",
}


def conditions(root: Path, **rules: float) -> Conditions:
    return Conditions(lambda: BackgroundRules(**rules), root)


def test_a_machine_without_sensors_never_waits(tmp_path: Path) -> None:
    assert conditions(tmp_path, battery_percent=100, celsius=1, busy_percent=1).reason_to_wait() == ""


def test_low_battery(tmp_path: Path) -> None:
    root = machine(tmp_path, **BATTERY)
    assert "on battery at 20 %" in conditions(root).reason_to_wait()
    assert conditions(root, battery_percent=10).reason_to_wait() == ""
    assert conditions(root, battery_percent=0).reason_to_wait() == ""
    machine(root, sys__class__power_supply__AC__type="Mains", sys__class__power_supply__AC__online="1")
    assert conditions(root).reason_to_wait() == ""
    machine(root, sys__class__power_supply__AC__online="0", sys__class__power_supply__BAT0__scope="Device")
    assert conditions(root).reason_to_wait() == "", "a mouse's battery is not the machine's"


def test_heat(tmp_path: Path) -> None:
    root = machine(tmp_path, sys__class__thermal__thermal_zone0__temp="95000")
    assert "95 degrees" in conditions(root).reason_to_wait()
    for harmless in ("60000", "-274000", "255000", "broken"):
        machine(root, sys__class__thermal__thermal_zone0__temp=harmless)
        assert conditions(root).reason_to_wait() == ""


def test_other_programs_but_not_our_own_make_a_machine_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    own = f"proc__{os.getpid()}__stat"

    def tick(busy: int, idle: int, ours: int) -> str:
        now[0] += 1.0
        stat = f"1 (hob) S {' '.join(['0'] * 10)} {ours} 0 0 0"
        machine(tmp_path, proc__stat=f"cpu  {busy} 0 0 {idle} 0 0 0 0\ncpu0 1", **{own: stat})
        return found.reason_to_wait()

    found = conditions(tmp_path, busy_percent=50)
    assert tick(1000, 1000, 0) == "", "the first look compares with nothing"
    assert tick(1180, 1020, 170) == "", "170 of 200 ticks, but 170 of them are ours"
    assert "90 %" in tick(1360, 1040, 170)
    assert tick(1370, 1230, 170) == ""


def test_work_is_delayed_until_the_condition_is_over(tmp_path: Path) -> None:
    root = machine(tmp_path, **BATTERY)
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert "battery" in waits.waiting_for
        if len(slept) == 3:
            machine(root, sys__class__power_supply__BAT0__status="Charging")

    waits = conditions(root)
    asyncio.run(waits.clear(sleep))
    assert len(slept) == 3
    assert waits.waiting_for == ""


# ---- the audit log ----


def entry(number: int, body: str | None = None) -> Entry:
    return Entry(float(number), "1/a", 1, 2, "POST /v1/x", 200, None, "standard", 10, 5, 3, 1.5, body)


def test_rows_are_written_and_read_back(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit", AuditRules)
    for number in range(30):
        log.note(entry(number))
    log.close()
    assert [found.time for found in read_last(tmp_path / "audit", 3)] == [27.0, 28.0, 29.0]
    assert read_last(tmp_path / "audit", 1)[0] == entry(29)
    assert (tmp_path / "audit" / "audit.db").stat().st_mode & 0o077 == 0


def test_files_are_put_aside_by_size_and_the_oldest_goes(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, lambda: AuditRules(max_bytes=1 << 16, num_files=2))
    for number in range(5):
        log._write([entry(number, "x" * 80_000)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit.1.db", "audit.2.db"]
    with sqlite3.connect(tmp_path / "audit.1.db") as database:
        assert database.execute("SELECT time FROM requests").fetchall() == [(4.0,)]
    database.close()


def test_a_log_that_cannot_be_written_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "audit").write_text("a file where the folder should be")
    log = AuditLog(tmp_path / "audit", AuditRules)
    log._write([entry(1)])
    log._write([entry(2), entry(3)])
    assert log.num_lost == 3
    assert len(caplog.records) == 1
