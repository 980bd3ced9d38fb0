"""The short form of `python -m tests.fuzz`: the same inputs, some hundred of each, without a sanitizer."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.fuzz.__main__ import PLANTED, Watcher, check_it_finds
from tests.fuzz.targets import TARGETS
from tests.needs import needs

needs("gguf")
NUM_RUNS = 300


def test_the_harness_finds_what_is_planted(tmp_path: Path) -> None:
    watcher = check_it_finds([sys.executable], dict(os.environ), tmp_path)
    assert set(watcher.tally.findings) >= PLANTED
    assert any(path.read_bytes()[:4] == b"GGUF" for path in watcher.findings.glob("died-*"))


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "planted"])
def test_no_input_does_harm(name: str, tmp_path: Path) -> None:
    watcher = Watcher(name, [sys.executable], dict(os.environ), tmp_path)
    tally = watcher.run(120, NUM_RUNS)
    assert tally.runs >= NUM_RUNS
    assert not tally.findings, "\n".join(path.read_text()[-2000:] for path in watcher.findings.glob("*.txt"))
