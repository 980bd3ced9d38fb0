"""What a step will take, learnt from the steps before it.

    seconds = a + b * rows + c * context + d * keys

a is reading the weights and all that a step costs anyway, b a row's matrix products, c its attention, d bringing a
sequence's keys and values in once, however many rows look at them. Fitted by least squares on relative errors, older
steps forgotten with a half-life of 200 steps, and held near a prior so that the first steps are sane: the default
model's, times what the first steps took of its estimates, because a larger model is slower in all four. Example: with
a = 4 ms, b = 0.3 ms, c = 0.4 us, d = 1 us, 8 rows of a prompt at 1,000 are 4 + 2.4 + 3.2 + 1 = 10.6 ms.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

import numpy as np

PRIOR = np.array([4e-3, 3e-4, 3e-7, 1e-6])
"""Near SmolLM2-135M on two cores."""
FORGET = 0.5 ** (1 / 200)
OUTLIER = 4.0
"""A step this many times the estimate was disturbed (a core taken away): it counts as this much, no more."""
SETTLE = 16
"""Steps that the prior is scaled by: the middle one of their ratios."""
REFIT_EVERY = 8
RIDGE = 0.01
"""Weight of the prior, in steps."""


class Work(NamedTuple):
    """What a step computes, as far as its cost goes."""

    num_rows: int = 0
    context: int = 0
    """Sum over the rows of their places in their sequences."""
    num_keys: int = 0
    """Sum over the sequences of the keys that their last row sees."""

    def plus(self, start: int, num_rows: int) -> Work:
        """And rows [start, start + num_rows) of one more sequence."""
        end = start + num_rows
        return Work(self.num_rows + num_rows, self.context + (start + end) * num_rows // 2, self.num_keys + end)

    def longer(self, start: int, num_rows: int) -> Work:
        """And rows [start, start + num_rows) of a sequence that has the rows before them."""
        more = self.plus(start, num_rows)
        return more._replace(num_keys=self.num_keys + num_rows)


class CostModel:
    """Seconds per step, online."""

    def __init__(self) -> None:
        self._prior = PRIOR
        self._ratios: list[float] = []
        self._coefficients = [float(value) for value in PRIOR]
        # Sums over steps of x x^T (upper triangle) and of x, where x = (1, rows, context, keys) / seconds.
        self._sums = [0.0] * 14
        self._num_steps = 0

    def observe(self, work: Work, seconds: float) -> None:
        """Learn from a step."""
        seconds = max(seconds, 1e-6)
        if len(self._ratios) < SETTLE:
            self._settle(work, seconds)
        seconds = min(seconds, OUTLIER * self.step_s(work))
        w, x, y, z = 1.0 / seconds, work.num_rows / seconds, work.context / seconds, work.num_keys / seconds
        news = (w * w, w * x, w * y, w * z, x * x, x * y, x * z, y * y, y * z, z * z, w, x, y, z)
        self._sums = [FORGET * old + new for old, new in zip(self._sums, news, strict=True)]
        self._num_steps += 1
        if self._num_steps % REFIT_EVERY == 0 or self._num_steps < REFIT_EVERY:
            self._refit()

    def _settle(self, work: Work, seconds: float) -> None:
        """Scale the prior, and with it what is believed so far."""
        self._ratios.append(seconds / float(PRIOR @ (1, *work)))
        prior = PRIOR * statistics.median(self._ratios)
        self._coefficients = (np.array(self._coefficients) * prior / self._prior).tolist()
        self._prior = prior

    def _refit(self) -> None:
        """Least squares with a ridge towards the prior, in units of the prior so that all four weigh alike."""
        ww, wx, wy, wz, xx, xy, xz, yy, yz, zz, *firsts = self._sums
        gram = np.array([[ww, wx, wy, wz], [wx, xx, xy, xz], [wy, xy, yy, yz], [wz, xz, yz, zz]])
        prior = self._prior
        fit = np.linalg.solve(gram * np.outer(prior, prior) + RIDGE * np.eye(4), np.array(firsts) * prior + RIDGE)
        self._coefficients = (np.maximum(fit, 0.05) * prior).tolist()

    def step_s(self, work: Work) -> float:
        """Estimated seconds of a step."""
        a, b, c, d = self._coefficients
        return a + b * work.num_rows + c * work.context + d * work.num_keys

    def share(self, start: int, num_rows: int, num_sequences: int) -> float:
        """What one of a step's sequences answers for: its rows, and an equal part of what the step costs anyway."""
        return self._coefficients[0] / num_sequences + self.prompt_s(start, num_rows)

    def prompt_s(self, start: int, num_rows: int) -> float:
        """Estimated seconds to compute rows [start, start + num_rows) of one sequence, beside a step's fixed part."""
        _, b, c, d = self._coefficients
        return b * num_rows + c * num_rows * (start + num_rows / 2) + d * (start + num_rows)

    def row_s(self, start: int) -> float:
        """Estimated seconds of one row more, at `start`, of a sequence that has the rows before it."""
        _, b, c, d = self._coefficients
        return b + c * start + d

    def rows_within(self, seconds: float, start: int, max_rows: int) -> int:
        """Most further rows of one sequence, from index `start` on, that take no more than `seconds` beside a step.

        Solves b n + c (n start + n^2 / 2) + d (start + n) = seconds.
        """
        _, b, c, d = self._coefficients
        seconds -= d * start
        if seconds <= 0:
            return 0
        linear = b + c * start + d
        n = 2 * seconds / (linear + (linear * linear + 2 * c * seconds) ** 0.5)
        return min(int(n), max_rows)
