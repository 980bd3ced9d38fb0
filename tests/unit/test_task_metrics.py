"""Macro-F1, intervals, calibration, splits and files, on examples small enough to do by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from hob.errors import UserError
from hob.tasks import metrics
from hob.tasks.datasets import Example, check_labels, dataset_files, read_examples, share_of, split_by_hash
from hob.tasks.few_shot import draw
from hob.tasks.files import classify_file


def test_macro_f1_by_hand() -> None:
    """a: tp 1, fp 1, fn 1 -> .5; b: tp 1, fp 1, fn 0 -> 2/3; c: tp 0, fp 0, fn 1 -> 0. Mean 7/18."""
    assert metrics.macro_f1(["a", "a", "b", "c"], ["a", "b", "b", "a"]) == pytest.approx(7 / 18)


def test_majority_at_nine_to_one() -> None:
    truth = ["x"] * 9 + ["y"]
    assert metrics.majority(truth) == "x"
    assert metrics.accuracy(truth, ["x"] * 10) == 0.9
    assert metrics.macro_f1(truth, ["x"] * 10) == pytest.approx(18 / 19 / 2)
    assert metrics.majority(["b", "a"]) == "a"


def test_bootstrap_holds_the_value_and_narrows_with_more_texts() -> None:
    truth, answers = ["a", "b"] * 20, (["a", "b"] * 15 + ["b", "a"] * 5)
    few, many = metrics.bootstrap_f1(truth, answers), metrics.bootstrap_f1(truth * 20, answers * 20)
    assert few.value == many.value == pytest.approx(0.75)
    assert few.low < many.low < 0.75 < many.high < few.high
    assert metrics.bootstrap_f1(truth, truth) == metrics.Measured(1.0, 1.0, 1.0)


def test_calibration_error_by_hand() -> None:
    """Two at .95 of which one is right, two at .55 of which one is right: (.45 + .05) / 2."""
    assert metrics.calibration_error([0.95, 0.95, 0.55, 0.55], [True, False, True, False]) == pytest.approx(0.25)
    assert metrics.calibration_error([1.0, 1.0], [True, True]) == 0.0


def test_a_split_depends_on_the_text_alone() -> None:
    examples = [Example(f"text {i}", "a") for i in range(1000)]
    kept, held = split_by_hash(examples, 0.2)
    assert 150 < len(held) < 250
    assert not {e.text for e in kept} & {e.text for e in held}
    assert set(split_by_hash(examples[::-1], 0.2)[1]) == set(held)
    assert share_of("a", "x") != share_of("a", "y")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'text,label\nhello,x\n"two, words",y\n'),
        ("a.tsv", "text\tlabel\nhello\tx\ntwo, words\ty\n"),
        ("a.jsonl", '{"text": "hello", "label": "x"}\n{"text": "two, words", "label": "y"}\n'),
    ],
)
def test_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_examples(tmp_path / name) == [Example("hello", "x"), Example("two, words", "y")]
    assert dataset_files(tmp_path, ["a", "b"]) == {"a": tmp_path / name}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text,kind\nhello,x\n", "row 1.*'label'.*text, kind"),
        ("a.csv", "text,label\nhello,x\n,y\n", "row 2"),
        ("a.csv", "text,label\n", "no rows"),
        ("a.jsonl", "{", "cannot be read"),
        ("a.xls", "", "Expected .csv"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_examples(tmp_path / name)


def test_labels_that_teach_nothing_are_refused() -> None:
    check_labels(["a", "b"] * 2)
    for labels, message in ((["a", "a"], "Expected two"), (["a", "a", "b"], "'b' has 1"), ([], "all 0")):
        with pytest.raises(UserError, match=message):
            check_labels(labels)


def test_a_draw_has_two_of_each_label() -> None:
    examples = [Example(str(i), "rare" if i < 3 else f"label {i % 4}") for i in range(100)]
    for seed in range(5):
        chosen = draw(examples, 12, seed)
        assert len(chosen) == len(set(chosen)) == 12
        assert sum(examples[i].label == "rare" for i in chosen) >= 2
    assert draw(examples, 12, 0) != draw(examples, 12, 1)
    assert len(draw(examples, 4, 0)) == 10


def test_rows_come_out_as_they_went_in_with_answers(tmp_path: Path) -> None:
    data, out = tmp_path / "in.csv", tmp_path / "out.csv"
    data.write_text('id,body,label\n1,hello,old\n2,"a, b",old\n')
    answers = [
        {"label": "x", "probability": 0.5, "out_of_domain": False},
        {"label": None, "probability": 0.25, "out_of_domain": True},
    ]
    assert classify_file(data, out, "body", lambda texts: [answers[t != "hello"] for t in texts]) == 2
    assert out.read_text() == (
        'id,body,label,probability,out_of_domain\n1,hello,x,0.5000,false\n2,"a, b",,0.2500,true\n'
    )
    with pytest.raises(UserError, match="'text'.*id, body"):
        classify_file(data, out, "text", lambda _: [])
