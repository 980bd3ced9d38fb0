"""A part of what `python -m tests.clients.lm_eval_rows` does in full."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.heavy import heavy

pytestmark = [pytest.mark.weights, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_accuracy_is_that_of_scoring_in_process(default_gguf: Path, shared_data: Path) -> None:
    heavy("lm_eval")
    from tests.clients.lm_eval_rows import compare

    for name, (theirs, ours, num_other) in compare(default_gguf, shared_data, 20).items():
        assert (theirs, num_other) == (ours, 0), name
