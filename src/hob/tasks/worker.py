"""Trains one head in a process of its own, which the daemon starts: scikit-learn stays out of the daemon's memory.

    python -m hob.tasks.worker        stdin: a Job as JSON;  stdout: a JSON object per line

    {"step": "reading", "done": 64, "of": 400} ...  {"step": "trying mean, all layers"} ...
    {"result": {...}}  or  {"error": {"name", "message"}}

Like any program it asks the daemon for hidden states over the socket, as background work under the app's name. A fifth
of the examples, by a hash of their text, is held out of every training of a task: on it a new head must beat the one
in use, or the majority label where there is none.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from hob.client import Client
from hob.errors import Conflict, HobError, InternalError, UserError
from hob.heads.head import Head
from hob.heads.parts import is_marked
from hob.heads.store import HeadStore
from hob.tasks import metrics
from hob.tasks.datasets import Example, check_labels, split_by_hash
from hob.tasks.features import States, gather

HELD_OUT = 0.2


class Job(msgspec.Struct):
    """What the daemon hands over."""

    task: str
    app: str
    """As identity names it: '<uid>/<label>'."""
    socket: str
    folder: str
    """Where heads are kept."""
    examples: list[tuple[str, str]]
    """(text, label)"""
    model: str
    """Whose states it reads, with the next two."""
    quantisation: str
    num_layers: int
    words: bool | None = None
    """Whether words of the text count beside hidden states. None: whichever cross-validation likes better."""
    max_tokens: int = 1024


@dataclass
class Outcome:
    """How a training ended."""

    is_kept: bool
    reason: str
    version: int | None
    macro_f1: float
    """Of the new head on the held-out part."""
    replaced_f1: float
    """Of what it was to replace, there."""
    features: dict[str, Any] = field(default_factory=dict)


def tell(**fields: Any) -> None:
    """One line of progress."""
    print(json.dumps(fields), flush=True)


def run(job: Job, client: Client) -> Outcome:
    """Train, compare, keep or not."""
    examples = [Example(text, label) for text, label in dict(job.examples).items()]
    check_labels([e.label for e in examples])
    inside, outside = split_by_hash(examples, HELD_OUT, job.task)
    if not outside:
        raise UserError(f"none of {len(examples)} texts falls into the held-out fifth. Give some more examples.")
    labels = [e.label for e in inside]
    check_labels(labels)
    try:
        from hob.tasks import train
    except ImportError:
        raise UserError(f"training needs scikit-learn: {sys.executable} -m pip install scikit-learn") from None
    kept = train.sample([e.text for e in inside], labels)
    inside = [inside[i] for i in kept]
    gathered = train.gathered_features(job.num_layers, all(is_marked(e.text) for e in examples), job.max_tokens)
    texts = [e.text for e in inside + outside]
    states = gather(client, texts, gathered, lambda done, of: tell(step="reading", done=done, of=of), model=job.model)
    head = train.train(
        job.task,
        [e.text for e in inside],
        [e.label for e in inside],
        states[: len(inside)],
        gathered,
        (job.model, job.quantisation),
        with_words=job.words,
        progress=lambda step: tell(step=step),
    )
    return _keep_if_better(job, head, [states[len(inside) :], gathered], outside)


def _keep_if_better(job: Job, head: Head, held: list[Any], outside: list[Example]) -> Outcome:
    from hob.tasks import train

    states, gathered = held
    texts, truth = [e.text for e in outside], [e.label for e in outside]

    def answers_of(other: Head) -> tuple[list[str], list[float]]:
        values: States = train.blocks_of(states, gathered, other.features)
        answers = other.answers(values, texts)
        return [a.best for a in answers], [a.probability for a in answers]

    answers, confidence = answers_of(head)
    trust = train.trust_of(head.trust.num_train, truth, answers, confidence)
    store = HeadStore(Path(job.folder))
    before, what = trust.majority_f1, "the most frequent label"
    if job.task in store.tasks(job.app):
        old = store.load(job.app, job.task)
        try:
            old.check_model(head.model, head.quantisation)
            before, what = metrics.macro_f1(truth, answers_of(old)[0]), f"version {old.version}"
        except (Conflict, ValueError):  # of another model, or reads what this training did not gather
            what = f"the most frequent label (version {old.version} is of another model)"
    is_kept = trust.macro_f1 > before
    reason = (
        f"macro-F1 {trust.macro_f1:.3f} on {len(outside)} held-out texts, against {before:.3f} of {what}"
        f"{'' if is_kept else ': not better, so not kept'}"
    )
    version = store.save(job.app, dataclasses.replace(head, trust=trust)).version if is_kept else None
    return Outcome(is_kept, reason, version, trust.macro_f1, before, dataclasses.asdict(head.features))


def main() -> None:
    """Body of the process."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    os.nice(5)
    try:
        label = re.sub(r"[^A-Za-z0-9._-]+", "-", job.app.rpartition("/")[2])[:64]
        with Client(job.socket, app=label, service_class="background") as client:
            outcome = run(job, client)
    except HobError as error:
        tell(error={"name": type(error).__name__, "message": error.message})
    except Exception as error:
        tell(error={"name": InternalError.__name__, "message": f"training failed: {type(error).__name__}: {error}"})
        raise
    else:
        tell(result=dataclasses.asdict(outcome))


if __name__ == "__main__":
    main()
