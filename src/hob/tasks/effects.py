"""Does it matter which? A factor's levels compared over data sets, with intervals and tests of rank. Pure.

    table (data sets, levels) of macro-F1  -->  means, the gap of best and worst, whether ranks agree from set to set

Data sets are what is drawn: a level is better if it is so on sets not seen, so intervals and tests are over sets, not
texts. Ranks: Friedman's test for three levels and more, Wilcoxon's for two. Kendall's W is 0 where each set has an
order of its own, 1 where all have the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from hob.tasks.metrics import Measured

Floats = NDArray[np.float64]
NUM_DRAWS = 10_000


@dataclass(frozen=True)
class Effect:
    """A factor over a number of data sets."""

    num_sets: int
    means: dict[str, float]
    """Of each level over sets, the best first."""
    gap: Measured
    """Best minus worst; the interval is of these two, over draws of sets."""
    agreement: float
    """Kendall's W."""
    p: float
    """How likely ranks at least as unlike would be if levels did not differ."""


def effect(levels: list[str], table: Floats) -> Effect:
    """table: (data sets, levels), two levels at least."""
    means = table.mean(axis=0)
    order = np.argsort(-means, kind="stable")
    gaps = table[:, order[0]] - table[:, order[-1]]
    draws = np.random.default_rng(0).integers(0, len(gaps), (NUM_DRAWS, len(gaps)))
    low, high = np.quantile(gaps[draws].mean(axis=1), [0.025, 0.975])
    return Effect(
        num_sets=len(table),
        means={levels[i]: float(means[i]) for i in order},
        gap=Measured(float(gaps.mean()), float(low), float(high)),
        agreement=_agreement(table),
        p=_p(table),
    )


def _agreement(table: Floats) -> float:
    """W: variance of the levels' mean ranks over what it would be if all sets agreed."""
    num_levels = table.shape[1]
    ranks = stats.rankdata(table, axis=1).mean(axis=0)
    return float(np.var(ranks) / ((num_levels**2 - 1) / 12))


def _p(table: Floats) -> float:
    if np.all(table == table[:, :1]):
        return 1.0
    if table.shape[1] == 2:
        return float(stats.wilcoxon(table[:, 0], table[:, 1]).pvalue)
    return float(stats.friedmanchisquare(*table.T).pvalue)
