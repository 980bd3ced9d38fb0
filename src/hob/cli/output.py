"""How commands print: plain aligned tables, and JSON for programs. No box drawing, so that `grep` and `awk` work."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import msgspec


def print_json(value: Any) -> None:
    """One JSON value, indented."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]], empty: str = "") -> None:
    """Columns as wide as they need; numbers to the right. Where there are no rows `empty` goes to standard error."""
    if not rows:
        if empty:
            print(empty, file=sys.stderr)
        return
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    right = [all(_is_number(row[i]) for row in cells) for i in range(len(header))]
    for line in [list(header), *cells]:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
        print("  ".join(padded).rstrip())


def _is_number(text: str) -> bool:
    return text[:1].isdigit() and not text[-1:].isalpha()


def print_memory(report: dict[str, Any]) -> None:
    """The ledger: one line of sums, one of each resident model."""
    budget, reserved = human_bytes(report["budget_bytes"]), human_bytes(report["reserved_bytes"])
    line = f"budget {budget}, {reserved} of it reserved, beside it at most {human_bytes(report['overhead_bytes'])}"
    print(line if report["pressure"] == "none" else f"{line}; memory pressure: {report['pressure']}")
    rows = [
        [
            model["name"],
            model["state"],
            human_bytes(model["num_bytes"]),
            human_bytes(model["accounts"].get("weights", 0)),
            human_bytes(model["accounts"].get("kv", 0)),
            model["num_running"],
            model["num_waiting"],
            f"{model['idle_s']:.0f}",
            "pinned" if model["is_pinned"] else model["rank"],
            ",".join(model["leases"]) or "-",
        ]
        for model in report["models"]
    ]
    print_table(["model", "state", "memory", "weights", "kv", "running", "waiting", "idle s", "rank", "leases"], rows)


def human_bytes(count: float) -> str:
    """98362432 -> '98.4 MB' (decimal units, as disks are sold)."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
