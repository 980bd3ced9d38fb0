"""One process that makes inputs and runs them: `python -m tests.fuzz.worker TARGET FOLDER SEED MAX_RUNS`.

Before each run the input lies in FOLDER/input and the number of runs in FOLDER/beat, so that whoever watches knows what
killed it. There is no measure of coverage: an input is kept to be changed further when its end was not seen before,
which in a reader where each check has words of its own comes near to one.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import sys
import time
import traceback
from pathlib import Path

from hob.errors import HobError
from tests.fuzz.targets import TARGETS

MAX_MEMORY_BYTES = 2_000_000_000
"""Of the process at its largest, with the sanitizer's own: an input that takes it further is a finding."""
MEMORY_STATUS = 3
MAX_KEPT = 2000
_VALUE = re.compile(r"/\S+|'[^']*'|\"[^\"]*\"")
_WORD = re.compile("[a-z]{3,}")


def outcome_of(error: BaseException) -> str:
    """Where an error comes from: its kind, the last place of ours, and its first words without values."""
    frames = traceback.extract_tb(error.__traceback__)
    place = next((f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames) if "/hob/" in f.filename), "?")
    words = _WORD.findall(_VALUE.sub("", str(error)[:1000]))[:8]
    return f"{type(error).__name__} {place} {' '.join(words)}"


def main(name: str, folder: Path, seed: int, max_runs: int) -> int:
    """Exit status: 0 after max_runs, MEMORY_STATUS after an input that took too much memory."""
    target, rng = TARGETS[name](folder), random.Random(seed)
    kept = folder / "kept"
    kept.mkdir(exist_ok=True)
    seeds = target.seeds()
    corpus = [*seeds, *(path.read_bytes() for path in sorted(kept.iterdir()))]
    seen = set(json.loads((folder / "seen").read_text())) if (folder / "seen").exists() else set()
    beat = os.open(folder / "beat", os.O_RDWR | os.O_CREAT)
    slowest_s = float((folder / "slowest_s").read_text()) if (folder / "slowest_s").exists() else 0.0
    findings = (folder / "exceptions").open("a")
    for i in range(max_runs):
        data = corpus[i] if i < len(seeds) else rng.choice(corpus)
        for _ in range(0 if i < len(seeds) else rng.choice((1, 1, 1, 2, 4))):
            data = target.change(data, rng, corpus)
        (folder / "input").write_bytes(data)
        os.pwrite(beat, i.to_bytes(8, "little"), 0)
        start_s = time.process_time()
        try:
            outcome = target.run(data)
        except HobError as error:
            outcome = outcome_of(error)
        except Exception as error:  # a finding
            outcome = outcome_of(error)
            if outcome not in seen:
                print(json.dumps([outcome, data.hex(), traceback.format_exc()]), file=findings, flush=True)
        took_s = time.process_time() - start_s
        if took_s > slowest_s:
            slowest_s = took_s
            (folder / "slowest").write_bytes(data)
            (folder / "slowest_s").write_text(str(slowest_s))
        if outcome not in seen:
            seen.add(outcome)
            (folder / "seen").write_text(json.dumps(sorted(seen)))
            if i >= len(seeds) and len(corpus) < MAX_KEPT:
                corpus.append(data)
                (kept / f"{len(corpus):06}").write_bytes(data)
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10 > MAX_MEMORY_BYTES:
            return MEMORY_STATUS
    os.pwrite(beat, max_runs.to_bytes(8, "little"), 0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
