"""python -m tests.soak [--rounds 10000] [--leaks 200]: the long soak, and its positive control. Prints JSON."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.soak.leaks import KINDS, plant
from tests.soak.sessions import Sessions

PART = 1000
"""Rounds of one world; each has its own seed, every third its own threads."""


def main() -> int:
    """Exit status 1 if a reply was wrong, an alarm was false, or the control missed too many leaks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--leaks", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    start = time.perf_counter()
    totals: dict[str, Any] = {}
    for part in range(-(-given.rounds // PART)):
        with tempfile.TemporaryDirectory() as folder:
            world = Sessions(Path(folder), given.seed + part, is_threaded=part % 3 == 2)
            tally = vars(world.run(min(PART, given.rounds - part * PART)))
        totals = {name: totals.get(name, type(value)()) + value for name, value in tally.items()}
        print(f"{totals['num_rounds']} rounds, {totals['num_wrong']} wrong", file=sys.stderr)
    control = {}
    for is_checking in (True, False):
        results = []
        for seed in range(given.leaks):
            with tempfile.TemporaryDirectory() as folder:
                results.append(plant(Path(folder), seed, KINDS[seed % len(KINDS)], is_checking))
        control["with_checks" if is_checking else "without_checks"] = {
            "planted": len(results),
            "alarms": sum(result.num_alarms > 0 for result in results),
            "wrong_replies": sum(result.is_wrong for result in results),
        }
    totals |= {"control": control, "seconds": round(time.perf_counter() - start, 1), "seed": given.seed}
    print(json.dumps(totals, indent=2))
    checked, unchecked = control["with_checks"], control["without_checks"]
    is_right = (
        not totals["num_wrong"]
        and not totals["num_alarms"]
        and not checked["wrong_replies"]
        and checked["alarms"] == given.leaks
        and unchecked["wrong_replies"] >= 0.95 * given.leaks
    )
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
