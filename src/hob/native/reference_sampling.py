"""The sampler of the compute core in plain NumPy: `csrc/sample.cpp` must draw the same tokens.

    logits + bias -> penalties -> mask -> (temperature 0: the largest) -> top-k -> min-p -> top-p -> draw by inverse CDF

The random number of a draw depends on (seed, sample index, position) alone, so a step may be computed again, a
sequence preempted, or a token guessed ahead, and the same tokens come out.

Penalties: Keskar et al. 2019, arXiv:1909.05858. Top-p: Holtzman et al. 2019, arXiv:1904.09751. Min-p: Nguyen et al.
2024, arXiv:2407.01082. Random numbers: the finaliser of splitmix64, Steele, Lea and Flood 2014.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from hob.request import SamplingParams

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return x ^ x >> 31


def uniform(seed: int, sample_index: int, position: int) -> float:
    """A number of [0, 1) that belongs to this seed, sample and position."""
    h = _mix((seed + _GOLDEN) & _WORD)
    h = _mix(h ^ (sample_index & 0xFFFFFFFF))
    h = _mix((h + _GOLDEN * ((position & 0xFFFFFFFF) + 1)) & _WORD)
    return float((h >> 11) * 2.0**-53)


def adjust(logits: NDArray[np.float32], params: SamplingParams, token_ids: list[int], num_generated: int) -> None:
    """Apply bias and penalties to a row of logits (V,) in place. The last `num_generated` of `token_ids` are output."""
    for token, bias in params.logit_bias.items():
        logits[token] += np.float32(bias)
    repetition = np.float32(params.repetition_penalty)
    for token in set(token_ids):
        logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
    for token, count in Counter(token_ids[len(token_ids) - num_generated :]).items():
        logits[token] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * np.float32(count)


def keep(logits: NDArray[np.float32], weights: NDArray[np.float64], params: SamplingParams) -> NDArray[np.intp]:
    """Token ids that top-k, min-p and top-p leave, most likely first; among equals the lower id comes first."""
    ids = np.argsort(-logits, kind="stable")
    if params.top_k > 0:
        ids = ids[: params.top_k]
    ids = ids[weights[ids] >= np.float32(params.min_p)]  # the largest weight is 1
    if params.top_p < 1:
        cumulated = np.cumsum(weights[ids])
        ids = ids[: int(np.searchsorted(cumulated, np.float32(params.top_p) * cumulated[-1])) + 1]
    return ids


def sample(
    logits: NDArray[np.float32],
    params: SamplingParams,
    sample_index: int,
    position: int,
    token_ids: list[int],
    num_generated: int,
    mask: NDArray[np.uint8] | None = None,
) -> int:
    """The token drawn from a row of raw logits (V,). mask: bit id % 8 of byte id // 8 allows a token."""
    changed = logits.copy()
    adjust(changed, params, token_ids, num_generated)
    if mask is not None:
        changed[np.unpackbits(mask, count=len(logits), bitorder="little") == 0] = -np.inf
    if params.temperature == 0:
        return int(changed.argmax())
    weights = np.exp(((changed - changed.max()) / np.float32(params.temperature)).astype(np.float64))
    ids = np.sort(keep(changed, weights, params))
    cumulated = np.cumsum(weights[ids])
    at = int(np.searchsorted(cumulated, uniform(params.seed, sample_index, position) * cumulated[-1], side="right"))
    return int(ids[min(at, len(ids) - 1)])
