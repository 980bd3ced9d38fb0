"""Tokens per second with speculation and without, where guesses come true and where they do not.

    python benchmarks/speculation.py [MODEL.gguf] [--loads code,json,chat] [--json]

Engine and scheduler in one process, as the engine process runs them, without a prefix cache. Each load with 1 and with
4 sequences, off and auto in turn, medians over --rounds; the tokens must be the same. The scheduler lives on from round
to round, as in a service, and begins with a round that does not count.

code   a file of functions that are alike goes on with the next one: greedy completions
json   records made into JSON after some examples: greedy completions, and on with records of the model's own
chat   questions in the model's chat template, drawn at temperature 0.8
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import machine
from hob.config import SchedulerConfig, load_config
from hob.engine.local import LocalEngine
from hob.models.catalog import Catalog
from hob.models.chat import ChatEncoder
from hob.models.gguf import open_gguf
from hob.models.known import DEFAULT_MODEL
from hob.models.pack import ensure_packed
from hob.models.tokenizer import Tokenizer
from hob.request import Request, SamplingParams
from hob.scheduler.scheduler import Scheduler
from hob.service.step import run_step

NUM_BLOCKS = 400
MAX_TOKENS = 160
CODE = """def {0}(items, limit):
    \"\"\"Return the {0} of the items that are below the limit.\"\"\"
    found = []
    for index, item in enumerate(items):
        if item.value < limit and item.name not in found:
            found.append(item.name)
    if not found:
        raise ValueError("no items below the limit")
    return sorted(found, key=len)[: limit // 2]
"""
NAMES = ["names", "labels", "titles", "words", "tags"]
RECORD = 'Text: {0} is {1} years old and lives in {2}.\nJSON: {{"name": "{0}", "age": {1}, "city": "{2}"}}\n\n'
PEOPLE = [
    ("Ada Lovelace", 36, "London"),
    ("Alan Turing", 41, "Manchester"),
    ("Grace Hopper", 85, "New York"),
    ("Konrad Zuse", 55, "Berlin"),
    ("Emmy Noether", 53, "Erlangen"),
]
QUESTIONS = [
    "What should I pack for a week in the mountains?",
    "Write a short story about a lighthouse keeper.",
    "Why do leaves change their colour in autumn?",
    "How can I learn to play the piano as an adult?",
]


class Host:
    """One engine, and a scheduler for each way."""

    def __init__(self, model: Path) -> None:
        self.engine = LocalEngine("benchmark", ensure_packed(model), load_config()[0].engine, 512)
        self.engine.open_pool(NUM_BLOCKS)
        self._num_requests = 0

    def scheduler(self, speculation: str) -> Scheduler:
        """A fresh one."""
        info = self.engine.info
        config = SchedulerConfig(speculation=speculation, prefix_cache=False)
        return Scheduler(config, NUM_BLOCKS, info.context_length, info.vocab_size)

    def run(self, scheduler: Scheduler, prompts: list[list[int]], temperature: float) -> tuple[float, list[list[int]]]:
        """Tokens per second after the first of each, and the tokens."""
        replies: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            self._num_requests += 1
            name = f"r{self._num_requests}"
            sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=temperature, seed=i)
            scheduler.add(Request(name, "app", prompt, sampling=sampling), time.monotonic())
            replies[name] = []
        start, num_before = time.perf_counter(), 0
        while (outputs := run_step(self.engine, scheduler, time.monotonic)) is not None:
            for output in outputs:
                if output.error is not None:
                    raise SystemExit(f"the step failed: {output.error.message}")
                replies[output.request_id] += output.token_ids
            if not num_before and all(replies.values()):
                start, num_before = time.perf_counter(), sum(map(len, replies.values()))
        num_tokens = sum(map(len, replies.values())) - num_before
        return num_tokens / (time.perf_counter() - start), list(replies.values())


def compare(host: Host, prompts: list[list[int]], temperature: float, rounds: int) -> dict[str, float]:
    """Off and auto in turn. Ends the program if they differ in a token."""
    schedulers = {speculation: host.scheduler(speculation) for speculation in ("off", "auto")}
    speeds: dict[str, list[float]] = {"off": [], "auto": []}
    for turn in range(rounds + 1):
        said = []
        for speculation, scheduler in schedulers.items():
            speed, replies = host.run(scheduler, prompts, temperature)
            said.append(replies)
            if turn:
                speeds[speculation].append(speed)
        if said[0] != said[1]:
            raise SystemExit("the tokens differ with speculation and without: that must not be")
    stats = schedulers["auto"].stats()
    off, auto = statistics.median(speeds["off"]), statistics.median(speeds["auto"])
    ratio = statistics.median(b / a for a, b in zip(speeds["off"], speeds["auto"], strict=True))
    return {
        "off": round(off, 1),
        "auto": round(auto, 1),
        "ratio": round(ratio, 3),
        "drafted": stats.num_drafted_tokens,
        "accepted": stats.num_accepted_tokens,
        "steps": stats.num_steps,
        "steps_off": schedulers["off"].stats().num_steps,
    }


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="GGUF file; the default model if left out")
    parser.add_argument("--loads", default="code,json,chat", help="which, with commas")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = args.model or Catalog(load_config()[0].models_dir).pull(DEFAULT_MODEL)
    with open_gguf(model) as file:
        tokenizer = Tokenizer(file.metadata)
        encoder = ChatEncoder.from_metadata(file.metadata, tokenizer)
    host = Host(model)
    functions = [CODE.format(name) for name in NAMES]
    files = [tokenizer.encode("\n\n".join([*functions[i:], *functions[:i]][:3]) + "\n\ndef") for i in range(4)]
    records = [RECORD.format(*person) for person in PEOPLE]
    lists = [tokenizer.encode("".join([*records[i:], *records[:i]]) + "Text:") for i in range(4)]
    questions = [encoder.encode([{"role": "user", "content": text}]) for text in QUESTIONS]
    before = machine.CpuTimes.now()
    results: dict[str, Any] = {}
    for name, prompts, temperature in (
        ("code", files, 0.0),
        ("json", lists, 0.0),
        ("chat", questions, 0.8),
    ):
        for count in (1, 4) if name in args.loads.split(",") else ():
            results[f"{name}_{count}"] = compare(host, prompts[:count], temperature, args.rounds)
    result = {"machine": machine.describe(), "isa": host.engine.info.isa, "loads": results}
    result["steal"] = round(before.steal_share_since(), 4)
    if args.json:
        print(json.dumps(result))
        return
    table = Table("load", "off, tok/s", "auto, tok/s", "auto / off", "drafted", "accepted", "steps off", "steps auto")
    for name, r in results.items():
        counts = [f"{r[key]:,}" for key in ("drafted", "accepted", "steps_off", "steps")]
        table.add_row(name, f"{r['off']:.0f}", f"{r['auto']:.0f}", f"{r['ratio']:.2f}", *counts)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
