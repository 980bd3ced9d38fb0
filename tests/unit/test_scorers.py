"""The six scorings by examples worked out by hand, and what must not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hob.tasks.scorers import SCORERS, LabelScores, batch_calibration, softmax

LN = math.log


def scores(sums: list[list[float]], **given: list[float] | list[list[float]]) -> LabelScores:
    num_labels = len(sums[0])
    fields = {
        "counts": [1.0] * num_labels,
        "prior": [0.0] * num_labels,
        "premise": [0.0] * num_labels,
        "content_free": [[0.0] * num_labels],
        **given,
    }
    return LabelScores(np.array(sums), *(np.array(fields[n]) for n in ("counts", "prior", "premise", "content_free")))


def test_probability_is_the_sum() -> None:
    assert SCORERS["probability"](scores([[-1.0, -2.0]])).tolist() == [[-1.0, -2.0]]


def test_length_normalised_divides_by_tokens() -> None:
    """-3 over one token, -4 over two: -3 and -2, so the longer label wins."""
    assert SCORERS["length_normalised"](scores([[-3.0, -4.0]], counts=[1, 2])).tolist() == [[-3.0, -2.0]]


def test_pmi_removes_what_a_label_has_anyway() -> None:
    """ln .5 - ln .8 = ln .625 and ln .25 - ln .2 = ln 1.25."""
    found = SCORERS["pmi"](scores([[LN(0.5), LN(0.25)]], prior=[LN(0.8), LN(0.2)]))
    assert np.exp(found[0]) == pytest.approx([0.625, 1.25])


def test_dc_pmi_removes_what_the_domain_says() -> None:
    """.6 / .9 and .3 / .05, whatever the prior after nothing."""
    found = SCORERS["dc_pmi"](scores([[LN(0.6), LN(0.3)]], premise=[LN(0.9), LN(0.05)], prior=[-7.0, -9.0]))
    assert np.exp(found[0]) == pytest.approx([2 / 3, 6.0])


def test_contextual_calibration() -> None:
    """p = (.6, .4); content-free texts say (.9, .1) and (.7, .3), mean (.8, .2). W p = (.75, 2), then the softmax."""
    given = scores([[LN(0.6), LN(0.4)]], content_free=[[LN(0.9), LN(0.1)], [LN(0.7), LN(0.3)]])
    e = [math.exp(0.75), math.exp(2.0)]
    assert SCORERS["contextual_calibration"](given)[0] == pytest.approx([e[0] / sum(e), e[1] / sum(e)])


def test_a_content_free_text_becomes_uniform() -> None:
    sums = [[LN(0.7), LN(0.2), LN(0.1)]]
    found = SCORERS["contextual_calibration"](scores(sums, content_free=sums))
    assert found[0] == pytest.approx([1 / 3] * 3)


def test_batch_calibration_divides_by_the_batch_mean() -> None:
    """p = (.9, .1) and (.7, .3): mean (.8, .2); so (1.125, .5) and (.875, 1.5)."""
    found = batch_calibration(scores([[LN(0.9), LN(0.1)], [LN(0.7), LN(0.3)]]))
    assert np.exp(found).ravel() == pytest.approx([1.125, 0.5, 0.875, 1.5])


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_order_of_labels_and_texts_changes_nothing(scorer: str) -> None:
    rng = np.random.default_rng(0)
    given = LabelScores(
        rng.normal(-5, 2, (20, 4)),
        np.array([1.0, 2.0, 1.0, 3.0]),
        rng.normal(-5, 2, 4),
        rng.normal(-5, 2, 4),
        rng.normal(-5, 2, (3, 4)),
    )
    labels, texts = np.array([2, 0, 3, 1]), rng.permutation(20)
    turned = LabelScores(
        given.sums[texts][:, labels],
        given.counts[labels],
        given.prior[labels],
        given.premise[labels],
        given.content_free[:, labels],
    )
    np.testing.assert_allclose(SCORERS[scorer](turned), SCORERS[scorer](given)[texts][:, labels], rtol=1e-12)


@pytest.mark.parametrize("scorer", sorted(set(SCORERS) - {"batch_calibration"}))
def test_a_text_alone_scores_as_in_a_batch(scorer: str) -> None:
    sums = [[-1.0, -2.0], [-3.0, -0.5]]
    both = SCORERS[scorer](scores(sums, counts=[1, 2], prior=[-1, -2], premise=[-2, -1]))
    alone = SCORERS[scorer](scores(sums[1:], counts=[1, 2], prior=[-1, -2], premise=[-2, -1]))
    assert np.array_equal(both[1:], alone)


def test_softmax_of_very_small_probabilities() -> None:
    assert softmax(np.array([-2000.0, -2000.0])) == pytest.approx([0.5, 0.5])
