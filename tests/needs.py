"""Packages that an environment made before they were added may lack. There a test is skipped; in CI it fails."""

from __future__ import annotations

import importlib
import os

import pytest


def needs(name: str) -> None:
    """Skip the calling module, unless CI is set, where the package is missing."""
    if os.environ.get("CI"):
        importlib.import_module(name)
    else:
        pytest.importorskip(name, reason=f"this environment has no {name}: run `make test` to have it installed")
