"""lm-eval, unchanged, against a daemon: the accuracy must be that of scoring the same rows in this process.

    python -m tests.clients.lm_eval_rows [--rows 100]

HellaSwag, ARC-easy and PIQA rows of the data sets beside the repository; lm-eval's `local-completions` asks
/v1/completions for echoed log-probabilities, ours scores each choice in the engine directly. Prints both, row by row
equal or not. lm-eval wants the tokenizer as Hugging Face has it: made from the same GGUF file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
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


def choices_in_process(gguf: Path, rows: list[dict[str, Any]]) -> list[int]:
    """The likeliest choice of each row, by the sum of its tokens' log-probabilities."""
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
        found.append(int(np.argmax(sums)))
    engine.close()
    return found


def choices_by_lm_eval(gguf: Path, rows_of: dict[str, list[dict[str, Any]]], folder: Path) -> dict[str, list[int]]:
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
        found[name] = [int(np.argmax([float(answer[0]) for answer in sample["filtered_resps"]])) for sample in samples]
    return found


def compare(gguf: Path, data: Path, num_rows: int) -> dict[str, tuple[float, float, int]]:
    """Accuracy by lm-eval, accuracy in this process, rows on which they differ."""
    rows_of = {
        name: [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()[:num_rows]]
        for name in TASKS
    }
    with tempfile.TemporaryDirectory() as folder:
        theirs = choices_by_lm_eval(gguf, rows_of, Path(folder))
    result = {}
    for name, rows in rows_of.items():
        ours = choices_in_process(gguf, rows)
        answers = [row["answer"] for row in rows]
        accuracies = [float(np.mean(np.array(found) == answers)) for found in (theirs[name], ours)]
        result[name] = (accuracies[0], accuracies[1], int(np.sum(np.array(theirs[name]) != ours)))
    return result


def main() -> None:
    """Run and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100)
    args = parser.parse_args()
    gguf = REPOSITORY / ".cache/hob/models/smollm2-135m.gguf"
    for name, (theirs, ours, num_other) in compare(gguf, REPOSITORY / "../shared/data", args.rows).items():
        print(f"{name:10} lm-eval {theirs:.4f}   in process {ours:.4f}   rows that differ: {num_other}")


if __name__ == "__main__":
    main()
