"""A trained head: hidden states and words of a text in, calibrated probabilities of labels out. NumPy only.

    states (blocks x hidden size) --standardise, clip, length about 1-->  x
    text --words.py-->  t, length 1                                        z = (W [x; t] + b) / temperature
    softmax(z): probabilities       mean(x^2) beyond `far`: the text is unlike those it was trained on

A head belongs to one model at one quantisation: the same text has other states in any other. It knows no model and no
text format; `features` says what it must be given.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import msgspec
import numpy as np
from numpy.typing import NDArray

from hob.errors import Conflict, StorageError
from hob.heads.words import weights_of

Floats = NDArray[np.float32]
CLIP = 5.0
"""Standard deviations beyond which a value counts no further: rare outliers of single dimensions are large."""


@dataclass(frozen=True)
class Features:
    """What of the model a head reads: one block of hidden_size values for each pool and each layer."""

    layers: list[int]
    pools: list[tuple[str, str]]
    """(how, span): of the text, or of one of the things it marks. An empty span is all that is read, lead included."""
    has_words: bool = False
    """Whether words of the text count too."""
    max_tokens: int = 1024
    """Longer texts lose their middle."""
    lead: str = ""
    """What is read before each text: see parts.py."""

    @property
    def num_blocks(self) -> int:
        """Pools times layers."""
        return len(self.layers) * len(self.pools)


@dataclass(frozen=True)
class Trust:
    """How far a head can be trusted: what it did on texts that it had not seen."""

    num_train: int
    num_held_out: int
    macro_f1: float
    accuracy: float
    majority_f1: float
    calibration_error: float
    """Mean distance of stated probability and share of right answers, over ten bins."""
    coverage: list[tuple[float, float, float]] = field(default_factory=list)
    """(confidence, share of texts at or above it, share of those that were right)"""


@dataclass
class Answer:
    """What a head says of one text."""

    label: str | None
    """None: it abstains."""
    best: str
    probability: float
    probabilities: list[float]
    """In the order of the head's labels."""
    is_far: bool
    """The text is unlike those the head was trained on."""


@dataclass
class Head:
    """One version of one task."""

    task: str
    version: int
    model: str
    quantisation: str
    labels: list[str]
    features: Features
    trust: Trust
    created: int
    """Unix time."""
    min_confidence: float
    """Below this it abstains, unless told otherwise."""
    temperature: float
    far: float
    mean: Floats
    """(F,) of the training texts' values; F = blocks x hidden size"""
    scale: Floats
    """(F,)"""
    weights: Floats
    """(labels, F + words)"""
    bias: Floats
    """(labels,)"""
    idf: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Words it knows; empty where words do not count."""

    def check_model(self, model: str, quantisation: str) -> None:
        """Raise Conflict unless this is the model the head was trained on."""
        if (model, quantisation) != (self.model, self.quantisation):
            raise Conflict(
                f"task '{self.task}' was trained on {self.model} {self.quantisation}, but {model} {quantisation} is "
                f"served. Train it again: hob task train {self.task} --data FILE"
            )

    def answers(self, states: Floats, texts: list[str], min_confidence: float | None = None) -> list[Answer]:
        """states: (n, F). min_confidence: abstain below it; None: the head's own."""
        least = self.min_confidence if min_confidence is None else min_confidence
        x = standardised(states, self.mean, self.scale)
        probabilities = softmax(self._scores(x, texts) / self.temperature)
        distance = distances(x)
        best = probabilities.argmax(axis=1)
        return [
            Answer(
                label=self.labels[b] if row[b] >= least else None,
                best=self.labels[b],
                probability=float(row[b]),
                probabilities=row.tolist(),
                is_far=bool(d > self.far),
            )
            for b, row, d in zip(best, probabilities, distance, strict=True)
        ]

    def _scores(self, x: Floats, texts: list[str]) -> Floats:
        num_values = len(self.mean)
        # One row at a time: the product of many rows adds in another order, and a text's answer would depend on others.
        scores = np.stack([self.weights[:, :num_values] @ row for row in x]) + self.bias
        if self.idf:
            for row, text in zip(scores, texts, strict=True):
                columns, values = weights_of(text, self.idf)
                row += self.weights[:, [num_values + c for c in columns]] @ np.array(values, np.float32)
        return scores


def standardised(states: Floats, mean: Floats, scale: Floats) -> Floats:
    """(n, F) -> about length 1 each, so that hidden states weigh as much as words."""
    x: Floats = np.clip((states - mean) / scale, -CLIP, CLIP) / np.float32(max(len(mean), 1) ** 0.5)
    return x


def distances(x: Floats) -> Floats:
    """(n,) mean square of standardised values: 1 on average where the texts are like the training's."""
    squares: Floats = np.sum(x * x, axis=1)
    return squares


def softmax(scores: Floats) -> Floats:
    """Over the last axis."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    total: Floats = weights / weights.sum(axis=-1, keepdims=True)
    return total


# ---- files ----

_ARRAYS = ("mean", "scale", "weights", "bias")


def to_bytes(head: Head) -> bytes:
    """A head as one .npz file: four arrays and a JSON text. No pickle, so a file can do nothing but be wrong."""
    facts = {name: value for name, value in asdict(head).items() if name not in _ARRAYS}
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: getattr(head, name) for name in _ARRAYS}
    np.savez(buffer, facts=np.frombuffer(msgspec.json.encode(facts), np.uint8), **arrays)
    return buffer.getvalue()


def from_file(path: Path) -> Head:
    """Read what `to_bytes` made. Raises StorageError for a file that is not one."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as data:
            facts = msgspec.json.decode(data["facts"].tobytes(), type=dict[str, Any])
            arrays = {name: data[name] for name in _ARRAYS}
        head = msgspec.convert({**facts, **dict.fromkeys(_ARRAYS)}, _Facts)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, msgspec.MsgspecError) as error:
        raise StorageError(f"{path} is no head: {error}. Train the task again.") from None
    shapes = {name: array.shape for name, array in arrays.items()}
    num_values, num_labels = len(arrays["mean"]), len(head.labels)
    expected = {
        "mean": (num_values,),
        "scale": (num_values,),
        "weights": (num_labels, num_values + len(head.idf)),
        "bias": (num_labels,),
    }
    if shapes != expected:
        raise StorageError(f"{path} is no head: its arrays are {shapes}, expected {expected}. Train the task again.")
    return Head(**{f: getattr(head, f) for f in _Facts.__struct_fields__ if f not in _ARRAYS}, **arrays)


class _Facts(msgspec.Struct):
    """A head without its arrays."""

    task: str
    version: int
    model: str
    quantisation: str
    labels: list[str]
    features: Features
    trust: Trust
    created: int
    min_confidence: float
    temperature: float
    far: float
    idf: dict[str, tuple[int, float]]
    mean: None = None
    scale: None = None
    weights: None = None
    bias: None = None
