"""The short form of the memory soak. The long one: python -m tests.soak.memory --seconds 1800."""

from __future__ import annotations

import pytest

from tests.soak.memory import BUDGETS, run, slope


@pytest.mark.slow
def test_pss_stays_under_the_budget_and_the_stated_overhead() -> None:
    findings = run(seconds=1.0, seed=1, acts=6, clients=2)
    assert not findings.wrong
    assert findings.num_requests + findings.num_refused == 12
    assert findings.num_loads >= 3
    assert findings.num_samples > 20
    assert findings.worst_bytes < findings.overhead_bytes


@pytest.mark.slow
def test_without_a_budget_the_same_work_takes_more() -> None:
    """The positive control: held to a budget that the daemon does not know of, the soak cries."""
    findings = run(seconds=1.0, seed=1, acts=8, granted=1 << 40)
    assert findings.worst_bytes > findings.overhead_bytes
    assert findings.peak_pss_bytes > BUDGETS[0] + findings.overhead_bytes


def test_the_slope_is_that_of_the_points() -> None:
    points = [(60.0 * i, 100_000_000 + 1000 * i + (i % 3)) for i in range(40)]
    rate, error = slope(points)
    assert rate == pytest.approx(60_000, rel=0.01)
    assert error < 600
