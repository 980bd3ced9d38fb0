"""Heads without a model: made-up states in which the labels lie, and texts whose words tell them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hob.errors import Conflict, InvalidRequest, NotFound, StorageError
from hob.heads.head import Features, Head, from_file, standardised, to_bytes
from hob.heads.parts import LEAD, TEXT, Part, is_marked, parts_of, plain
from hob.heads.store import KEPT_VERSIONS, HeadStore
from hob.heads.words import fit_idf, weights_of, words_of
from hob.tasks import train

GATHERED = Features([2, 4], [("mean", TEXT), ("max", TEXT), ("last", TEXT)])
SIZE = 8
NUM_VALUES = GATHERED.num_blocks * SIZE


def states(labels: list[str], seed: int, strength: float = 1.5) -> np.ndarray:
    """Noise, shifted in the first block by the label."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((len(labels), NUM_VALUES)).astype(np.float32)
    for row, label in zip(values, labels, strict=True):
        row[:4] += strength * (ord(label[0]) % 3 - 1)
    return values


def made(labels: list[str], texts: list[str] | None = None, strength: float = 1.5, **options: object) -> Head:
    texts = texts or [f"text {i}" for i in range(len(labels))]
    return train.train("made", texts, labels, states(labels, 0, strength), GATHERED, ("m", "Q4_1"), **options)  # type: ignore[arg-type]


LABELS = ["a", "b", "c"] * 50


@pytest.fixture(scope="module")
def head() -> Head:
    return made(LABELS, with_words=False)


def answers(head: Head, labels: list[str], seed: int = 1, **options: float) -> list[str | None]:
    values = train.blocks_of(states(labels, seed), GATHERED, head.features)
    return [a.label for a in head.answers(values, [""] * len(labels), **options)]


def test_it_learns_what_is_there(head: Head) -> None:
    found = answers(head, LABELS, min_confidence=0.0)
    right = np.mean([a == b for a, b in zip(found, LABELS, strict=True)])
    assert right > 0.8
    assert abs(head.trust.accuracy - right) < 0.12, "what it claims is what it does"
    assert head.trust.macro_f1 > head.trust.majority_f1 + 0.4


def test_a_regression_of_some_values_scores_the_same_within_the_matrix_of_all() -> None:
    """So a mean of regressions that read different layers and pools is one matrix."""
    read = replace(GATHERED, layers=[4], pools=GATHERED.pools[:2], has_words=True)
    texts, code = [f"say {label}" for label in LABELS], np.array([ord(label) - ord("a") for label in LABELS])
    values = states(LABELS, 0)
    words = train._word_matrix(texts, fit_idf(texts))
    scores = []
    for given in (GATHERED, read):
        some = train.blocks_of(values, GATHERED, given)
        x = standardised(some, some.mean(axis=0), some.std(axis=0))
        weights, bias = train._fit(x, words, given, read, code, [3.0, 10.0])
        scores.append(np.concatenate([x, words.toarray()], axis=1) @ weights.T + bias)
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def test_where_all_were_right_a_head_is_still_not_certain() -> None:
    sure = made(LABELS, strength=20.0, with_words=False)
    values = train.blocks_of(states(LABELS, 1, 20.0), GATHERED, sure.features)
    probabilities = [a.probability for a in sure.answers(values, [""] * len(LABELS))]
    assert 0.95 < float(np.median(probabilities)) < 0.9999


def test_it_claims_nothing_where_there_is_nothing() -> None:
    """The control: labels that the states do not hold."""
    nothing = made(LABELS, strength=0.0, with_words=False)
    assert nothing.trust.macro_f1 < 0.5
    values = train.blocks_of(states(LABELS, 1, 0.0), GATHERED, nothing.features)
    assert np.mean([a.probability for a in nothing.answers(values, [""] * len(LABELS))]) < 0.6


def test_probabilities_are_calibrated(head: Head) -> None:
    many = LABELS * 10
    values = train.blocks_of(states(many, 2), GATHERED, head.features)
    found = head.answers(values, [""] * len(many))
    right = np.mean([a.best == b for a, b in zip(found, many, strict=True)])
    assert abs(np.mean([a.probability for a in found]) - right) < 0.08
    assert all(sum(a.probabilities) == pytest.approx(1, abs=1e-5) for a in found)


def test_it_abstains_below_a_confidence(head: Head) -> None:
    found = answers(head, LABELS, min_confidence=0.9)
    kept = [(a, b) for a, b in zip(found, LABELS, strict=True) if a is not None]
    assert 0 < len(kept) < len(LABELS)
    assert np.mean([a == b for a, b in kept]) > 0.9
    assert None not in answers(head, LABELS, min_confidence=0.0)


def test_far_texts_are_flagged_and_near_ones_are_not(head: Head) -> None:
    near = train.blocks_of(states(LABELS, 3), GATHERED, head.features)
    far = near * 2.5
    assert np.mean([a.is_far for a in head.answers(near, [""] * len(near))]) < 0.06
    assert np.mean([a.is_far for a in head.answers(far, [""] * len(far))]) > 0.9


def test_words_alone_can_carry_it() -> None:
    texts = [f"nothing {'soup' if label == 'a' else 'train'} number{i}" for i, label in enumerate(["a", "b"] * 40)]
    head = made(["a", "b"] * 40, texts, strength=0.0)
    assert head.features.has_words
    values = train.blocks_of(states(["a", "b"], 5, 0.0), GATHERED, head.features)
    assert [a.best for a in head.answers(values, ["some soup", "a train"])] == ["a", "b"]


def test_a_text_has_one_answer_whatever_its_company(head: Head) -> None:
    values = train.blocks_of(states(LABELS, 4), GATHERED, head.features)
    together = head.answers(values, [""] * len(values))
    assert [head.answers(values[i : i + 1], [""])[0] for i in range(20)] == together[:20]


def test_the_order_of_examples_does_not_name_the_labels() -> None:
    assert made(LABELS[::-1], with_words=False).labels == ["a", "b", "c"]


def test_the_carried_back_weights_are_those_of_the_gram_matrix() -> None:
    """Fitted in n dimensions or in F: the same scores. n < F and n > F."""
    for count in (30, 150):
        head = made(LABELS[:count], with_words=False)
        values = train.blocks_of(states(LABELS[:count], 0), GATHERED, head.features)
        found = [a.best for a in head.answers(values, [""] * count)]
        assert np.mean([a == b for a, b in zip(found, LABELS, strict=False)]) > 0.9


# ---- files ----


def test_a_head_survives_the_disk(head: Head, tmp_path: Path) -> None:
    path = tmp_path / "1.npz"
    path.write_bytes(to_bytes(head))
    again = from_file(path)
    assert answers(again, LABELS) == answers(head, LABELS)
    assert (again.trust, again.features, again.labels) == (head.trust, head.features, head.labels)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 nothing", b"\x80\x04pickle"])
def test_a_file_that_is_no_head(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "1.npz").write_bytes(data)
    with pytest.raises(StorageError, match="Train the task again"):
        from_file(tmp_path / "1.npz")


def test_a_head_whose_arrays_do_not_fit(head: Head, tmp_path: Path) -> None:
    (tmp_path / "1.npz").write_bytes(to_bytes(replace(head, bias=head.bias[:1])))
    with pytest.raises(StorageError, match="arrays"):
        from_file(tmp_path / "1.npz")


def test_versions(head: Head, tmp_path: Path) -> None:
    store = HeadStore(tmp_path / "tasks")
    assert store.tasks("app") == []
    for expected in range(1, KEPT_VERSIONS + 3):
        assert store.save("app", head).version == expected
    assert store.versions("app", "made") == list(range(3, KEPT_VERSIONS + 3))
    assert store.load("app", "made").version == KEPT_VERSIONS + 2
    assert store.load("app", "made", 3).version == 3
    assert store.tasks("other") == []
    with pytest.raises(NotFound, match="version 1"):
        store.load("app", "made", 1)
    with pytest.raises(NotFound, match="Known: none"):
        store.load("other", "made")
    store.remove("app", "made")
    with pytest.raises(NotFound):
        store.load("app", "made")


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "-a", "x" * 65])
def test_names_that_are_no_file_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="task name"):
        HeadStore(tmp_path).versions("app", name)


def test_another_model_is_refused(head: Head) -> None:
    head.check_model("m", "Q4_1")
    for model in (("m", "Q8_0"), ("n", "Q4_1")):
        with pytest.raises(Conflict, match="Train it again"):
            head.check_model(*model)


# ---- texts ----


def test_parts_of_a_marked_text() -> None:
    text = "The <e1>company</e1> makes <e2>chairs</e2>."
    assert parts_of(text) == [
        Part("The", (TEXT,)),
        Part(" company", (TEXT, "e1")),
        Part(" makes", (TEXT,)),
        Part(" chairs", (TEXT, "e2")),
        Part(".", (TEXT,)),
    ]
    assert parts_of(text, LEAD) == [Part(LEAD), *parts_of(text)]
    assert "".join(part.text for part in parts_of(text)) == plain(text) == "The company makes chairs."


@pytest.mark.parametrize("text", ["plain", "<e1>a</e1> only", "<e1>a</e1> <e2> </e2>", "<e1>a</e2>"])
def test_texts_without_both_marks_stand_for_both(text: str) -> None:
    assert not is_marked(text)
    assert parts_of(text) == [Part(text, (TEXT, "e1", "e2"))]


def test_words_by_hand() -> None:
    assert words_of("Free entry, free!") == ["free", "entry", "free", "!", "free entry", "entry free", "free !"]
    idf = fit_idf(["a b", "a c"])
    assert idf["a"] == (0, 1.0)  # ln(3 / 3) + 1
    assert idf["b"][1] == pytest.approx(np.log(3 / 2) + 1)
    columns, values = weights_of("a a x", idf)
    assert columns == [0]
    assert values == [1.0]


def test_words_between_marked_things_count_by_themselves() -> None:
    words = words_of("So <e1>A</e1> kills <e2>B</e2> now.")
    assert {"between kills", "e1e2 between kills", "e1e2 before so", "e1e2 behind now"} <= set(words)
    turned = words_of("So <e2>B</e2> kills <e1>A</e1> now.")
    assert "e2e1 between kills" in turned
    assert "between kills" in turned
    assert not any(word.startswith(("between", "e1e2")) for word in words_of("So A kills B now."))
