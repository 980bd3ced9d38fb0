"""What tests share: the default model, fetched once, and the measured data sets beside the repository."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

import pytest

from hob.models.catalog import Catalog
from hob.models.known import DEFAULT_MODEL

REPOSITORY = Path(__file__).resolve().parent.parent
HAS_TASKS = all(importlib.util.find_spec(name) for name in ("sklearn", "matplotlib"))
collect_ignore = (
    []
    if HAS_TASKS
    else [
        "api/test_tasks.py",
        "cli/test_eval.py",
        "cli/test_examples.py",
        "unit/test_heads.py",
        "unit/test_task_metrics.py",
    ]
)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's job in the background; what we start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str | None:
    """Say what is left out."""
    return None if HAS_TASKS else "no extra 'tasks' (scikit-learn, matplotlib) here: the tests of heads are left out"


@pytest.fixture(scope="session")
def default_gguf() -> Path:
    """The default model's file, under HOB_HOME or <repository>/.cache/hob. For tests marked `weights`.

    Fetched the first time; a test that needs it fails if it cannot be had.
    """
    home = Path(os.environ.get("HOB_HOME") or REPOSITORY / ".cache" / "hob")
    return Catalog(home / "models").pull(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets; its tests are skipped where it is not laid out beside the repository."""
    folder = (REPOSITORY / ".." / "shared" / "data").resolve()
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: the data sets are kept apart from the repository")
    return folder
