"""Six ways to make a choice out of label log-probabilities. Pure: arrays in, scores out, the largest is the answer.

Shapes: n texts, C labels. `sums` (n, C) is log p(label | text), the sum over the label's tokens; `counts` (C,) how many
tokens. Priors (C,) are log p(label | something without the text). Nothing depends on the order of labels or texts,
except that batch calibration looks at all texts of a batch together.

    probability             log p(y | x)
    length_normalised       log p(y | x) / tokens of y
    pmi                     log p(y | x) - log p(y)                      y after an empty text
    dc_pmi                  log p(y | x) - log p(y | premise)            Holtzman et al. 2021, arXiv:2104.08315
    contextual_calibration  softmax(W p), W = diag(p_cf)^-1              Zhao et al. 2021, arXiv:2102.09690
    batch_calibration       log p - log mean of p over the batch         Zhou et al. 2023, arXiv:2309.17249

p is the softmax of log p(y | x) over labels, p_cf its mean over content-free texts put in the text's place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
CONTENT_FREE = ("N/A", "", "[MASK]")


@dataclass(frozen=True)
class LabelScores:
    """What the model said of n texts and C labels."""

    sums: Floats
    """(n, C)"""
    counts: Floats
    """(C,)"""
    prior: Floats
    """(C,) after nothing at all"""
    premise: Floats
    """(C,) after the domain's premise"""
    content_free: Floats
    """(k, C) after the prompt with each content-free text"""


def softmax(scores: Floats) -> Floats:
    """Over the last axis."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    total: Floats = weights / weights.sum(axis=-1, keepdims=True)
    return total


def probability(s: LabelScores) -> Floats:
    """(n, C)"""
    return s.sums


def length_normalised(s: LabelScores) -> Floats:
    """(n, C)"""
    return s.sums / s.counts


def pmi(s: LabelScores) -> Floats:
    """(n, C)"""
    return s.sums - s.prior


def dc_pmi(s: LabelScores) -> Floats:
    """(n, C)"""
    return s.sums - s.premise


def contextual_calibration(s: LabelScores) -> Floats:
    """(n, C) probabilities; a content-free text that is the only one gets 1 / C for each label."""
    return softmax(softmax(s.sums) / softmax(s.content_free).mean(axis=0))


def batch_calibration(s: LabelScores) -> Floats:
    """(n, C)"""
    p = softmax(s.sums)
    scores: Floats = np.log(p) - np.log(p.mean(axis=0))
    return scores


SCORERS: dict[str, Callable[[LabelScores], Floats]] = {
    scorer.__name__: scorer
    for scorer in (probability, length_normalised, pmi, dc_pmi, contextual_calibration, batch_calibration)
}
