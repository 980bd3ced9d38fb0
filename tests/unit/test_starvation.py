"""No request starves: a simulation under a virtual clock, the short form of `python -m tests.starvation`."""

from __future__ import annotations

import pytest
from tests.starvation import Result, simulate


def check(result: Result) -> None:
    assert result.num_ended == result.num_requests
    assert result.longest_wait_s < result.bound_s, result


def test_nobody_starves_among_2500_requests() -> None:
    check(simulate(num_requests=2500, seed=1, is_hard=False))


@pytest.mark.slow
def test_nobody_starves_among_100000_requests() -> None:
    check(simulate(num_requests=100_000, seed=2))


def test_the_detector_cries_without_the_floor() -> None:
    """The control: strict classes, nobody owed a turn."""
    result = simulate(num_requests=2500, seed=1, has_floor=False, is_hard=False)
    assert result.longest_wait_s > result.bound_s
