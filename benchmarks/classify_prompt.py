"""Which default prompt and which normalisation /hob/v1/classify should have: macro-F1 on labelled texts.

python benchmarks/classify_prompt.py --model MODEL.gguf --data FILE.jsonl ... [--rows 200]

Each row of a file is {"text", "label"}. A form is how a text and the labels become a prompt; the engine gives each
label's log-probability after it, and once more after a form without its text. Four ways to compare them:

    sum         log p(label | text)
    mean        the same per token
    pmi         log p(label | text) - log p(label | no text)
    pmi-mean    the same per token

majority: macro-F1 of always giving the most frequent label.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hob.config import EngineConfig, SchedulerConfig
from hob.models.chat import ChatEncoder, read_template
from hob.models.gguf import open_gguf
from hob.models.pack import ensure_packed
from hob.models.tokenizer import Tokenizer
from hob.request import Kind, Request
from hob.service.handle import EngineHandle
from hob.service.loop import EngineSpec

MAX_TEXT_CHARS = 1000
IN_FLIGHT = 16


@dataclass(frozen=True)
class Form:
    """A prompt with {labels} and {text}."""

    prompt: str
    is_chat: bool
    reply: str = ""
    """How the assistant's turn begins, before the label."""
    joint: str = " "
    """Between prompt and label."""


FORMS = {
    "listed, chat": Form(
        "Classify the text. Answer with one of these labels only: {labels}.\n\nText: {text}\nLabel:", True, joint=""
    ),
    "listed, chat, reply begun": Form(
        "Classify the text. Answer with one of these labels only: {labels}.\n\nText: {text}", True, "Label:"
    ),
    "listed, plain": Form("Classify each text as one of: {labels}.\n\nText: {text}\nLabel:", False),
    "plain": Form("Text: {text}\nLabel:", False),
    "plain, quoted": Form('Text: "{text}"\nThe label of this text is:', False),
    "plain, category": Form("{text}\n\nCategory:", False),
    "plain, it is": Form("{text}\n\nThis is", False),
    "chat, what is it": Form("{text}\n\nWhat is this text? Answer in a word.", True, "It is"),
}
SCALES = ("sum", "mean", "pmi", "pmi-mean")


class Scorer:
    """A model in an engine process."""

    def __init__(self, path: Path) -> None:
        with open_gguf(path) as gguf:
            self.tokenizer = Tokenizer(gguf.metadata)
            self.chat = ChatEncoder(read_template(gguf.metadata), self.tokenizer)
        packed = str(ensure_packed(path))
        self.handle = EngineHandle(EngineSpec(path.stem, packed, EngineConfig(), SchedulerConfig(), kv_tokens=16384))
        self._gate = asyncio.Semaphore(IN_FLIGHT)
        self._count = 0

    async def score(self, form: Form, text: str, labels: list[str]) -> list[tuple[float, int]]:
        """Of each label: the sum of its log-probabilities and its number of tokens."""
        content = form.prompt.format(labels=", ".join(labels), text=text)
        if form.is_chat:
            prefix = self.chat.encode([{"role": "user", "content": content}])
            prefix += self.tokenizer.encode(form.reply, add_bos=False)
        else:
            prefix = self.tokenizer.encode(content)
        tails = [self.tokenizer.encode(form.joint + label, add_bos=False) for label in labels]
        self._count += 1
        request = Request(f"r{self._count}", "bench", prefix, Kind.SCORE, continuations=tails)
        found = [(0.0, 0)] * len(labels)
        async with self._gate:
            async for output in self.handle.submit(request):
                found[output.index] = sum(output.scores), len(output.scores)
        return found


def weigh(scale: str, scores: list[tuple[float, int]], empty: list[tuple[float, int]]) -> list[float]:
    """Each label's weight."""
    sums = [s - (e if scale.startswith("pmi") else 0.0) for (s, _), (e, _) in zip(scores, empty, strict=True)]
    return [s / n if scale.endswith("mean") else s for s, (_, n) in zip(sums, scores, strict=True)]


def macro_f1(truths: list[str], guesses: list[str]) -> float:
    """Mean over the labels of 2 TP / (2 TP + FP + FN)."""
    scores = []
    for label in sorted(set(truths)):
        hits = sum(t == g == label for t, g in zip(truths, guesses, strict=True))
        scores.append(2 * hits / (truths.count(label) + guesses.count(label)))
    return sum(scores) / len(scores)


async def measure(scorer: Scorer, form: Form, rows: list[dict[str, str]]) -> dict[str, float]:
    """Macro-F1 by scale."""
    truths = [row["label"] for row in rows]
    labels = sorted(set(truths))
    empty = await scorer.score(form, "", labels)
    found = await asyncio.gather(*(scorer.score(form, row["text"][:MAX_TEXT_CHARS], labels) for row in rows))
    results = {}
    for scale in SCALES:
        weights = [weigh(scale, scores, empty) for scores in found]
        results[scale] = macro_f1(truths, [labels[max(range(len(labels)), key=w.__getitem__)] for w in weights])
    return results


async def run(args: argparse.Namespace, note: Callable[..., None]) -> None:
    """All forms on all files."""
    scorer = Scorer(args.model)
    await scorer.handle.start()
    sets = {p.stem: [json.loads(line) for line in p.read_text().splitlines()[: args.rows]] for p in args.data}
    majority = {}
    for name, rows in sets.items():
        truths = [row["label"] for row in rows]
        majority[name] = macro_f1(truths, [Counter(truths).most_common(1)[0][0]] * len(rows))
    note("majority", "", majority)
    try:
        for form_name, form in FORMS.items():
            results = {name: await measure(scorer, form, rows) for name, rows in sets.items()}
            for scale in SCALES:
                note(form_name, scale, {name: results[name][scale] for name in sets})
    finally:
        await scorer.handle.stop()


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="JSON lines of text and label")
    parser.add_argument("--rows", type=int, default=200)
    args = parser.parse_args()
    table = Table("form", "scale", *(path.stem for path in args.data), "mean", title="macro-F1, %")

    def note(form: str, scale: str, scores: dict[str, float]) -> None:
        mean = sum(scores.values()) / len(scores)
        table.add_row(form, scale, *(f"{100 * score:.1f}" for score in [*scores.values(), mean]))

    asyncio.run(run(args, note))
    Console().print(table)


if __name__ == "__main__":
    main()
