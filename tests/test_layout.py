"""Imports point down only. The house is drawn in docs/architecture.md."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "hob"

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "durable": set(),
    "request": set(),
    "pooling": {"request"},
    "rundir": {"errors"},
    "systemd": set(),
    "memory": set(),
    "logs": set(),
    "energy": set(),
    "config": {"errors"},
    "messages": {"request"},
    "native": {"errors"},
    "kvcache": {"durable", "request", "errors", "config", "messages"},
    "experts": {"request", "errors", "config", "native"},
    "models": {"durable", "errors", "config", "native"},
    "engine": {"models", "kvcache", "experts", "native", "messages", "request", "errors", "config"},
    "scheduler": {"kvcache", "messages", "pooling", "request", "errors", "config"},
    "service": {
        "durable",
        "scheduler",
        "engine",
        "models",
        "kvcache",
        "messages",
        "request",
        "errors",
        "config",
        "logs",
    },
    "client": {"request", "errors", "config", "unix_transport"},
    "unix_transport": {"errors", "service"},
    "heads": {"durable", "errors"},
    "tasks": {"client", "heads", "errors", "request"},
    "agents": {"client", "errors", "request"},
}
"""Package or module -> what it may import beside itself. Those not named here are above all of these."""

EXEMPT: dict[str, set[str]] = {
    "native/reference.py": {"models"},  # the core in NumPy: it reads the same packed file and shapes
    "native/reference_sampling.py": {"request"},
}
"""File -> what it may import although its package may not. Each is imported by tests and benchmarks only."""

ABOVE = {"api", "assembly", "daemon", "cli", "demo", "lab", "units", "doctor"}
FORBIDDEN_ABOVE: dict[str, set[str]] = {
    "api": {"daemon", "cli", "demo", "client", "engine", "scheduler", "lab"},
    "assembly": {"daemon", "cli", "demo", "client", "lab"},
    "daemon": {"cli", "demo", "client", "lab", "api", "models", "engine"},
    "cli": {"engine", "scheduler", "kvcache", "api"},  # of service: the policy and its log, which need no daemon
    "units": {"daemon", "cli", "demo", "api", "service"},
    "doctor": {"daemon", "cli", "demo", "api", "engine", "scheduler", "kvcache"},
    "demo": {"engine", "scheduler", "kvcache", "service", "api"},
    "lab": {"cli", "demo", "daemon", "api"},
}


def owner(path: Path) -> str:
    """The package under hob, or the module, that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """What a file imports from hob, anywhere in it: lazy imports point down too. Not what only types need."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it absolutely"
            if node.module == "hob":
                names |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith("hob."):
                names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("hob.")}
    return names - {owner(path), "__version__"}


FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or not path.name.startswith("__"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    name = owner(path)
    found = imported(path) - EXEMPT.get(str(path.relative_to(ROOT)), set())
    if name in ALLOWED:
        assert found <= ALLOWED[name], f"{path.name} may not import {sorted(found - ALLOWED[name])}"
    else:
        assert name in ABOVE, f"'{name}' has no place in the house; give it one in this test and in architecture.md"
        assert not found & FORBIDDEN_ABOVE[name], f"{path.name} may not import {sorted(found & FORBIDDEN_ABOVE[name])}"


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(p.relative_to(ROOT))
        for p in FILES
        if p.read_text().strip() and not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert not silent
