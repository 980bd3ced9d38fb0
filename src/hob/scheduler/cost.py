"""What a step will take, learnt from the steps before it.

    seconds = a + b * rows + c * sum over rows of their context

a is reading the weights, b a row's matrix products, c its attention. Fitted by least squares on relative errors, older
steps forgotten with a half-life of 200 steps, and held near a prior so that the first steps are sane. Example: with
a = 5 ms, b = 0.4 ms, c = 0.1 us a chunk of 100 rows at context 1,000 is 5 + 40 + 10 = 55 ms.
"""

from __future__ import annotations

import numpy as np

PRIOR = np.array([5e-3, 4e-4, 1e-7])
"""Near SmolLM2-135M on two cores."""
FORGET = 0.5 ** (1 / 200)
OUTLIER = 4.0
"""A step this many times the estimate was disturbed (a core taken away): it counts as this much, no more."""
REFIT_EVERY = 8
RIDGE = 0.01
"""Weight of the prior, in steps."""


class CostModel:
    """Seconds per step, online."""

    def __init__(self) -> None:
        self._coefficients = [float(value) for value in PRIOR]
        # Sums over steps of x x^T (upper triangle) and of x, where x = (1, rows, context) / seconds.
        self._sums = [0.0] * 9
        self._num_steps = 0

    def observe(self, num_rows: int, context: int, seconds: float) -> None:
        """Learn from a step of `num_rows` rows whose places in their sequences sum to `context`."""
        seconds = min(max(seconds, 1e-6), OUTLIER * self.step_s(num_rows, context))
        x, y, z = 1.0 / seconds, num_rows / seconds, context / seconds
        news = (x * x, x * y, x * z, y * y, y * z, z * z, x, y, z)
        self._sums = [FORGET * old + new for old, new in zip(self._sums, news, strict=True)]
        self._num_steps += 1
        if self._num_steps % REFIT_EVERY == 0 or self._num_steps < REFIT_EVERY:
            self._refit()

    def _refit(self) -> None:
        """Least squares with a ridge towards the prior, in units of the prior so that all three weigh alike."""
        xx, xy, xz, yy, yz, zz, x, y, z = self._sums
        gram = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]) * np.outer(PRIOR, PRIOR)
        fit = np.linalg.solve(gram + RIDGE * np.eye(3), np.array([x, y, z]) * PRIOR + RIDGE)
        self._coefficients = (np.maximum(fit, 0.05) * PRIOR).tolist()

    def step_s(self, num_rows: int, context: int) -> float:
        """Estimated seconds of a step."""
        a, b, c = self._coefficients
        return a + b * num_rows + c * context

    def share(self, num_rows: int, context: int, num_sequences: int) -> float:
        """What one of a step's sequences answers for: its rows, and an equal part of what the step costs anyway."""
        a, b, c = self._coefficients
        return a / num_sequences + b * num_rows + c * context

    def prompt_s(self, start: int, num_rows: int) -> float:
        """Estimated seconds to compute rows [start, start + num_rows) of one sequence, beside a step's fixed part."""
        _, b, c = self._coefficients
        return b * num_rows + c * num_rows * (start + num_rows / 2)

    def rows_within(self, seconds: float, start: int, max_rows: int) -> int:
        """Most further rows of one sequence, from index `start` on, that take no more than `seconds` beside a step.

        Solves b n + c (n start + n^2 / 2) = seconds.
        """
        _, b, c = self._coefficients
        if seconds <= 0:
            return 0
        linear = b + c * start
        n = 2 * seconds / (linear + (linear * linear + 2 * c * seconds) ** 0.5)
        return min(int(n), max_rows)
