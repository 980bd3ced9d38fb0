"""Zero-shot classification measured: label words scored by a server, what it said kept, six scorings compared.

    prompts.toml + texts --Server--> log p of each label (kept as it comes) --scorers.py--> answers --metrics.py-->

A server gives log-probabilities of continuations of prompts: Hob's /hob/v1/classify does so over shared prefixes; any
other needs /v1/completions with `echo` and `logprobs`, and its echo is checked first. A run that was interrupted goes
on where it ended.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np

from hob.client import Client
from hob.errors import InternalError, UserError
from hob.heads.parts import MARKED, plain
from hob.tasks import metrics
from hob.tasks.datasets import Example, dataset_files, read_examples, share_of
from hob.tasks.scorers import CONTENT_FREE, SCORERS, LabelScores

CALL_PROMPTS = 64
"""Prompts asked for together: their rows share the server's steps. What they brought is kept before the next are."""
NOTHING = "\n"
"""What stands for no text at all where a label's prior is asked for: a model needs one token to start from."""
CHECKED = "Monday, Tuesday, Wednesday,"
"""What a server continues, to see whether its echo tells the same of that continuation as it told when it made it."""
Left = Callable[[int, int, float], None]
Scores = tuple[list[float], list[int]]
"""Of each word: log-probability and number of tokens."""


@dataclass(frozen=True)
class Prompt:
    """How a data set is put to a model: see data/prompts.toml."""

    prompt: str
    premise: str
    words: dict[str, str]

    def filled(self, text: str, max_chars: int) -> str:
        """The prompt with a text in it."""
        marked = {match[1]: match[2].strip() for match in MARKED.finditer(text)}
        body = shortened(plain(text), max_chars)
        fields = {"text": body, "e1": marked.get("e1", body), "e2": marked.get("e2", body)}
        return re.sub(r"\{(text|e1|e2)\}", lambda match: fields[match[1]], self.prompt)


def shortened(text: str, max_chars: int) -> str:
    """Without its middle where it is too long: beginnings and ends say most."""
    if len(text) <= max_chars:
        return text
    tail = max_chars // 4
    return f"{text[: max_chars - tail]} ... {text[-tail:]}"


def prompts() -> dict[str, Prompt]:
    """By data set."""
    with (Path(__file__).parent / "data" / "prompts.toml").open("rb") as file:
        return {name: Prompt(**fields) for name, fields in tomllib.load(file).items()}


class Server(Protocol):
    """Whoever gives log-probabilities."""

    @property
    def name(self) -> str:
        """Server and model: what is kept belongs to it."""
        ...

    def scores(self, prompts: list[str], words: list[str]) -> list[Scores]:
        """log p of each word after each prompt."""
        ...


class HobServer:
    """The daemon: all words over one shared prefix."""

    def __init__(self, client: Client) -> None:
        self._client = client
        model = client.stats()["model"]
        self.name = f"{model['name']} {model['quantisation']}"

    def scores(self, prompts: list[str], words: list[str]) -> list[Scores]:
        """By one call of /hob/v1/classify."""
        found = [
            one["labels"] for one in self._client.classify(None, words, prompt=prompts, continuations=words)["data"]
        ]
        return [([entry["logprob"] for entry in one], [entry["num_tokens"] for entry in one]) for one in found]


class EchoServer:
    """Any OpenAI-compatible server whose completions echo the prompt's log-probabilities."""

    def __init__(self, base_url: str, model: str, timeout_s: float = 3600.0) -> None:
        """timeout_s: long, for a server that takes one request after the other makes the last of many wait."""
        self.name = f"{base_url} {model}"
        self._model = model
        self._http = httpx.Client(base_url=base_url.rstrip("/") + "/", timeout=timeout_s, trust_env=False)

    def __enter__(self) -> EchoServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def check_echo(self) -> None:
        """Generate a token, have it echoed: raises UserError unless it has the same log-probability both times.

        llama-cpp-python's server echoes, where a model has no BOS token, how likely each token is to come once more.
        """
        choice = self._complete(CHECKED, echo=False)["choices"][0]
        made = (choice.get("logprobs") or {}).get("token_logprobs") or [None]
        if not choice["text"] or made[0] is None:
            raise UserError(f"{self.name} gives no log-probability of what it generates: its echo cannot be checked")
        found = _echoed(self._complete(CHECKED + choice["text"], echo=True), len(CHECKED), len(CHECKED) + 1, self.name)
        if abs(sum(found) - made[0]) > 0.1:
            raise UserError(
                f"{self.name} echoes wrong log-probabilities: {choice['text']!r} had {made[0]:.2f} when generated, "
                f"and {sum(found):.2f} when echoed after the same text. It cannot be measured."
            )

    def scores(self, prompts: list[str], words: list[str]) -> list[Scores]:
        """All prompts at once."""
        with ThreadPoolExecutor(CALL_PROMPTS) as pool:
            return list(pool.map(lambda prompt: self._score(prompt, words), prompts))

    def _score(self, prompt: str, words: list[str]) -> Scores:
        """One completion for each word. One token is generated and left aside: some servers take 0 for "no limit"."""
        sums, counts = [], []
        for word in words:
            reply = self._complete(prompt + word, echo=True)
            found = _echoed(reply, len(prompt), len(prompt) + len(word), self.name)
            sums.append(sum(found))
            counts.append(len(found))
        return sums, counts

    def _complete(self, prompt: str, *, echo: bool) -> dict[str, Any]:
        body = {"model": self._model, "prompt": prompt, "max_tokens": 1, "echo": echo, "logprobs": 1, "temperature": 0}
        reply = self._http.post("completions", json=body)
        if reply.status_code != 200:
            raise UserError(f"{self.name} answered {reply.status_code}: {reply.text[:200]}")
        found: dict[str, Any] = reply.json()
        return found


def _echoed(reply: dict[str, Any], start: int, end: int, name: str) -> list[float]:
    """Log-probabilities of the tokens that begin in characters start .. end. Raises UserError if it did not echo."""
    logprobs = reply["choices"][0].get("logprobs") or {}
    pairs = list(zip(logprobs.get("text_offset") or [], logprobs.get("token_logprobs") or [], strict=False))
    found = [value for offset, value in pairs if start <= offset < end]
    if not found or any(value is None for value in found):
        raise UserError(f"{name} does not echo log-probabilities of the prompt: it cannot be measured")
    return found


# ---- one data set ----


@dataclass
class Scored:
    """Examples and what the model said of their labels."""

    labels: list[str]
    truth: list[str]
    scores: LabelScores

    def answers(self) -> dict[str, list[str]]:
        """By scorer."""
        return {name: [self.labels[i] for i in scorer(self.scores).argmax(axis=1)] for name, scorer in SCORERS.items()}


def sample(examples: list[Example], most: int) -> list[Example]:
    """At most that many, those whose texts hash lowest: the same whatever the order."""
    return sorted(examples, key=lambda example: (share_of(example.text, "sample"), example.text))[:most]


def scored(
    name: str, examples: list[Example], server: Server, cache: Path, max_chars: int, left: Left | None = None
) -> Scored:
    """Ask what is not known yet. Raises UserError for a label that has no words."""
    prompt = _prompt_of(name, examples)
    labels = sorted(prompt.words)
    words = [prompt.words[label] for label in labels]
    asked = [prompt.filled(example.text, max_chars) for example in examples]
    extras = [NOTHING, prompt.premise, *(prompt.filled(text, max_chars) for text in CONTENT_FREE)]
    store = _Kept(cache, f"{name} {server.name}", words)
    _fill(store, [*extras, *asked], words, server, left)
    found = [store.known[key] for key in (*extras, *asked)]
    sums = np.array([sums for sums, _ in found], np.float64)
    counts = np.array(found[0][1], np.float64)
    return Scored(
        labels,
        [example.label for example in examples],
        LabelScores(sums[len(extras) :], counts, sums[0], sums[1], sums[2 : len(extras)]),
    )


def _prompt_of(name: str, examples: list[Example]) -> Prompt:
    known = prompts()
    if name not in known:
        raise UserError(f"data set '{name}' has no prompt. Known: {', '.join(known)}.")
    strange = {example.label for example in examples} - set(known[name].words)
    if strange:
        raise UserError(f"data set '{name}': no words for {sorted(strange)}. Known: {', '.join(known[name].words)}.")
    return known[name]


class _Kept:
    """What a server said, one JSON line per prompt; a line that was cut off by an interruption is asked again."""

    def __init__(self, folder: Path, owner: str, words: list[str]) -> None:
        digest = hashlib.sha256(json.dumps([owner, words]).encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{owner.partition(' ')[0]}-{digest}.jsonl"
        self.known: dict[str, Scores] = {}
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").split("\n"):
                try:
                    prompt, sums, counts = json.loads(line)
                except ValueError:
                    continue
                self.known[prompt] = (sums, counts)

    def add(self, prompt: str, scores: Scores) -> None:
        """Keep it before the next is asked."""
        self.known[prompt] = scores
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps([prompt, *scores]))


def _fill(store: _Kept, asked: list[str], words: list[str], server: Server, left: Left | None) -> None:
    missing = [prompt for prompt in dict.fromkeys(asked) if prompt not in store.known]
    begun = time.perf_counter()
    for start in range(0, len(missing), CALL_PROMPTS):
        some = missing[start : start + CALL_PROMPTS]
        for prompt, (sums, counts) in zip(some, server.scores(some, words), strict=True):
            if len(sums) != len(words):
                raise InternalError(f"{server.name} gave {len(sums)} scores for {len(words)} labels")
            store.add(prompt, (sums, counts))
        done = start + len(some)
        if left is not None:
            left(done, len(missing), (time.perf_counter() - begun) / done * (len(missing) - done))


# ---- many data sets ----


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    data: Path
    only: list[str]
    rows: int
    max_chars: int
    out: Path


@dataclass
class Result:
    """One data set at one model."""

    model: str
    dataset: str
    num_rows: int
    majority: float
    tfidf: float
    f1: dict[str, metrics.Measured]
    """By scorer, with intervals."""
    accuracy: dict[str, float] = field(default_factory=dict)


def run(plan: Plan, server: Server, bar: Callable[[str, int, int, float], None]) -> list[Result]:
    """All data sets in turn. TF-IDF learns from the rows that are not asked for."""
    from hob.tasks import baselines

    results = []
    for name, path in dataset_files(plan.data, plan.only or list(prompts())).items():
        examples = read_examples(path)
        asked = sample(examples, min(plan.rows, len(examples) // 2))
        texts = {example.text for example in asked}
        others = [example for example in examples if example.text not in texts]

        def left(done: int, of: int, left_s: float, name: str = name) -> None:
            bar(name, done, of, left_s)

        found = scored(name, asked, server, plan.out / "kept", plan.max_chars, left)
        answers = found.answers()
        learnt = baselines.tfidf([e.text for e in others], [e.label for e in others], [e.text for e in asked])
        most = metrics.majority([e.label for e in others])
        results.append(
            Result(
                server.name,
                name,
                len(asked),
                metrics.macro_f1(found.truth, [most] * len(asked)),
                metrics.macro_f1(found.truth, learnt),
                {scorer: metrics.bootstrap_f1(found.truth, a) for scorer, a in answers.items()},
                {scorer: metrics.accuracy(found.truth, a) for scorer, a in answers.items()},
            )
        )
    return results
