"""Whether a factor matters over data sets: by hand, and where there is nothing."""

from __future__ import annotations

import numpy as np
import pytest

from hob.tasks import report
from hob.tasks.effects import effect
from hob.tasks.metrics import Measured
from hob.tasks.scorers import SCORERS
from hob.tasks.zero_shot import Result


def test_three_sets_that_agree_by_hand() -> None:
    found = effect(["low", "high", "mid"], np.array([[0.1, 0.5, 0.3], [0.2, 0.6, 0.3], [0.0, 0.4, 0.3]]))
    assert list(found.means) == ["high", "mid", "low"]
    assert found.means["high"] == pytest.approx(0.5)
    assert (found.gap.value, found.gap.low, found.gap.high) == pytest.approx((0.4, 0.4, 0.4))
    assert found.agreement == pytest.approx(1.0)
    assert found.p == pytest.approx(np.exp(-3.0))  # chi square of 3 x 2 x W = 6 at 2 degrees of freedom


def test_levels_that_do_not_differ() -> None:
    """The control: noise has no order, and a factor without any difference no p below 1."""
    noise = effect(["a", "b", "c"], np.random.default_rng(1).random((200, 3)))
    assert noise.p > 0.05
    assert noise.agreement < 0.02
    assert effect(["a", "b"], np.full((9, 2), 0.5)).p == 1.0


def test_two_levels() -> None:
    found = effect(["a", "b"], np.array([[0.1, 0.2 + 0.01 * i] for i in range(8)]))
    assert found.p == pytest.approx(2 / 2**8)  # all eight differences have one sign
    assert found.gap.low > 0.1


def results(model: str, lift: float, num_sets: int = 8) -> list[Result]:
    """Batch calibration is better by 0.1 on every set."""
    return [
        Result(
            model,
            f"set {i}",
            100,
            0.3,
            0.8,
            {s: Measured(0.4 + lift + 0.1 * (s == "batch_calibration"), 0.3, 0.9) for s in SCORERS},
        )
        for i in range(num_sets)
    ]


def test_the_report_says_what_matters() -> None:
    text = report.markdown([*results("one", 0.0), *results("two", 0.01)])
    assert "batch_calibration is 0.100 above" in text
    assert text.count("the order is more than chance") == 5  # scoring of each and of both; the model, twice
    assert "Model, by batch_calibration" in text
    assert "Model" not in report.markdown(results("one", 0.0))
    assert "Too few data sets" in report.markdown(results("one", 0.0, 3))


def test_the_page_stands_alone() -> None:
    page = report.page([*results("<one>", 0.0), *results("two", 0.01)])
    assert "<h2>&lt;one&gt;</h2>" in page
    assert "<h2>All models</h2>" in page
    assert "<svg" in page
    assert not any(word in page for word in ("<script", "<link", "src="))
