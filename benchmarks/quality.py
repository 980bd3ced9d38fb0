"""What quantised weights and 8-bit activations cost: perplexity, and distance from the same weights in float32.

    python benchmarks/quality.py --peer-python /path/to/venv/bin/python     table, llama.cpp beside ours
    python benchmarks/quality.py --json                                     ours alone, one JSON object
    python benchmarks/quality.py --peer-python ... --types Q2_K,Q4_K,BF16   a row for each type, files by llama.cpp
    python benchmarks/quality.py --kv-types f16,q8 --window 1500            a row of ours for each number format of KV

The first --tokens tokens of --text are cut into windows; each window is computed on its own from an empty context, and
every token but its first (the BOS token, for models that want one) is scored. All engines are given the same ids.
"float32" is our engine on the file's weights dequantised (so it shows the arithmetic, not what was lost when the file
was made). KL divergence is of each engine's distribution from the float32 one, in nats a token.

Needs the test extras (`gguf` writes the float32 file). The peer's environment: `pip install llama-cpp-python numpy`.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hob.config import load_config
from hob.engine.base import BLOCK_SIZE, Batch, Out
from hob.engine.local import LocalEngine
from hob.models.catalog import Catalog
from hob.models.ggml_types import GGML_TYPES
from hob.models.gguf import open_gguf
from hob.models.known import DEFAULT_MODEL
from hob.models.pack import ensure_packed
from hob.models.tokenizer import Tokenizer
from hob.native.reference import log_softmax

TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikitext2_test_raw.txt"
WORKERS = Path(__file__).parent / "workers"
Floats = NDArray[np.float32]
LogProbs = Callable[[list[int]], Floats]
"""ids (T,) -> log-probabilities (T - 1, vocab_size) of the token after each of the first T - 1."""


@dataclass
class Score:
    """One engine's answers, gathered over windows."""

    logprob: list[float] = field(default_factory=list)
    """Of each scored token."""
    kl: list[float] = field(default_factory=list)
    """Of each row's distribution from the float32 one."""
    is_same_top: list[bool] = field(default_factory=list)

    def add(self, logprobs: Floats, targets: list[int], base: Floats) -> None:
        """Rows of one window."""
        self.logprob += logprobs[np.arange(len(targets)), targets].tolist()
        self.kl += np.einsum("rv,rv->r", np.exp(base), base - logprobs, dtype=np.float64).tolist()
        self.is_same_top += (logprobs.argmax(axis=1) == base.argmax(axis=1)).tolist()

    def summary(self) -> dict[str, float]:
        """The figures of the report."""
        return {
            "perplexity": math.exp(-float(np.mean(self.logprob))),
            "kl_mean": float(np.mean(self.kl)),
            "kl_p99": float(np.quantile(self.kl, 0.99)),
            "top1_agreement": float(np.mean(self.is_same_top)),
        }


def open_ours(packed: Path, window: int, kv_type: str) -> tuple[LogProbs, str]:
    """Our engine, a window per step, and the instruction set it uses."""
    config, _ = load_config({"kv_type": kv_type})
    engine = LocalEngine("quality", packed, config.engine, max_rows=window)
    num_blocks = -(-window // BLOCK_SIZE)
    engine.open_pool(num_blocks)

    def logprobs(ids: list[int]) -> Floats:
        index = np.arange(len(ids) - 1, dtype=np.int32)
        batch = Batch(
            token=np.array(ids[:-1], np.int32),
            position=index,
            index=index,
            out=np.full(len(index), int(Out.LOGITS), np.uint8),
            target=np.zeros(len(index), np.int32),
            row_start=np.array([0, len(index)], np.int32),
            table_start=np.array([0, num_blocks], np.int32),
            blocks=np.arange(num_blocks, dtype=np.int32),
            adapter=np.zeros(1, np.int32),
        )
        engine.forward(batch)
        return log_softmax(engine.logits())

    return logprobs, engine.info.isa


def write_float32(source: Path, destination: Path) -> None:
    """The same network with every tensor dequantised to float32; no tokenizer."""
    with open_gguf(source) as file:
        architecture = str(file.metadata["general.architecture"])
        out = gguf.GGUFWriter(destination, architecture)
        kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
        for key, value in file.metadata.items():
            if key.startswith(f"{architecture}."):
                out.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
        for info in file.tensors.values():
            kind = gguf.GGMLQuantizationType[GGML_TYPES[info.ggml_type].name]
            raw = np.frombuffer(file.tensor_data(info.name), np.uint8)
            if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
                values = raw.view(np.float32 if kind is gguf.GGMLQuantizationType.F32 else np.float16)
            else:
                values = dequantize(raw.reshape(*info.shape[:-1], -1), kind)
            out.add_tensor(info.name, values.astype(np.float32).reshape(info.shape))
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()


class Peer:
    """llama.cpp in a process of its own: a window's ids out, its log-probabilities back through a file."""

    def __init__(self, python: str, model: Path, window: int, folder: Path) -> None:
        self._file = folder / "peer.npy"
        self._process = subprocess.Popen(
            [python, str(WORKERS / "logprobs_llama_cpp.py"), str(model), str(window), str(self._file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def logprobs(self, ids: list[int]) -> Floats:
        """As `LogProbs`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(ids) + "\n")
        self._process.stdin.flush()
        if self._process.stdout.readline().strip() != "done":
            raise SystemExit(f"llama.cpp: the worker ended with status {self._process.wait()}")
        return log_softmax(np.load(self._file)[:-1])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def windows(ids: list[int], length: int, bos: list[int]) -> Iterator[list[int]]:
    """Whole windows, one after the other, each beginning with `bos`."""
    step = length - len(bos)
    for start in range(0, len(ids) - step + 1, step):
        yield bos + ids[start : start + step]


def run_types(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    """The model coded anew in each type by llama.cpp's quantiser, as far as its rows allow; the results by type."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        for kind in args.types.split(","):
            file = Path(name) / f"{kind}.gguf"
            subprocess.run([args.peer_python, WORKERS / "quantise_llama_cpp.py", model, file, kind], check=True)
            with open_gguf(file) as opened:
                counts = Counter(GGML_TYPES[info.ggml_type].name for info in opened.tensors.values())
            results[kind] = run(args, file) | {"tensors": dict(counts)}
            print(f"{kind}: {json.dumps(results[kind])}", file=sys.stderr, flush=True)
            for made in Path(name).iterdir():
                made.unlink()
    return results


def name_of(kv_type: str) -> str:
    """Our engine's row of the report."""
    return "ours" if kv_type == "f16" else f"ours, KV {kv_type}"


def run(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Every window through every engine."""
    with open_gguf(model) as file:
        tokenizer = Tokenizer(file.metadata)
    bos = tokenizer.encode("")
    ids = tokenizer.encode(args.text.read_text(encoding="utf-8"), add_bos=False)[: args.tokens]
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        folder = Path(name)
        packed = ensure_packed(model)
        engines: dict[str, LogProbs] = {}
        for kv_type in args.kv_types.split(","):
            engines[name_of(kv_type)], isa = open_ours(packed, args.window, kv_type)
        write_float32(model, folder / "float32.gguf")
        packed_float32 = ensure_packed(folder / "float32.gguf")
        (folder / "float32.gguf").unlink()
        base, _ = open_ours(packed_float32, args.window, "f16")
        peer = Peer(args.peer_python, model, args.window, folder) if args.peer_python else None
        if peer is not None:
            engines["llama.cpp"] = peer.logprobs
        scores = {engine: Score() for engine in ("float32", *engines)}
        console = Console(stderr=True)
        for window in track(list(windows(ids, args.window, bos)), "windows", console=console):
            base_logprobs = base(window)
            scores["float32"].add(base_logprobs, window[1:], base_logprobs)
            for engine, logprobs in engines.items():
                scores[engine].add(logprobs(window), window[1:], base_logprobs)
        if peer is not None:
            peer.close()
    result: dict[str, Any] = {engine: score.summary() for engine, score in scores.items()}
    if peer is not None:
        result["ratio"] = result[next(iter(engines))]["perplexity"] / result["llama.cpp"]["perplexity"]
    return result | {
        "model": model.name,
        "text": args.text.name,
        "num_scored": len(scores["float32"].logprob),
        "window": args.window,
        "isa": isa,
    }


def print_table(result: dict[str, Any]) -> None:
    """For people."""
    table = Table(
        title=f"{result['model']}: {result['num_scored']} tokens of {result['text']}, windows of {result['window']}, "
        f"{result['isa']}"
    )
    for column in ("engine", "perplexity", "KL from float32, mean", "99th percentile", "same likeliest token"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for engine, s in result.items():
        if isinstance(s, dict):
            cells = (
                f"{s['perplexity']:.3f}",
                f"{s['kl_mean']:.5f}",
                f"{s['kl_p99']:.4f}",
                f"{s['top1_agreement']:.2%}",
            )
            table.add_row(engine, *cells)
    console = Console()
    console.print(table)
    if "ratio" in result:
        console.print(f"perplexity, ours / llama.cpp: {result['ratio']:.4f} (goal: within 1 %)")


def print_types(results: dict[str, Any]) -> None:
    """For people: what each type costs from the file's own weights in float32."""
    table = Table("type", "perplexity", "ours / llama.cpp", "KL, ours", "KL, llama.cpp", "tensors")
    for kind, r in results.items():
        tensors = ", ".join(f"{count} {name}" for name, count in r["tensors"].items())
        kl = [f"{r[engine]['kl_mean']:.5f}" for engine in ("ours", "llama.cpp")]
        table.add_row(kind, f"{r['ours']['perplexity']:.3f}", f"{r['ratio']:.4f}", *kl, tensors)
    Console(width=140).print(table)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="GGUF file; the default model if left out")
    parser.add_argument("--text", type=Path, default=TEXT, help=f"text file (default: {TEXT})")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--peer-python", help="Python of an environment with llama-cpp-python; left out: ours alone")
    parser.add_argument("--types", help="GGML types to code the model in first, with commas: Q2_K,Q4_K,BF16")
    parser.add_argument("--kv-types", default="f16", help="number formats of KV, with commas: f16,q8")
    parser.add_argument("--scratch", type=Path, help="folder for 1.1 GB of float32 weights (default: the system's)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args()
    if args.tokens < args.window or args.window < 2:
        parser.error(
            f"--tokens is {args.tokens} and --window {args.window}. Expected at least one window of 2 or more."
        )
    if args.types and args.kv_types != "f16":
        parser.error("--types and --kv-types are two tables: one at a time.")
    if args.types and not args.peer_python:
        parser.error("--types needs --peer-python: llama.cpp's quantiser makes the files.")
    config, _ = load_config()
    model = args.model or Catalog(config.models_dir).pull(DEFAULT_MODEL)
    result = run_types(args, model) if args.types else run(args, model)
    if args.json:
        print(json.dumps(result))
    elif args.types:
        print_types(result)
    else:
        print_table(result)


if __name__ == "__main__":
    main()
