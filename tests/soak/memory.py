"""python -m tests.soak.memory [--seconds 600]: models and contexts thrash, PSS stays under budget plus overhead.

A real daemon with several random checkpoints that do not fit the budget together. Clients ask all of them for
completions and turns of contexts, take and end leases; the budget shrinks and grows between rounds. Meanwhile PSS of
both processes is sampled. Prints JSON; exit status 1 if the promise was broken once or a request went wrong.

The memory slopes are fitted to the anonymous memory at the end of each round, when nothing is in flight and no model is
resident, in bytes an hour with their standard errors. Not to PSS: of that a library takes more when other programs that
use it end.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from hob.client import Client
from hob.errors import HobError, Overloaded
from hob.memory import processes_below, rollup_bytes
from hob.models.pack import ensure_packed
from tests.daemons import Daemon, short_folder, until
from tests.tiny import TinyShape, write_tiny_gguf

SHAPE = TinyShape(
    num_layers=12, hidden_size=256, num_heads=8, num_kv_heads=4, ffn_size=1024, context_length=4096, can_serve=True
)
"""46 MB of float32 weights, 6 kB of KV a token."""
NAMES = ("alpha", "beta", "gamma", "delta")
MB = 1_000_000
BUDGETS = (180 * MB, 140 * MB, 110 * MB)
SAMPLE_S = 0.02
CLIENTS = 4
PATIENCE_S = 300.0
"""Of a client: on a busy machine a reply is late, not wrong."""
ACTS = 8
"""Of a client in a round."""


@dataclass
class Rest:
    """What both processes have of their own while nothing is in flight and no model is resident."""

    after_s: float
    api_bytes: int
    engine_bytes: int


@dataclass
class Findings:
    """What a run brought."""

    seconds: float = 0.0
    num_requests: int = 0
    num_refused: int = 0
    num_loads: int = 0
    num_unloads: int = 0
    num_samples: int = 0
    peak_pss_bytes: int = 0
    worst_bytes: int = -(1 << 60)
    """Most that PSS was ever above the budget of its moment. Below `overhead_bytes`: the promise held."""
    overhead_bytes: int = 0
    resting: list[Rest] = field(default_factory=list)
    """The end of each round."""
    wrong: list[str] = field(default_factory=list)


class Sampler:
    """Looks at PSS in a thread of its own."""

    def __init__(self, pid: int, budget: int, findings: Findings) -> None:
        self.budget = budget
        self._pid = pid
        self._findings = findings
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._is_over.wait(SAMPLE_S):
            budget = self.budget  # before the look: a budget that shrinks meanwhile does not count yet
            pss = pss_of(self._pid)
            self._findings.num_samples += 1
            self._findings.peak_pss_bytes = max(self._findings.peak_pss_bytes, pss)
            self._findings.worst_bytes = max(self._findings.worst_bytes, pss - max(budget, self.budget))

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()


def pss_of(pid: int) -> int:
    """Of a daemon and its engine process; a child that packs a model is not the service's memory."""
    return sum(p.pss_bytes for p in processes_below(pid) if p.role in ("api", "engine"))


def anonymous_of(pid: int, role: str) -> int:
    """What a daemon's process of this role has of its own."""
    return sum(rollup_bytes(p.pid, "Anonymous") or 0 for p in processes_below(pid) if p.role == role)


def make_models(folder: Path) -> None:
    """The checkpoints, packed."""
    folder.mkdir()
    for seed, name in enumerate(NAMES):
        ensure_packed(write_tiny_gguf(folder / f"{name}.gguf", seed, "F32", SHAPE))


def run(seconds: float, seed: int, acts: int = ACTS, clients: int = CLIENTS, granted: int | None = None) -> Findings:
    """The soak. granted: what the daemon is told its budget is, where that is not what it is held to (the control)."""
    findings, rng = Findings(), random.Random(seed)
    with short_folder() as home:
        make_models(home / "models")
        settings = {"budget": granted or BUDGETS[0], "keep_alive_s": 5, "kv_tokens": 16384, "max_contexts": 1000}
        with Daemon(home, model=NAMES[0], **settings).wait_ready() as daemon:
            start = time.monotonic()
            with Sampler(daemon.process.pid, BUDGETS[0], findings) as sampler, daemon.client(PATIENCE_S) as owner:
                while time.monotonic() < start + seconds:
                    if granted is None:
                        change_budget(owner, sampler, rng.choice(BUDGETS))
                    with ThreadPoolExecutor(clients) as pool:
                        seeds = [rng.random() for _ in range(clients)]
                        for client_findings in pool.map(lambda s: play(daemon, s, acts), seeds):
                            findings.num_requests += client_findings.num_requests
                            findings.num_refused += client_findings.num_refused
                            findings.wrong += client_findings.wrong
                    rest(owner)
                    of_role = [anonymous_of(daemon.process.pid, role) for role in ("api", "engine")]
                    findings.resting.append(Rest(time.monotonic() - start, *of_role))
                memory = owner.memory()
            findings.seconds = time.monotonic() - start
            findings.num_loads, findings.num_unloads = memory["num_loads"], memory["num_unloads"]
            findings.overhead_bytes = memory["overhead_bytes"]
    return findings


def change_budget(owner: Client, sampler: Sampler, budget: int) -> None:
    """Nothing is in flight: what is too much is given back at once, and then the new budget counts."""
    owner.set_budget(budget)
    until(lambda: owner.memory()["reserved_bytes"] <= budget, "the budget to be kept", PATIENCE_S)
    time.sleep(2 * SAMPLE_S)
    sampler.budget = budget


def rest(owner: Client) -> None:
    """Unload all models, those too that a lease has asked for and that come only now."""

    def are_gone() -> bool:
        for name in NAMES:
            for go in (owner.end_lease, owner.unload):
                with suppress(HobError):  # no lease, or not loaded
                    go(name)
        return all(model["state"] == "unloaded" for model in owner.memory()["models"])

    until(are_gone, "the models to go", PATIENCE_S)


def play(daemon: Daemon, seed: float, acts: int) -> Findings:
    """One client's part of a round."""
    rng, findings = random.Random(seed), Findings()
    with daemon.client(PATIENCE_S) as client:
        contexts: dict[str, str] = {}
        for _ in range(acts):
            model = rng.choice(NAMES)
            try:
                act(client, rng, model, contexts)
                findings.num_requests += 1
            except Overloaded as error:
                findings.num_refused += 1
                print("refused:", error.message, file=sys.stderr)
            except HobError as error:
                findings.wrong.append(f"{type(error).__name__}: {error.message}")
        for context_id in contexts.values():
            client.delete_context(context_id)
    return findings


def act(client: Client, rng: random.Random, model: str, contexts: dict[str, str]) -> None:
    """One thing that a client does."""
    kind = rng.random()
    prompt = [rng.randrange(3, 250) for _ in range(rng.choice((20, 200, 1500, 3000)))]
    if kind < 0.6:
        client.complete(prompt, model=model, max_tokens=rng.randrange(1, 30), service_class=rng.choice(CLASSES))
    elif kind < 0.9:
        client.model = model
        if model not in contexts:
            contexts[model] = client.create_context()["id"]
        client.turn(contexts[model], prompt="x" * rng.randrange(10, 400), max_tokens=10, model=model)
        client.model = "default"
    elif kind < 0.95:
        client.lease(model, rank=rng.randrange(5), keep_alive_s=2)
    else:
        client.classify("abc", ["x", "y"], model=model)


CLASSES = ("interactive", "standard", "background")


def slopes(rests: list[Rest]) -> dict[str, tuple[float, float]]:
    """Of each process over the last three quarters of the rounds (the first warms up) and over the last half."""
    found = {}
    for part, last in (("three_quarters", 3 * len(rests) // 4), ("last_half", len(rests) // 2)):
        for role in ("api", "engine"):
            points = [(rest.after_s, getattr(rest, f"{role}_bytes")) for rest in rests[len(rests) - last :]]
            found[f"{role}_{part}"] = slope(points)
    return found


def slope(points: list[tuple[float, int]]) -> tuple[float, float]:
    """Bytes an hour and their standard error, by least squares."""
    if len(points) < 4:
        return 0.0, float("inf")
    x, y = (np.array(values, float) for values in zip(*points, strict=True))
    x = (x - x.mean()) / 3600
    rate = float((x * y).sum() / (x * x).sum())
    residual = y - y.mean() - rate * x
    return rate, float(np.sqrt((residual**2).sum() / (len(x) - 2) / (x * x).sum()))


def main() -> int:
    """Exit status 1 if the promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    findings = run(given.seconds, given.seed)
    print(json.dumps(asdict(findings) | {"slopes": slopes(findings.resting)}, indent=2))
    return int(findings.worst_bytes > findings.overhead_bytes or bool(findings.wrong))


if __name__ == "__main__":
    sys.exit(main())
