"""Hob: one daemon holds a small language model, every app on the device shares it.

`import hob` costs nothing; `hob.Client` is loaded when it is first named.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hob.client import Client as Client

try:
    __version__ = version("hob-slm")
except PackageNotFoundError:  # run from a tree that was never installed
    __version__ = "0.0.0"

__all__ = ["Client", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Client":
        from hob.client import Client

        return Client
    raise AttributeError(f"module 'hob' has no attribute '{name}'")
