"""How good a classification is: macro-F1, accuracy, intervals, calibration. Pure.

Macro-F1 is the mean of the labels' F1, each 2 tp / (2 tp + fp + fn), over the labels that occur in the truth or the
answers; a label never answered counts 0. It is what unbalanced sets need: always saying the most frequent label of two
at 9 : 1 has accuracy 0.9 and macro-F1 0.47.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def macro_f1(truth: Sequence[str], answers: Sequence[str]) -> float:
    """In [0, 1]."""
    labels = sorted(set(truth) | set(answers))
    code = {label: i for i, label in enumerate(labels)}
    return _macro_f1(np.array([code[t] for t in truth]), np.array([code[a] for a in answers]), len(labels))


def _macro_f1(truth: NDArray[np.int_], answers: NDArray[np.int_], num_labels: int) -> float:
    right = np.bincount(truth[truth == answers], minlength=num_labels)
    ends = np.bincount(truth, minlength=num_labels) + np.bincount(answers, minlength=num_labels)
    occurs = ends > 0
    return float(np.mean(2 * right[occurs] / ends[occurs]))


def accuracy(truth: Sequence[str], answers: Sequence[str]) -> float:
    """Share of equal entries."""
    return sum(t == a for t, a in zip(truth, answers, strict=True)) / len(truth)


def majority(truth: Sequence[str]) -> str:
    """The most frequent label; of equals the first in the alphabet."""
    counts = Counter(truth)
    return min(counts, key=lambda label: (-counts[label], label))


@dataclass(frozen=True)
class Measured:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap_f1(truth: Sequence[str], answers: Sequence[str], num_draws: int = 1000, seed: int = 0) -> Measured:
    """Macro-F1 and the 2.5 and 97.5 % points over texts drawn with replacement."""
    labels = sorted(set(truth) | set(answers))
    code = {label: i for i, label in enumerate(labels)}
    t, a = np.array([code[x] for x in truth]), np.array([code[x] for x in answers])
    rng = np.random.default_rng(seed)
    draws = [_macro_f1(t[i], a[i], len(labels)) for i in rng.integers(0, len(t), (num_draws, len(t)))]
    low, high = np.quantile(draws, [0.025, 0.975])
    return Measured(_macro_f1(t, a, len(labels)), float(low), float(high))


def calibration_error(confidences: Sequence[float], is_right: Sequence[bool], num_bins: int = 10) -> float:
    """Expected calibration error: |share right - mean confidence| of each bin, weighted by its texts."""
    confidence, right = np.array(confidences), np.array(is_right, float)
    bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    gaps = [abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in set(bins)]
    return float(sum(gaps))
