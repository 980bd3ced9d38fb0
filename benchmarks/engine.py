"""Our engine and its peers, in turn, in one run, beside the machine's own peak.

    python benchmarks/engine.py --peer-python /path/to/venv/bin/python     table
    python benchmarks/engine.py --no-peers --json                          ours alone, one JSON object

Each round measures every figure once with every engine, one after the other; the median over rounds counts. Ours runs
the Q4_1 file as it is. A peer may use its best file: llama.cpp runs each file of --llama-files, the best one counts.
OpenVINO runs in each of --openvino-precisions (auto: as it chooses by itself). With --vnni ours and OpenVINO do without
AMX (HOB_ISA=avx512, ONEDNN_MAX_CPU_ISA), as on the machine that the goals were set on.
The peers' environment: `pip install --no-binary llama-cpp-python llama-cpp-python` (built natively) and
`pip install openvino-genai`; Q4_0 files are made by llama.cpp's own quantiser.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import machine
from hob.lab.speed import FIGURES, Figure, as_shares, busy_processes, with_base

WORKERS = Path(__file__).parent / "workers"


class Worker:
    """An engine in a process of its own, asked for one figure at a time."""

    def __init__(self, name: str, command: list[str], env: dict[str, str] | None = None) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
        )
        self._read()

    def measure(self, figure: Figure) -> float:
        """Tokens per second."""
        with busy_processes(figure.num_busy):
            assert self._process.stdin is not None
            task = {"figure": figure.kind, "n": figure.n, "context": figure.context}
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
            return float(self._read()["tok_s"])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while True:
            line = self._process.stdout.readline()
            if not line:
                raise SystemExit(f"{self.name}: the worker ended with status {self._process.wait()}")
            if line.startswith("{"):
                return dict(json.loads(line))


def chosen_figures(args: argparse.Namespace) -> list[Figure]:
    """All, or those named; the busy ones need decode_1 to be a share of."""
    return with_base([figure for figure in FIGURES if not args.figures or figure.key in args.figures])


def start_workers(args: argparse.Namespace) -> list[Worker]:
    """Ours first."""
    ours = [sys.executable, str(WORKERS / "run_ours.py"), args.model]
    workers = [Worker("ours", ours, {"HOB_ISA": "avx512"} if args.vnni else None)]
    for isa in args.isa:
        workers.append(Worker(f"ours {isa}", ours, {"HOB_ISA": isa}))
    for kv_type in args.kv_types:
        workers.append(Worker(f"ours KV {kv_type}", ours, {"HOB_KV_TYPE": kv_type}))
    if args.no_peers:
        return workers
    for file in args.llama_files or [args.model]:
        label = f"llama.cpp {Path(file).stem.rpartition('.')[2]}"
        workers.append(Worker(label, [args.peer_python, str(WORKERS / "run_llama_cpp.py"), file]))
    openvino = [args.peer_python, str(WORKERS / "run_openvino.py"), args.model]
    confined = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"} if args.vnni else None
    for precision in ["f32"] if args.vnni else args.openvino_precisions:
        hint = [] if precision == "auto" else [precision]
        workers.append(Worker(f"OpenVINO {precision}", [*openvino, *hint], confined))
    return workers


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All rounds. Busy figures come back as shares of the same engine's undisturbed decode_1."""
    console = Console(stderr=True)
    figures = chosen_figures(args)
    workers = start_workers(args)
    samples: dict[str, dict[str, list[float]]] = {w.name: {f.key: [] for f in figures} for w in workers}
    steal = []
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=args.rounds * len(figures) * len(workers))
        for _ in range(args.rounds):
            before = machine.CpuTimes.now()
            for figure in figures:
                for worker in workers:
                    samples[worker.name][figure.key].append(worker.measure(figure))
                    progress.advance(task)
            steal.append(round(before.steal_share_since(), 4))
    for worker in workers:
        worker.close()
    medians = {name: {key: statistics.median(v) for key, v in values.items()} for name, values in samples.items()}
    medians = {name: as_shares(values, figures) for name, values in medians.items()}
    ours = medians.pop("ours")
    peers = {name: values for name, values in medians.items() if not name.startswith("ours")}
    best = {f.key: max((values[f.key] for values in peers.values()), default=None) for f in figures}
    return {
        "ours": ours,
        "others": {name: values for name, values in medians.items() if name.startswith("ours")},
        "peers": peers,
        "peak": machine.peak(),
        "ratios": {key: round(ours[key] / value, 3) for key, value in best.items() if value},
        "steal_per_round": steal,
        "rounds": args.rounds,
        "machine": machine.describe(),
    }


def as_json(result: dict[str, Any]) -> dict[str, Any]:
    """For programs: of the peers the best one of each figure."""
    best = {key: max(values[key] for values in result["peers"].values()) for key in result["ours"] if result["peers"]}
    return {"ours": result["ours"], "peers": best, "peak": result["peak"], "ratios": result["ratios"]}


def print_table(result: dict[str, Any], console: Console) -> None:
    """For people."""
    columns = {"ours": result["ours"], **result["others"], **result["peers"]}
    table = Table(title=f"{result['machine']['cpu']}, {result['machine']['cores']} cores, {result['rounds']} rounds")
    table.add_column("figure")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("ours / best peer", justify="right")
    for figure in FIGURES:
        if figure.key not in result["ours"]:
            continue
        form = "{:.0%}" if figure.num_busy else "{:.0f}"
        ratio = result["ratios"].get(figure.key)
        cells = [form.format(values[figure.key]) for values in columns.values()]
        table.add_row(figure.title, *cells, f"{ratio:.2f} x" if ratio else "-")
    console.print(table)
    peak = result["peak"]
    console.print(
        f"peak: {peak['int8_gmacs']} G int8 MAC/s, {peak['float32_gmacs']} G float32 MAC/s, {peak['dram_gb_s']} GB/s; "
        f"steal per round: {result['steal_per_round']}"
    )


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="GGUF file (ours and OpenVINO run it as it is)")
    parser.add_argument("--llama-files", nargs="*", help="GGUF files llama.cpp may choose from")
    parser.add_argument("--peer-python", default=sys.executable, help="Python of the environment that has the peers")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument(
        "--openvino-precisions",
        nargs="*",
        default=["auto", "f32"],
        help="auto, bf16, f32; the best counts; none given: without it",
    )
    parser.add_argument("--vnni", action="store_true", help="ours and OpenVINO without AMX")
    parser.add_argument("--isa", nargs="*", default=[], help="also run ours with these instruction sets")
    parser.add_argument("--kv-types", nargs="*", default=[], help="also run ours with these number formats of KV")
    parser.add_argument("--figures", nargs="*", choices=[f.key for f in FIGURES], help="only these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object; the table goes to standard error")
    args = parser.parse_args()
    result = run(args)
    print_table(result, Console(stderr=args.json))
    if args.json:
        print(json.dumps(as_json(result)))


if __name__ == "__main__":
    main()
