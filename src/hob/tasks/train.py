"""A head from examples: choose what to read of the model by cross-validation, fit, calibrate, say how far to trust it.

    states, words --Gram matrix of each fold--> regressions of all candidates --macro-F1--> the best few --fit--> Head

The scores of the best few are averaged: they err in different places, and the choice among near equals is mostly luck.
A mean of linear models is a linear model, so the head is one matrix over all that any of them reads.

A linear model over F values of n texts lies in the span of those texts, so it is fitted in n dimensions (the Gram
matrix's eigenvectors) and carried back: exact, and n is a thousand where F is 28,000. Standardisation is of all
training texts, words and their weights of each fold's own. Class weights are balanced, because macro-F1 is the measure.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits

from hob.heads.head import Features, Head, Trust, distances, softmax, standardised
from hob.heads.parts import LEAD, MARKS, TEXT
from hob.heads.words import Idf, fit_idf, weights_of
from hob.tasks import metrics
from hob.tasks.datasets import check_labels

Doubles = NDArray[np.float64]
States = NDArray[np.float32]
_T = TypeVar("_T", bound=np.generic)

DEPTHS = (4 / 15, 6 / 15, 8 / 15, 10 / 15)
"""Layers to read, as shares of the model's depth. Above two thirds a state is more and more the next token."""
STRENGTHS = (3.0, 10.0, 30.0)
"""Inverse regularisation to choose from; texts have length 1 or 2."""
NUM_FOLDS = 4
MAX_EXAMPLES = 3000
"""Examples used at most; more are sampled by a fixed seed. The Gram matrix's eigenvectors cost their cube."""
NUM_AVERAGED = 5
"""Regressions, each a candidate at a strength, whose mean a head is."""
FAR_SHARE = 0.99
"""Share of the training texts that count as like the training texts, each seen from the others."""
MIN_RIGHT = 0.95
"""A head abstains where it would be right less often than this, as far as that can be had."""


@dataclass(frozen=True)
class Candidate:
    """Which of the gathered blocks a head reads."""

    name: str
    features: Features


def gathered_features(num_layers: int, is_marked: bool, max_tokens: int = 1024) -> Features:
    """Everything that any candidate reads: one pass per text has it all."""
    layers = sorted({max(round(depth * num_layers), min(num_layers, 1)) for depth in DEPTHS})
    pools = [("mean", TEXT), ("max", TEXT), ("last", TEXT)]
    if is_marked:
        pools += [(how, span) for span in MARKS for how in ("last", "mean")]
    return Features(layers, pools, max_tokens=max_tokens, lead=LEAD)


def candidates(gathered: Features, *, with_words: bool | None = None) -> list[Candidate]:
    """What to choose from: four sets of blocks, each with words and without. with_words: only those."""
    marked = [pool for pool in gathered.pools if pool[1] in MARKS]
    sets = {
        "all pools, all layers": (gathered.layers, gathered.pools),
        "marked things, all layers" if marked else "mean, all layers": (gathered.layers, marked or gathered.pools[:1]),
        "all pools, upper two layers": (gathered.layers[-2:], gathered.pools),
        "no maximum, upper two layers": (gathered.layers[-2:], [pool for pool in gathered.pools if pool[0] != "max"]),
    }
    return [
        Candidate(
            name + (" and words" if words else ""), replace(gathered, layers=layers, pools=pools, has_words=words)
        )
        for name, (layers, pools) in sets.items()
        for words in ((False, True) if with_words is None else (with_words,))
    ]


def blocks_of(states: NDArray[_T], gathered: Features, wanted: Features) -> NDArray[_T]:
    """(n, F of `gathered`) -> (n, F of `wanted`)."""
    pools = [gathered.pools.index(pool) for pool in wanted.pools]
    layers = [gathered.layers.index(layer) for layer in wanted.layers]
    blocks = states.reshape(len(states), len(gathered.pools), len(gathered.layers), -1)
    return blocks[:, pools][:, :, layers].reshape(len(states), -1)


def _union(gathered: Features, some: list[Features]) -> Features:
    """What is read by any of them."""
    return replace(
        gathered,
        layers=[layer for layer in gathered.layers if any(layer in one.layers for one in some)],
        pools=[pool for pool in gathered.pools if any(pool in one.pools for one in some)],
        has_words=any(one.has_words for one in some),
    )


@dataclass
class _Tried:
    """A candidate at one strength: scores of each text by models that had not seen it."""

    candidate: Candidate
    strength: float
    scores: Doubles


def train(
    task: str,
    texts: list[str],
    labels: list[str],
    states: States,
    gathered: Features,
    model: tuple[str, str],
    *,
    with_words: bool | None = None,
    progress: Callable[[str], None] | None = None,
) -> Head:
    """A head of version 0. states: (n, F of `gathered`); model: name and quantisation. Raises UserError.

    `trust` is from cross-validation; who has a held-out part replaces it.
    """
    with threadpool_limits(1):  # threads that wait for each other cost more than they give where cores are busy
        return _train(task, texts, labels, states, gathered, model, with_words, progress)


def _train(
    task: str,
    texts: list[str],
    labels: list[str],
    states: States,
    gathered: Features,
    model: tuple[str, str],
    with_words: bool | None,
    progress: Callable[[str], None] | None,
) -> Head:
    names = sorted(set(labels))
    check_labels(labels)
    code = np.array([names.index(label) for label in labels])
    tell = progress or (lambda _: None)
    tried = []
    for candidate in candidates(gathered, with_words=with_words):
        tell(f"trying {candidate.name}")
        tried += _try(candidate, texts, code, blocks_of(states, gathered, candidate.features))
    best = sorted(tried, key=lambda t: -_f1(code, t.scores))[:NUM_AVERAGED]
    features = _union(gathered, [t.candidate.features for t in best])
    values = blocks_of(states, gathered, features)
    mean, scale = _moments(values)
    idf = fit_idf(texts) if features.has_words else {}
    x, words = standardised(values, mean, scale), _word_matrix(texts, idf)
    weights, bias = np.zeros((len(names), x.shape[1] + len(idf)), np.float32), np.zeros(len(names), np.float32)
    for candidate in {t.candidate.name: t.candidate for t in best}.values():
        tell(f"fitting {candidate.name}")
        strengths = [t.strength for t in best if t.candidate is candidate]
        more = _fit(x, words, features, candidate.features, code, strengths)
        weights += more[0] / np.float32(len(best))
        bias += more[1] / np.float32(len(best))
    scores = np.mean([t.scores for t in best], axis=0)
    temperature = _temperature(code, scores)
    probabilities = softmax((scores / temperature).astype(np.float32))
    is_right = probabilities.argmax(axis=1) == code
    confidence = probabilities.max(axis=1)
    coverage = coverage_of(confidence.tolist(), is_right.tolist())
    answers = [names[i] for i in probabilities.argmax(axis=1)]
    return Head(
        task=task,
        version=0,
        model=model[0],
        quantisation=model[1],
        labels=names,
        features=features,
        trust=trust_of(len(texts), labels, answers, confidence.tolist(), coverage),
        created=int(time.time()),
        min_confidence=_abstain_below(coverage),
        temperature=temperature,
        far=_far(values),
        mean=mean,
        scale=scale,
        weights=weights,
        bias=bias,
        idf=idf,
    )


def trust_of(
    num_train: int,
    truth: list[str],
    answers: list[str],
    confidence: list[float],
    coverage: list[tuple[float, float, float]] | None = None,
) -> Trust:
    """Measures on texts that the model behind the answers had not seen."""
    is_right = [t == a for t, a in zip(truth, answers, strict=True)]
    return Trust(
        num_train=num_train,
        num_held_out=len(truth),
        macro_f1=metrics.macro_f1(truth, answers),
        accuracy=metrics.accuracy(truth, answers),
        majority_f1=metrics.macro_f1(truth, [metrics.majority(truth)] * len(truth)),
        calibration_error=metrics.calibration_error(confidence, is_right),
        coverage=coverage_of(confidence, is_right) if coverage is None else coverage,
    )


def coverage_of(confidence: list[float], is_right: list[bool]) -> list[tuple[float, float, float]]:
    """(confidence, share of texts at or above, share of those right) for ten confidences that occur."""
    order = np.argsort(-np.array(confidence), kind="stable")
    right = np.array(is_right)[order]
    rows = []
    for tenth in range(1, 11):
        count = max(1, round(len(right) * tenth / 10))
        rows.append((float(confidence[order[count - 1]]), count / len(right), float(right[:count].mean())))
    return rows


def sample(texts: list[str], labels: list[str], most: int = MAX_EXAMPLES, seed: int = 0) -> list[int]:
    """Indices of at most `most` examples, in their order."""
    if len(texts) <= most:
        return list(range(len(texts)))
    chosen = np.random.default_rng(seed).choice(len(texts), most, replace=False)
    return sorted(int(i) for i in chosen)


# ---- the pieces ----


def _moments(values: States) -> tuple[States, States]:
    return values.mean(axis=0), values.std(axis=0) + np.float32(1e-6)


def _word_matrix(texts: list[str], idf: Idf) -> sparse.csr_matrix:
    """(n, words)"""
    starts, columns, values = [0], list[int](), list[float]()
    for text in texts:
        some, weights = weights_of(text, idf) if idf else ([], [])
        columns += some
        values += weights
        starts.append(len(columns))
    return sparse.csr_matrix((values, columns, starts), shape=(len(texts), len(idf)))


def _try(candidate: Candidate, texts: list[str], code: NDArray[np.int_], values: States) -> list[_Tried]:
    """Scores of each text from folds without it, at each strength."""
    num_labels = int(code.max()) + 1
    x = standardised(values, *_moments(values))
    gram = (x @ x.T).astype(np.float64)
    tried = [_Tried(candidate, strength, np.zeros((len(code), num_labels))) for strength in STRENGTHS]
    for inside, outside in _folds(code):
        rows = gram[:, inside]
        if candidate.features.has_words:
            words = _word_matrix(texts, fit_idf([texts[i] for i in inside]))
            rows = rows + (words @ words[inside].T).toarray()
        basis = _basis(rows[inside])
        g = rows @ basis
        for t in tried:
            weights, bias = _regress(g[inside], code[inside], num_labels, t.strength)
            t.scores[outside] = g[outside] @ weights.T + bias
    return tried


def _folds(code: NDArray[np.int_]) -> list[tuple[NDArray[np.int_], NDArray[np.int_]]]:
    num_folds = max(2, min(NUM_FOLDS, int(np.bincount(code).max())))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a label may have fewer examples than there are folds
        return list(StratifiedKFold(num_folds, shuffle=True, random_state=0).split(code, code))


def _basis(gram: Doubles) -> Doubles:
    """B with gram @ B = the texts in n dimensions."""
    eigenvalues, vectors = np.linalg.eigh(gram)
    is_kept = eigenvalues > 1e-6 * eigenvalues[-1]
    basis: Doubles = vectors[:, is_kept] / np.sqrt(eigenvalues[is_kept])
    return basis


def _regress(g: Doubles, code: NDArray[np.int_], num_labels: int, strength: float) -> tuple[Doubles, Doubles]:
    """Weights (num_labels, dimensions) and bias of a balanced logistic regression; labels it has not seen get -10."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = LogisticRegression(C=strength, class_weight="balanced", max_iter=300, tol=1e-3).fit(g, code)
    weights, bias = np.zeros((num_labels, g.shape[1])), np.full(num_labels, -10.0)
    if len(fitted.classes_) == 2:  # one row of weights stands for both
        weights[fitted.classes_[1]], bias[fitted.classes_] = fitted.coef_[0], (0.0, fitted.intercept_[0])
    else:
        weights[fitted.classes_], bias[fitted.classes_] = fitted.coef_, fitted.intercept_
    return weights, bias


def _fit(
    x: States, words: sparse.csr_matrix, given: Features, read: Features, code: NDArray[np.int_], strengths: list[float]
) -> tuple[States, States]:
    """The sum of regressions that read some of what is given: weights (labels, F + words of `given`) and bias."""
    columns = blocks_of(np.arange(x.shape[1])[None], given, read)[0]
    scale = np.float32((x.shape[1] / len(columns)) ** 0.5)  # to about length 1, as when it was tried
    own = x[:, columns] * scale
    gram = (own @ own.T).astype(np.float64)
    if read.has_words:
        gram += (words @ words.T).toarray()
    basis = _basis(gram)
    fitted = [_regress(gram @ basis, code, int(code.max()) + 1, strength) for strength in strengths]
    in_basis, bias = (np.sum(parts, axis=0) for parts in zip(*fitted, strict=True))
    dual = (in_basis @ basis.T).astype(np.float32)  # (labels, n): each label as a mixture of texts
    whole = np.zeros((len(dual), x.shape[1] + words.shape[1]), np.float32)
    whole[:, columns] = dual @ own * scale
    if read.has_words:
        whole[:, x.shape[1] :] = words.T.dot(dual.T).T
    return whole, bias.astype(np.float32)


def _temperature(code: NDArray[np.int_], scores: Doubles) -> float:
    """The divisor of scores that makes the texts' own labels most likely.

    One text more than there are is taken to be wrong, as Platt does: where all are right, a head is not certain of all.
    """
    wrong = 1.0 / (len(code) + 2)
    target = np.full(scores.shape, wrong / (scores.shape[1] - 1))
    target[np.arange(len(code)), code] = 1.0 - wrong

    def loss(temperature: float) -> float:
        z = scores / temperature
        top = z.max(axis=1, keepdims=True)
        log_p = z - top - np.log(np.exp(z - top).sum(axis=1, keepdims=True))
        return -float((target * log_p).sum())

    return float(min(np.geomspace(0.1, 10.0, 81), key=loss))


def _f1(code: NDArray[np.int_], scores: Doubles) -> float:
    return metrics.macro_f1([str(c) for c in code], [str(c) for c in scores.argmax(axis=1)])


def _far(values: States) -> float:
    """The distance that FAR_SHARE of the texts keep, each measured by the moments of folds without it."""
    folds = np.arange(len(values)) % NUM_FOLDS
    found = []
    for fold in range(min(NUM_FOLDS, len(values))):
        inside, outside = values[folds != fold], values[folds == fold]
        found += distances(standardised(outside, *_moments(inside))).tolist()
    return float(np.quantile(found, FAR_SHARE))


def _abstain_below(coverage: list[tuple[float, float, float]]) -> float:
    """The lowest confidence at which enough answers are right; the top tenth's where none is."""
    enough = [confidence for confidence, _, right in coverage if right >= MIN_RIGHT]
    return min(enough) if enough else coverage[0][0]
