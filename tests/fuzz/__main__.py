"""Hostile files and texts against the sanitized compute core: `python -m tests.fuzz [TARGET ...] [--seconds 600]`.

`--jobs 2` fuzzes two targets at a time; `--json` prints the table at the end as one JSON object as well.

    targets.py     what is fuzzed, from valid inputs of our own making to a step of the engine
    mutations.py   how inputs are changed
    worker.py      the process that runs them
    here           builds the core with AddressSanitizer and UndefinedBehaviorSanitizer, watches, counts, keeps findings

A finding is an input that ends the process, raises what is no HobError, takes a minute of CPU, or 2 GB of memory. First
the harness has to find three mistakes that are planted for it, or nothing it says would count. Findings are written to
build/fuzz/TARGET/findings, each with what was seen; each one that is mended becomes a test where its kind lives.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.fuzz.targets import TARGETS
from tests.fuzz.worker import MEMORY_STATUS
from tests.sanitize import FIXED_ADDRESSES, REPOSITORY, SANITIZERS, Sanitizer, build, environment

RUNS_OF_A_WORKER = 20_000
HANG_CPU_S = 60.0
PLANTED = {"died", "KeyError", "hung"}


@dataclass
class Tally:
    """What came of one target."""

    seconds: float = 0.0
    runs: int = 0
    cpu_s: float = 0.0
    outcomes: int = 0
    slowest_s: float = 0.0
    findings: Counter[str] = field(default_factory=Counter)

    def line(self, name: str) -> str:
        """For the table of docs/results.md."""
        slowest = f"{self.slowest_s:.2f} s"
        found = ", ".join(f"{kind} {count}" for kind, count in self.findings.items()) or "none"
        spent = f"{self.seconds:.0f} | {self.cpu_s:.0f}"
        return f"| {name} | {spent} | {self.runs:,} | {self.outcomes:,} | {slowest} | {found} |"


class Watcher:
    """Runs workers on one target until time or runs are up, and notes what befalls them."""

    def __init__(
        self, name: str, python: list[str], env: dict[str, str], folder: Path, hang_cpu_s: float = HANG_CPU_S
    ) -> None:
        self.name, self.tally = name, Tally()
        self._python, self._env, self._hang_cpu_s = python, env, hang_cpu_s
        self.folder = folder / name
        self.findings = self.folder / "findings"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.findings.mkdir(parents=True)
        memory = Path("/dev/shm")
        self._work = (memory if memory.is_dir() else self.folder) / f"hob-fuzz-{name}-{os.getpid()}"
        self._work.mkdir()

    def run(self, seconds: float, max_runs: int | None = None, seed: int = 1, until: set[str] | None = None) -> Tally:
        """Also ends when `max_runs` inputs were run, or all kinds of finding in `until` were made."""
        start = time.monotonic()
        end = start + seconds
        try:
            while time.monotonic() < end and (max_runs is None or self.tally.runs < max_runs):
                if until is not None and set(self.tally.findings) >= until:
                    break
                left = RUNS_OF_A_WORKER if max_runs is None else min(RUNS_OF_A_WORKER, max_runs - self.tally.runs)
                self._worker(end, seed, left)
                self._read_exceptions()
                seed += 1
            return self.tally
        finally:
            self.tally.seconds = time.monotonic() - start
            shutil.rmtree(self._work, ignore_errors=True)

    def _worker(self, end: float, seed: int, max_runs: int) -> None:
        log = self._work / "log"
        command = [*self._python, "-m", "tests.fuzz.worker", self.name, str(self._work), str(seed), str(max_runs)]
        (self._work / "beat").unlink(missing_ok=True)
        with log.open("wb") as stderr:
            worker = subprocess.Popen(command, cwd=REPOSITORY, env=self._env, stdout=stderr, stderr=stderr)
        last_beat, cpu_at_beat, cpu_s, why = -1, 0.0, 0.0, ""
        while worker.poll() is None:
            time.sleep(0.05)
            cpu_s = _cpu_s(worker.pid) or cpu_s
            if (beat := self._beat()) != last_beat:
                last_beat, cpu_at_beat = beat, cpu_s
            elif cpu_s - cpu_at_beat > self._hang_cpu_s:
                why = "hung"
            if why or time.monotonic() > end:
                worker.kill()
        status = worker.wait()
        self.tally.runs += max(self._beat(), 0)
        self.tally.cpu_s += cpu_s
        if not why and status == MEMORY_STATUS:
            why = "memory"
        elif not why and status != 0 and time.monotonic() <= end:
            why = "died"
        if why:
            self._keep(
                why, (self._work / "input").read_bytes(), f"status {status}\n{log.read_text('utf-8', 'replace')}"
            )

    def _beat(self) -> int:
        try:
            return int.from_bytes((self._work / "beat").read_bytes(), "little")
        except OSError:
            return -1

    def _keep(self, why: str, data: bytes, words: str) -> None:
        self.tally.findings[why] += 1
        name = f"{why}-{self.tally.findings[why]}"
        (self.findings / name).write_bytes(data)
        (self.findings / f"{name}.txt").write_text(words)

    def _read_exceptions(self) -> None:
        found = self._work / "exceptions"
        for line in found.read_text().splitlines() if found.exists() else []:
            outcome, data, words = json.loads(line)
            self._keep(outcome.split()[0], bytes.fromhex(data), words)
        found.unlink(missing_ok=True)
        seen = self._work / "seen"
        self.tally.outcomes = len(json.loads(seen.read_text())) if seen.exists() else 0
        slowest = self._work / "slowest_s"
        if slowest.exists():
            self.tally.slowest_s = float(slowest.read_text())
            shutil.copy(self._work / "slowest", self.folder / "slowest")


def _cpu_s(pid: int) -> float:
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def check_it_finds(python: list[str], env: dict[str, str], folder: Path) -> Watcher:
    """Raises SystemExit if one of the planted mistakes goes unnoticed."""
    watcher = Watcher("planted", python, env, folder, hang_cpu_s=3.0)
    tally = watcher.run(600, 20_000, until=PLANTED)
    if not set(tally.findings) >= PLANTED:
        raise SystemExit(f"of the planted mistakes {PLANTED} the harness found only {dict(tally.findings)}")
    print(f"planted: found {dict(tally.findings)} in {tally.runs:,} runs", flush=True)
    return watcher


def sanitized() -> tuple[list[str], dict[str, str]]:
    """The Python of the sanitizer's build, and its environment."""
    sanitizer: Sanitizer = SANITIZERS["address"]
    env = environment(sanitizer)
    env["ASAN_OPTIONS"] += ":allocator_may_return_null=1:quarantine_size_mb=32"
    return [*FIXED_ADDRESSES, str(build("address", sanitizer))], env


def main() -> int:
    """Exit status 1 if there was a finding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in TARGETS if name != "planted"]
    parser.add_argument("targets", nargs="*", default=names, help=", ".join(names))
    parser.add_argument("--seconds", type=float, default=600, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time")
    parser.add_argument("--json", action="store_true", help="print the tallies as one JSON object at the end")
    args = parser.parse_args()
    python, env = sanitized()
    folder = REPOSITORY / "build" / "fuzz"
    check_it_finds(python, env, folder)

    def fuzz(name: str) -> Tally:
        tally = Watcher(name, python, env, folder).run(args.seconds, seed=args.seed)
        print(f"{name}: {tally.runs:,} inputs, findings {dict(tally.findings)}", flush=True)
        return tally

    with ThreadPoolExecutor(args.jobs) as pool:
        tallies = dict(zip(args.targets, pool.map(fuzz, args.targets), strict=True))
    print("| target | seconds | of CPU | inputs run | ways they ended | slowest | findings |\n" + "|---" * 7 + "|")
    for name, tally in tallies.items():
        print(tally.line(name))
    if args.json:
        print(json.dumps({name: asdict(tally) for name, tally in tallies.items()}))
    num_findings = sum(tally.findings.total() for tally in tallies.values())
    where = f", kept in {folder}/TARGET/findings" if num_findings else ""
    print(f"{sum(tally.runs for tally in tallies.values()):,} inputs, {num_findings} findings{where}", file=sys.stderr)
    return int(num_findings > 0)


if __name__ == "__main__":
    sys.exit(main())
