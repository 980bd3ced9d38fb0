"""lm-eval, unchanged, against a daemon: the accuracy must be that of scoring the same rows in this process.

    python -m tests.clients.lm_eval_rows [--rows 100]

HellaSwag, ARC-easy and PIQA rows of the data sets beside the repository; lm-eval's `local-completions` asks
/v1/completions for echoed log-probabilities, ours scores each choice in the engine directly. Prints both accuracies,
the rows in which another choice wins, and the largest difference of a choice's sum. lm-eval wants the tokenizer as
Hugging Face has it: made from the same GGUF file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hob.config import load_config
from hob.engine.base import Out
from hob.engine.local import LocalEngine
from hob.models.gguf import open_gguf
from hob.models.pack import ensure_packed
from hob.models.tokenizer import Tokenizer
from tests.conftest import REPOSITORY
from tests.daemons import running
from tests.model.runners import batch_of

TASKS = ("hellaswag", "arc_easy", "piqa")
MAX_ROWS = 512
SHOWN = 10
CLOSE = 1e-3
"""Nats that a choice's sum may differ by without being shown."""
Sums = list[list[float]]
"""Of each row, the log-probability of each of its choices."""


@dataclass
class Compared:
    """One task."""

    rows: list[dict[str, Any]]
    theirs: Sums
    ours: Sums

    def accuracy(self, sums: Sums) -> float:
        """Share of rows whose likeliest choice is the right one."""
        return float(np.mean([np.argmax(each) == row["answer"] for each, row in zip(sums, self.rows, strict=True)]))

    def other_rows(self) -> list[int]:
        """Rows in which another choice is the likeliest."""
        pairs = zip(self.theirs, self.ours, strict=True)
        return [i for i, (a, b) in enumerate(pairs) if np.argmax(a) != np.argmax(b)]

    def apart(self, i: int) -> float:
        """The largest difference of a sum in a row."""
        return float(np.abs(np.subtract(self.theirs[i], self.ours[i])).max())


def sums_in_process(gguf: Path, rows: list[dict[str, Any]]) -> Sums:
    """By the engine alone, each choice after its context anew."""
    with open_gguf(gguf) as file:
        tokenizer = Tokenizer(file.metadata)
    engine = LocalEngine("model", ensure_packed(gguf), load_config(environ={})[0].engine, MAX_ROWS)
    engine.open_pool(MAX_ROWS // 16)
    found = []
    for row in rows:
        sums = []
        for choice in row["choices"]:
            # As lm-eval cuts it: a blank at the end of the context belongs to the continuation.
            whole = tokenizer.encode(f"{row['context']} {choice}", add_bos=False)
            num_context = len(tokenizer.encode(row["context"], add_bos=False))
            batch = batch_of(whole, out=Out.SCORE, blocks=list(range(MAX_ROWS // 16)))
            batch.out[-1] = Out.NONE
            assert engine.forward(batch).is_done
            sums.append(float(engine.scores().logprob[num_context - 1 :].sum()))
        found.append(sums)
    engine.close()
    return found


def sums_by_lm_eval(gguf: Path, rows_of: dict[str, list[dict[str, Any]]], folder: Path) -> dict[str, Sums]:
    """The same, as lm-eval's own log of samples has it."""
    tokenizer = folder / "tokenizer"
    save = (
        "import sys, transformers as t;"
        "t.AutoTokenizer.from_pretrained(sys.argv[1], gguf_file=sys.argv[2]).save_pretrained(sys.argv[3])"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", save, gguf.parent, gguf.name, tokenizer], check=True)
    for name, rows in rows_of.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(
            f"task: hob_{name}\n"
            "dataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}\n"
            "test_split: test\n"
            "output_type: multiple_choice\n"
            'doc_to_text: "{{context}}"\n'
            'doc_to_choice: "{{choices}}"\n'
            'doc_to_target: "{{answer}}"\n'
            "metric_list: [{metric: acc}]\n"
        )
    with running(model=gguf) as daemon:
        args = {
            "model": "default",
            "base_url": f"http://127.0.0.1:{daemon.state.port}/v1/completions",
            "tokenizer": str(tokenizer),
            "num_concurrent": "8",
            "max_retries": "1",
        }
        command = [sys.executable, "-W", "ignore", "-m", "lm_eval", "--model", "local-completions"]
        command += ["--model_args", ",".join(f"{key}={value}" for key, value in args.items())]
        command += ["--tasks", ",".join(f"hob_{name}" for name in rows_of), "--include_path", str(folder)]
        command += ["--output_path", str(folder / "out"), "--log_samples"]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
        subprocess.run(command, check=True, env={**os.environ, **offline}, stdout=subprocess.DEVNULL)
    found = {}
    for name in rows_of:
        (path,) = (folder / "out").rglob(f"samples_hob_{name}_*.jsonl")
        samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        found[name] = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
    return found


def compare(gguf: Path, data: Path, num_rows: int, tasks: Sequence[str] = TASKS) -> dict[str, Compared]:
    """The first rows of each task, by lm-eval and in this process."""
    rows_of = {
        name: [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()[:num_rows]]
        for name in tasks
    }
    with tempfile.TemporaryDirectory() as folder:
        theirs = sums_by_lm_eval(gguf, rows_of, Path(folder))
    return {name: Compared(rows, theirs[name], sums_in_process(gguf, rows)) for name, rows in rows_of.items()}


def main() -> None:
    """Run and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--tasks", default=",".join(TASKS))
    args = parser.parse_args()
    gguf = REPOSITORY / ".cache/hob/models/smollm2-135m.gguf"
    found = compare(gguf, REPOSITORY / "../shared/data", args.rows, args.tasks.split(","))
    for name, each in found.items():
        accuracies = f"lm-eval {each.accuracy(each.theirs):.4f}   in process {each.accuracy(each.ours):.4f}"
        apart = [each.apart(i) for i in range(len(each.rows))]
        print(f"{name:10} {accuracies}   other choice: rows {each.other_rows()}   sums at most {max(apart):.2g} apart")
        for i in sorted(range(len(apart)), key=lambda i: -apart[i])[:SHOWN]:
            if apart[i] > CLOSE:
                print(f"  row {i}: lm-eval {each.theirs[i]}, in process {each.ours[i]}")


if __name__ == "__main__":
    main()
