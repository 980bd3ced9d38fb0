"""Hidden states of many rows made into one vector: what an EMBED request wants, gathered chunk by chunk.

    Pooled(pools, num_tokens)  --add(first row, states of the rows)-->  ...  --vector()-->  pools x layers x hidden

Rows are added one after the other in float64, so the vector has the same bits however the prompt was cut into chunks.
It knows arrays only: no engine, no sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hob.request import Pool

States = NDArray[np.float32]
Vectors = NDArray[np.float64]


class Pooled:
    """The pools of one sequence as far as they are filled."""

    def __init__(self, pools: Sequence[Pool], num_tokens: int) -> None:
        self.next_row = 0
        """Rows before this one are in already: a recomputed row does not count twice."""
        self._pools = [(pool.how, *pool.rows(num_tokens)) for pool in pools]
        self._values: list[Vectors | None] = [None] * len(pools)

    def add(self, first: int, states: States) -> None:
        """Take in rows first .. first + n. states: (n, layers, hidden)."""
        for k, (how, start, end) in enumerate(self._pools):
            rows = states[max(start - first, 0) : max(end - first, 0)]
            if len(rows):
                self._values[k] = _joined(how, self._values[k], rows)
        self.next_row = first + len(states)

    def vector(self) -> States:
        """(pools * layers * hidden,), pool by pool. Call when every row is in."""
        parts = []
        for (how, start, end), value in zip(self._pools, self._values, strict=True):
            assert value is not None, f"no row of {start}..{end} was added"
            parts.append(value.ravel() / (end - start) if how == "mean" else value.ravel())
        return np.concatenate(parts).astype(np.float32)


def _joined(how: str, before: Vectors | None, rows: States) -> Vectors:
    """What was gathered before, (layers, hidden), and `rows` after it."""
    if how == "last":
        last: Vectors = rows[-1].astype(np.float64)
        return last
    combine = np.add if how == "mean" else np.maximum
    # Row by row, not rows.sum(axis=0): that may add in an order which depends on the number of rows.
    result: Vectors = rows[0].astype(np.float64) if before is None else combine(before, rows[0])
    for row in rows[1:]:
        combine(result, row, out=result)
    return result
