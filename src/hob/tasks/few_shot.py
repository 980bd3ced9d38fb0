"""Few-shot curves: heads from 8, 32, 128, 512 examples, several draws each, all from states that are there already."""

from __future__ import annotations

import random

from hob.heads.head import Features
from hob.tasks import metrics, train
from hob.tasks.datasets import Example
from hob.tasks.features import States

COUNTS = (8, 32, 128, 512)


def draw(examples: list[Example], count: int, seed: int) -> list[int]:
    """Indices of `count` examples at random, but two of each label first: nobody learns a label from nothing.

    Where two of each are more than `count`, all of those.
    """
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    by_label: dict[str, list[int]] = {}
    for i in order:
        by_label.setdefault(examples[i].label, []).append(i)
    first = [i for label in sorted(by_label) for i in by_label[label][:2]]
    rest = [i for i in order if i not in set(first)]
    return sorted((first + rest)[: max(count, len(first))])


def few_shot(
    examples: list[Example],
    test: list[Example],
    states: States,
    test_states: States,
    gathered: Features,
    count: int,
    num_seeds: int = 5,
) -> list[float]:
    """Macro-F1 on `test` of a head for each draw. A data set with fewer examples gives one head from all of them."""
    scores = []
    for seed in range(num_seeds if count < len(examples) else 1):
        chosen = draw(examples, count, seed)
        head = train.train(
            "few",
            [examples[i].text for i in chosen],
            [examples[i].label for i in chosen],
            states[chosen],
            gathered,
            ("", ""),
        )
        values = train.blocks_of(test_states, gathered, head.features)
        answers = [answer.best for answer in head.answers(values, [e.text for e in test])]
        scores.append(metrics.macro_f1([e.label for e in test], answers))
    return scores
