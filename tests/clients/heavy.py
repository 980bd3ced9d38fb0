"""Clients too large to be installed for every run of the tests: `pip install '.[heavy-clients]'`, then as ever.

litellm took 42 s and 355 MB to install, lm-eval 52 s and 674 MB.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest


def heavy(name: str) -> Any:
    """The module, or a skip that says how to have it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        pytest.skip(f"{name} is large and not installed: pip install '.[heavy-clients]'")
